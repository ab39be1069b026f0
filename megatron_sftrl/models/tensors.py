"""The one table of names: each tensor of a Megatron checkpoint, and the Hugging Face tensors it is made of.

A Megatron tensor is named by its key in a sharded checkpoint (`decoder.layers.mlp.linear_fc1.weight`) and its
index in the stacked axes (layer, or layer and expert); its rows are runs of rows of Hugging Face tensors, its
columns are theirs. So any region of it, whatever the layout, is a list of regions of Hugging Face tensors.
Loading, saving, the conversion tools and the resharding to a rollout engine all work on this list.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from megatron_sftrl.models.architecture import Architecture, DeltaNet, Latent, Norms
from megatron_sftrl.models.hf_families import hf_family

Shard = Literal["rows", "columns"]


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
class _Rule:
    """A line of the table.

    Args:
        megatron: key, below "decoder.layers." for a tensor of every layer.
        hf: the tensors it is made of, below "model.layers.{layer}." for a tensor of every layer.
        rows: order of their rows. one: a single tensor. halves: one tensor below the other. groups: for each
            key/value head its query heads, their gates if there are any, the key head, the value head. Of
            halves and groups the files may hold all parts one below the other in a single tensor. keys: of a
            gated delta net, for each key head its query, its key, its values and what belongs to these.
        shard: the dimension that tensor parallelism cuts; of `halves` each half is cut. None: every rank has
            all of it.
        fused: the file has one tensor of all experts, [experts, columns, rows] or [experts, rows]; the rows
            of halves take turns in it.
    """

    megatron: str
    hf: tuple[str, ...]
    rows: Literal["one", "halves", "groups", "keys"] = "one"
    shard: Shard | None = None
    fused: bool = False


_EMBEDDING = _Rule(
    megatron="embedding.word_embeddings.weight", hf=("model.embed_tokens.weight",), shard="rows"
)
_FINAL_NORM = _Rule(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",))
_OUTPUT = _Rule(megatron="output_layer.weight", hf=("lm_head.weight",), shard="rows")

WHOLE_WEIGHTS = {rule.hf[0].split(".")[-2]: (rule.hf[0], rule.megatron) for rule in (_EMBEDDING, _OUTPUT)}
"""By the names of lora.modules_to_save, the tensor's name in Hugging Face's files and in Megatron's model."""

