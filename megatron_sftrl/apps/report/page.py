"""A report as one HTML file: paragraphs, tables and curves, with nothing to fetch from anywhere."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.run_directory import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#475569")

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { margin: 0; background: #f6f7f9; color: #1f2937; font: 16px/1.55 system-ui, sans-serif; }
  main { max-width: 1100px; margin: 0 auto; padding: 32px 20px 64px; }
  h1 { font-size: 26px; line-height: 1.25; margin: 0 0 12px; overflow-wrap: anywhere; }
  h2 { font-size: 17px; margin: 0 0 6px; overflow-wrap: anywhere; }
  section { background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; padding: 18px 20px; }
  section { margin: 18px 0; }
  .note { color: #6b7280; font-size: 14px; }
"""
"""How a page begins, up to the styles of its own."""

_PAGE = (
    HEAD
    + """\
  p { margin: 0 0 12px; max-width: 72ch; white-space: pre-line; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { padding: 7px 12px; border-bottom: 1px solid #e5e7eb; text-align: right; white-space: nowrap; }
  th { color: #6b7280; font-weight: 600; font-size: 14px; }
  th:first-child, td:first-child { text-align: left; }
  tr:last-child td { border-bottom: 0; }
  .curves { display: grid; gap: 20px; }
  .curves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
  .curves section { margin: 0; }
  img { display: block; width: 100%; height: auto; margin-top: 8px; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% for paragraph in text %}<p>{{ paragraph }}</p>
{% endfor %}
{% for table in tables %}<section>
<h2>{{ table.title }}</h2>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
<div class="scroll"><table>
<thead><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
</section>
{% endfor %}
<div class="curves">
{% for curve, image in curves %}<section>
<h2>{{ curve.title }}</h2>
{% if curve.note %}<p class="note">{{ curve.note }}</p>{% endif %}
<img alt="{{ curve.title }}" src="data:image/svg+xml;base64,{{ image }}">
</section>
{% endfor %}</div>
</main>
</body>
</html>
"""
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of ready-made text; the first column is left-aligned, the others right.

    Raises:
        UserError: a row that does not have one cell per column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise UserError(
                    f"table '{self.title}': expected {len(self.columns)} cells in each row, got {row}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a curve; x and y have the same length.

    Args:
        color: number of its color; its place in the curve when not given.
    Raises:
        UserError: lengths that differ, or no point.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: int | None = None
    is_dashed: bool = False

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or not self.x:
            raise UserError(
                f"series '{self.label}': expected as many x as y and at least one, "
                f"got {len(self.x)} and {len(self.y)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One picture with one or more lines."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    note: str = ""


def write_report(
    path: Path,
    *,
    title: str,
    text: Sequence[str] = (),
    tables: Sequence[Table] = (),
    curves: Sequence[Curve] = (),
) -> None:
    """Write a self-contained HTML report; pictures are inside the file, and no script runs.

    Args:
        path: the .html file; its folder is created.
        title: heading.
        text: paragraphs; line breaks inside them are kept.
        tables: in this order, above the curves.
        curves: in this order.
    Raises:
        UserError: curves without matplotlib, or a page that cannot be written there.
    """
    import jinja2

    if curves:
        check_matplotlib()
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    pictures = [(curve, base64.b64encode(_draw(curve)).decode("ascii")) for curve in curves]
    page = template.render(title=title, text=text, tables=tables, curves=pictures)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise error_of(f"the page cannot be written to {path}: {error}", error) from error


def check_matplotlib() -> None:
    """Raise UserError where curves could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "curves need the package matplotlib, which is not installed: pip install matplotlib, or this "
            "package with its extra report"
        )


def print_table(table: Table) -> None:
    """The table for a terminal, long texts cut."""
    lines = [[_short(cell) for cell in line] for line in (table.columns, *table.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    print(f"\n{table.title}")
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *cells]))


def _short(text: str, limit: int = 48) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def write_png(path: Path, curve: Curve) -> None:
    """The picture as a PNG file, for slides and papers; its folder is created.

    Raises:
        UserError: it cannot be written there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure(curve)
    FigureCanvasAgg(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
    except OSError as error:
        raise error_of(f"the picture cannot be written to {path}: {error}", error) from error


def _draw(curve: Curve) -> bytes:
    """The picture as SVG; letters become outlines, so that no font is needed."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    drawn = io.BytesIO()
    FigureCanvasSVG(_figure(curve)).print_svg(drawn, metadata={"Date": None})
    return drawn.getvalue()


def _figure(curve: Curve) -> Figure:
    # The Figure class draws without pyplot, which would keep global state and look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for index, series in enumerate(curve.series):
        marker = "o" if len(series.x) <= 12 else None
        axes.plot(
            series.x,
            series.y,
            label=series.label,
            color=_COLORS[(index if series.color is None else series.color) % len(_COLORS)],
            linestyle="--" if series.is_dashed else "-",
            linewidth=1.6,
            marker=marker,
            markersize=4,
        )
    axes.set_xlabel(curve.x_label, color="#6b7280")
    axes.set_ylabel(curve.y_label, color="#6b7280")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.tick_params(colors="#6b7280", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    if len(curve.series) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure
