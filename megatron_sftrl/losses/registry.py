"""Losses by name: registered with a decorator, built from a name and options, checked before any model is.

The default registry is the package's one piece of module state: a decorator in a user's file has nowhere
else to write to. It only ever gains entries, and a second entry under a name is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput, is_own_number
from megatron_sftrl.registry import Entry, FunctionRegistry, load_module, nearest, origin_of

__all__ = ["DEFAULT_REGISTRY", "NEEDS", "Loss", "Registry", "build_loss", "load_module", "register_loss"]

NEEDS = ("reference", "behavior_logprobs", "old_logprobs", "rollout_logprobs", "advantages")

LossFunction = Callable[[LossInputs, Any], LossOutput]
TokenLocal = bool | Callable[[Any], bool]
FunctionT = TypeVar("FunctionT", bound=LossFunction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss with its options fixed: function(inputs, config); other fields as in register_loss."""

    name: str
    config: LossOptions
    needs: tuple[str, ...]
    function: LossFunction
    is_token_local: bool = False
    is_on_policy: bool = False

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """The loss of every token.

        Raises:
            UserError: the inputs lack something the loss needs, or what it returned is not a [T] loss.
        """
        for need in self.needs:
            holder = inputs if need == "reference" else inputs.batch
            if getattr(holder, need) is None:
                raise UserError(f"loss {self.name!r} needs {need}, got none: {_how_to_get(need)}")
        output = self.function(inputs, self.config)
        _check_output(self.name, output, inputs)
        return output


@dataclass(frozen=True, slots=True, kw_only=True)
class LossEntry(Entry):
    """A registered loss; `token_local` and `on_policy` as in register_loss."""

    token_local: TokenLocal
    on_policy: bool

    def is_token_local(self, config: LossOptions) -> bool:
        """With these options."""
        return self.token_local(config) if callable(self.token_local) else self.token_local


class Registry(FunctionRegistry[LossEntry]):
    """Names of losses and what they stand for."""

    def __init__(self) -> None:
        super().__init__(kind="loss", modules_key="loss.modules")


DEFAULT_REGISTRY = Registry()


def register_loss(
    name: str,
    *,
    config: type[LossOptions] = LossOptions,
    needs: tuple[str, ...] = (),
    token_local: TokenLocal = False,
    on_policy: bool = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> Callable[[FunctionT], FunctionT]:
    """Decorate `function(inputs: LossInputs, config) -> LossOutput` to make it available under a name.

    Args:
        needs: "reference", or fields of TokenBatch that may be None.
        token_local: what it says of a token depends on that token alone: it asks for no `sequences` and
            combines no tokens. Its gradient is then formed while a chunk of logits is hot, and masked
            tokens are left out. A function of the options where they decide.
        on_policy: it is about responses that the policy has sampled, as one that needs advantages is:
            `sftrl grpo` trains with it, `sftrl sft` does not.
    Raises:
        UserError: the name is taken by another function, or a need is unknown.
    """
    for need in needs:
        if need not in NEEDS:
            raise UserError(f"loss {name!r}: unknown need {need!r}{nearest(need, NEEDS)}; known: {NEEDS}")

    def register(function: FunctionT) -> FunctionT:
        registry.add(
            LossEntry(
                name=name,
                function=function,
                config=config,
                needs=needs,
                origin=origin_of(function),
                token_local=token_local,
                on_policy=on_policy or "advantages" in needs,
            )
        )
        return function

    return register


def build_loss(
    name: str,
    options: Mapping[str, object] | None = None,
    modules: Iterable[str | Path] = (),
    *,
    defaults: Mapping[str, object] | None = None,
    registry: Registry = DEFAULT_REGISTRY,
) -> Loss:
    """A loss by name, with its options checked.

    Args:
        modules: Python files (paths ending in .py) or importable names, imported first.
        defaults: options that hold where the loss has them and `options` does not give them.
    Raises:
        UserError: unknown name, unknown or invalid option, a module that cannot be found, a name taken twice.
    """
    registry.load(modules)
    entry = registry.get(name)
    known = {name: value for name, value in (defaults or {}).items() if name in entry.config.model_fields}
    config = cast(LossOptions, registry.options_of(entry, {**known, **(options or {})}))
    needs = entry.needs + tuple(need for need in config.extra_needs() if need not in entry.needs)
    return Loss(
        name=name,
        config=config,
        needs=needs,
        function=entry.function,
        is_token_local=entry.is_token_local(config),
        is_on_policy=entry.on_policy,
    )


def _check_output(name: str, output: object, inputs: LossInputs) -> None:
    if not isinstance(output, LossOutput):
        raise UserError(f"loss {name!r}: expected it to return a LossOutput, got {type(output).__name__}")
    if not isinstance(output.metrics, Mapping):
        raise UserError(
            f"loss {name!r}: expected metrics to be a dictionary of [T] values by name, got "
            f"{type(output.metrics).__name__}"
        )
    _check_vector(name, "token_loss", output.token_loss, inputs)
    for metric, value in output.metrics.items():
        if not isinstance(metric, str) or is_own_number(metric):
            raise UserError(
                f"loss {name!r}: metric {metric!r} would stand in the place of a number that every step "
                f"writes to metrics.jsonl; give it another name, 'loss/{metric}' say"
            )
        _check_vector(name, f"metric {metric!r}", value, inputs)
        if value.requires_grad:
            raise UserError(f"loss {name!r}: expected metric {metric!r} to be detached; call .detach()")


def _check_vector(name: str, what: str, value: object, inputs: LossInputs) -> None:
    """Raise UserError unless it is [T] floating point where the batch is."""
    tokens = inputs.batch.tokens
    if (
        isinstance(value, Tensor)
        and value.shape == tokens.shape
        and value.is_floating_point()
        and value.device == tokens.device
    ):
        return
    got = type(value).__name__
    if isinstance(value, Tensor):
        got = f"{value.dtype} {list(value.shape)} on {value.device}"
    raise UserError(
        f"loss {name!r}: expected {what} to be a floating point tensor [T] = {list(tokens.shape)} on "
        f"{tokens.device}, got {got}; return one value per token, token_weight does the averaging"
    )


def _how_to_get(need: str) -> str:
    if need == "reference":
        return "add a `reference` section to the run (kind: frozen or moving_average)"
    if need == "behavior_logprobs":
        return "score the data with `sftrl score`"
    return "it is filled by the rollout stage; this loss does not train on plain demonstrations"
