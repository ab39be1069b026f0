"""Rows and counts on a terminal, and as one HTML page that fetches nothing and runs no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megatron_sftrl.apps.report.page import HEAD
from megatron_sftrl.apps.show_data.examine import Piece, ShownRow
from megatron_sftrl.apps.show_data.words import Section, headline, id_pieces, in_brackets, printable, short
from megatron_sftrl.errors import error_of
from megatron_sftrl.observability.run_directory import write_atomically

_LONGEST_PIECE = 2000
"""Characters of a piece of text on a terminal, where only the first rows are looked at."""
_LEARNED = "bold white on dark_green"
_SPECIAL = "bold cyan"


class PipedConsole(Console):
    """A console whose closed pipe (`sftrl show-data ... | head`) is the command line's to handle."""

    def on_broken_pipe(self) -> None:
        raise


class Terminal:
    """Prints rows in colour, or with brackets around what is learned where there is no colour."""

    def __init__(self, console: Console, *, with_ids: bool) -> None:
        self._console, self._with_ids = console, with_ids
        self._has_color = console.color_system is not None and not console.no_color

    def show_section(self, section: Section) -> None:
        self._line("")
        self._line(section.title, style="bold")
        for line in section.lines:
            self._line(line)

    def show_row(self, row: ShownRow, *, is_whole: bool = False) -> None:
        """A line about the row and its text, in the middle of long pieces cut down unless `is_whole`."""
        self._line("")
        self._line(headline(row), style="bold")
        if row.error:
            self._line(row.error, style="red")
        limit = None if is_whole else _LONGEST_PIECE
        if row.pieces:
            self._show_pieces([replace(each, text=short(each.text, limit)) for each in row.pieces])
        if row.removed:
            self._line(f"cut out: {short(row.removed, limit)}", style="dim")
        if row.answer is not None:
            self._line(f"answer: {short(row.answer, limit)}")
        if self._with_ids and row.ids:
            self._show_pieces(id_pieces(row))

    def _show_pieces(self, pieces: Sequence[Piece]) -> None:
        if not self._has_color:
            self._line(in_brackets(pieces))
            return
        line = Text()
        for piece in pieces:
            style = _LEARNED if piece.is_learned else _SPECIAL if piece.is_special else ""
            line.append(_shown(piece), style=style)
        self._console.print(line, soft_wrap=True)

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.out(printable(text), style=style, highlight=False)


# The page.


_PAGE = (
    HEAD
    + """\
  pre { margin: 0; font: 14px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
  mark { background: #bbf7d0; color: inherit; }
  b { color: #0369a1; }
  .error { color: #b91c1c; margin-bottom: 8px; }
  .note, details { margin-top: 8px; }
  details { color: #6b7280; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p><mark>Learned</mark> tokens, <b>special tokens</b>.</p>
{% macro text(pieces) %}<pre>
{% for piece in pieces -%}
{%- if piece.is_learned %}<mark>{% endif %}{% if piece.is_special %}<b>{% endif -%}
{{ shown(piece) }}
{%- if piece.is_special %}</b>{% endif %}{% if piece.is_learned %}</mark>{% endif -%}
{% endfor %}</pre>{% endmacro %}
{% for row in rows %}<section>
<h2>{{ headline(row) }}</h2>
{% if row.error %}<pre class="error">{{ printable(row.error) }}</pre>{% endif %}
{% if row.pieces %}{{ text(row.pieces) }}{% endif %}
{% if row.removed %}<pre class="note">cut out: {{ printable(row.removed) }}</pre>{% endif %}
{% if row.answer is not none %}<pre class="note">answer: {{ printable(row.answer) }}</pre>{% endif %}
{% if row.ids %}<details><summary>token ids</summary>{{ text(id_pieces(row)) }}</details>{% endif %}
</section>
{% endfor %}
{% for section in sections %}<section>
<h2>{{ section.title }}</h2>
<pre>{% for line in section.lines %}{{ printable(line) }}
{% endfor %}</pre>
</section>
{% endfor %}
</main>
</body>
</html>
"""
)


def write_page(path: Path, *, title: str, rows: Sequence[ShownRow], sections: Sequence[Section]) -> None:
    """Write the page, all of it or nothing.

    Raises:
        UserError: it cannot be written there.
    """
    import jinja2

    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    text = page.render(
        title=title,
        rows=rows,
        sections=sections,
        headline=headline,
        id_pieces=id_pieces,
        printable=printable,
        shown=_shown,
    )
    try:
        write_atomically(path, text)
    except OSError as error:
        raise error_of(f"--html: {path} cannot be written: {error}", error) from error


def _shown(piece: Piece) -> str:
    """Its text with signs for learned ends of lines, which have no width that could be coloured."""
    text = printable(piece.text)
    return text.replace("\n", "↵\n") if piece.is_learned else text
