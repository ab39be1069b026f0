"""Numbers of every stage, their signed changes with paired intervals, and the page that shows them.

It measures and claims nothing. That RL raises the loss of SFT, and SFT lowers the reward (arXiv:2601.07389),
is proven for stages that are at their optimum; elsewhere either change may have the other sign.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sftrl.apps.coupling.measure import Gradients, drawn_responses
from megatron_sftrl.apps.coupling.rotation import Turns, TurnSummary, kind_of, layer_of, pair_key, summarize
from megatron_sftrl.apps.coupling.stages import Stage
from megatron_sftrl.apps.evaluate.run import answers_of, demonstrations_of
from megatron_sftrl.apps.evaluate.statistics import Estimate, estimate, per_prompt
from megatron_sftrl.apps.report.page import Curve, Series, Table, print_table, write_report
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.prompts import PromptSet
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.trainers.experience import Response, grouped

NLL = "nll/token"
KL = "kl/token"
REWARD, LENIENT = "reward", "reward, lenient"
_FIRST = (NLL, REWARD, LENIENT, "accuracy", "greedy accuracy", "lenient")
_LAST = ("entropy", "tokens", "finished")
_ON_CURVES = (NLL, REWARD, "accuracy", "entropy")
_TOLD = (NLL, REWARD, LENIENT, "accuracy", "entropy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A number of a stage: a mean for each prompt or demonstration (None where it has none), and weights."""

    means: Sequence[float | None]
    weights: Sequence[int]

    @classmethod
    def of(cls, means: Sequence[float | None]) -> Values:
        """Each counts once."""
        return cls(means=means, weights=[1] * len(means))

    @classmethod
    def of_tokens(cls, values: Sequence[Sequence[float]]) -> Values:
        """Values of tokens, sequence by sequence: each token counts once."""
        return cls(means=[math.fsum(each) / len(each) for each in values], weights=list(map(len, values)))

    def estimate(self, *, seed: int, less: Values | None = None) -> Estimate | None:
        """The mean, or its change from another stage's, paired; None where no prompt has a value."""
        before = [0.0] * len(self.means) if less is None else less.means
        found = [
            (after - first, weight)
            for after, first, weight in zip(self.means, before, self.weights, strict=True)
            if after is not None and first is not None
        ]
        if not found:
            return None
        means, weights = zip(*found, strict=True)
        return estimate(means, seed=seed, weights=weights)


