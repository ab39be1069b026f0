"""Live weights of every family, out of every layout of the trainer, into engines of every tp, bit for bit.

The truth are numbered Hugging Face tensors in which no value occurs twice, loaded into the trainer's shards;
what vLLM reads of the stream is cut by a transcription of its own loaders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sftrl.models.architecture import Architecture, DeltaNet, from_section
from megatron_sftrl.models.engine_shards import EngineLayout
from megatron_sftrl.models.tensors import hf_shapes
from tests.distributed.test_layouts import make_config, step_batches
from tests.distributed.test_tensor_table import FAMILIES
from tests.grid import cases
from tests.ranks import run_ranks
from tests.vllm_loaders import loaded_by_vllm

DENSE = ("llama", "mistral", "qwen2", "qwen3")
MIXTURES = ("mixtral", "qwen3_moe")
HYBRIDS: dict[Any, str] = {
    "qwen3_5_text": "qwen3",
    "qwen3_5_moe_text": "qwen3_moe",
    "qwen3_next": "qwen3_moe",
}
"""And what else their blocks are made of."""
SPLIT = {"tp": 2, "sequence_parallel": True}
TINY, AMPLE = 1000, 2**24
"""Buckets, bytes: below most tensors of these models, and above the whole model."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one update of one engine cost a rank, and what it had to cost."""

    received: int
    lacking: int
    peak: int
    largest: int
    num_rounds: int


def numbered(architecture: Architecture) -> dict[str, Tensor]:
    """Tensors in which no value occurs twice, exact in fp32."""
    first, tensors = 1, {}
    for name, shape in hf_shapes(architecture).items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + size, dtype=torch.float32).view(shape)
        first += size
    assert first < 2**24
    return tensors


def build(parallel: Any, run: Any, architecture: Architecture, hf: dict[str, Tensor]) -> list[Any]:
    """Chunks that hold the given Hugging Face tensors."""
    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.engine.megatron_config import transformer_config
    from megatron_sftrl.engine.model import build_model_chunks

    config = transformer_config(architecture, run.model, run.parallel, run.train, is_cuda=False)
    chunks = build_model_chunks(architecture, config, parallel)
    files: Any = SimpleNamespace(
        check_model=lambda architecture: None,
        read_into=lambda target, name, part: target.copy_(hf[name][part]),
    )
    load_hf_weights(chunks, files, architecture, parallel)
    return chunks


def assert_serves(
    items: dict[str, Tensor], hf: dict[str, Tensor], architecture: Architecture, tp: int, tp_rank: int
) -> None:
    """vLLM reads the right values, and everything that it does not read is NaN."""
    assert list(items) == list(hf)
    for name, tensor in items.items():
        assert tensor.shape == hf[name].shape, name
        assert tensor.is_contiguous()
        expected = loaded_by_vllm(name, hf[name], architecture, tp=tp, tp_rank=tp_rank)
        read = loaded_by_vllm(name, tensor, architecture, tp=tp, tp_rank=tp_rank)
        assert torch.equal(read, expected), name
        assert int(tensor.isnan().sum()) == tensor.numel() - read.numel(), name


def lacking_bytes(chunks: list[Any], architecture: Architecture, items: dict[str, Tensor]) -> int:
    """Bytes that were filled and that this rank does not hold, counted element by element."""
    from megatron_sftrl.engine.live_weights import live_weights

    missing = {name: ~tensor.isnan() for name, tensor in items.items()}
    for name, regions in live_weights(chunks, architecture).regions().items():
        for region in regions:
            missing[name][region.slices] = False
    return 4 * sum(int(mask.sum()) for mask in missing.values())


def as_hybrid(architecture: Architecture, family: Any) -> Architecture:
    """With gated delta nets in the first layer and every second one, whose sizes all differ."""
    net = DeltaNet(
        layers=tuple(range(0, architecture.num_layers, 2)),
        num_key_heads=4,
        num_value_heads=8,
        key_dim=3,
        value_dim=5,
        kernel=4,
    )
    mixture = architecture.mixture and replace(architecture.mixture, shared_width=16)
    gates: dict[str, Any] = {"has_output_gate": True, "norms_from_zero": True, "tie_embeddings": False}
    return replace(architecture, family=family, delta_net=net, mixture=mixture, **gates)


