"""Which part of each Hugging Face tensor one rank of a tensor-parallel rollout engine reads.

The rules are those of vLLM 0.32 (`layers/linear.py`, `layers/vocab_parallel_embedding.py`,
`layers/fused_moe/routed_experts.py`): its weight loaders take a tensor of the whole shape and narrow it to
one region for each rank.

    q_proj                      query heads, an equal run of them for each rank
    k_proj, v_proj              key/value heads; with more ranks than heads, neighbours read the same head
    gate, up (also of experts)  an equal run of rows
    o_proj, down                an equal run of columns
    embedding, output layer     the vocabulary padded to a multiple of 64 is cut evenly, padding is not read
    norms, routers              everything, though of a MiniMax-M2's norms of q and k it keeps its heads' part
    sinks                       an equal run of query heads
    matrices of all experts     the same rows or columns of each expert
    fused q/k/v and gate/up     everything: of each part an equal run of rows, which are no one region
    gated delta nets            rows (of out_proj columns) of an equal run of key heads, of their value heads;
                                of Qwen3.5's in_proj_qkv and of convolutions everything, as of fused q/k/v
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, padded_vocab_size
from megatron_sftrl.models.tensors import MegatronTensor, Region, hf_boxes, megatron_tensors

_WHOLE = (
    ".qkv_proj.weight", ".gate_up_proj.weight", "_norm.weight", ".in_proj_qkv.weight", ".conv1d.weight",
)  # fmt: skip
VOCAB_MULTIPLE = 64
"""vLLM's DEFAULT_VOCAB_PADDING_SIZE, whatever the tensor parallel size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayout:
    """How a job's ranks form rollout engines: runs of `tp` consecutive ranks, one replica each.

    Raises:
        UserError: the ranks do not form whole replicas.
    """

    tp: int
    world_size: int

    def __post_init__(self) -> None:
        if self.tp < 1 or self.world_size % self.tp:
            raise UserError(
                f"{self.world_size} processes cannot form rollout engines of tp {self.tp}: choose a tp that "
                "divides the number of processes"
            )

    @property
    def num_replicas(self) -> int:
        """Engines that generate side by side."""
        return self.world_size // self.tp

    def tp_rank(self, rank: int) -> int:
        """Place of a global rank in its replica."""
        return rank % self.tp

    def replica(self, rank: int) -> int:
        return rank // self.tp

    def replica_ranks(self, replica: int) -> tuple[int, ...]:
        """Global ranks of a replica, in the order of their tp_rank."""
        return tuple(range(replica * self.tp, (replica + 1) * self.tp))


def engine_regions(architecture: Architecture, *, tp: int, tp_rank: int) -> dict[str, Region]:
    """The region of every Hugging Face tensor that rank `tp_rank` of an engine reads, in the model's order.

    Returns:
        One region for each name of `hf_boxes(architecture)`; empty where only padding falls to the rank.
    Raises:
        UserError: heads, widths or vocabulary that an engine of this tp cannot cut.
    """
    check_cut(architecture, tp)
    regions: dict[str, Region] = {}
    boxes = hf_boxes(architecture)
    for tensor in megatron_tensors(architecture):
        if (run := tensor.rows[0]).expert is not None:
            if run.name not in regions:
                regions[run.name] = _region_of_all(tensor, Region.of(boxes[run.name]), tp, tp_rank)
            continue
        for name, rows in _rows_of_names(tensor).items():
            whole = Region.of((rows, *tensor.shape[1:]))
            regions[name] = _region(tensor, name, whole, architecture, tp, tp_rank)
    return regions


def check_cut(architecture: Architecture, tp: int) -> None:
    """Refuse a tp that cannot cut the heads, widths or vocabulary: UserError."""
    a = architecture
    problems = []
    if a.delta_net and a.delta_net.num_key_heads % tp:
        problems.append(f"linear_num_key_heads = {a.delta_net.num_key_heads} is not a multiple of it")
    if a.num_attention_heads % tp:
        problems.append(f"num_attention_heads = {a.num_attention_heads} is not a multiple of it")
    if a.num_query_groups % tp and tp % a.num_query_groups:
        problems.append(f"num_query_groups = {a.num_query_groups} is neither a multiple nor a divisor of it")
    if a.ffn_hidden_size % tp:
        problems.append(f"ffn_hidden_size = {a.ffn_hidden_size} is not a multiple of it")
    if a.mixture and a.mixture.shared_width % tp:
        problems.append(f"the width of the shared expert, {a.mixture.shared_width}, is not a multiple of it")
    if a.mixture and a.mixture.dense_width % tp:
        problems.append(f"the width of the first MLPs, {a.mixture.dense_width}, is not a multiple of it")
    padded = padded_vocab_size(a.vocab_size, 1, multiple=VOCAB_MULTIPLE)
    if padded % tp:
        problems.append(f"the vocabulary padded to {padded} is not a multiple of it")
    if problems:
        raise UserError(
            f"a rollout engine of tp {tp} cannot hold this model: {'; '.join(problems)}; choose another tp"
        )


def _rows_of_names(tensor: MegatronTensor) -> dict[str, int]:
    """Rows of each Hugging Face tensor that a Megatron tensor is made of."""
    rows: dict[str, int] = {}
    for run in tensor.rows:
        rows[run.name] = rows.get(run.name, 0) + run.num_rows
    return rows


def _region(
    tensor: MegatronTensor, name: str, whole: Region, architecture: Architecture, tp: int, tp_rank: int
) -> Region:
    rows = whole.stop[0]
    if tensor.shard is None or name.endswith(_WHOLE):
        return whole
    if tensor.shard == "columns":
        return whole.along(1, *_run(whole.stop[1], tp, tp_rank))
    if tensor.has_padding:
        rows = padded_vocab_size(rows, 1, multiple=VOCAB_MULTIPLE)
    elif ".k_proj." in name or ".v_proj." in name:
        heads = min(tp, architecture.num_query_groups)
        return whole.along(0, *_run(rows, heads, tp_rank * heads // tp))
    return whole.along(0, *_run(rows, tp, tp_rank))


def _region_of_all(tensor: MegatronTensor, whole: Region, tp: int, tp_rank: int) -> Region:
    """Of a tensor of all experts."""
    if tensor.shard is None:
        return whole
    dim = 1 if tensor.shard == "columns" else len(whole.stop) - (1 if tensor.rows[0].half is None else 2)
    return whole.along(dim, *_run(whole.stop[dim], tp, tp_rank))


def _run(size: int, parts: int, part: int) -> tuple[int, int]:
    length = size // parts
    return part * length, (part + 1) * length
