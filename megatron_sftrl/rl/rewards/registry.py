"""Rewards by name: registered with a decorator, built from the run's list, checked before any model is.

The default registry is module state for the reason that the losses' one is: a decorator in a user's file has
nowhere else to write to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

from megatron_sftrl.config.data import Section
from megatron_sftrl.config.rewards import RewardSection, check_rewards
from megatron_sftrl.errors import UserError
from megatron_sftrl.registry import Entry, FunctionRegistry, origin_of

# What a reward is given, what it returns, and how it shows that it can tell right from wrong. No tensor comes
# near it: its processes start without torch.

# The largest number that a reward may return: times a weight that is no larger, it is still one in fp32, and
# so are sums and squares of it in float64.
LARGEST = 1e15

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class RewardConfig(Section):
    """Options of a reward: frozen, strict about unknown names; the text below a field documents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInputs:
    """One response as a reward sees it.

    Args:
        response: the generated text, without the end token; any characters, of any length.
        row: the prompt's row of the data: answer, metadata and whatever else stands there.
        num_response_tokens: tokens generated, the end token included.
        is_finished: the end token was reached; otherwise the response was cut off.
    """

    prompt: str
    response: str
    row: Mapping[str, Json]
    num_response_tokens: int
    is_finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOutput:
    """What a reward returns; every number finite, or the sample has no reward and is not trained on.

    Args:
        reward: what is trained, by the strict reading of the response.
        lenient: what it would be if the format were forgiven; measured, never trained. None: the same.
        metrics: further numbers by name, averaged over samples.
        answer: what was read in the response as its answer, in one spelling; equal ones vote together in
            `sftrl eval`. None: nothing was read, or the reward has no such thing.
    """

    reward: float
    lenient: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A response known to be right or wrong, with inputs; each right one must score above each wrong one."""

    response: str
    is_right: bool
    prompt: str = ""
    row: Mapping[str, Json] = field(default_factory=dict)
    num_response_tokens: int = 1
    is_finished: bool = True

    @property
    def inputs(self) -> RewardInputs:
        """The same as a sample to score."""
        return RewardInputs(
            prompt=self.prompt,
            response=self.response,
            row=self.row,
            num_response_tokens=self.num_response_tokens,
            is_finished=self.is_finished,
        )


RewardFunction = Callable[[RewardInputs, Any], RewardOutput]
CanaryFunction = Callable[[Any], Sequence[Canary]]
RowCheck = Callable[[Mapping[str, Json], Any], None]
SolutionFunction = Callable[[Mapping[str, Json], Any], "str | None"]
FunctionT = TypeVar("FunctionT", bound=RewardFunction)


def no_canaries(config: RewardConfig) -> Sequence[Canary]:
    """The examples of a reward that declares none."""
    return ()


def any_row(row: Mapping[str, Json], config: RewardConfig) -> None:
    """The check of a reward that reads whatever its needs hold."""


def no_solution(row: Mapping[str, Json], config: RewardConfig) -> str | None:
    """Of a reward that does not say what a right response looks like."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardEntry(Entry):
    """A registered reward; the fields are explained at register_reward."""

    canaries: CanaryFunction
    imports: tuple[str, ...]
    is_confined: bool
    check_row: RowCheck
    solution: SolutionFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward with its validated options and its weight, its factor in the sum that is trained, fixed."""

    entry: RewardEntry
    config: RewardConfig
    weight: float

    @property
    def name(self) -> str:
        """As registered."""
        return self.entry.name

    def __call__(self, inputs: RewardInputs) -> RewardOutput:
        """The reward of one response; runs whatever the reward runs, so call it in a worker only."""
        return self.entry.function(inputs, self.config)

    def solution(self, row: Mapping[str, Json]) -> str | None:
        """A response that earns 1; None where the reward does not say."""
        return self.entry.solution(row, self.config)

    @property
    def has_solutions(self) -> bool:
        """It says how a right response is written, of which it gives 1."""
        return self.entry.solution is not no_solution

    def written(self, row: Mapping[str, Json], answer: str) -> str | None:
        """Another answer to the row in the form of its solution.

        None where the reward does not say, cannot write this one, or takes the answer from another place than
        `answer`: what it wrote would be the row's own.
        """
        try:
            text = self.entry.solution({**row, "answer": answer}, self.config)
            other = self.entry.solution({**row, "answer": f"{answer}1"}, self.config)
        except Exception:  # a user's function, given an answer of another kind than its rows have
            return None
        return None if text == other else text

    def check_row(self, row: Mapping[str, Json]) -> None:
        """Raise UserError when the row lacks what the reward needs, or holds what it cannot read."""
        for need in self.entry.needs:
            if row.get(need) is None:
                raise UserError(
                    f"reward {self.name!r} needs {need!r} in every row of the data, got a row with "
                    f"{sorted(key for key, value in row.items() if value is not None)}; add it to the data, "
                    "or choose another reward"
                )
        try:
            self.entry.check_row(row, self.config)
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            raise UserError(f"reward {self.name!r} cannot read the row: {kind}{error}") from error


class RewardRegistry(FunctionRegistry[RewardEntry]):
    """Names of rewards and what they stand for."""

    def __init__(self) -> None:
        super().__init__(kind="reward", modules_key="the reward's modules")


DEFAULT_REGISTRY = RewardRegistry()


def register_reward(
    name: str,
    *,
    config: type[RewardConfig] = RewardConfig,
    needs: tuple[str, ...] = (),
    canaries: CanaryFunction = no_canaries,
    imports: tuple[str, ...] = (),
    is_confined: bool = True,
    check_row: RowCheck = any_row,
    solution: SolutionFunction = no_solution,
    registry: RewardRegistry = DEFAULT_REGISTRY,
) -> Callable[[FunctionT], FunctionT]:
    """Decorate `function(inputs: RewardInputs, config) -> RewardOutput` to make it available under a name.

    The function is pure. It runs in a worker process: what it prints goes nowhere. An exception, a hang, a
    crash or a number that is not finite says that it could not judge: the sample is tried once more in a new
    worker, and then left out of the loss and of its group. A wrong or unreadable response gets 0 instead.

    Args:
        needs: keys that each row of the data must hold.
        canaries: from the options to examples, right ones and wrong ones, which are tried before the run.
        imports: libraries that the function imports, so that their loading is not counted as a sample's time.
        is_confined: refuse processes, the network, changes to files and what /proc says about other processes
            while it runs; one that compiles a program or asks a service needs False, and takes the kernel's
            part of it from the run's other rewards as well.
        check_row: from row and options; raises, with what to do, for a row that the reward cannot read. Every
            row is checked before a run, in the trainer: be quick.
        solution: from row and options to a response of which the reward gives 1, the row's own answer in the
            form that the reward reads; None where there is none. Some rows are tried before a run.
    Raises:
        UserError: the name is taken by another function.
    """

    def register(function: FunctionT) -> FunctionT:
        registry.add(
            RewardEntry(
                name=name,
                function=function,
                config=config,
                needs=needs,
                origin=origin_of(function),
                canaries=canaries,
                imports=imports,
                is_confined=is_confined,
                check_row=check_row,
                solution=solution,
            )
        )
        return function

    return register


def build_rewards(
    sections: Iterable[RewardSection], *, registry: RewardRegistry = DEFAULT_REGISTRY
) -> tuple[Reward, ...]:
    """The rewards of a run in order, with their options checked, after every section's modules were imported.

    Raises:
        UserError: an empty list or one without a weight, an unknown name, an unknown or invalid option, a
            module that cannot be found.
    """
    sections = check_rewards(list(sections))
    registry.load(module for section in sections for module in section.modules)
    return tuple(_build(section, registry) for section in sections)


def portable(sections: Iterable[RewardSection]) -> list[dict[str, Any]]:
    """The sections as JSON that means the same in another working directory."""
    written = [section.model_dump(mode="json") for section in sections]
    for section in written:
        section["modules"] = [
            str(Path(module).expanduser().resolve()) if module.endswith(".py") else module
            for module in section["modules"]
        ]
    return written


def _build(section: RewardSection, registry: RewardRegistry) -> Reward:
    entry = registry.get(section.name)
    config = cast(RewardConfig, registry.options_of(entry, section.options))
    return Reward(entry=entry, config=config, weight=section.weight)


# The rewards of a response, and the numbers that a step logs about them.

Outcome: TypeAlias = Literal["ok", "timeout", "crashed", "error", "nonfinite"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one reward said about one response; unless it is ok, its numbers say nothing.

    Args:
        outcome: ok, or what went wrong: out of time (wall clock or processor), the worker died, the reward
            raised an exception, a number was not finite or above 1e15 in size.
        reward, lenient: by the strict and the lenient reading, before the weight; 0 unless ok.
        metrics: the reward's own numbers; empty unless ok.
        answer: as in RewardOutput, its first characters.
        seconds: wall-clock time in the worker.
        is_retried: it failed once before, in another worker.
    """

    name: str
    outcome: Outcome
    reward: float = 0.0
    lenient: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None
    seconds: float = 0.0
    detail: str = ""
    is_retried: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The reward of one response.

    Args:
        reward: sum of weight * strict reward over the parts: what is trained. None: a part with a weight
            failed: the response is neither right nor wrong, and left out of the loss and of every mean.
        lenient: the same sum of the lenient readings; None with `reward`.
    """

    reward: float | None
    lenient: float | None
    parts: tuple[Part, ...]

    @property
    def first(self) -> float | None:
        """What the run's first reward, which defines success, gave; None when it or the sum is unknown."""
        return self.parts[0].reward if self.reward is not None and self.parts[0].outcome == "ok" else None

    @property
    def outcome(self) -> Outcome:
        """ok, or the first thing that went wrong."""
        for part in self.parts:
            if part.outcome != "ok":
                return part.outcome
        return "ok"