def reshard_families(
    layout: dict[str, Any], families: Sequence[str], engine_tps: Sequence[int], sizes: dict[str, Any]
) -> list[Update]:
    """Three updates for each family and engine, each of other weights, the last through tiny buckets."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.rollout.reshard import between_all_ranks

    updates: list[Update] = []
    parallel = initialize_parallel(make_config(layout).parallel)
    for family in families:
        others = HYBRIDS.get(family, family)
        run = make_config(layout, family=others, **{**FAMILIES[others], **sizes})
        assert run.model.architecture is not None
        architecture = from_section(run.model.architecture)
        architecture = as_hybrid(architecture, family) if family in HYBRIDS else architecture
        hf = numbered(architecture)
        chunks = build(parallel, run, architecture, hf)
        for tp in engine_tps:
            engines = EngineLayout(tp=tp, world_size=parallel.world_size)
            resharders = [
                between_all_ranks(
                    chunks,
                    architecture,
                    parallel,
                    engines,
                    bucket_bytes=bucket_bytes,
                    is_checked=True,
                    has_checksums=True,
                )
                for bucket_bytes in (AMPLE, TINY)
            ]
            for resharder, bucket_bytes in (
                (resharders[0], AMPLE),
                (resharders[0], AMPLE),
                (resharders[1], TINY),
            ):
                with resharder.stream() as stream:
                    # Kept until the end: a buffer that is used twice would show.
                    items = dict(stream)
                assert_serves(items, hf, architecture, tp, engines.tp_rank(parallel.rank))
                assert resharder.last_report is not None
                report = resharder.last_report
                assert report.num_tensors == len(hf)
                updates.append(
                    Update(
                        received=report.received_bytes,
                        lacking=lacking_bytes(chunks, architecture, items),
                        peak=report.peak_bytes - 2 * bucket_bytes,
                        largest=max(tensor.nbytes for tensor in hf.values()),
                        num_rounds=report.num_rounds,
                    )
                )
                hf = {name: -tensor for name, tensor in hf.items()}
                with torch.no_grad():
                    for chunk in chunks:
                        for parameter in chunk.parameters():
                            parameter.neg_()
    parallel_state.destroy_model_parallel()
    return updates


LAYOUTS = {
    "one process": (1, {}, DENSE + MIXTURES, (1,)),
    "tp2": (2, {"tp": 2}, (*DENSE, "qwen3_5_text"), (1, 2)),
    "pp2": (2, {"pp": 2}, (*DENSE, *HYBRIDS), (1, 2)),
    "3 + 1 layers": (2, {"pp": 2, "last_stage_layers": 1}, ("qwen3_moe",), (1, 2)),
    "vp2": (2, {"pp": 2, "vp": 2}, (*DENSE, "qwen3_moe"), (1, 2)),
    "dp2": (2, {}, DENSE, (1, 2)),
    "ep2": (2, {"ep": 2}, (*MIXTURES, "qwen3_next"), (1, 2)),
    "cp2 ep2": (2, {"cp": 2, "ep": 2}, ("mixtral",), (2,)),
    "tp2 etp2": (2, SPLIT, (*MIXTURES, "qwen3_5_moe_text"), (1, 2)),
    "tp2 etp1 ep2": (2, {**SPLIT, "etp": 1, "ep": 2}, MIXTURES, (1, 2)),
    # Engines of tp 4 over 2 key/value heads: two ranks read the same head.
    "tp2 pp2": (4, {"tp": 2, "pp": 2}, ("qwen2", "qwen3", "qwen3_5_text"), (1, 2, 4)),
    "tp2 etp1 ep2 pp2": (4, {**SPLIT, "etp": 1, "ep": 2, "pp": 2}, ("qwen3_moe", "qwen3_next"), (2, 4)),
}


@pytest.mark.parametrize("name", cases(LAYOUTS, rarely=["pp2", "tp2 pp2", "tp2 etp1 ep2"]))
def test_an_engine_of_any_tp_receives_its_share_of_every_tensor_bit_for_bit_update_after_update(
    name: str,
) -> None:
    world_size, layout, families, engine_tps = LAYOUTS[name]
    sizes = {"num_layers": 4 if "vp" in layout else 2}
    for updates in run_ranks(world_size, reshard_families, layout, families, engine_tps, sizes):
        assert len(updates) == len(families) * len(engine_tps) * 3
        for update in updates:
            assert update.received == update.lacking
            # A row is at most 384 bytes here, so that no single one exceeds the tiny bucket.
            assert update.peak <= update.largest
        assert len({update.num_rounds for update in updates}) > 1 or not any(
            update.received for update in updates
        )


@pytest.mark.parametrize(("layout", "tp"), [({"tp": 2}, 2), ({}, 1), ({**SPLIT, "etp": 2}, 2)])
def test_nothing_travels_where_the_shards_line_up(layout: dict[str, Any], tp: int) -> None:
    family = "mixtral" if "etp" in layout else "llama"
    # 128 rows: the trainer and vLLM, which pads to 64, cut the vocabulary alike.
    sizes = {"vocab_size": 128, "num_layers": 2}
    for updates in run_ranks(2, reshard_families, layout, (family,), (tp,), sizes):
        assert {(update.received, update.lacking, update.num_rounds) for update in updates} == {(0, 0, 1)}


@pytest.mark.parametrize("defect", ["lost", "twice", "dtype"])
def test_a_parameter_that_is_missing_or_ambiguous_is_refused_everywhere_before_anything_moves(
    defect: str,
) -> None:
    messages = run_ranks(2, refused_construction, defect)
    assert len(set(messages)) == 1
    expected = {
        "lost": r"model.layers.1.mlp.up_proj.weight [48, 32]: 768 elements are held by no rank",
        "twice": "model.norm.weight [32]: the part [(0, 30)] overlaps another",
        "dtype": "weights of one dtype are expected, got ['torch.bfloat16', 'torch.float32']",
    }
    assert expected[defect] in messages[0]


def refused_construction(defect: str) -> str:
    """The message of a Resharder over a policy of which rank 1 tells something wrong."""
    from megatron_sftrl.models.tensors import Region
    from megatron_sftrl.rollout import reshard

    parallel, architecture, chunks, _ = small_policy({"tp": 2})
    if parallel.rank == 1 and defect == "dtype":
        chunks[0].decoder.final_layernorm.weight.data = chunks[0].decoder.final_layernorm.weight.bfloat16()
    real = reshard.live_weights

    def wrong(*arguments: Any) -> Any:
        found = real(*arguments)
        if parallel.rank == 1 and defect == "lost":
            del found.parts["model.layers.1.mlp.up_proj.weight"]
        if parallel.rank == 1 and defect == "twice":
            (whole,) = found.parts["model.norm.weight"].values()
            found.parts["model.norm.weight"] = {Region.of((30,)): whole[:30]}
        return found

    reshard.live_weights = wrong
    try:
        with pytest.raises(ValueError, match=r"expected|make up the model") as caught:
            reshard.between_all_ranks(
                chunks, architecture, parallel, EngineLayout(tp=1, world_size=2), bucket_bytes=AMPLE
            )
    finally:
        reshard.live_weights = real
        destroy()
    return str(caught.value)


def small_policy(layout: dict[str, Any]) -> tuple[Any, Architecture, list[Any], dict[str, Tensor]]:
    from megatron_sftrl.engine.parallel import initialize_parallel

    run = make_config(layout, family="llama")
    assert run.model.architecture is not None
    architecture = from_section(run.model.architecture)
    parallel = initialize_parallel(run.parallel)
    hf = numbered(architecture)
    return parallel, architecture, build(parallel, run, architecture, hf), hf


def destroy() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def corrupted_update(has_checksums: bool) -> tuple[str, int]:
    """The error of an update in which one bit changes on the way to rank 1, and how many values are wrong."""
    from megatron_sftrl.rollout import reshard
    from megatron_sftrl.rollout import reshard as reshard_messages

    parallel, architecture, chunks, hf = small_policy({"tp": 2})
    resharder = reshard.between_all_ranks(
        chunks,
        architecture,
        parallel,
        EngineLayout(tp=1, world_size=2),
        bucket_bytes=AMPLE,
        has_checksums=has_checksums,
    )
    real: Any = reshard_messages.Exchange.finish

    def noisy(exchange: Any) -> Any:
        received = real(exchange)
        if parallel.rank == 1:
            piece = next(iter(received.values.values()))
            piece.view(torch.int32).view(-1)[piece.numel() // 2] ^= 1
        return received

    reshard_messages.Exchange.finish = noisy
    items: dict[str, Tensor] = {}
    try:
        with resharder.stream() as stream:
            items.update(stream)
        return "", sum(int((items[name] != hf[name]).sum()) for name in hf)
    except RuntimeError as error:
        assert resharder.last_report is None
        return str(error), sum(int((items[name] != hf[name]).sum()) for name in hf)
    finally:
        reshard_messages.Exchange.finish = real
        destroy()


def test_a_bit_that_changes_on_the_way_stops_the_update_on_every_rank() -> None:
    assert run_ranks(2, corrupted_update, False) == [("", 0), ("", 1)]
    (message, wrong), (same_message, same_wrong) = run_ranks(2, corrupted_update, True)
    assert (wrong, same_wrong) == (0, 1)
    assert message == same_message
    assert "did not arrive as it was sent" in message


def interrupted_update(how: str) -> str:
    """The error of an update that rank 1's engine does not take to the end."""
    from megatron_sftrl.rollout.reshard import between_all_ranks

    parallel, architecture, chunks, _ = small_policy({"pp": 2})
    resharder = between_all_ranks(
        chunks, architecture, parallel, EngineLayout(tp=1, world_size=2), bucket_bytes=TINY
    )

    def load() -> None:
        with resharder.stream() as stream:
            for number, (name, _) in enumerate(stream):
                if parallel.rank == 1 and number == 4 and how == "refuses":
                    raise KeyError(name)
                if parallel.rank == 1 and number == 4 and how == "leaves":
                    break

    try:
        with pytest.raises(RuntimeError, match="rollout engine") as caught:
            load()
        assert resharder.last_report is None
    finally:
        destroy()
    return str(caught.value)


