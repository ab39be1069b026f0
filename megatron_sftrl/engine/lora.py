"""Low-rank adapters (LoRA, arXiv:2106.09685) on Megatron's shards of a frozen model.

Megatron keeps q, k and v in one matrix, and gate and up. Each Hugging Face matrix has an adapter of its own,
under its Hugging Face name, so that what is trained is what PEFT trains: each expert has its own, and q, k
and v share A where their files hold them as one. Of a matrix whose rows are split over tp every rank has all
of A and its rows of B; of one whose columns are split, its columns of A and all of B. What travels between
ranks has r columns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_sftrl.config.lora import LoraSection
from megatron_sftrl.engine.model import LanguageModel, named_generator
from megatron_sftrl.engine.parallel import ParallelContext, rng_tracker
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.tensor_rules import WHOLE_WEIGHTS
from megatron_sftrl.models.tensors import (
    MegatronTensor,
    Region,
    hf_matrices,
    megatron_tensors,
    short_name,
)

PREFIX = "lora."
"""Of the names of adapters in a checkpoint; a name of PEFT's follows, as in its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slices:
    """The ranks among which a layer's matrix is cut.

    Args:
        rank, size: place of this rank's slice; of a matrix that every rank has whole, of the copy.
        replica: which of the ranks that hold the same slice this is.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    replica: int

    @classmethod
    def of(cls, tensor: MegatronTensor, parallel: ParallelContext) -> _Slices:
        group, replicas = parallel.tp_group, parallel.dp_cp_group
        if tensor.is_expert:
            group, replicas = parallel.etp_group, parallel.edp_group
        return cls(group=group, rank=group.rank(), size=group.size(), replica=replicas.rank())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Rows of a layer that are rows of one Hugging Face matrix.

    Args:
        name: of that.
        first: of its rows, this rank's first one.
        place: of B's rows on this rank, all of the matrix, these.
        order: of tensors.Block.
    """

    name: str
    first: int
    place: slice
    order: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.place.stop - self.place.start

    def of_layer(self, up: Tensor, num_turns: int) -> Tensor:
        """Its rows of B in the order of the layer's."""
        rows = up[self.place]
        if len(self.order) == 1:
            return rows
        parts = rows.unflatten(0, (num_turns, len(self.order), -1)).unbind(1)
        return torch.stack([parts[number] for number in self.order], dim=1).flatten(0, 2)


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
        self._tensor, self._slices = tensor, _Slices.of(tensor, parallel)
        self._rank = section.rank
        self._num_turns = max(1, tensor.num_turns // self._num_cuts("rows"))
        self._blocks, self._whole_rows = self._lay_out(tensor)
        self.names = [name for name in self._whole_rows if short_name(name) in section.names]
        columns = tensor.shape[1] // self._num_cuts("columns")
        for name in self.names:
            rows = self._whole_rows[name] // self._num_cuts("rows")
            # Of this module itself: with overlap_param_gather calling it waits for its own parameters.
            for letter, shape in (("A", (section.rank, columns)), ("B", (rows, section.rank))):
                empty = torch.empty(shape, dtype=dtype, device=parallel.device)
                self.register_parameter(f"{short_name(name)}_{letter}", torch.nn.Parameter(empty))
        self._mark_parameters(parallel)

    def _lay_out(self, tensor: MegatronTensor) -> tuple[list[_Block], dict[str, int]]:
        """This rank's blocks, and the rows of each whole matrix."""
        blocks, whole, cuts = [], dict[str, int](), self._num_cuts("rows")
        for each in tensor.blocks:
            rows, before = each.num_rows // cuts, whole.get(each.name, 0)
            first = each.start + (self._slices.rank * rows if cuts > 1 else 0)
            place = slice(before // cuts, before // cuts + rows)
            blocks.append(_Block(name=each.name, first=first, place=place, order=each.order))
            whole[each.name] = before + each.num_rows
        return blocks, whole

    def _num_cuts(self, dimension: Literal["rows", "columns"]) -> int:
        return self._slices.size if self._tensor.shard == dimension else 1

    def _is_cut(self, letter: str) -> bool:
        """Every rank has a part of A, or of B; else all of it."""
        return self._tensor.shard == {"A": "columns", "B": "rows"}[letter]

    def _mark_parameters(self, parallel: ParallelContext) -> None:
        """Tell Megatron which gradients are parts, which are sums to be made, and which count in the norm."""
        for letter, axis in (("A", 1), ("B", 0)):
            for parameter in self._own(letter):
                if self._tensor.is_expert:
                    # As mixtures.mark_expert_parameters; of copies the first one alone counts.
                    parameter.allreduce = False  # type: ignore[attr-defined]
                    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                    parameter.shared = not self._is_cut(letter) and self._slices.rank > 0  # type: ignore[attr-defined]
                elif self._is_cut(letter):
                    set_tensor_model_parallel_attributes(parameter, True, axis, 1)
                else:
                    # finalize_model_grads sums the gradient over tp where this is set: each rank saw its own
                    # tokens.
                    parameter.sequence_parallel = parallel.sequence_parallel  # type: ignore[attr-defined]

    @property
    def down(self) -> list[Tensor]:
        """A of each matrix: [r, in], of a row-parallel layer [r, in/tp]."""
        return self._values("A")

    @property
    def up(self) -> list[Tensor]:
        """B of each matrix: [out/tp, r], of a row-parallel layer [out, r]."""
        return self._values("B")

    def _own(self, letter: str) -> list[torch.nn.Parameter]:
        return [getattr(self, f"{short_name(name)}_{letter}") for name in self.names]

    def _values(self, letter: str) -> list[Tensor]:
        own: Sequence[Tensor] = self._own(letter)
        if self.instead is not None:
            own = [self.instead[id(parameter)].to(parameter.dtype) for parameter in own]
        if self._tensor.is_expert and not self._is_cut(letter):
            # Of an expert's slices Megatron adds up outputs and gradients of inputs, as they are, between its
            # layers; what has no slices gets the sum of all slices' gradients here.
            group = self._slices.group
            own = [copy_to_tensor_model_parallel_region(parameter, group=group) for parameter in own]
        return [*own]

    def forward(self, x: Tensor, *, is_split: bool) -> Tensor:
        """scale B A x, [.., out/tp] of a column-parallel layer's input and [.., out] of a row-parallel one's.

        Args:
            x: what the layer is given.
            is_split: tokens are split over tp between the layers (sequence parallelism).
        """
        if self.training and self.dropout:
            with rng_tracker().fork(self._dropout_stream(is_split=is_split)):
                x = F.dropout(x, self.dropout)
        inner = self._over_slices(F.linear(x, torch.cat(self.down)), is_split=is_split)
        parts = dict(zip(self.names, inner.chunk(len(self.names), dim=-1), strict=True))
        ups = dict(zip(self.names, self.up, strict=True))
        outputs = [
            F.linear(parts[block.name], block.of_layer(ups[block.name], self._num_turns))
            if block.name in ups
            else inner.new_zeros(*inner.shape[:-1], block.num_rows)
            for block in self._blocks
        ]
        # [.., turns, rows of a turn]: those of one block side by side with those of the others.
        turns = [output.unflatten(-1, (self._num_turns, -1)) for output in outputs]
        return torch.cat(turns, dim=-1).flatten(-2) * self.scale

    def _over_slices(self, inner: Tensor, *, is_split: bool) -> Tensor:
        """A x of all of x for B, whole or the rows of this rank."""
        group = self._slices.group
        if self._tensor.is_expert or self._tensor.shard is None:
            return inner
        if self._tensor.shard == "columns":
            if is_split:
                return reduce_scatter_to_sequence_parallel_region(inner, group=group)
            return reduce_from_tensor_model_parallel_region(inner, group=group)
        if is_split:
            return gather_from_sequence_parallel_region(inner, group=group)
        return copy_to_tensor_model_parallel_region(inner, group=group)

    def _dropout_stream(self, *, is_split: bool) -> str:
        """Under tensor parallelism x is a part that no other rank has, or the same on all of them."""
        if self._tensor.shard == "columns":
            return _DROPOUT_OF_PARTS
        if self._tensor.is_expert:
            return _DROPOUT_OF_EXPERTS
        return _DROPOUT_OF_PARTS if is_split else _DROPOUT_OF_COPIES

    @torch.no_grad()
    def initialize(self, init: Literal["uniform", "gaussian"], seed: int) -> None:
        """A by lora.init, B zero; drawn by seed and name, alike in every layout."""
        for _, place in self.places():
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

    def places(self) -> Iterator[tuple[torch.nn.Parameter, ShardedTensor]]:
        """A of each matrix and B of each block of rows, as parts of PEFT's tensors, with their parameters."""
        columns = self._tensor.shape[1]
        for name, down in zip(self.names, self._own("A"), strict=True):
            first = self._slices.rank * down.shape[1] if self._is_cut("A") else 0
            yield down, self._place(name, "A", down, (self._rank, columns), (0, first))
        ups = dict(zip(self.names, self._own("B"), strict=True))
        for block in self._blocks:
            if (up := ups.get(block.name)) is not None:
                part = up if block.num_rows == len(up) else up[block.place]
                shape = (self._whole_rows[block.name], self._rank)
                yield up, self._place(block.name, "B", part, shape, (block.first, 0))

    def _place(
        self, name: str, letter: str, part: Tensor, shape: tuple[int, int], offset: tuple[int, int]
    ) -> ShardedTensor:
        copy = 0 if self._is_cut(letter) else self._slices.rank
        return ShardedTensor(
            key=f"{PREFIX}{name.removesuffix('.weight')}.lora_{letter}.weight",
            data=part,
            dtype=part.dtype,
            local_shape=tuple(part.shape),
            global_shape=shape,
            global_offset=offset,
            axis_fragmentations=None,  # q, k and v in one matrix are no regular grid
            replica_id=(0, copy, self._slices.replica),
        )


def _attach(linear: Any, adapters: tuple[Adapter, ...], *, is_split: bool) -> None:
    """Add to the output of Megatron's layer; engine/decode_step.py, which calls no layer, looks here.

    Args:
        adapters: one, or of a layer of several experts one for each.
        is_split: as Adapter.forward.
    """
    linear.adapters = adapters  # in a tuple, in which torch does not look for parameters
    if hasattr(linear, "return_layernorm_output"):
        # Transformer Engine's with a norm in it: the adapter reads what the matrix reads.
        linear.return_layernorm_output = True
    linear.register_forward_hook(partial(_add, adapters, is_split))


def _add(
    adapters: tuple[Adapter, ...], is_split: bool, _: torch.nn.Module, inputs: tuple[Any, ...], outputs: Any
) -> Any:
    if isinstance(outputs, Tensor):  # of a layer of ours
        return _add(adapters, is_split, _, inputs, (outputs, None))[0]
    output, bias = outputs
    x = inputs[0]
    if isinstance(output, tuple):
        output, x = output
    if adapters[0].is_on:
        # Experts in one layer have their tokens one expert below the other.
        parts = x.split(inputs[1]) if len(adapters) > 1 else [x]
        added = [adapter(part, is_split=is_split) for adapter, part in zip(adapters, parts, strict=True)]
        output = output + torch.cat(added)
    return output, bias


class Adapters(torch.nn.ModuleList):
    """All adapters of a model chunk."""

    def sharded_state_dict(self, *_: object, **__: object) -> dict[str, ShardedTensor | ShardedTensorFactory]:
        """By name; Megatron's of a chunk asks each module for its own."""
        found: dict[str, ShardedTensor | ShardedTensorFactory] = {}
        for adapter in self:
            parts: dict[str, list[tuple[Tensor, ShardedTensor]]] = {}
            for parameter, place in adapter.places():  # type: ignore[operator]
                parts.setdefault(place.key, []).append((parameter, place))
            for key, ((parameter, place), *others) in parts.items():
                several = [place, *(other for _, other in others)]
                found[key] = place if not others else _in_parts(key, parameter, several)
        return found


def _in_parts(key: str, parameter: Tensor, places: list[ShardedTensor]) -> ShardedTensorFactory:
    """A parameter whose parts have places of their own."""
    return ShardedTensorFactory(key, parameter, lambda *_: places, lambda each: each)  # type: ignore[arg-type]


def add_adapters(
    chunks: Sequence[LanguageModel],
    architecture: Architecture,
    section: LoraSection,
    parallel: ParallelContext,
    *,
    seed: int,
) -> None:
    """Give the chunks adapters, which alone are trained from now on, with section.modules_to_save."""
    tensors = [
        tensor
        for tensor in megatron_tensors(architecture)
        if any(short_name(run.name) in section.names and run.expert is None for run in tensor.rows)
        and len(tensor.shape) == 2
        and _is_here(tensor, parallel)
    ]
    _seed_dropout(parallel, seed, has_experts=any(tensor.is_expert for tensor in tensors))
    for chunk in chunks:
        chunk.requires_grad_(False)
        weights = dict(chunk.named_parameters())
        for _, name in (WHOLE_WEIGHTS[each] for each in section.modules_to_save):
            if name in weights:
                weights[name].requires_grad_(True)
        layers: Any = chunk.decoder.layers
        adapters = Adapters()
        for layer in layers:
            linears: dict[Any, list[Adapter]] = {}
            for tensor in tensors:
                if tensor.layer == layer.layer_number - 1:
                    linear = _linear_of(tensor, layer, parallel)
                    adapter = Adapter(tensor, section, parallel, next(linear.parameters()).dtype)
                    adapter.initialize(section.init, seed)
                    linears.setdefault(linear, []).append(adapter)
                    adapters.append(adapter)
            for linear, several in linears.items():
                _attach(linear, tuple(several), is_split=parallel.sequence_parallel)
        chunk.add_module("lora", adapters)
        if chunk.pre_process and chunk.config.recompute_granularity is not None:
            # What is computed again must have an input with a gradient, or it has none.
            chunk.embedding.register_forward_hook(_with_gradient)


def _is_here(tensor: MegatronTensor, parallel: ParallelContext) -> bool:
    """This rank's stage may have it, and has it if it is an expert's."""
    if tensor.expert is None:
        return True
    return tensor.expert // (tensor.stack[-1] // parallel.ep_size) == parallel.ep_rank


def _linear_of(tensor: MegatronTensor, layer: Any, parallel: ParallelContext) -> Any:
    """The module of a layer that computes with this matrix, alone or with those of other experts."""
    # Layers that are not alike have their number in the key.
    path = tensor.key.removeprefix("decoder.layers.").removeprefix(f"{tensor.layer}.").removesuffix(".weight")
    if tensor.expert is None:
        return attrgetter(path)(layer)
    experts, name = layer.mlp.experts, path.split(".")[-1]
    if not isinstance(experts, SequentialMLP):
        return getattr(experts, name)
    return getattr(experts.local_experts[tensor.expert % len(experts.local_experts)], name)


_DROPOUT_OF_PARTS, _DROPOUT_OF_COPIES = "lora-dropout-of-parts", "lora-dropout-of-copies"
_DROPOUT_OF_EXPERTS = "lora-dropout-of-experts"


def _seed_dropout(parallel: ParallelContext, seed: int, *, has_experts: bool) -> None:
    """Streams in Megatron's tracker: recomputation winds them back, and checkpoints hold them."""
    tracker = rng_tracker()
    place = f"{seed}:lora dropout:{parallel.pp_rank}:{parallel.dp_cp_group.rank()}"
    streams = {_DROPOUT_OF_COPIES: place, _DROPOUT_OF_PARTS: f"{place}:{parallel.tp_rank}"}
    if has_experts:
        # The slices of an expert are given the same tokens.
        expert = f"{parallel.pp_rank}:{parallel.ep_rank}:{parallel.edp_group.rank()}"
        streams[_DROPOUT_OF_EXPERTS] = f"{seed}:lora dropout of experts:{expert}"
    for name, text in streams.items():
        if name not in tracker.get_states():
            tracker.add(name, named_generator(text).initial_seed())


def adapter_shapes(architecture: Architecture, section: LoraSection) -> dict[str, tuple[int, int]]:
    """Of A and B of each matrix of the whole model, by PEFT's names inside of it."""
    shapes = {}
    for name, (rows, columns) in hf_matrices(architecture, section.names).items():
        module = name.removesuffix(".weight")
        shapes[f"{module}.lora_A.weight"] = (section.rank, columns)
        shapes[f"{module}.lora_B.weight"] = (rows, section.rank)
    return shapes


def lora_targets(architecture: Architecture, section: LoraSection) -> list[str]:
    """Those that the model has, by their Hugging Face names."""
    there = {short_name(name) for name in hf_matrices(architecture, section.names)}
    return [name for name in section.names if name in there]


def adapters_of(chunks: Sequence[torch.nn.Module]) -> list[Adapter]:
    """Every adapter of the chunks, wrapped by DDP or not; none without LoRA."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]


def adapter_parameters(chunks: Sequence[torch.nn.Module]) -> list[Tensor]:
    """Every A and B of the chunks."""
    return [parameter for adapter in adapters_of(chunks) for parameter in adapter.parameters()]


def whole_weights(chunks: Sequence[torch.nn.Module]) -> list[Tensor]:
    """What lora.modules_to_save trains of the chunks."""
    adapters = {id(parameter) for parameter in adapter_parameters(chunks)}
    return [each for each in trained_weights(chunks) if id(each) not in adapters]


def trained_weights(chunks: Sequence[torch.nn.Module]) -> list[Tensor]:
    """Adapters and whole weights of a run with adapters."""
    return [each for chunk in chunks for each in chunk.parameters() if each.requires_grad]


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

    def has(self, region: Region) -> bool:
        """The region's rows are among its own."""
        return self.start[0] <= region.start[0] and region.stop[0] <= self.start[0] + len(self.up)

    @torch.no_grad()
    def merged(self, weight: Tensor, region: Region) -> Tensor:
        """`weight`, which is `region` of the matrix, with scale B A: summed in fp32, rounded once; a copy."""
        rows, columns = region.relative_to(self.start).slices
        added = self.up[rows].float() @ self.down[:, columns].float()
        return weight.float().add(added, alpha=self.scale).to(weight.dtype)


def low_ranks(chunks: Sequence[torch.nn.Module]) -> dict[str, list[LowRank]]:
    """What the adapters of this rank's chunks add, by the Hugging Face name of each matrix; views."""
    found: dict[str, list[LowRank]] = {}
    for adapter in adapters_of(chunks):
        downs: dict[str, ShardedTensor] = {}
        for _, place in adapter.places():
            module, letter, _ = place.key.removeprefix(PREFIX).rsplit(".", 2)
            if letter == "lora_A":
                downs[module] = place
                continue
            down = downs[module]
            assert down.data is not None and place.data is not None
            start = (place.global_offset[0], down.global_offset[1])
            low_rank = LowRank(start=start, down=down.data, up=place.data, scale=adapter.scale)
            found.setdefault(f"{module}.weight", []).append(low_rank)
    return found


@contextlib.contextmanager
def other_adapters(chunks: Sequence[torch.nn.Module], instead: Mapping[int, Tensor]) -> Iterator[None]:
    """For the block the chunks, in evaluation mode, have other trained weights.

    Args:
        instead: by the id() of a trained parameter what takes its place. An adapter without is off.
    """
    adapters, before = adapters_of(chunks), [chunk.training for chunk in chunks]
    whole = [(weight, weight.data) for weight in whole_weights(chunks)]
    for adapter in adapters:
        adapter.is_on = all(id(parameter) in instead for parameter in adapter.parameters())
        adapter.instead = instead
    for weight, _ in whole:
        weight.data = instead[id(weight)].to(weight.dtype)
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on, adapter.instead = True, None
        for weight, own in whole:
            weight.data = own
        for chunk, was_training in zip(chunks, before, strict=True):
            chunk.train(was_training)


def _with_gradient(_: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
