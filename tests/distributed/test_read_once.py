"""What data-parallel ranks hold alike is read from the disk once, and is the same bits on all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.checkpoint_runs import Span, engines, held_state, open_store
from tests.distributed.test_conversion import run_config
from tests.hf_models import read_tensors, write_model
from tests.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a rank did.

    Args:
        read: tensors (of Hugging Face) or pieces (of a checkpoint) that it read from files.
        num_parts: that it holds.
        differing: names of those that are not what the files hold, bit for bit.
    """

    read: list[str]
    num_parts: int
    differing: list[str]


def load_files(hf: Path, parallel: dict, dtype: str) -> Loaded:
    from megatron.core import parallel_state

    from megatron_sftrl.engine.live_weights import live_weights, load_hf_weights
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.models.hf_weights import open_weights

    config = run_config(hf, parallel, dtype)
    context = initialize_parallel(config.parallel)
    architecture = architecture_of(config.model)
    policy = PolicyEngine(architecture, config, context)
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    read: list[str] = []
    with open_weights(hf) as weights:
        original = weights.read_into

        def read_into(target: torch.Tensor, name: str, part: tuple[slice, ...]) -> None:
            read.append(name)
            original(target, name, part)

        weights.read_into = read_into  # type: ignore[method-assign]
        load_hf_weights(policy.chunks, weights, architecture, context)
    stored, parts = read_tensors(hf), live_weights(policy.chunks, architecture).parts
    places = [(name, region, view) for name, of in parts.items() for region, view in of.items()]
    outcome = Loaded(
        read=read,
        num_parts=len(places),
        differing=[
            name
            for name, region, view in places
            if not torch.equal(view, stored[name][region.slices].to(view.dtype))
        ],
    )
    parallel_state.destroy_model_parallel()
    return outcome


# Ranks, layout, family, dtype, and the ranks that read nothing.
LAYOUTS: dict[str, tuple[int, dict[str, Any], str, str, set[int]]] = {
    "dp2": (2, {}, "qwen3", "fp32", {1}),
    "dp2, bf16, distributed optimizer": (2, {"distributed_optimizer": True}, "qwen2", "bf16", {1}),
    "cp2": (2, {"cp": 2}, "llama", "fp32", {1}),
    "tp2 dp2": (4, {"tp": 2}, "qwen3", "fp32", {2, 3}),
    "pp2 dp2": (4, {"pp": 2}, "qwen3", "fp32", {1, 3}),
    "ep2": (2, {"ep": 2}, "qwen3_moe", "fp32", set()),
    "ep2 dp4": (4, {"ep": 2}, "qwen3_moe", "bf16", {2, 3}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_hugging_face_are_read_once_and_bits_agree(name: str, tmp_path: Path) -> None:
    world_size, parallel, family, dtype, idle = LAYOUTS[name]
    hf = write_model(tmp_path / "hf", family, max_shard_size="20KB")
    ranks = run_ranks(world_size, load_files, hf, parallel, dtype)
    assert [each.differing for each in ranks] == [[]] * world_size
    assert {rank for rank, each in enumerate(ranks) if not each.read} == idle
    if family == "qwen3_moe":
        # Experts lie on a grid of their own: the second rank reads those that it alone holds, nothing else.
        assert all(".experts." in tensor for tensor in ranks[1].read)
        assert set(ranks[0].read).isdisjoint(ranks[1].read)
    else:
        assert all(len(each.read) == each.num_parts for each in ranks if each.read)


def load_broken(hf: Path) -> str:
    from megatron_sftrl.models import hf_weights

    original = hf_weights.read_part

    def read_part(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise hf_weights.UserError("model.safetensors was cut short")

    hf_weights.read_part = read_part
    try:
        load_files(hf, {}, "fp32")
    except hf_weights.UserError as error:
        return str(error)
    finally:
        hf_weights.read_part = original
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return "nothing is wrong"


def test_a_file_that_cannot_be_read_is_the_same_error_where_nothing_is_read(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", "qwen3")
    assert run_ranks(2, load_broken, hf, timeout_s=60) == ["model.safetensors was cut short"] * 2


def save(directory: str, span: Span) -> dict[str, torch.Tensor]:
    from megatron_sftrl.engine.checkpoint import TrainerState

    with engines(span) as (parallel, policy, reference):
        open_store(directory, parallel, span).save(TrainerState(step=0), policy, reference)
        return held_state(policy, reference)


def load(directory: str, span: Span, resumes: bool) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Keys of the pieces that this rank read, and what it holds then."""
    from megatron_sftrl.engine.checkpoint import format as checkpoint_format
    from megatron_sftrl.engine.checkpoint import load_weights

    keys: list[str] = []
    original = checkpoint_format.IndexReader.read_data

    def read_data(self: Any, plan: Any, planner: Any) -> Any:
        keys.extend(item.storage_index.fqn for item in plan.items)
        return original(self, plan, planner)

    checkpoint_format.IndexReader.read_data = read_data  # type: ignore[method-assign]
    try:
        with engines(span) as (parallel, policy, reference):
            with torch.no_grad():
                for parameter in (each for chunk in policy.chunks for each in chunk.parameters()):
                    parameter.fill_(float("nan"))
            store = open_store(directory, parallel, span)
            path = store.latest()
            assert path is not None
            if resumes:
                store.load(path, policy, reference)
            else:
                load_weights(policy.chunks, path, architecture=policy.architecture, parallel=parallel)
            return keys, held_state(policy, reference)
    finally:
        checkpoint_format.IndexReader.read_data = original  # type: ignore[method-assign]


SPANS = {
    "plain": Span(parallel={}, dtype="bf16", reference="moving_average"),
    "plain, fp32": Span(parallel={}, dtype="fp32", reference="moving_average"),
    "distributed": Span(parallel={"distributed_optimizer": True}, dtype="bf16"),
    "tp2": Span(parallel={"tp": 2}, dtype="fp32"),
}


@pytest.mark.parametrize("resumes", [False, True], ids=["weights", "all"])
@pytest.mark.parametrize("name", SPANS)
def test_a_checkpoint_is_read_once_and_bits_agree(name: str, resumes: bool, tmp_path: Path) -> None:
    span = SPANS[name]
    world_size = 2 * span.parallel.get("tp", 1)
    # Other weights than those that a new policy begins with.
    other = dataclasses.replace(span, model={**span.model, "init_std": 0.2})
    saved = run_ranks(world_size, save, str(tmp_path), other)
    loaded = run_ranks(world_size, load, str(tmp_path), span, resumes)
    for (_, state), truth in zip(loaded, saved, strict=True):
        for key, value in truth.items():
            if key.startswith("policy.") or (resumes and not key.startswith("rng")):
                assert torch.equal(state[key], value), key
    first, replica = ({key.split(".")[0] for key in loaded[rank][0]} for rank in (0, world_size // 2))
    # A generator of each rank; and of a distributed optimizer the share that no other rank holds.
    own = {"rng", *(["optimizer"] if name == "distributed" else [])} if resumes else set()
    assert replica == own
    assert first == own | {"policy"} | ({"optimizer"} if resumes else set()) | (
        {"reference"} if resumes and span.reference else set()
    )
