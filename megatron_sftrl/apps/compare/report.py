"""The report of a comparison: a page, its pictures as files, and plain words on what is significant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from megatron_sftrl.apps.compare.config import BAR, CompareConfig, Tree
from megatron_sftrl.apps.compare.results import (
    CURVES,
    GREEDY,
    NLL,
    SCORE,
    SIDES,
    UNJUDGED,
    Difference,
    Results,
)
from megatron_sftrl.apps.compare.statistics import Mean
from megatron_sftrl.apps.report.page import Curve, Series, Table, print_table, write_png, write_report
from megatron_sftrl.config.load import dump_yaml
from megatron_sftrl.observability.run_directory import flat, write_atomically


def tell(config: CompareConfig, results: Results) -> None:
    """report.html, report.json and plots/ in out_dir, and the tables on standard output.

    Raises:
        UserError: they cannot be written, or matplotlib is not installed.
    """
    tables = [*_tables(results), _changes(config)]
    pictures, text = list(_curves(config, results)), list(words(results))
    write_report(
        config.out_dir / "report.html",
        title=f"Which SFT leaves the best policy after RL: {', '.join(results.arms)}",
        text=text,
        tables=tables,
        curves=pictures,
    )
    for curve in pictures:
        name = curve.title.lower().replace(" ", "_").replace("@", "_at_").replace(",", "")
        write_png(config.out_dir / "plots" / f"{name}.png", curve)
    write_atomically(config.out_dir / "report.json", results.to_json())
    for table in tables:
        print_table(table)
    print("\n" + "\n".join(text))


def words(results: Results) -> Iterator[str]:
    """What can be said, and what cannot, a sentence or two at a time."""
    count = len(results.seeds)
    if not any(arm.seeds for arm in results.arms.values()):
        yield "No run has both of its evaluations yet: nothing can be compared."
    elif count == 1:
        yield (
            "One seed: every interval is over prompts alone. It says what other prompts would give, nothing "
            "about another seed, and no difference here is claimed; add seeds."
        )
    for side, title in reversed(SIDES.items()):
        found = [each for each in results.differences if each.side == side]
        if found and count > 1:
            yield from (_verdict(each, title) for each in found)
            if halves := [h for each in found if (h := _half(each.mean)) is not None]:
                fewest = min(each.mean.num_seeds for each in found)
                yield (
                    f"With {fewest} seeds and {found[0].mean.num_prompts} prompts a difference {title} under "
                    f"{_points(statistics.median(halves))} cannot be told from noise (before the correction "
                    f"for {len(results.differences)} comparisons)."
                )
    for name, arm in results.arms.items():
        if arm.seeds and len(arm.seeds) < count:
            flattered = " If the others failed because training went wrong, they flatter it."
            yield (
                f"{name}: its means are over the seeds {', '.join(map(str, arm.seeds))} alone."
                f"{flattered if arm.failures else ''}"
            )
        for side, title in SIDES.items():
            unjudged = arm.numbers.get(side, {}).get(UNJUDGED)
            if unjudged is not None and unjudged.value:
                yield (
                    f"{name} {title}: {_points(unjudged.value)} of the responses could not be judged and are "
                    "left out, which may flatter it."
                )
        for stage, error in arm.failures.items():
            yield f"{stage} failed: {error}"
        if arm.missing:
            yield f"{name}: {len(arm.missing)} stages are not done, the first of them {arm.missing[0]}."


def _verdict(found: Difference, title: str) -> str:
    mean, p = found.mean, found.p_holm
    if mean.num_seeds == 1:
        return f"{found.arm} {title}: one seed in common with {BAR}, nothing is claimed."
    interval = "the same for all" if mean.low is None else f"95 %, {_range(mean)}"
    told = f"{_points(mean.value, signed=True)} against {BAR} ({interval}; p = {_p(p)} after Holm)"
    if not found.is_significant:
        return f"{found.arm} {title}: {told}: cannot be told from {BAR}."
    return f"{found.arm} {title}: {told}: {'better' if mean.value > 0 else 'worse'}, significantly."


def _half(mean: Mean) -> float | None:
    return None if mean.low is None or mean.high is None else (mean.high - mean.low) / 2


def _points(share: float, *, signed: bool = False) -> str:
    return f"{100 * share:{'+' if signed else ''}.1f} points"


def _range(mean: Mean) -> str:
    assert mean.low is not None
    assert mean.high is not None
    return f"{100 * mean.low:+.1f} to {100 * mean.high:+.1f}"


def _p(p: float | None) -> str:
    return "unknown" if p is None else f"{p:.2g}"


def _share(mean: Mean | None) -> str:
    if mean is None:
        return ""
    if mean.low is None or mean.high is None:
        return f"{100 * mean.value:.1f}"
    # A half-width with Student's t of two seeds goes beyond what a share can be.
    interval = f" [{100 * max(mean.low, 0.0):.1f}, {100 * min(mean.high, 1.0):.1f}]"
    return f"{100 * mean.value:.1f}{interval}"


# What stands on the page.


def _tables(results: Results) -> Iterator[Table]:
    columns = [(side, name) for name in (SCORE, GREEDY) for side in SIDES]
    rows = []
    for arm, result in results.arms.items():
        cells = (_share(result.numbers.get(side, {}).get(name)) for side, name in columns)
        rows.append((arm, f"{len(result.seeds)} of {len(results.seeds)}", *cells))
    yield Table(
        title="Accuracy, percent",
        columns=("arm", "seeds", *(f"{_called(name)} {SIDES[side]}" for side, name in columns)),
        rows=tuple(rows),
        note="Drawn responses decide. Intervals of 95 % over seeds and prompts, the same ones for all arms; "
        "those of one seed are over prompts alone.",
    )
    yield Table(
        title=f"Differences from {BAR}, in points of {_called(SCORE)} accuracy",
        columns=("arm", "", "difference", "95 %", "p", "p after Holm", "seeds", "prompts"),
        rows=tuple(
            (
                each.arm,
                SIDES[each.side],
                f"{100 * each.mean.value:+.1f}",
                "" if each.mean.low is None else _range(each.mean),
                _p(each.p),
                _p(each.p_holm) + (" *" if each.is_significant else ""),
                str(each.mean.num_seeds),
                str(each.mean.num_prompts),
            )
            for each in results.differences
        ),
        note="Paired by seed and prompt. * below 0.05 after the correction for all lines of this table, with "
        "more than one seed.",
    )
    num_arms = sum(bool(arm.seeds) for arm in results.arms.values())
    yield Table(
        title=f"Rank correlation of numbers after SFT with {_called(SCORE)} accuracy after RL",
        columns=("number after SFT", "Spearman", "95 %"),
        rows=tuple(
            (
                _called(name),
                "" if each is None else f"{each.value:+.2f}",
                "" if each is None or each.low is None else f"{each.low:+.2f} to {each.high:+.2f}",
            )
            for name, each in results.correlations.items()
        ),
        note=f"Over {num_arms} arms. {_of_luck(num_arms, len(results.correlations))}Empty: fewer than three "
        "arms, or a number that is the same for all.",
    )


def _changes(config: CompareConfig) -> Table:
    """What each arm is."""
    arms = {BAR: {}, **config.arms}
    return Table(
        title="What an arm changes in base.sft",
        columns=("arm", "keys"),
        rows=tuple((name, _keys(arm)) for name, arm in arms.items()),
        note=f"{BAR} has the loss sft and batch.aggregation token_mean in any case.",
    )


def _keys(arm: Tree) -> str:
    return ", ".join(f"{key}={value}" for key, value in flat(dump_yaml(arm)).items())


def _of_luck(num_arms: int, num_tried: int) -> str:
    """How little a rank correlation over so few arms says."""
    if num_arms < 3:
        return ""
    return (
        "An interval with 0 in it says that the order of the arms after RL may have nothing to do with the "
        f"number. One without is of these arms and not of others: a number without meaning puts {num_arms} "
        f"arms into their order, or its reverse, in 1 of {math.factorial(num_arms) // 2:,} cases, and "
        f"{num_tried} numbers are tried. "
    )


def _called(name: str) -> str:
    return {SCORE: "sampled", GREEDY: "greedy", NLL: "NLL of demonstrations"}.get(name, name)


def _curves(config: CompareConfig, results: Results) -> Iterator[Curve]:
    """pass@k before (dashed) and after RL, then the curves of GRPO; an arm keeps its color."""
    ks = config.base.eval.all_ks
    lines = []
    for color, (arm, result) in enumerate(results.arms.items()):
        for side in reversed(SIDES):
            found = result.numbers.get(side, {})
            if points := [(float(k), found[f"pass@{k}"].value) for k in ks if f"pass@{k}" in found]:
                x, y = zip(*points, strict=True)
                is_dashed = side == "sft"
                label = f"{arm} {SIDES[side]}"
                lines.append(Series(label=label, x=x, y=y, color=color, is_dashed=is_dashed))
    if lines:
        yield Curve(title="pass@k", x_label="k", y_label="", series=tuple(lines), note="Dashed: after SFT.")
    for name in CURVES:
        lines = []
        for color, (arm, result) in enumerate(results.arms.items()):
            if points := result.curves[name]:
                x, y = zip(*((float(step), value) for step, value in points), strict=True)
                lines.append(Series(label=arm, x=x, y=y, color=color))
        if lines:
            title = f"{name.partition('/')[0].capitalize()} in GRPO"
            note = "Mean over seeds."
            yield Curve(title=title, x_label="step", y_label="", series=tuple(lines), note=note)
