"""Each tensor of a Megatron checkpoint as runs of rows of Hugging Face tensors (names: tensor_rules.py).

A Megatron tensor is named by its key in a sharded checkpoint (`decoder.layers.mlp.linear_fc1.weight`) and its
index in the stacked axes (layer, or layer and expert); its rows are runs of rows of Hugging Face tensors, its
columns are theirs. So any region of it, whatever the layout, is a list of regions of Hugging Face tensors.
Loading, saving, the conversion tools and the resharding to a rollout engine all work on this list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_sftrl.models.architecture import Architecture, DeltaNet
from megatron_sftrl.models.hf_families import hf_family
from megatron_sftrl.models.tensor_rules import (
    EMBEDDING,
    EXPERTS,
    FINAL_NORM,
    FUSED_DELTA_IN,
    OUTPUT,
    ROUTING_BIAS,
    Rule,
    Shard,
    layer_rules,
    num_rows_of,
    shape_of_row,
)


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A part of a tensor: the elements from `start` up to `stop`, one number a dimension."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], offset: Sequence[int] | None = None) -> Region:
        """The region of this shape that begins at `offset`, or the whole of a tensor of this shape."""
        start = (0,) * len(shape) if offset is None else tuple(offset)
        return cls(start, tuple(a + size for a, size in zip(start, shape, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes a tensor with it."""
        return tuple(map(slice, self.start, self.stop))

    @property
    def text(self) -> str:
        return str(list(zip(self.start, self.stop, strict=True)))

    def intersect(self, other: Region) -> Region:
        """What both share; without elements where they share nothing."""
        start = tuple(map(max, self.start, other.start))
        return Region(start, tuple(map(max, start, map(min, self.stop, other.stop))))

    def along(self, dim: int, start: int, stop: int) -> Region:
        """Its part from `start` up to `stop` of one dimension."""
        cut = Region(
            (*self.start[:dim], start, *self.start[dim + 1 :]),
            (*self.stop[:dim], stop, *self.stop[dim + 1 :]),
        )
        return self.intersect(cut)

    def stretched(self, times: int) -> Region:
        """Of a vector, each element of which is that many."""
        (start,), (stop,) = self.start, self.stop
        return Region((start * times,), (stop * times,))

    def relative_to(self, origin: Sequence[int]) -> Region:
        """The same elements, counted from `origin`."""
        return Region(
            tuple(a - o for a, o in zip(self.start, origin, strict=True)),
            tuple(b - o for b, o in zip(self.stop, origin, strict=True)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HfRows:
    """`num_rows` consecutive rows of a Hugging Face tensor, from its row `start`.

    Of a tensor of all experts, [experts, columns, rows] or [experts, rows], `expert` says whose they are;
    where rows of two halves take turns it is seen as [..., rows, 2], and `half` is the last index.
    """

    name: str
    start: int
    num_rows: int
    expert: int | None = None
    half: int | None = None

    def in_file(self, rows: Region) -> Region:
        """Where a region of the tensor's rows (and columns) lies in the file's."""
        if self.expert is None:
            return rows
        half = () if self.half is None else (self.half,)
        return Region(
            (self.expert, *rows.start[::-1], *half),
            (self.expert + 1, *rows.stop[::-1], *(each + 1 for each in half)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive rows of a Hugging Face tensor, an equal part of which has each turn in a Megatron tensor.

    Args:
        start, num_rows: in the file, of all turns.
        order: of the parts of a turn, one behind the other in the file, Megatron's order.
    """

    name: str
    start: int
    num_rows: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronTensor:
    """One tensor of the model, whole, without vocabulary padding.

    Args:
        key: its name in a sharded checkpoint.
        index: its place in the stacked axes: (), (layer,) or (layer, expert).
        stack: sizes of the stacked axes.
        shape: (rows,) or (rows, columns); of a convolution (rows, 1, width).
        shard: the dimension that tensor parallelism cuts; None for a tensor that every rank has whole.
        num_parts: equal parts of the rows that tensor parallelism cuts one by one (2 for a gated MLP).
        num_turns: how often each of `blocks` has its turn in the rows: one for each key/value or key head.
        num_gated: of the first runs of a turn, those that are one block, in another order in the file: the
            query heads of a group and their gates.
        is_expert: expert parallelism spreads it, and etp cuts it instead of tp.
        has_padding: rows of padding may follow in a model (vocabulary).
        rows: what it is made of, in order.
        layer, expert: whose it is, counted from 0.
        is_fp32: whatever the model's dtype is; no gradient reaches it.
    """

    key: str
    index: tuple[int, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    shard: Shard | None
    num_parts: int
    num_turns: int
    num_gated: int
    is_expert: bool
    has_padding: bool
    rows: tuple[HfRows, ...]
    layer: int | None
    expert: int | None
    is_fp32: bool

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What takes turns in the rows: q, k and v, or gate and up; of matrices of their own or of one."""
        firsts = self.rows[: len(self.rows) // self.num_turns]
        gated, others = firsts[: self.num_gated], firsts[self.num_gated :]
        return tuple(self._block(runs) for runs in (gated, *((run,) for run in others)) if runs)

    def _block(self, runs: Sequence[HfRows]) -> Block:
        start, size = min(run.start for run in runs), runs[0].num_rows
        return Block(
            name=runs[0].name,
            start=start,
            num_rows=len(runs) * size * self.num_turns,
            order=tuple((run.start - start) // size for run in runs),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HfRegion:
    """A region of the Hugging Face tensor `run.name`, and its place in a region of a Megatron tensor.

    Args:
        source: in the tensor as hf_boxes() has it.
    """

    run: HfRows
    source: Region
    target: Region

    @property
    def name(self) -> str:
        return self.run.name

    def as_in_file(self, values: Tensor) -> Tensor:
        """A view of the Megatron tensor's values in the dimensions of `source`."""
        if self.run.expert is None:
            return values
        values = values.mT[None] if values.dim() == 2 else values[None]
        return values if self.run.half is None else values[..., None]

    def as_in_megatron(self, values: Tensor) -> Tensor:
        """The other way round."""
        if self.run.expert is None:
            return values
        values = values[0] if self.run.half is None else values[0, ..., 0]
        return values.mT if values.dim() == 2 else values


def megatron_tensors(architecture: Architecture) -> Iterator[MegatronTensor]:
    """Every tensor of the model, in the order of its computation; a tied output layer is not one."""
    yield _tensor(EMBEDDING, architecture)
    for layer in range(architecture.num_layers):
        for rule in layer_rules(architecture, layer):
            if architecture.mixture is not None and rule.megatron.startswith(EXPERTS):
                for expert in range(architecture.mixture.num_experts):
                    yield _tensor(rule, architecture, layer=layer, expert=expert)
            else:
                yield _tensor(rule, architecture, layer=layer)
    yield _tensor(FINAL_NORM, architecture)
    if not architecture.tie_embeddings:
        yield _tensor(OUTPUT, architecture)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Hugging Face checkpoint of this architecture holds."""
    return {
        name: box if half is None else (*box[:-2], 2 * box[-2])
        for name, (box, half) in _boxes(architecture).items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor:
    """A tensor of an export, and those of hf_shapes() that it is made of, one behind the other."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]


_OF_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def file_tensors(architecture: Architecture) -> dict[str, FileTensor]:
    """By name, in the order of the model, what an export holds: tensors of hf_shapes(), or stacks of them."""
    shapes = hf_shapes(architecture)
    if "stacks" not in hf_family(architecture.family).fused:
        return {name: FileTensor(shape=shape, parts=(name,)) for name, shape in shapes.items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        expert = _OF_EXPERT.fullmatch(name)
        stack = name if expert is None else f"{expert[1]}.{'down' if expert[2] == 'down' else 'gate_up'}_proj"
        parts.setdefault(stack, []).append(name)
    found = {}
    for name, each in parts.items():
        shape = shapes[each[0]]
        if name not in shapes:
            assert architecture.mixture is not None
            num_experts = architecture.mixture.num_experts
            shape = (num_experts, len(each) // num_experts * shape[0], shape[1])
        found[name] = FileTensor(shape=shape, parts=tuple(each))
    return found


def hf_matrices(architecture: Architecture, names: Collection[str]) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the blocks' matrices with such a short_name, by their full names."""
    return {
        name: shape
        for name, shape in hf_shapes(architecture).items()
        if len(shape) == 2 and name.startswith("model.layers.") and short_name(name) in names
    }


def short_name(name: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj.weight."""
    return name.split(".")[-2]


def hf_boxes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The same tensors as regions count them: [..., rows, 2] where the rows of two halves take turns."""
    return {name: box for name, (box, _) in _boxes(architecture).items()}


def _boxes(architecture: Architecture) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """With the half of the rows that takes the first turn, None where all rows are one behind the other."""
    found: dict[str, tuple[tuple[int, ...], int | None]] = {}
    for tensor in megatron_tensors(architecture):
        for run in tensor.rows:
            if run.expert is None:
                rows = max(run.start + run.num_rows, found.get(run.name, ((0,), None))[0][0])
                found[run.name] = (rows, *tensor.shape[1:]), None
            elif run.name not in found:
                whole = run.in_file(Region.of((run.num_rows, *tensor.shape[1:])))
                last = () if run.half is None else (2,)
                middle = whole.shape[1:] if run.half is None else whole.shape[1:-1]
                found[run.name] = (tensor.stack[-1], *middle, *last), run.half
    return found


def hf_regions(tensor: MegatronTensor, region: Region) -> Iterator[HfRegion]:
    """What a region of `tensor`, without the stacked axes, is made of; rows of padding of nothing."""
    whole, first = Region.of(tensor.shape), 0
    for run in tensor.rows:
        shared = whole.along(0, first, first + run.num_rows).intersect(region)
        if shared.numel:
            first_of_name = (first - run.start, *(0 for _ in tensor.shape[1:]))
            yield HfRegion(
                run=run,
                source=run.in_file(shared.relative_to(first_of_name)),
                target=shared.relative_to(region.start),
            )
        first += run.num_rows


def _tensor(
    rule: Rule, architecture: Architecture, *, layer: int | None = None, expert: int | None = None
) -> MegatronTensor:
    mixture, prefix, key = architecture.mixture, "", rule.megatron
    places = [] if expert is None or mixture is None else [(expert, mixture.num_experts)]
    if layer is not None:
        prefix, key = f"model.layers.{layer}.", f"decoder.layers.{key}"
        if architecture.has_layers_of_kinds:
            # Megatron stacks layers that are alike alone.
            key = f"decoder.layers.{layer}.{rule.megatron}"
        else:
            places.insert(0, (layer, architecture.num_layers))
    names = [prefix + name.format(expert=expert) for name in rule.hf]
    rows = tuple(_rows(rule, names, architecture, expert if rule.fused else None))
    heads_each = architecture.num_attention_heads // architecture.num_query_groups
    return MegatronTensor(
        key=key,
        index=tuple(at for at, _ in places),
        stack=tuple(size for _, size in places),
        shape=(sum(run.num_rows for run in rows), *shape_of_row(rule, architecture)),
        shard=rule.shard,
        num_parts=2 if rule.rows == "halves" else 1,
        num_turns=_num_turns(rule, architecture),
        num_gated=2 * heads_each if rule.rows == "groups" and architecture.has_output_gate else 0,
        is_expert=expert is not None,
        has_padding=rule in (EMBEDDING, OUTPUT),
        rows=rows,
        layer=layer,
        expert=expert,
        is_fp32=rule.megatron == ROUTING_BIAS.megatron,
    )


def _num_turns(rule: Rule, a: Architecture) -> int:
    if rule.rows == "keys":
        assert a.delta_net is not None
        return a.delta_net.num_key_heads
    return a.num_query_groups if rule.rows == "groups" else 1


def _rows(rule: Rule, names: list[str], a: Architecture, expert: int | None) -> Iterator[HfRows]:
    """What a tensor is made of; `expert` where the file has one tensor of all."""
    if rule.rows == "keys":
        assert a.delta_net is not None
        yield from _rows_by_key_head(names, a.delta_net, is_fused=rule is FUSED_DELTA_IN)
        return
    if rule.rows == "groups" and a.has_output_gate:
        yield from _rows_with_gates(names, a)
        return
    if rule.rows == "groups":
        heads = (a.num_attention_heads // a.num_query_groups, 1, 1)
        firsts = (0, a.num_attention_heads, a.num_attention_heads + a.num_query_groups)
        if len(names) > 1:
            firsts = (0, 0, 0)
        else:
            names = names * 3
        for group in range(a.num_query_groups):
            for name, num, first in zip(names, heads, firsts, strict=True):
                start = (first + group * num) * a.head_dim
                yield HfRows(name=name, start=start, num_rows=num * a.head_dim)
        return
    num_rows = num_rows_of(rule, a)
    if expert is not None:
        for half in (0, 1) if rule.rows == "halves" else (None,):
            yield HfRows(name=names[0], start=0, num_rows=num_rows, expert=expert, half=half)
    elif rule.rows == "halves" and len(names) == 1:
        yield from (HfRows(name=names[0], start=half * num_rows, num_rows=num_rows) for half in (0, 1))
    else:
        yield from (HfRows(name=name, start=0, num_rows=num_rows) for name in names)


def _rows_with_gates(names: list[str], a: Architecture) -> Iterator[HfRows]:
    """q, k and v, where the file has the gate of each query head below it."""
    query, *others = names
    each = a.num_attention_heads // a.num_query_groups
    for group in range(a.num_query_groups):
        for is_gate in (0, 1):
            for head in range(group * each, (group + 1) * each):
                yield HfRows(name=query, start=(2 * head + is_gate) * a.head_dim, num_rows=a.head_dim)
        for name in others:
            yield HfRows(name=name, start=group * a.head_dim, num_rows=a.head_dim)


def _rows_by_key_head(names: list[str], net: DeltaNet, *, is_fused: bool) -> Iterator[HfRows]:
    """The projection of a gated delta net, or its convolution (queries, keys and values alone)."""
    each = net.value_heads_each
    if is_fused:
        parts = [(names[0], 0, net.rows_each - 2 * each), (names[1], 0, 2 * each)]
    else:
        firsts = (0, net.key_dim, 2 * net.key_dim, 0, 0, 0)
        sizes = (net.key_dim, net.key_dim, *[each * net.value_dim] * 2, each, each)
        parts = list(zip([*[names[0]] * 3, *names[1:]], firsts, sizes, strict=False))
    for head in range(net.num_key_heads):
        for name, first, size in parts:
            yield HfRows(name=name, start=net.num_key_heads * first + head * size, num_rows=size)