@pytest.mark.parametrize("how", ["refuses", "leaves"])
def test_an_engine_that_does_not_take_every_tensor_stops_every_rank_and_nobody_waits(how: str) -> None:
    messages = run_ranks(2, interrupted_update, how, timeout_s=60)
    assert len(set(messages)) == 1
    expected = {
        "refuses": "the rollout engine stopped after 5 of 39 tensors: KeyError: 'model.layers.0.",
        "leaves": "the rollout engine took 5 of 39 tensors; the first it left is model.layers.0.",
    }
    assert expected[how] in messages[0]


def trained_streams() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a Resharder made before the first step streams before and after it."""
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.rollout.reshard import between_all_ranks

    overlapped = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    run = make_config(overlapped, family="llama")
    assert run.model.architecture is not None
    architecture = from_section(run.model.architecture)
    parallel = initialize_parallel(run.parallel)
    policy = PolicyEngine(architecture, run, parallel)
    resharder = between_all_ranks(
        policy.chunks, architecture, parallel, EngineLayout(tp=1, world_size=2), bucket_bytes=AMPLE
    )
    streams = []
    for step in range(2):
        batches = step_batches(0, num_groups=2, group=parallel.rank, multiple=1, num_microbatches=1)
        if step:
            policy.forward_backward(batches, build_loss("sft", {}))
            policy.optim_step(1, num_steps=2)
            policy.gather_parameters()
        with resharder.stream() as stream:
            streams.append(dict(stream))
    destroy()
    return streams[0], streams[1]


def test_a_step_of_a_sharded_optimizer_reaches_every_element_of_the_next_update() -> None:
    (before, after), (_, other_after) = run_ranks(2, trained_streams)
    for name in before:
        assert torch.equal(after[name], other_after[name]), name
        # Adam moves every element that has a gradient; rows of tokens that do not occur have none.
        assert (after[name] != before[name]).any(), name


BUCKET = 2**20


def measured_memory() -> tuple[int, int, int, int]:
    """Most bytes of tensors alive at once in an update, as reported, the bound, and those of all weights."""
    from megatron_sftrl.engine.megatron_config import transformer_config
    from megatron_sftrl.engine.model import build_model_chunks, initialize_weights
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.rollout.reshard import between_all_ranks

    run = make_config({"tp": 2}, family="llama", hidden_size=256, ffn_hidden_size=1024, vocab_size=4096)
    assert run.model.architecture is not None
    architecture = from_section(run.model.architecture)
    parallel = initialize_parallel(run.parallel)
    config = transformer_config(architecture, run.model, run.parallel, run.train, is_cuda=False)
    chunks = build_model_chunks(architecture, config, parallel)
    initialize_weights(chunks, architecture, seed=0)
    resharder = between_all_ranks(
        chunks, architecture, parallel, EngineLayout(tp=1, world_size=2), bucket_bytes=BUCKET
    )
    with (
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
        resharder.stream() as stream,
    ):
        for _, tensor in stream:
            del tensor  # as an engine that has copied it
    results: Any = profile.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    sizes = [4 * torch.Size(shape).numel() for shape in hf_shapes(architecture).values()]
    bound = 2 * BUCKET + max(sizes)
    assert resharder.last_report is not None
    destroy()
    return peak, resharder.last_report.peak_bytes, bound, sum(sizes)


def test_an_update_needs_at_most_two_buckets_and_the_largest_tensor() -> None:
    for peak, reported, bound, whole in run_ranks(2, measured_memory):
        assert whole > 3 * bound
        assert reported <= bound
        # 64 KiB for the few numbers that the ranks exchange at the end.
        assert reported <= peak <= reported + 2**16