_QKV = _Rule(
    megatron="self_attention.linear_qkv.weight",
    hf=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    rows="groups",
    shard="rows",
)
_QKV_BIAS = _Rule(
    megatron="self_attention.linear_qkv.bias",
    hf=("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    rows="groups",
    shard="rows",
)
_QK_NORM = (
    _Rule(megatron="self_attention.q_layernorm.weight", hf=("self_attn.q_norm.weight",)),
    _Rule(megatron="self_attention.k_layernorm.weight", hf=("self_attn.k_norm.weight",)),
)
_SPANNING_QK_NORM = tuple(replace(rule, shard="rows") for rule in _QK_NORM)
_PROJECTION = _Rule(
    megatron="self_attention.linear_proj.weight", hf=("self_attn.o_proj.weight",), shard="columns"
)
_PROJECTION_BIAS = _Rule(megatron="self_attention.linear_proj.bias", hf=("self_attn.o_proj.bias",))
_SINKS = _Rule(megatron="self_attention.core_attention.softmax_offset", hf=("self_attn.sinks",), shard="rows")
_FC1 = _Rule(
    megatron="mlp.linear_fc1.weight",
    hf=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    rows="halves",
    shard="rows",
)
_FC2 = _Rule(megatron="mlp.linear_fc2.weight", hf=("mlp.down_proj.weight",), shard="columns")
_LATENT_QUERY = _Rule(
    megatron="self_attention.linear_q_proj.weight", hf=("self_attn.q_proj.weight",), shard="rows"
)
_QUERY_DOWN = _Rule(megatron="self_attention.linear_q_down_proj.weight", hf=("self_attn.q_a_proj.weight",))
_QUERY_NORM = _Rule(megatron="self_attention.q_layernorm.weight", hf=("self_attn.q_a_layernorm.weight",))
_QUERY_UP = _Rule(
    megatron="self_attention.linear_q_up_proj.weight", hf=("self_attn.q_b_proj.weight",), shard="rows"
)
_LATENT_DOWN = _Rule(
    megatron="self_attention.linear_kv_down_proj.weight", hf=("self_attn.kv_a_proj_with_mqa.weight",)
)
_LATENT_NORM = _Rule(megatron="self_attention.kv_layernorm.weight", hf=("self_attn.kv_a_layernorm.weight",))
_LATENT_UP = _Rule(
    megatron="self_attention.linear_kv_up_proj.weight", hf=("self_attn.kv_b_proj.weight",), shard="rows"
)
_DELTA_IN = _Rule(
    megatron="self_attention.in_proj.weight",
    hf=tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")),
    rows="keys",
    shard="rows",
)
_FUSED_DELTA_IN = replace(_DELTA_IN, hf=("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"))
_DELTA_CONVOLUTION = _Rule(
    megatron="self_attention.conv_weight", hf=("linear_attn.conv1d.weight",), rows="keys", shard="rows"
)
_DELTA_DECAY = _Rule(megatron="self_attention.A_log", hf=("linear_attn.A_log",), shard="rows")
_DELTA_TIME = _Rule(megatron="self_attention.dt_bias", hf=("linear_attn.dt_bias",), shard="rows")
_DELTA_NORM = _Rule(megatron="self_attention.out_norm.weight", hf=("linear_attn.norm.weight",))
_DELTA_OUT = replace(_PROJECTION, hf=("linear_attn.out_proj.weight",))
_DELTA_NET = (_DELTA_DECAY, _DELTA_TIME, _DELTA_CONVOLUTION, _DELTA_OUT, _DELTA_NORM)
_FUSED_QKV = replace(_QKV, hf=("self_attn.qkv_proj.weight",))
_FUSED_FC1 = replace(_FC1, hf=("mlp.gate_up_proj.weight",))

_NORMS: dict[Norms, dict[str, str]] = {
    "before": {"before attention": "input_layernorm", "before mlp": "post_attention_layernorm"},
    "behind": {"behind attention": "post_attention_layernorm", "behind mlp": "post_feedforward_layernorm"},
    "both": {
        "before attention": "input_layernorm",
        "behind attention": "post_self_attn_layernorm",
        "before mlp": "post_attention_layernorm",
        "behind mlp": "post_mlp_layernorm",
    },
}
"""Names in the files, by place."""


def _norm(architecture: Architecture, place: str, megatron: str) -> Iterator[_Rule]:
    """The norm at that place, if the blocks have one there."""
    if (name := _NORMS[architecture.norms].get(place)) is not None:
        yield _Rule(megatron=megatron, hf=(f"{name}.weight",))


_EXPERTS = "mlp.experts.experts."


def _mixture(router: str, gate: str, up: str, down: str) -> tuple[_Rule, ...]:
    return (
        _Rule(megatron="mlp.router.weight", hf=(router,)),
        _Rule(megatron=f"{_EXPERTS}linear_fc1.weight", hf=(gate, up), rows="halves", shard="rows"),
        _Rule(megatron=f"{_EXPERTS}linear_fc2.weight", hf=(down,), shard="columns"),
    )


_FUSED_FC1_OF_EXPERTS = _Rule(
    megatron=f"{_EXPERTS}linear_fc1.weight",
    hf=("mlp.experts.gate_up_proj",),
    rows="halves",
    shard="rows",
    fused=True,
)
_FUSED_FC2_OF_EXPERTS = _Rule(
    megatron=f"{_EXPERTS}linear_fc2.weight", hf=("mlp.experts.down_proj",), shard="columns", fused=True
)
_BIASED_MIXTURE = (
    _Rule(megatron="mlp.router.weight", hf=("mlp.router.weight",)),
    _Rule(megatron="mlp.router.bias", hf=("mlp.router.bias",)),
    _FUSED_FC1_OF_EXPERTS,
    replace(
        _FUSED_FC1_OF_EXPERTS,
        megatron=f"{_EXPERTS}linear_fc1.bias",
        hf=("mlp.experts.gate_up_proj_bias",),
    ),
    _FUSED_FC2_OF_EXPERTS,
    replace(
        _FUSED_FC2_OF_EXPERTS,
        megatron=f"{_EXPERTS}linear_fc2.bias",
        hf=("mlp.experts.down_proj_bias",),
        shard=None,
    ),
)


_QWEN_MIXTURE = _mixture(
    "mlp.gate.weight",
    "mlp.experts.{expert}.gate_proj.weight",
    "mlp.experts.{expert}.up_proj.weight",
    "mlp.experts.{expert}.down_proj.weight",
)
_OTHER_MIXTURES = {
    "mixtral": _mixture(
        "block_sparse_moe.gate.weight",
        "block_sparse_moe.experts.{expert}.w1.weight",
        "block_sparse_moe.experts.{expert}.w3.weight",
        "block_sparse_moe.experts.{expert}.w2.weight",
    ),
    "gpt_oss": _BIASED_MIXTURE,
}
_ROUTING_BIAS = _Rule(megatron="mlp.router.expert_bias", hf=("mlp.gate.e_score_correction_bias",))


def _shared_expert(name: str) -> tuple[_Rule, ...]:
    return (
        _Rule(
            megatron="mlp.shared_experts.linear_fc1.weight",
            hf=(f"mlp.{name}.gate_proj.weight", f"mlp.{name}.up_proj.weight"),
            rows="halves",
            shard="rows",
        ),
        _Rule(
            megatron="mlp.shared_experts.linear_fc2.weight",
            hf=(f"mlp.{name}.down_proj.weight",),
            shard="columns",
        ),
    )


_SHARED_GATE = _Rule(megatron="mlp.shared_experts.gate_weight", hf=("mlp.shared_expert_gate.weight",))
_GATED_SHARED_EXPERT = (_SHARED_GATE, *_shared_expert("shared_expert"))
_SHARED_EXPERT = _shared_expert("shared_experts")


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
class MegatronTensor:
    """One tensor of the model, whole, without vocabulary padding.

    Args:
        key: its name in a sharded checkpoint.
        index: its place in the stacked axes: (), (layer,) or (layer, expert).
        stack: sizes of the stacked axes.
        shape: (rows,) or (rows, columns); of a convolution (rows, 1, width).
        shard: the dimension that tensor parallelism cuts; None for a tensor that every rank has whole.
        num_parts: equal parts of the rows that tensor parallelism cuts one by one (2 for a gated MLP).
        num_blocks: see `blocks`.
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
    num_blocks: int
    is_expert: bool
    has_padding: bool
    rows: tuple[HfRows, ...]
    layer: int | None
    expert: int | None
    is_fp32: bool

    @property
    def num_turns(self) -> int:
        """How often each of the blocks has its turn."""
        return len(self.rows) // self.num_blocks

    @property
    def blocks(self) -> tuple[HfRows, ...]:
        """What takes turns in the rows: q, k and v, or gate and up; of matrices of their own or of one."""
        firsts = self.rows[: self.num_blocks]
        return tuple(replace(first, num_rows=first.num_rows * self.num_turns) for first in firsts)


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
    yield _tensor(_EMBEDDING, architecture)
    for layer in range(architecture.num_layers):
        for rule in _layer_rules(architecture, layer):
            if architecture.mixture is not None and rule.megatron.startswith(_EXPERTS):
                for expert in range(architecture.mixture.num_experts):
                    yield _tensor(rule, architecture, layer=layer, expert=expert)
            else:
                yield _tensor(rule, architecture, layer=layer)
    yield _tensor(_FINAL_NORM, architecture)
    if not architecture.tie_embeddings:
        yield _tensor(_OUTPUT, architecture)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Hugging Face checkpoint of this architecture holds."""
    return {
        name: box if half is None else (*box[:-2], 2 * box[-2])
        for name, (box, half) in _boxes(architecture).items()
    }


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


def _layer_rules(architecture: Architecture, layer: int) -> Iterator[_Rule]:
    a, fused = architecture, hf_family(architecture.family).fused
    if a.latent is not None:
        yield from _norm(a, "before attention", "input_layernorm.weight")
        yield from (_QUERY_DOWN, _QUERY_NORM, _QUERY_UP) if a.latent.query_rank else (_LATENT_QUERY,)
        yield from (_LATENT_DOWN, _LATENT_NORM, _LATENT_UP)
    elif not a.attends(layer):
        yield from _norm(a, "before attention", "input_layernorm.weight")
        yield from (*_DELTA_NET, _FUSED_DELTA_IN if "delta_net" in fused else _DELTA_IN)
    else:
        yield from _norm(a, "before attention", "self_attention.linear_qkv.layer_norm_weight")
        yield _FUSED_QKV if "qkv" in fused else _QKV
        if a.qkv_bias:
            yield _QKV_BIAS
        if a.qk_norm:
            yield from _SPANNING_QK_NORM if a.qk_norm_spans_heads else _QK_NORM
        if a.has_sinks:
            yield _SINKS
    if a.attends(layer):
        yield _PROJECTION
    if a.all_biases:
        yield _PROJECTION_BIAS
    yield from _norm(a, "behind attention", "post_self_attn_layernorm.weight")
    if not a.has_experts(layer):
        yield from _norm(a, "before mlp", "mlp.linear_fc1.layer_norm_weight")
        yield from (_FUSED_FC1 if "gate_up" in fused else _FC1, _FC2)
    else:
        assert a.mixture is not None
        yield from _norm(a, "before mlp", "pre_mlp_layernorm.weight")
        yield from _OTHER_MIXTURES.get(a.family, _QWEN_MIXTURE)
        if a.mixture.routing == "sigmoid":
            yield _ROUTING_BIAS
        if a.mixture.shared_width:
            yield from _GATED_SHARED_EXPERT if a.mixture.shared_is_gated else _SHARED_EXPERT
    yield from _norm(a, "behind mlp", "post_mlp_layernorm.weight")


def _tensor(
    rule: _Rule, architecture: Architecture, *, layer: int | None = None, expert: int | None = None
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
    return MegatronTensor(
        key=key,
        index=tuple(at for at, _ in places),
        stack=tuple(size for _, size in places),
        shape=(sum(run.num_rows for run in rows), *_shape_of_row(rule, architecture)),
        shard=rule.shard,
        num_parts=2 if rule.rows == "halves" else 1,
        num_blocks=3 if rule.rows == "groups" else len(rows),
        is_expert=expert is not None,
        has_padding=rule in (_EMBEDDING, _OUTPUT),
        rows=rows,
        layer=layer,
        expert=expert,
        is_fp32=rule is _ROUTING_BIAS,
    )


def _rows(rule: _Rule, names: list[str], a: Architecture, expert: int | None) -> Iterator[HfRows]:
    """What a tensor is made of; `expert` where the file has one tensor of all."""
    if rule.rows == "keys":
        assert a.delta_net is not None
        yield from _rows_by_key_head(names, a.delta_net, is_fused=rule is _FUSED_DELTA_IN)
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
    num_rows = _num_rows(rule, a)
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


def _num_rows(rule: _Rule, a: Architecture) -> int:
    """Rows of each part of a rule that is neither `groups` nor `keys`."""
    if a.latent is not None and (shape := _latent_shape(rule, a, a.latent)) is not None:
        return shape[0]
    if rule in (_EMBEDDING, _OUTPUT):
        return a.vocab_size
    if rule in _QK_NORM:
        return a.head_dim
    if rule in _SPANNING_QK_NORM:
        heads = a.num_attention_heads if rule is _SPANNING_QK_NORM[0] else a.num_query_groups
        return heads * a.head_dim
    if ".router." in rule.megatron:
        assert a.mixture is not None
        return a.mixture.num_experts
    if rule is _SINKS:
        return a.num_attention_heads
    if rule in (_DELTA_DECAY, _DELTA_TIME, _DELTA_NORM):
        assert a.delta_net is not None
        return a.delta_net.value_dim if rule is _DELTA_NORM else a.delta_net.num_value_heads
    if rule is _SHARED_GATE:
        return 1
    return _ffn_width(rule, a) if rule.rows == "halves" else a.hidden_size


def _shape_of_row(rule: _Rule, a: Architecture) -> tuple[int, ...]:
    """(columns,) of a matrix, () of a vector."""
    if rule.megatron.endswith(("norm.weight", "norm_weight", "bias", "softmax_offset", "A_log")):
        return ()
    if a.latent is not None and (shape := _latent_shape(rule, a, a.latent)) is not None:
        return shape[1:]
    if a.delta_net is not None and rule is _DELTA_CONVOLUTION:
        return 1, a.delta_net.kernel
    if a.delta_net is not None and rule is _DELTA_OUT:
        return (a.delta_net.num_value_heads * a.delta_net.value_dim,)
    if rule.megatron.endswith("linear_proj.weight"):
        return (a.num_attention_heads * a.value_dim,)
    return (_ffn_width(rule, a) if rule.megatron.endswith("linear_fc2.weight") else a.hidden_size,)


def _latent_shape(rule: _Rule, a: Architecture, latent: Latent) -> tuple[int, int] | None:
    """(rows, columns) of what latent attention alone has, the latter without meaning for norms; else None."""
    query_rank = latent.query_rank or 0
    queries = a.num_attention_heads * a.head_dim
    both = a.num_attention_heads * (a.head_dim - latent.rope_dim + latent.value_dim)
    return {
        _LATENT_QUERY: (queries, a.hidden_size),
        _QUERY_DOWN: (query_rank, a.hidden_size),
        _QUERY_NORM: (query_rank, 0),
        _QUERY_UP: (queries, query_rank),
        _LATENT_DOWN: (latent.rank + latent.rope_dim, a.hidden_size),
        _LATENT_NORM: (latent.rank, 0),
        _LATENT_UP: (both, latent.rank),
    }.get(rule)


def _ffn_width(rule: _Rule, a: Architecture) -> int:
    if a.mixture and ".shared_experts." in rule.megatron:
        return a.mixture.shared_width
    return a.mixture.dense_width if a.mixture and ".experts." not in rule.megatron else a.ffn_hidden_size
