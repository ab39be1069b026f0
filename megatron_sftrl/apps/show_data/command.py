"""`sftrl show-data`: what is learned, what is cut and what is refused, on a terminal or as one HTML page."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sftrl.apps.show_data.counts import Problems, count_rows, find_repeats
from megatron_sftrl.apps.show_data.examine import DataReader, ShownRow
from megatron_sftrl.apps.show_data.output import PipedConsole, Terminal, write_page
from megatron_sftrl.apps.show_data.words import Section, summary
from megatron_sftrl.config.load import load_any_config
from megatron_sftrl.config.schema import GrpoConfig, RunConfig
from megatron_sftrl.data.sources import find_files
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.losses.registry import build_loss

LOGGER = logging.getLogger(__name__)

_REFUSED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowRequest:
    """What is to be shown.

    Args:
        num_rows: of each file.
        row: one row alone, `FILE:NUMBER`.
        with_ids: the token ids, too.
        html: a page to write.
        is_valid: rows of data.valid, in place of data.train's.
    """

    num_rows: int = 3
    row: str | None = None
    with_ids: bool = False
    html: Path | None = None
    is_valid: bool = False


def run_show_data(config_path: str, overrides: Sequence[str], request: ShowRequest) -> int:
    """Show the data of a run; the exit code is 2 where training would refuse a row, else 0.

    Raises:
        UserError: a configuration, a tokenizer or a page that cannot be read or written, no such row.
    """
    config = load_any_config(config_path, overrides)
    assert isinstance(config, RunConfig | GrpoConfig)
    if request.is_valid and not config.data.valid:
        raise UserError("--valid: data.valid is empty; name files there, or leave --valid out")
    if request.html is not None:
        _check_page(request.html)
    tokenizer = load_tokenizer(config.tokenizer)
    for note in tokenizer.notes:
        LOGGER.info("note: %s", note)
    reader = DataReader(config, tokenizer)
    terminal = Terminal(PipedConsole(), with_ids=request.with_ids)
    if request.row is not None:
        path, key, number = _find_row(request.row, config)
        found = reader.read_one(path, key, number)
        rows, sections, is_refused = found.shown(tokenizer), [], found.error is not None
        for row in rows:
            terminal.show_row(row, is_whole=True)
    else:
        rows = []

        def show(row: ShownRow) -> None:
            terminal.show_row(row)
            rows.append(row)

        sections, is_refused = _all_rows(config, tokenizer, reader, request, show)
        for section in sections:
            terminal.show_section(section)
    if request.html is not None:
        write_page(request.html, title=f"Data of {config_path}", rows=rows, sections=sections)
        LOGGER.info("written: %s", request.html)
    return _REFUSED if is_refused else 0


def _all_rows(
    config: RunConfig | GrpoConfig,
    tokenizer: Tokenizer,
    reader: DataReader,
    request: ShowRequest,
    show: Callable[[ShownRow], None],
) -> tuple[list[Section], bool]:
    """Show the first rows; what there is to say about all, and whether one is refused."""
    limit = config.data.max_length if isinstance(config, RunConfig) else config.data.max_prompt_length
    needs_scores = False
    if isinstance(config, RunConfig):
        loss = build_loss(config.loss.name, config.loss.options, modules=config.loss.modules)
        needs_scores = "behavior_logprobs" in loss.needs
    problems = Problems()
    sets = [
        count_rows(
            reader,
            tokenizer,
            paths,
            key,
            max_length=limit,
            problems=problems,
            show=show,
            num_shown=request.num_rows if (key == "data.valid") == request.is_valid else 0,
        )
        for key, paths in (("data.train", config.data.train_paths), ("data.valid", config.data.valid))
        if paths
    ]
    for each in sets:
        if needs_scores and each.num_sequences and not any(source.num_scored for source in each.sources):
            told = f"loss {config.loss.name!r} needs behavior_logprobs, but {each.key} has none"
            problems.add(UserError(f"{told}: score it with `sftrl score`"), count=each.num_sequences)
    repeats = find_repeats(sets[0], sets[1] if len(sets) > 1 else None)
    return summary(config, sets, repeats, problems), len(problems) > 0


def _find_row(text: str, config: RunConfig | GrpoConfig) -> tuple[Path, str, int]:
    """File, key and number of `FILE:NUMBER`, or `FILE row NUMBER` as messages have it."""
    found = re.fullmatch(r"(.+?)(?::| row )(\d+)", text)
    if found is None:
        raise UserError(f"--row: expected FILE:NUMBER, such as train.jsonl:17, got {text!r}")
    sources = [
        (file.path, key)
        for key, paths in (("data.train", config.data.train_paths), ("data.valid", config.data.valid))
        for path in paths
        for file in find_files(path, key)
    ]
    for is_it in (
        lambda path: str(path) == found[1],
        lambda path: path.resolve() == Path(found[1]).resolve(),
        lambda path: path.name == found[1],
    ):
        fitting = {path: key for path, key in reversed(sources) if is_it(path)}
        if len(fitting) == 1:
            ((path, key),) = fitting.items()
            return path, key, int(found[2])
    raise UserError(
        f"--row: expected one of the run's files, {', '.join(str(path) for path, _ in sources)}, "
        f"got {found[1]!r}"
    )


def _check_page(path: Path) -> None:
    """Refuse a page that could not be written before everything is read."""
    if path.is_dir():
        raise UserError(f"--html: expected a file, got the directory {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise error_of(f"--html: {path.parent} cannot be made: {error}", error) from error
