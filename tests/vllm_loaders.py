"""What vLLM 0.32 keeps of a Hugging Face tensor on one tensor-parallel rank, transcribed from its loaders.

Written beside our own rule on purpose: `layers/linear.py` (ColumnParallelLinear, MergedColumnParallelLinear,
QKVParallelLinear, RowParallelLinear.weight_loader), `layers/vocab_parallel_embedding.py` (_get_indices,
weight_loader), `layers/fused_moe/routed_experts.py` (_load_w13, _load_w2),
`models/gpt_oss.py` (_load_weights_other), `layers/mamba/gdn/qwen_gdn_linear_attn.py` (create_qkvz_proj,
create_ba_proj, conv1d with mamba_v2_sharded_weight_loader, A_log and dt_bias with sharded_weight_loader).
"""

from __future__ import annotations

from torch import Tensor

from megatron_sftrl.models.architecture import Architecture


def loaded_by_vllm(name: str, weight: Tensor, architecture: Architecture, *, tp: int, tp_rank: int) -> Tensor:
    """The part of `weight` that is copied into the rank's parameter, a view."""
    if architecture.family == "gpt_oss" and ".experts." in name:
        per_rank = architecture.ffn_hidden_size // tp
        if "gate_up_proj" in name:
            return weight.narrow(-1, 2 * tp_rank * per_rank, 2 * per_rank)
        return weight if name.endswith("bias") else weight.narrow(1, tp_rank * per_rank, per_rank)
    if name.endswith("sinks"):
        heads = architecture.num_attention_heads // tp
        return weight.narrow(0, tp_rank * heads, heads)
    last = name.rsplit(".", 2)[-2]
    if ".linear_attn." in name:
        return _of_delta_net(name.split(".linear_attn.")[1], weight, tp, tp_rank)
    if name.endswith("o_proj.bias") or ".router." in name:
        return weight
    if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
        return _vocab_parallel(weight, tp, tp_rank)
    if last in ("q_proj", "q_b_proj"):
        # With attn_output_gate QKVParallelLinear is told of twice as many query heads.
        num_heads = architecture.num_attention_heads * (1 + architecture.has_output_gate) // tp
        shard_size = num_heads * architecture.head_dim
        return weight.narrow(0, tp_rank * shard_size, shard_size)
    if last in ("k_proj", "v_proj"):
        return _key_or_value(weight, architecture, tp, tp_rank)
    if last in ("gate_proj", "up_proj", "w1", "w3"):
        shard_size = weight.shape[0] // tp
        return weight.narrow(0, tp_rank * shard_size, shard_size)
    if last in ("o_proj", "down_proj", "w2"):
        shard_size = weight.shape[1] // tp
        return weight.narrow(1, tp_rank * shard_size, shard_size)
    if last == "kv_b_proj":
        shard_size = weight.shape[0] // tp
        return weight.narrow(0, tp_rank * shard_size, shard_size)
    if last in ("q_a_proj", "kv_a_proj_with_mqa"):
        return weight  # ReplicatedLinear, DeepSeekV2FusedQkvAProjLinear
    if last in ("qkv_proj", "gate_up_proj"):
        return weight  # it narrows each of the parts inside
    assert (
        "e_score_correction_bias" in name
        or last.endswith("norm")
        or last.endswith("gate")
        or "layernorm" in last
    ), name
    return weight


def _of_delta_net(name: str, weight: Tensor, tp: int, tp_rank: int) -> Tensor:
    if name in ("A_log", "dt_bias"):
        shard_size = weight.shape[0] // tp
        return weight.narrow(0, tp_rank * shard_size, shard_size)
    if name in ("in_proj_qkv.weight", "conv1d.weight", "norm.weight"):
        return weight  # of q, k and v each a run of rows, which are no one region; the norm is not cut
    if name == "out_proj.weight":
        shard_size = weight.shape[1] // tp
        return weight.narrow(1, tp_rank * shard_size, shard_size)
    assert name in (
        "in_proj_qkvz.weight",  # one output size, in which the parts of each key head are together
        "in_proj_ba.weight",
        "in_proj_z.weight",
        "in_proj_b.weight",
        "in_proj_a.weight",
    ), name
    shard_size = weight.shape[0] // tp
    return weight.narrow(0, tp_rank * shard_size, shard_size)


def _key_or_value(weight: Tensor, architecture: Architecture, tp: int, tp_rank: int) -> Tensor:
    total_num_kv_heads = architecture.num_query_groups
    if tp >= total_num_kv_heads:
        num_kv_heads, num_kv_head_replicas = 1, tp // total_num_kv_heads
    else:
        num_kv_heads, num_kv_head_replicas = total_num_kv_heads // tp, 1
    shard_size = num_kv_heads * architecture.head_dim
    return weight.narrow(0, tp_rank // num_kv_head_replicas * shard_size, shard_size)


def _vocab_parallel(weight: Tensor, tp: int, tp_rank: int) -> Tensor:
    org_vocab_size = weight.shape[0]
    per_partition = (org_vocab_size + 63) // 64 * 64 // tp
    start = min(tp_rank * per_partition, org_vocab_size)
    end = min((tp_rank + 1) * per_partition, org_vocab_size)
    return weight.narrow(0, start, end - start)
