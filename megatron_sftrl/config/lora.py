"""The section `lora`: low-rank adapters are trained, and the model under them stays as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from megatron_sftrl.config.data import Section
from megatron_sftrl.config.paths import ExpandedPath
from megatron_sftrl.errors import UserError

LoraTarget = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
    "in_proj_qkvz",
    "in_proj_ba",
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_b",
    "in_proj_a",
    "out_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "w1",
    "w3",
    "w2",
]
WholeWeight = Literal["embed_tokens", "lm_head"]
ALL_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)
NARROW_TARGETS: frozenset[LoraTarget] = frozenset({"in_proj_ba", "in_proj_b", "in_proj_a"})
"""A row or two for each head: PEFT gives them adapters of a larger rank, too."""


class LoraSection(Section):
    """Low-rank adapters beside frozen matrices: W x + scale B A x, as PEFT trains them."""

    rank: int = Field(ge=1)
    """r, rows of A and columns of B; at most the smaller side of each matrix, except of in_proj_ba,
    in_proj_b and in_proj_a, which have a row or two for each head."""
    alpha: float = Field(gt=0, allow_inf_nan=False)
    """scale = alpha / rank, with rslora alpha / sqrt(rank)."""
    targets: Literal["all-linear"] | Annotated[list[LoraTarget], Field(min_length=1)] = "all-linear"
    """The matrices that get an adapter, by their Hugging Face names: [q_proj, v_proj]; of a mixture every
    expert's. all-linear: all of attention, gated delta nets, MLP and experts; a router stays as it is."""
    modules_to_save: list[WholeWeight] = Field(default_factory=list)
    """What is trained whole, beside the adapters: embed_tokens, lm_head, of a model that has both of them. A
    reference has a copy of these weights."""
    dropout: float = Field(ge=0, lt=1, default=0.0)
    """Share of the entries of x that A does not see, drawn in each training forward; the others grow to make
    up for them. The matrices of one layer (q, k and v; gate and up; in_proj_*) share a draw."""
    init: Literal["uniform", "gaussian"] = "uniform"
    """Of A: uniform in +-1/sqrt(in), PEFT's default, or gaussian of deviation 1/rank. B starts at 0."""
    start: ExpandedPath | None = None
    """Directory of a PEFT adapter that training starts from, of the same rank, alpha, targets and base; None
    draws A and sets B to 0."""
    rslora: bool = False
    """Divide alpha by the root of the rank (arXiv:2312.03732)."""

    @model_validator(mode="before")
    @classmethod
    def _without_dora(cls, value: Any) -> Any:
        for key in ("dora", "use_dora"):
            if isinstance(value, Mapping) and key in value:
                raise UserError(
                    f"lora.{key}: adapters of DoRA, which have a magnitude beside A and B, are not trained"
                )
        return value

    @field_validator("targets", mode="before")
    @classmethod
    def _known_targets(cls, value: Any) -> Any:
        """One sentence for what is neither of the two: pydantic would have one for each."""
        if value == "all-linear":
            return value
        if not isinstance(value, list) or not value:
            raise UserError(
                f"lora.targets: expected all-linear, or a list such as [q_proj, v_proj], got {value!r}"
            )
        if "conv1d" in value:
            raise UserError(
                "lora.targets: the convolution of gated delta nets, conv1d, has no adapter: transformers "
                "reads its weights past the module that PEFT would put one on; remove it"
            )
        if unknown := [name for name in value if name not in ALL_TARGETS]:
            raise UserError(f"lora.targets: expected some of {', '.join(ALL_TARGETS)}, got {unknown}")
        return value

    @property
    def scale(self) -> float:
        """What B A x is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def names(self) -> tuple[LoraTarget, ...]:
        """The matrices that get an adapter where a model has them, in the order of a block."""
        if self.targets == "all-linear":
            return ALL_TARGETS
        return tuple(each for each in ALL_TARGETS if each in self.targets)