Numbers = dict[str, Values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """Everything that was measured.

    Args:
        stages: their checkpoints by name, in the order of training.
        changes: by pair, then by number: after less before; kl/token is KL(before || after) itself.
    """

    stages: Mapping[str, str]
    numbers: Mapping[str, Numbers]
    changes: Mapping[str, Mapping[str, Estimate]]
    gradients: Mapping[str, Gradients]
    turns: Turns
    seed: int

    @property
    def names(self) -> list[str]:
        """The numbers that all stages have."""
        first, *others = self.numbers.values()
        return [name for name in first if all(name in each for each in others)]

    def to_json(self) -> str:
        """The whole of it; the single angles of every matrix are in rotation.jsonl."""
        told = {
            "stages": self.stages,
            "numbers": {
                stage: {
                    name: asdict(found)
                    for name, values in numbers.items()
                    if (found := values.estimate(seed=self.seed)) is not None
                }
                for stage, numbers in self.numbers.items()
            },
            "changes": {
                pair: {name: asdict(found) for name, found in changes.items()}
                for pair, changes in self.changes.items()
            },
            "gradients": {stage: asdict(found) for stage, found in self.gradients.items()},
            "rotation": {
                pair: {name: _as_dict(summarize(self.turns, pair, by)) for name, by in _GROUPS.items()}
                for pair in self.changes
                if self.turns
            },
        }
        return json.dumps(told, indent=1) + "\n"


_GROUPS = {"kind": kind_of, "layer": layer_of}


def _as_dict(groups: Mapping[str, TurnSummary]) -> dict[str, Any]:
    return {name: asdict(found) for name, found in groups.items()}


def numbers_of(folder: Path, config: GrpoConfig, prompts: PromptSet, *, ks: Sequence[int]) -> Numbers:
    """The numbers of a stage that was evaluated in this folder, in the order in which they are told."""
    drawn = per_prompt(answers_of(folder, "sampled"), ks=ks)
    greedy = per_prompt(answers_of(folder, "greedy"), ks=[])
    groups = grouped(drawn_responses(folder, config, prompts))
    found = {
        NLL: Values.of_tokens([[-value for value in each[0]] for each in demonstrations_of(folder)]),
        REWARD: Values.of([_mean(groups[place], "reward") for place in sorted(groups)]),
        LENIENT: Values.of([_mean(groups[place], "lenient") for place in sorted(groups)]),
        "greedy accuracy": Values.of(greedy["accuracy"]),
        **{name: Values.of(means) for name, means in drawn.items()},
    }
    # pass@1 is the accuracy.
    more = [name for name in drawn if name.startswith(("pass@", "majority@")) and name != "pass@1"]
    names = [*_FIRST, *more, *_LAST]
    return {name: found[name] for name in names}


def _mean(group: Sequence[Response], reading: str) -> float | None:
    """Of the weighted sum of the run's rewards, by one reading of them."""
    known = [value for each in group if (value := getattr(each.scored, reading)) is not None]
    return math.fsum(known) / len(known) if known else None


def changes_of(
    numbers: Mapping[str, Numbers],
    pairs: Sequence[tuple[Stage, Stage]],
    divergences: Mapping[str, Sequence[Sequence[float]]],
    *,
    seed: int,
) -> dict[str, dict[str, Estimate]]:
    """After less before of every number that both have, and KL(before || after), by pair."""
    changes: dict[str, dict[str, Estimate]] = {}
    for before, after in pairs:
        first, then, pair = numbers[before.name], numbers[after.name], pair_key(before, after)
        found = {
            name: values.estimate(seed=seed, less=first[name])
            for name, values in then.items()
            if name in first
        }
        found[KL] = Values.of_tokens(divergences[pair]).estimate(seed=seed)
        changes[pair] = {name: each for name, each in found.items() if each is not None}
    return changes


# What a person reads: a line for each stage or pair, however many there are; on the page a table for each.


def tell(out: Path, found: Coupling) -> None:
    """coupling.json and report.html, and the tables on standard output."""
    tables = [_stages(found), _changes(found), *([_turns(found)] if found.turns else [])]
    write_atomically(out / "coupling.json", found.to_json())
    write_report(
        out / "report.html",
        title=f"Coupling of the stages {', '.join(found.stages)}",
        text=[
            "Changes are after less before, paired by prompt or demonstration; intervals are 95 % over these "
            "and say nothing of another training of the same stages. A loss that rose is no proof that RL "
            "and SFT exclude each other, and one that fell none that they do not."
        ],
        tables=[*tables, *(table for pair in found.changes for table in _details(found, pair))],
        curves=list(_curves(found)),
    )
    for table in tables:
        print_table(table)
    print(f"\nwritten: {out / 'report.html'}, {out / 'coupling.json'}")


def _stages(found: Coupling) -> Table:
    rows = []
    for stage, numbers in found.numbers.items():
        values = (_value(numbers[name].estimate(seed=found.seed)) for name in found.names)
        at = found.gradients[stage]
        rows.append((stage, *values, _number(at.cosine), _number(at.sft), _number(at.rl)))
    return Table(
        title="Stages",
        columns=("", *found.names, "cosine", "gradient of SFT", "of RL"),
        rows=tuple(rows),
        note="nll/token is of the demonstrations, the rest of the responses. The cosine is of both losses' "
        "gradients at a stage: below 0, a small step down the loss of RL goes up that of SFT.",
    )


def _changes(found: Coupling) -> Table:
    names = [*(name for name in found.names if name in _TOLD or name.startswith("pass@")), KL]
    return Table(
        title="Changes, after less before, with intervals of 95 %",
        columns=("", *names),
        rows=tuple(
            (pair, *(_change(changes.get(name), name) for name in names))
            for pair, changes in found.changes.items()
        ),
        note="kl/token is KL(before || after) on the demonstrations, over the whole vocabulary.",
    )


def _turns(found: Coupling) -> Table:
    by_pair = {pair: summarize(found.turns, pair, kind_of) for pair in found.changes}
    kinds = list(next(iter(by_pair.values())))
    return Table(
        title="Rotation of singular vectors, left and right, in degrees",
        columns=("", *(kind.rpartition(".")[2] for kind in kinds)),
        rows=tuple(
            (pair, *(f"{groups[kind].left:.3g}, {groups[kind].right:.3g}" for kind in kinds))
            for pair, groups in by_pair.items()
        ),
        note="Mean principal angles of the leading singular subspaces.",
    )


def _details(found: Coupling, pair: str) -> Iterator[Table]:
    """Everything about one pair."""
    yield Table(
        title=pair,
        columns=("", "change and its interval of 95 %", "prompts or demonstrations"),
        rows=tuple(
            (name, _change(change, name), str(change.num_prompts))
            for name, change in found.changes[pair].items()
        ),
    )
    for group, by in _GROUPS.items() if found.turns else ():
        yield Table(
            title=f"{pair}: rotation by {group}",
            columns=(group, "matrices", "left", "right", "largest", "values", "weights"),
            rows=tuple(
                (
                    name,
                    str(each.num_matrices),
                    *(f"{angle:.3g}\u00b0" for angle in (each.left, each.right, each.largest)),
                    *(f"{100 * change:.3g} %" for change in (each.values, each.weights)),
                )
                for name, each in summarize(found.turns, pair, by).items()
            ),
            note="Mean and largest principal angle of the leading singular subspaces; relative change of the "
            "leading singular values, and of the weights.",
        )


def _value(found: Estimate | None) -> str:
    return _number(None if found is None else found.value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _change(found: Estimate | None, name: str) -> str:
    if found is None:
        return ""
    sign = "" if name == KL else "+"
    if found.low is None or found.high is None:
        return f"{found.value:{sign}.3g}"
    return f"{found.value:{sign}.3g} [{found.low:{sign}.3g}, {found.high:{sign}.3g}]"


def _curves(found: Coupling) -> Iterator[Curve]:
    places = tuple(map(float, range(len(found.stages))))
    order = ", ".join(f"{place} {name}" for place, name in enumerate(found.stages))
    for name in [name for name in _ON_CURVES if name in found.names]:
        values = [numbers[name].estimate(seed=found.seed) for numbers in found.numbers.values()]
        known = [(place, each.value) for place, each in zip(places, values, strict=True) if each]
        if known:
            x, y = zip(*known, strict=True)
            series = (Series(label=name, x=x, y=y),)
            yield Curve(title=name, x_label="stage", y_label="", series=series, note=order)
    known = [
        (place, each.cosine)
        for place, each in zip(places, found.gradients.values(), strict=True)
        if each.cosine is not None
    ]
    if known:
        x, y = zip(*known, strict=True)
        series = (Series(label="cosine", x=x, y=y),)
        title = "Cosine of the gradients of SFT and RL"
        yield Curve(title=title, x_label="stage", y_label="", series=series, note=order)
