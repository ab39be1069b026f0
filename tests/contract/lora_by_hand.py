"""LoRA by its definition: W + scale B A in transformers' model, where PEFT has other adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from megatron_sftrl.config.lora import LoraSection

Adapters = dict[str, torch.nn.Parameter]
"""A and B by the names of PEFT's files, inside of the model."""
Stack = Sequence[Sequence[str | None]]


class LowRank(torch.nn.Module):
    """What a parameter becomes: a matrix, or a stack of matrices that each are several, one below the other.

    Args:
        stack: the names of the matrices; None for one without an adapter.
    """

    def __init__(self, shape: torch.Size, stack: Stack, section: LoraSection) -> None:
        super().__init__()
        self.stack, self.scale, self.adapters = stack, section.scale, Adapters()
        self.rows, self.columns = shape[-2] // len(stack[0]), shape[-1]
        for name in (name for names in stack for name in names if name is not None):
            for letter, sides in (("A", (section.rank, self.columns)), ("B", (self.rows, section.rank))):
                self.adapters[f"{name}.lora_{letter}.weight"] = torch.nn.Parameter(torch.empty(sides))

    def forward(self, weight: Tensor) -> Tensor:
        added = [torch.cat([self._product(name) for name in names]) for names in self.stack]
        return weight + self.scale * (torch.stack(added) if weight.dim() == 3 else added[0])

    def _product(self, name: str | None) -> Tensor:
        if name is None:
            return torch.zeros(self.rows, self.columns)
        return self.adapters[f"{name}.lora_B.weight"] @ self.adapters[f"{name}.lora_A.weight"]


def adapted_by_hand(directory: Path, section: LoraSection) -> tuple[Any, Adapters]:
    """transformers' model in fp32, and its adapters, which are not filled."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
    is_mixtral = model.config.model_type in ("mixtral", "minimax_m2")
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    found: Adapters = {}

    def adapt(module: torch.nn.Module, parameter: str, stack: Stack) -> None:
        if any(name is not None for names in stack for name in names):
            low_rank = LowRank(getattr(module, parameter).shape, stack, section)
            parametrize.register_parametrization(module, parameter, low_rank)
            found.update(low_rank.adapters)

    def named(place: str, name: str) -> str | None:
        return f"{place}.{name}" if name in section.names else None

    for path, module in list(model.named_modules()):
        place, _, last = path.rpartition(".")
        if isinstance(module, torch.nn.Linear):
            adapt(module, "weight", [[named(place, last)]])
        elif last == "experts":
            of_file = path.replace(".mlp.", ".block_sparse_moe.") if is_mixtral else path
            experts = [f"{of_file}.{number}" for number in range(len(module.down_proj))]  # type: ignore[arg-type]
            adapt(module, "gate_up_proj", [[named(each, gate), named(each, up)] for each in experts])
            adapt(module, "down_proj", [[named(each, down)] for each in experts])
    return model, found
