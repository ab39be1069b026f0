"""Low-rank adapters (LoRA, arXiv:2106.09685) on Megatron's shards of a frozen model.

Megatron keeps q, k and v in one matrix, and gate and up. Each Hugging Face matrix has an adapter of its own,
under its Hugging Face name, so that what is trained is what PEFT trains. Of a matrix whose rows are split
over tp every rank has all of A and its rows of B; of one whose columns are split, its columns of A and all of
B. What travels between ranks has r columns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from megatron_sftrl.config.lora import LoraSection
from megatron_sftrl.engine.model import LanguageModel, named_generator
from megatron_sftrl.engine.parallel import ParallelContext, rng_tracker
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.tensors import MegatronTensor, Region, megatron_tensors

PREFIX = "lora."
"""Of the names of adapters in a checkpoint; a name of PEFT's follows, as in its files."""


class Adapter(torch.nn.Module):
    """The adapters of one of Megatron's linear layers, one for each Hugging Face matrix in it.

    Args:
        tensor: the layer's weight, whole.
        dtype: of the layer's weight.
    """

    def __init__(
        self, tensor: MegatronTensor, section: LoraSection, parallel: ParallelContext, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.is_on = True
        self.instead: Mapping[int, Tensor] | None = None
        """By the id() of a parameter, what the forward takes in its place."""
        self.scale, self.dropout = section.scale, section.dropout
        self._parallel, self._tensor = parallel, tensor
        self._sums_input = tensor.shard == "columns"
        tp = parallel.tp_size
        sizes: dict[str, int] = {}
        for run in tensor.rows:
            sizes[run.name] = sizes.get(run.name, 0) + run.num_rows
        # q, k and v alternate, one run of rows of each for every key/value head.
        self._num_runs = max(1, len(tensor.rows) // len(sizes) // tp)
        self._num_rows = {name: size if self._sums_input else size // tp for name, size in sizes.items()}
        self.names = [name for name in sizes if _short(name) in section.names]
        columns = tensor.shape[1] // (tp if self._sums_input else 1)
        for name in self.names:
            # Of this module itself: with overlap_param_gather calling it waits for its own parameters.
            for letter, shape in (
                ("A", (section.rank, columns)),
                ("B", (self._num_rows[name], section.rank)),
            ):
                empty = torch.empty(shape, dtype=dtype, device=parallel.device)
                self.register_parameter(f"{_short(name)}_{letter}", torch.nn.Parameter(empty))
        shards, copies = (self.down, self.up) if self._sums_input else (self.up, self.down)
        for parameter in shards:
            set_tensor_model_parallel_attributes(parameter, True, 1 if self._sums_input else 0, 1)
        for parameter in copies:
            # finalize_model_grads sums the gradient over tp where this is set: each rank saw its own tokens.
            parameter.sequence_parallel = parallel.sequence_parallel  # type: ignore[attr-defined]

    @property
    def down(self) -> list[Tensor]:
        """A of each matrix: [r, in], of a row-parallel layer [r, in/tp]."""
        return self._values("A")

    @property
    def up(self) -> list[Tensor]:
        """B of each matrix: [out/tp, r], of a row-parallel layer [out, r]."""
        return self._values("B")

    def _values(self, letter: str) -> list[Tensor]:
        own = [getattr(self, f"{_short(name)}_{letter}") for name in self.names]
        if self.instead is None:
            return own
        return [self.instead[id(parameter)].to(parameter.dtype) for parameter in own]

    def forward(self, x: Tensor, *, is_split: bool) -> Tensor:
        """scale B A x, [.., out/tp] of a column-parallel layer's input and [.., out] of a row-parallel one's.

        Args:
            x: what the layer is given.
            is_split: tokens are split over tp between the layers (sequence parallelism).
        """
        group = self._parallel.tp_group
        if self.training and self.dropout:
            # Under tensor parallelism x is a part that no other rank has, or the same on all of them.
            is_own = is_split or self._sums_input
            with rng_tracker().fork(_DROPOUT_OF_PARTS if is_own else _DROPOUT_OF_COPIES):
                x = F.dropout(x, self.dropout)
        inner = F.linear(x, torch.cat(self.down))
        if self._sums_input:
            if is_split:
                inner = reduce_scatter_to_sequence_parallel_region(inner, group=group)
            else:
                inner = reduce_from_tensor_model_parallel_region(inner, group=group)
        elif is_split:
            inner = gather_from_sequence_parallel_region(inner, group=group)
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=group)
        parts = dict(zip(self.names, inner.chunk(len(self.names), dim=-1), strict=True))
        ups = dict(zip(self.names, self.up, strict=True))
        outputs = [
            F.linear(parts[name], ups[name]) if name in ups else inner.new_zeros(*inner.shape[:-1], rows)
            for name, rows in self._num_rows.items()
        ]
        # [.., runs, rows of a run]: the runs of one matrix side by side with those of the others.
        runs = [output.unflatten(-1, (self._num_runs, -1)) for output in outputs]
        return torch.cat(runs, dim=-1).flatten(-2) * self.scale

    def attach(self, linear: Any) -> None:
        """Add to the output of Megatron's layer; engine/decode_step.py, which calls no layer, looks here."""
        linear.adapters = (self,)  # in a tuple, in which torch does not look for parameters
        if hasattr(linear, "return_layernorm_output"):
            # Transformer Engine's with a norm in it: the adapter reads what the matrix reads.
            linear.return_layernorm_output = True
        linear.register_forward_hook(self._add)

    def _add(self, _: torch.nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> Any:
        output, bias = outputs
        x = inputs[0]
        if isinstance(output, tuple):
            output, x = output
        if self.is_on:
            output = output + self(x, is_split=self._parallel.sequence_parallel)
        return output, bias

    @torch.no_grad()
    def initialize(self, init: Literal["uniform", "gaussian"], seed: int) -> None:
        """A by lora.init, B zero; drawn by seed and name, alike in every layout."""
        for place in self.places():
            assert place.data is not None
            if ".lora_B." in place.key:
                place.data.zero_()
                continue
            (rank, columns), generator = place.global_shape, named_generator(f"{seed}:{place.key}")
            if init == "gaussian":
                whole = torch.randn(rank, columns, generator=generator) / rank
            else:
                whole = (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
            start, size = place.global_offset[1], place.local_shape[1]
            place.data.copy_(whole[:, start : start + size])

    def places(self) -> Iterator[ShardedTensor]:
        """A and B of each matrix as parts of PEFT's tensors."""
        parallel, tp = self._parallel, (self._parallel.tp_rank, self._parallel.tp_size)
        replica = torch.distributed.get_rank(parallel.dp_cp_group)
        for letter, parameters, axis in (("A", self.down, 1), ("B", self.up, 0)):
            is_cut = self._sums_input == (letter == "A")
            for name, parameter in zip(self.names, parameters, strict=True):
                yield ShardedTensor.from_rank_offsets(
                    f"{PREFIX}{name.removesuffix('.weight')}.lora_{letter}.weight",
                    parameter,
                    *([(axis, *tp)] if is_cut else []),
                    replica_id=(0, 0 if is_cut else parallel.tp_rank, replica),
                )


class Adapters(torch.nn.ModuleList):
    """All adapters of a model chunk."""

    def sharded_state_dict(self, *_: object, **__: object) -> dict[str, ShardedTensor]:
        """By name; Megatron's of a chunk asks each module for its own."""
        return {place.key: place for adapter in self for place in adapter.places()}  # type: ignore[operator]


def add_adapters(
    chunks: Sequence[LanguageModel],
    architecture: Architecture,
    section: LoraSection,
    parallel: ParallelContext,
    *,
    seed: int,
) -> None:
    """Freeze the chunks and give them adapters, which alone are trained from now on."""
    _seed_dropout(parallel, seed)
    table = {
        (tensor.key, tensor.layer): tensor
        for tensor in megatron_tensors(architecture)
        if tensor.layer is not None and len(tensor.shape) == 2 and tensor.expert is None
    }
    for chunk in chunks:
        chunk.requires_grad_(False)
        layers: Any = chunk.decoder.layers
        adapters = Adapters()
        for layer in layers:
            for (key, index), tensor in table.items():
                is_wanted = any(_short(run.name) in section.names for run in tensor.rows)
                if index != layer.layer_number - 1 or not is_wanted:
                    continue
                # Layers that are not alike have their number in the key.
                path = key.removeprefix("decoder.layers.").removeprefix(f"{index}.").removesuffix(".weight")
                linear = attrgetter(path)(layer)
                adapter = Adapter(tensor, section, parallel, linear.weight.dtype)
                adapter.initialize(section.init, seed)
                adapter.attach(linear)
                adapters.append(adapter)
        chunk.add_module("lora", adapters)
        if chunk.pre_process and chunk.config.recompute_granularity is not None:
            # What is computed again must have an input with a gradient, or it has none.
            chunk.embedding.register_forward_hook(_with_gradient)


_DROPOUT_OF_PARTS, _DROPOUT_OF_COPIES = "lora-dropout-of-parts", "lora-dropout-of-copies"


def _seed_dropout(parallel: ParallelContext, seed: int) -> None:
    """Streams in Megatron's tracker: recomputation winds them back, and checkpoints hold them."""
    tracker = rng_tracker()
    place = f"{seed}:lora dropout:{parallel.pp_rank}:{torch.distributed.get_rank(parallel.dp_cp_group)}"
    for name, text in ((_DROPOUT_OF_COPIES, place), (_DROPOUT_OF_PARTS, f"{place}:{parallel.tp_rank}")):
        if name not in tracker.get_states():
            tracker.add(name, named_generator(text).initial_seed())


def adapter_shapes(architecture: Architecture, section: LoraSection) -> dict[str, tuple[int, int]]:
    """Of A and B of each matrix of the whole model, by PEFT's names inside of it."""
    sizes: dict[str, tuple[int, int]] = {}
    for tensor in megatron_tensors(architecture):
        for run in tensor.rows if tensor.layer is not None and len(tensor.shape) == 2 else ():
            if _short(run.name) in section.names:
                rows, _ = sizes.get(run.name, (0, 0))
                sizes[run.name] = (rows + run.num_rows, tensor.shape[1])
    shapes = {}
    for name, (rows, columns) in sizes.items():
        module = name.removesuffix(".weight")
        shapes[f"{module}.lora_A.weight"] = (section.rank, columns)
        shapes[f"{module}.lora_B.weight"] = (rows, section.rank)
    return shapes


def adapters_of(chunks: Sequence[torch.nn.Module]) -> list[Adapter]:
    """Every adapter of the chunks, wrapped by DDP or not; none without LoRA."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]


def adapter_parameters(chunks: Sequence[torch.nn.Module]) -> list[Tensor]:
    """Every A and B of the chunks."""
    return [parameter for adapter in adapters_of(chunks) for parameter in adapter.parameters()]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """scale B A for the part of a Hugging Face matrix that a rank holds.

    Args:
        start: row and column of the matrix at which B [rows, r] and A [r, columns] begin.
    """

    start: tuple[int, int]
    down: Tensor
    up: Tensor
    scale: float

    @torch.no_grad()
    def merged(self, weight: Tensor, region: Region) -> Tensor:
        """`weight`, which is `region` of the matrix, with scale B A: summed in fp32, rounded once; a copy."""
        rows, columns = region.relative_to(self.start).slices
        added = self.up[rows].float() @ self.down[:, columns].float()
        return weight.float().add(added, alpha=self.scale).to(weight.dtype)


def low_ranks(chunks: Sequence[torch.nn.Module]) -> dict[str, LowRank]:
    """What the adapters of this rank's chunks add, by the Hugging Face name of each matrix; views."""
    found = {}
    for adapter in adapters_of(chunks):
        places = {place.key.removeprefix(PREFIX): place for place in adapter.places()}
        for name in adapter.names:
            module = name.removesuffix(".weight")
            down, up = (places[f"{module}.lora_{letter}.weight"] for letter in "AB")
            assert down.data is not None and up.data is not None
            start = (up.global_offset[0], down.global_offset[1])
            found[name] = LowRank(start=start, down=down.data, up=up.data, scale=adapter.scale)
    return found


@contextlib.contextmanager
def other_adapters(chunks: Sequence[torch.nn.Module], instead: Mapping[int, Tensor] | None) -> Iterator[None]:
    """For the block the chunks, in evaluation mode, have other adapters, or without `instead` none."""
    adapters, before = adapters_of(chunks), [chunk.training for chunk in chunks]
    for adapter in adapters:
        adapter.is_on, adapter.instead = instead is not None, instead
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on, adapter.instead = True, None
        for chunk, was_training in zip(chunks, before, strict=True):
            chunk.train(was_training)


def _short(name: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj.weight."""
    return name.split(".")[-2]


def _with_gradient(_: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
