"""Operations, messages and time against published formulas, and against what torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sftrl.apps.plan.activations import chunks_in_flight, microbatch_of
from megatron_sftrl.apps.plan.job import (
    Hardware,
    attention_flops,
    block_flops,
    head_flops,
    model_flops,
    parse_bytes,
    workload_of,
)
from megatron_sftrl.apps.plan.model_state import Grid, grid_of
from megatron_sftrl.apps.plan.step_time import StepEstimate, block_traffic, estimate_step, state_traffic
from megatron_sftrl.config.schema import ArchitectureSection, ParallelSection, RunConfig
from megatron_sftrl.models.architecture import Architecture, from_section, num_parameters
from tests.unit.config.example import example

H100 = Hardware(gpu_memory=80e9)


def architecture(**sizes: object) -> Architecture:
    section = example().model.architecture
    assert section is not None
    return from_section(ArchitectureSection.model_validate({**section.model_dump(), **sizes}))


def run_in(*overrides: str, **sizes: int) -> tuple[RunConfig, Grid]:
    parallel = ParallelSection.model_validate({**sizes, "sequence_parallel": sizes.get("tp", 1) > 1})
    run = example("model.dtype=bf16", "data.max_length=256", "batch.global_size=64", *overrides)
    run = run.model_copy(update={"parallel": parallel})
    return run, grid_of(parallel, 64)


def estimate(*overrides: str, hardware: Hardware = H100, **sizes: int) -> StepEstimate:
    run, grid = run_in(*overrides, **sizes)
    return estimate_step(architecture(num_layers=8, hidden_size=512), run, grid, hardware)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_operations_are_those_that_torch_counts_in_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    common = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "head_dim": 16,
        "attn_implementation": "eager",
    }
    if family == "llama":
        ours = architecture(family="llama", num_layers=2, num_attention_heads=4, num_query_groups=2)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    else:
        experts = {"num_experts": 4, "experts_per_token": 2}
        ours = architecture(
            family="qwen3_moe", num_layers=2, num_attention_heads=4, num_query_groups=2, **experts
        )
        theirs = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
        model = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**common, **theirs, experts_implementation="eager")
        )
    tokens = 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 101, (1, tokens)))
    found = counter.get_total_flops()
    # Eager attention computes all scores, ours counts the half that is causal.
    attention = 2 * 2 * tokens * tokens * 4 * 16 * 2
    rotary = 2 * tokens * 8
    expected = 2 * block_flops(ours, tokens=tokens, length=tokens) + head_flops(ours, tokens=tokens)
    assert found == pytest.approx(expected + attention / 2, abs=rotary)


def test_training_takes_six_operations_a_parameter_and_token_and_attention() -> None:
    a = architecture()
    embedding = a.vocab_size * a.hidden_size
    norms = num_parameters(a) - 2 * embedding
    assert norms > 0
    matrices = a.num_layers * (a.hidden_size * 64 * 2 + a.hidden_size * 32 * 2 + 3 * a.hidden_size * 96)
    attention = 6.0 * a.num_layers * 128 * 64  # half of 12 L T H
    counted = model_flops(a, tokens=1, length=128, has_frozen_matrices=False)
    assert counted == 6.0 * (matrices + embedding) + attention
    frozen = model_flops(a, tokens=1, length=128, has_frozen_matrices=True)
    assert frozen == 4.0 * (matrices + embedding) + attention


def test_the_utilisation_is_the_operations_over_time_and_peak() -> None:
    found = estimate("loss={name: sft}", "reference=null", tp=2)
    a = architecture(num_layers=8, hidden_size=512)
    useful = model_flops(a, tokens=64 * 256, length=256, has_frozen_matrices=False)
    assert found.utilisation == pytest.approx(useful / (found.total * 64 * 989e12))
    assert 0 < found.utilisation < H100.efficiency


def test_the_bubble_is_the_published_one() -> None:
    # (p - 1) / v of m + (p - 1) / v micro-batches (arXiv:2104.04473); dp is 16, m is 4.
    assert estimate(pp=4).bubble == pytest.approx(3 / (4 + 3))
    assert estimate(pp=4, vp=2).bubble == pytest.approx(1.5 / (4 + 1.5))
    assert estimate().bubble == 0


def test_recomputation_costs_one_more_forward_of_the_blocks() -> None:
    fast = Hardware(gpu_memory=80e9, nvlink=1e30, network=1e30, memory_bandwidth=1e30)
    plain, full = (
        estimate(f"train.recompute={how}", "loss={name: sft}", "reference=null", hardware=fast)
        for how in ("none", "full")
    )
    a = architecture(num_layers=8, hidden_size=512)
    blocks, head = 8 * block_flops(a, tokens=1, length=256), head_flops(a, tokens=1)
    ratio = full.seconds["forward and backward"] / plain.seconds["forward and backward"]
    assert ratio == pytest.approx((4 * blocks + 3 * head) / (3 * blocks + 3 * head))


def test_products_in_eight_bits_run_at_their_rate_and_their_factors_are_cast() -> None:
    tokens, a = 256, architecture(num_layers=8, hidden_size=512)
    fast = replace(H100, memory_bandwidth=1e30)
    kept, eight = (estimate(*words, hardware=fast) for words in ([], ["train.fp8={}"]))
    products = block_flops(a, tokens=tokens, length=256) - attention_flops(a, tokens=tokens, length=256)
    # Forward, twice that backward, and the reference's forward.
    saved = 4 * kept.num_microbatches * 8 * products / (0.6 * 989e12) * (1 - 989 / 1979)
    assert kept.total - eight.total == pytest.approx(saved)
    cast = estimate("train.fp8={}").total - estimate().total - (eight.total - kept.total)
    query, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    forward = 2 * 512 + query + a.ffn_hidden_size
    backward = 2 * 512 + query + 2 * keys + 2 * a.ffn_hidden_size
    elements = kept.num_microbatches * 8 * tokens * (2 * forward + backward)
    assert cast == pytest.approx(4 * elements / (0.6 * 3.35e12))


def test_an_offloaded_optimizer_costs_the_link_and_the_hosts_memory() -> None:
    words = ["optim={lr: 1e-5, cpu_offload: 1}"]
    plain, away = estimate().seconds["optimizer"], estimate(*words).seconds["optimizer"]
    size = 16 * num_parameters(architecture(num_layers=8, hidden_size=512))
    assert away == pytest.approx(2 * size / (75e9 * 0.6) + size / 2 / 10e9)
    assert away > 20 * plain


def test_every_micro_batch_adds_a_gradient_of_every_weight_to_the_steps() -> None:
    a = architecture(num_layers=8, hidden_size=512)
    free = estimate(hardware=replace(H100, memory_bandwidth=1e30))
    paid = estimate()
    name = "forward and backward"
    seconds = paid.num_microbatches * 8 * num_parameters(a) / (3.35e12 * 0.6)  # fp32, read and written
    assert paid.seconds[name] - free.seconds[name] == pytest.approx(seconds)
    torch = estimate(hardware=replace(H100, kernels="torch"))
    assert torch.seconds[name] - free.seconds[name] == pytest.approx(seconds * 12 / 8)


def test_recomputing_some_blocks_costs_their_share() -> None:
    kept, some, every = (
        estimate(*words).seconds["forward and backward"]
        for words in ([], ["train.recompute=full", "train.recompute_layers=2"], ["train.recompute=full"])
    )
    assert some - kept == pytest.approx((every - kept) * 2 / 8)


def test_recomputing_an_mlp_costs_its_operations_and_messages_and_a_swiglu_its_bytes() -> None:
    tokens, a = 256, architecture(num_layers=8, hidden_size=512)
    kept = estimate(tp=2)
    mlp, act = (
        estimate("train.recompute=selective", f"train.recompute_modules=[{name}]", tp=2)
        for name in ("mlp", "mlp_act")
    )
    updates = kept.num_microbatches * 8
    products = 6.0 * tokens * 512 * a.ffn_hidden_size / (989e12 * 0.6 * 2)
    messages = 2 * tokens * 512 * 2 / 2 / (450e9 * 0.8)
    assert mlp.total - kept.total == pytest.approx(updates * (products + messages))
    moved = 3 * tokens * a.ffn_hidden_size // 2 * 2
    assert act.total - kept.total == pytest.approx(updates * moved / (3.35e12 * 0.6))


def test_the_stage_that_takes_longest_sets_the_pace() -> None:
    """The output layer of a large vocabulary, on a last stage with as many blocks and with fewer."""
    a = architecture(num_layers=8, hidden_size=512, vocab_size=4096)
    seconds = []
    for ends in ({}, {"first_stage_layers": 5, "last_stage_layers": 3}, {"last_stage_layers": 1}):
        run, grid = run_in(pp=2, **ends)
        seconds.append(estimate_step(a, run, grid, H100).seconds["forward and backward"])
    assert seconds[1] < seconds[0] < seconds[2]


def test_gradients_in_bf16_are_half_the_messages() -> None:
    words = ("parallel.distributed_optimizer=true",)
    a = architecture()
    run, grid = run_in(*words)
    parallel = run.parallel.model_copy(update={"distributed_optimizer": True})
    whole = run.model_copy(update={"parallel": parallel})
    half = run.model_copy(update={"parallel": parallel.model_copy(update={"grad_reduce_dtype": "bf16"})})
    sent = [state_traffic(a, each, grid, stage=0).dense for each in (whole, half)]
    assert sent[1] == pytest.approx(sent[0] * 4 / 6)


def test_a_slow_network_costs_only_groups_that_leave_the_node() -> None:
    slow = replace(H100, network=H100.network / 100)
    inside, outside = ({"tp": 8}, {"tp": 8, "cp": 2})
    assert estimate(hardware=slow, **inside).seconds["forward and backward"] == pytest.approx(
        estimate(**inside).seconds["forward and backward"]
    )
    assert estimate(hardware=slow, **outside).total > 2 * estimate(**outside).total


def test_gradients_and_weights_are_sent_as_a_ring_sends_them() -> None:
    a = architecture()
    run, grid = run_in("parallel.distributed_optimizer=true")
    assert grid.dp == 64
    sharded = run.model_copy(
        update={"parallel": run.parallel.model_copy(update={"distributed_optimizer": True})}
    )
    share = 63 / 64
    assert state_traffic(a, run, grid, stage=0).dense == pytest.approx(8 * num_parameters(a) * share)
    assert state_traffic(a, sharded, grid, stage=0).dense == pytest.approx(6 * num_parameters(a) * share)


def test_experts_exchange_every_visit_of_a_token_that_lives_elsewhere() -> None:
    a = architecture(family="qwen3_moe", num_experts=8, experts_per_token=2)
    run, grid = run_in(ep=4)
    batch = microbatch_of(run, grid, "torch")
    forward, backward = block_traffic(a, grid, batch).ep
    assert forward == backward == 2 * batch.tokens * 2 * a.hidden_size * 2 * 3 / 4


def test_sequences_fill_micro_batches_and_every_rank_runs_as_many() -> None:
    run, grid = run_in("batch.packing=true", "batch.max_tokens=1024", pp=2, vp=2)
    assert grid.dp == 32
    # 64 sequences, 4 a micro-batch: 16 micro-batches for 32 ranks, in pairs for the virtual pipeline.
    work = workload_of(run, grid)
    assert (work.num_microbatches, work.microbatch_tokens) == (2, 1024)
    short = workload_of(run, grid, mean_length=64)
    assert (short.num_microbatches, short.microbatch_tokens, short.length) == (2, 1024, 64)


def test_the_first_stage_keeps_most_micro_batches() -> None:
    _, grid = run_in(pp=4)
    assert [chunks_in_flight(grid, stage=s, num_microbatches=8) for s in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight(grid, stage=0, num_microbatches=2) == 2
    _, interleaved = run_in(pp=4, vp=2)
    assert [chunks_in_flight(interleaved, stage=s, num_microbatches=8) for s in (0, 3)] == [11, 5]


def test_sizes_are_read_with_their_unit() -> None:
    assert parse_bytes("80GB") == 80e9
    assert parse_bytes("79.5 GiB") == 79.5 * 2**30