def weighted(weights: Sequence[float], parts: tuple[Part, ...]) -> Scored:
    """The weighted sum of a response's parts; unknown as soon as one whose weight is not 0 has failed."""
    pairs = [(weight, part) for weight, part in zip(weights, parts, strict=True) if weight != 0]
    if any(part.outcome != "ok" for _, part in pairs):
        return Scored(reward=None, lenient=None, parts=parts)
    return Scored(
        reward=math.fsum(weight * part.reward for weight, part in pairs),
        lenient=math.fsum(weight * part.lenient for weight, part in pairs),
        parts=parts,
    )


def reward_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Numbers of a step; a mean over nothing is left out.

    reward/mean and reward/lenient_mean of the weighted sums, over the samples that have one;
    reward/unscored, the share of those that have none; for each reward reward/NAME and reward/NAME/lenient,
    means over the samples that it could judge, and reward/NAME/METRIC, over those that have it;
    reward/NAME/timeout, /crashed, /error, /nonfinite, numbers of samples, and reward/NAME/retried, of those
    that needed a second try; reward/slowest_seconds, of one reward of one sample.
    """
    if not scored:
        return {}
    values: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, float] = {}
    for one in scored:
        values["reward/unscored"].append(one.reward is None)
        if one.reward is not None and one.lenient is not None:
            values["reward/mean"].append(one.reward)
            values["reward/lenient_mean"].append(one.lenient)
        for part in one.parts:
            if part.outcome == "ok":
                values[f"reward/{part.name}"].append(part.reward)
                values[f"reward/{part.name}/lenient"].append(part.lenient)
                for name, value in part.metrics.items():
                    values[f"reward/{part.name}/{name}"].append(value)
            flags = {outcome: part.outcome == outcome for outcome in OUTCOMES[1:]}
            for name, flag in {**flags, "retried": part.is_retried}.items():
                key = f"reward/{part.name}/{name}"
                counts[key] = counts.get(key, 0.0) + flag
    means = {key: sum(numbers) / len(numbers) for key, numbers in values.items()}
    slowest = max((part.seconds for one in scored for part in one.parts), default=0.0)
    return means | counts | {"reward/slowest_seconds": slowest}


def failed_everywhere(scored: Sequence[Scored]) -> Part | None:
    """What a reward that could judge no sample said about the first one; None where each judged some."""
    for parts in zip(*(one.parts for one in scored), strict=True):
        if all(part.outcome != "ok" for part in parts):
            return parts[0]
    return None


def describe_failures(scored: Sequence[Scored], *, most: int = 3) -> list[str]:
    """One line for each of the first samples that a reward could not judge, with the reason."""
    lines = [
        f"sample {index}: reward {part.name!r}: {part.outcome}: {part.detail}"
        for index, one in enumerate(scored)
        for part in one.parts
        if part.outcome != "ok"
    ]
    hidden = len(lines) - most
    return lines[:most] + ([f"and {hidden} more"] if hidden > 0 else [])
