"""Rewards by name: registered with a decorator, built from the run's list, checked before any model is.

The default registry is module state for the reason that the losses' one is: a decorator in a user's file has
nowhere else to write to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from megatron_sftrl.config.schema import RewardSection, check_rewards
from megatron_sftrl.errors import UserError
from megatron_sftrl.registry import Entry, FunctionRegistry, origin_of
from megatron_sftrl.rl.rewards.api import Canary, Json, RewardConfig, RewardInputs, RewardOutput

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
    """A registered reward.

    Args:
        canaries: examples of known worth, given the options.
        imports: libraries that a worker imports before its first sample.
        is_confined: processes, the network and changes to files are refused while it runs.
        check_row: raises for a row that the reward cannot read.
        solution: a response that answers a row rightly.
    """

    canaries: CanaryFunction
    imports: tuple[str, ...]
    is_confined: bool
    check_row: RowCheck
    solution: SolutionFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward with its options and its weight fixed.

    Args:
        entry: as registered.
        config: validated options.
        weight: factor in the sum that is trained.
    """

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
        name: what run.yaml calls it.
        config: options, a subclass of RewardConfig.
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
        registry: where it is entered.
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
    """The rewards of a run, with their options checked.

    Args:
        sections: the run's list, in order.
        registry: where the names are looked up, after every section's modules were imported.
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
