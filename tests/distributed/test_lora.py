"""Adapters in several layouts, beside what tests/contract/test_peft_agrees.py says of their training."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.engine_outputs import engine_config
from tests.grid import cases
from tests.hf_models import read_tensors, write_model
from tests.ranks import run_ranks

LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
SCALE = 2.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("lora") / "base", "qwen2")


def policy_over(directory: Path, parallel: dict, lora: dict, **more: Any) -> Any:
    """The policy with the weights of `directory`, and the adapters that drawn() gives."""
    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.models.hf_weights import open_weights

    values = {**engine_config(directory, parallel, "fp32").model_dump(), "lora": lora, **more}
    config = type(engine_config(directory, parallel, "fp32")).model_validate(values)
    architecture = architecture_of(config.model)
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture, config, context)
    with open_weights(directory) as weights:
        load_hf_weights(policy.chunks, weights, architecture, context)
    draw_adapters(policy.chunks)
    policy.reload_optimizer_weights()
    return policy, config


@torch.no_grad()
def draw_adapters(chunks: Any) -> None:
    from megatron_sftrl.engine.lora import adapters_of

    for adapter in adapters_of(chunks):
        for _, place in adapter.places():
            assert place.data is not None
            place.data.copy_(drawn(place.key, place.global_shape)[place.global_slice()])


def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    """The whole adapter of that name."""
    generator = torch.Generator().manual_seed(sum(key.encode()))
    return torch.randn(shape, generator=generator) * 0.1


def streamed(directory: Path, parallel: dict, lora: dict, tp: int) -> dict[str, Tensor]:
    """What an engine of this tp is sent; the weights under the adapters stay, bit for bit."""
    from megatron.core import parallel_state

    from megatron_sftrl.models.engine_shards import EngineLayout
    from megatron_sftrl.rollout.reshard import between_all_ranks

    policy, _ = policy_over(directory, parallel, lora)
    before = [weight.clone() for weight in policy.chunks[0].parameters()]
    layout = EngineLayout(tp=tp, world_size=policy.parallel.world_size)
    resharder = between_all_ranks(
        policy.chunks,
        policy.architecture,
        policy.parallel,
        layout,
        bucket_bytes=1000,
        is_checked=True,
        has_checksums=True,
    )
    with resharder.stream() as stream:
        found = dict(stream)
    assert all(map(torch.equal, before, policy.chunks[0].parameters()))
    parallel_state.destroy_model_parallel()
    return found


def save(directory: Path, parallel: dict, checkpoints: str) -> None:
    """A checkpoint of the adapters that drawn() gives."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
    from megatron_sftrl.engine.policy import Base
    from megatron_sftrl.models.hf_weights import open_weights
    from megatron_sftrl.trainers.origins import hash_of_weights

    policy, _ = policy_over(directory, parallel, LORA)
    with open_weights(directory) as weights:
        policy.base = Base(path=str(directory), weights=hash_of_weights(directory, weights))
    with CheckpointStore(Path(checkpoints), policy.parallel, keep_last=1) as store:
        store.save(TrainerState(step=1), policy, None)
    parallel_state.destroy_model_parallel()


def read_merged(directory: Path, parallel: dict, checkpoint: Path) -> dict[str, tuple[list, Tensor]]:
    """What give_weights fills a model with, by name: parts, and what `sftrl coupling` reads."""
    from megatron.core import parallel_state

    from megatron_sftrl.apps.coupling.rotation import _reader
    from megatron_sftrl.apps.coupling.stages import Stage
    from megatron_sftrl.engine.live_weights import live_weights
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.trainers.weights import give_weights

    config = engine_config(directory, parallel, "fp32")
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture_of(config.model), config, context, with_optimizer=False)
    give_weights(policy, checkpoint, config)
    with contextlib.ExitStack() as stack:
        read = _reader(Stage(name="a", path=checkpoint), policy.architecture, stack, config)
        found = {
            name: ([(region.slices, part.clone()) for region, part in parts.items()], read(name))
            for name, parts in live_weights(policy.chunks, policy.architecture).parts.items()
        }
    parallel_state.destroy_model_parallel()
    return found


def test_a_command_that_reads_a_checkpoint_of_adapters_gets_merged_weights(
    directory: Path, tmp_path: Path
) -> None:
    run_ranks(2, save, directory, {"tp": 2}, str(tmp_path))
    truth, seen = merged(directory), set()
    for found in run_ranks(2, read_merged, directory, {"pp": 2}, tmp_path / "step-00000001"):
        seen |= found.keys()
        for name, (parts, whole) in found.items():
            torch.testing.assert_close(whole, truth[name], rtol=0, atol=1e-6, msg=name)
            for place, part in parts:
                torch.testing.assert_close(part, truth[name][place], rtol=0, atol=1e-6, msg=name)
    assert seen == truth.keys()


def merged(directory: Path, lora: dict = LORA) -> dict[str, Tensor]:
    """Every tensor of the model, with its adapter where `lora` names one."""
    found = {}
    for name, weight in read_tensors(directory).items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in lora["targets"]:
            down = drawn(f"lora.{module}.lora_A.weight", (4, weight.shape[1]))
            up = drawn(f"lora.{module}.lora_B.weight", (weight.shape[0], 4))
            weight = weight + SCALE * up @ down
        found[name] = weight
    return found


def write_merged(directory: Path, lora: dict, out: Path) -> Path:
    """The model of merged() as a directory."""
    from safetensors.torch import save_file

    out.mkdir()
    shutil.copy(directory / "config.json", out)
    save_file(merged(directory, lora), out / "model.safetensors", metadata={"format": "pt"})
    return out


ENGINES: dict[str, tuple[str, dict, int]] = {
    "tp2 to one": ("qwen2", {"tp": 2}, 1),
    "tp2 to tp2": ("qwen2", {"tp": 2}, 2),
    "pp2 to tp2": ("qwen2", {"pp": 2}, 2),
    "q, k and v in one, tp2 to tp2": ("phi3", {"tp": 2}, 2),
    "experts, ep2 to tp2": ("qwen3_moe", {"ep": 2}, 2),
}


@pytest.mark.parametrize("name", cases(ENGINES, rarely=["tp2 to tp2", "experts, ep2 to tp2"]))
def test_an_engine_is_sent_merged_weights(tmp_path: Path, name: str) -> None:
    model, parallel, tp = ENGINES[name]
    directory = write_model(tmp_path / "base", model)
    lora = {**LORA, "targets": ["qkv_proj", "gate_up_proj"]} if model == "phi3" else LORA
    truth = merged(directory, lora)
    ranks = run_ranks(2, streamed, directory, parallel, lora, tp)
    for tensor, whole in truth.items():
        filled = torch.zeros_like(whole, dtype=torch.bool)
        for found in ranks:
            here = ~found[tensor].isnan()
            torch.testing.assert_close(found[tensor][here], whole[here], rtol=0, atol=1e-6, msg=tensor)
            filled |= here
        assert filled.all(), tensor


def masks(directory: Path, parallel: dict) -> dict[str, Tensor]:
    """What the first layer's adapters let through of ones, by the name of a matrix; nothing in evaluation."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine import lora as engine_lora

    policy, _ = policy_over(directory, parallel, {**LORA, "dropout": 0.25})
    found: dict[str, Tensor] = {}
    linear = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        for adapter in engine_lora.adapters_of(policy.chunks):
            name = adapter.names[0].split(".")[-2]
            ones = torch.ones(200, 1, adapter.down[0].shape[1])

            def keep(x: Tensor, weight: Tensor, name: str = name) -> Tensor:
                found.setdefault(name, x.clone())
                return linear(x, weight)

            patch.setattr(engine_lora.F, "linear", keep)
            adapter.train()
            adapter(ones, is_split=policy.parallel.sequence_parallel)
            patch.undo()
            adapter.eval()
            assert torch.equal(*(adapter(ones, is_split=False) for _ in range(2)))
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("kind", cases(["tp2", "sp2", "dp2"], rarely=["sp2", "dp2"]))
def test_dropout_is_drawn_by_ranks_with_parts_of_their_own_and_shared_by_copies(
    directory: Path, kind: str
) -> None:
    layouts = {"tp2": {"tp": 2}, "sp2": {"tp": 2, "sequence_parallel": True}, "dp2": {}}
    first, second = run_ranks(2, masks, directory, layouts[kind])
    for name, mask in first.items():
        assert mask.unique().tolist() == pytest.approx([0, 1 / 0.75])
        deviation = (0.25 * 0.75 / mask.numel()) ** 0.5
        assert float((mask == 0).double().mean()) == pytest.approx(0.25, abs=5 * deviation), name
        is_copy = kind == "tp2" and name in ("q_proj", "up_proj")
        assert torch.equal(mask, second[name]) == is_copy, name


def step_with_dropout(directory: Path, recompute: str) -> list[float]:
    """Loss and gradient norm of a step, and of the next one."""
    from megatron.core import parallel_state

    from megatron_sftrl.losses.registry import build_loss
    from tests.distributed.test_layouts import step_batches

    lora = {**LORA, "dropout": 0.5}
    policy, _ = policy_over(directory, {}, lora, train={"steps": 2, "recompute": recompute})
    found = []
    for _ in range(2):
        batches = step_batches(0, num_groups=1, group=0, multiple=1, num_microbatches=2)
        report = policy.forward_backward(batches, build_loss("sft", {}))
        found += [report.loss, policy.optim_step(0, num_steps=2).grad_norm]
    parallel_state.destroy_model_parallel()
    return found


def test_a_block_that_is_computed_again_drops_what_it_dropped_before(directory: Path) -> None:
    (kept,), (again,) = (run_ranks(1, step_with_dropout, directory, each) for each in ("none", "full"))
    assert kept == pytest.approx(again, rel=1e-6)


def losses_of(policy: Any, reference: Any = None, *, is_one_group: bool = False) -> Tensor:
    """[1 or 2, T] nats of a step's labels by the policy, and by its reference; nothing before the last stage.

    Args:
        is_one_group: every replica has the whole step.
    """
    from tests.distributed.test_layouts import step_batches

    def ask(ours: Any, theirs: Any, labels: Tensor) -> list[Tensor]:
        return [each.logprobs(labels) for each in (ours, theirs) if each is not None]

    context = policy.parallel
    groups, group = (1, 0) if is_one_group else (context.dp_size, context.dp_rank)
    multiple = 2 if is_one_group else 2 * context.tp_size
    batches = step_batches(0, num_groups=groups, group=group, multiple=multiple, num_microbatches=2)
    return torch.cat([torch.empty(0), *policy.token_numbers(batches, ask, reference)], dim=-1)


def shift(policy: Any, by: float) -> None:
    """Move every element that is trained."""
    from megatron_sftrl.engine.lora import trained_weights

    with torch.no_grad():
        for parameter in trained_weights(policy.chunks):
            parameter.add_(by)
    policy.reload_optimizer_weights()


def follow_with_adapters(directory: Path, parallel: dict, checkpoints: str, saves: bool) -> list[Tensor]:
    """Numbers of policy and average, after an update of that or out of a checkpoint; of the policy alone;
    and of the policy with the average's adapters in the place of its own.
    """
    from megatron.core import parallel_state

    from megatron_sftrl.config.schema import ReferenceSection
    from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
    from megatron_sftrl.engine.policy import Base
    from megatron_sftrl.engine.reference import SharedReference

    policy, _ = policy_over(directory, parallel, {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]})
    policy.base = Base(path=str(directory), weights="of the test")
    section = ReferenceSection(kind="moving_average", decay=0.75, sync_every=1)
    reference = SharedReference(section, policy.parallel, policy.chunks, keeps_start=False)
    with CheckpointStore(Path(checkpoints), policy.parallel, keep_last=1) as store:
        if saves:
            shift(policy, 0.2)
            reference.follow(policy.chunks)
            store.save(TrainerState(step=1), policy, reference)
        else:
            latest = store.latest()
            assert latest is not None
            store.load(latest, policy, reference)
    both, alone = losses_of(policy, reference), losses_of(policy)
    shift(policy, -0.15)  # back by decay
    taught = losses_of(policy)
    parallel_state.destroy_model_parallel()
    return [both, alone, taught]


def test_a_moving_average_of_adapters_is_the_policy_with_other_adapters(
    directory: Path, tmp_path: Path
) -> None:
    split = {"tp": 2, "sequence_parallel": True}
    overlapped = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    saved = run_ranks(2, follow_with_adapters, directory, split, str(tmp_path), True)
    found = run_ranks(2, follow_with_adapters, directory, overlapped, str(tmp_path), False)
    for both, alone, taught in (*saved, *found):
        assert torch.equal(both[:1], alone), "the average's adapters stayed in the policy"
        torch.testing.assert_close(both[1:], taught, rtol=0, atol=2e-5)  # nats; the sums were rounded
        assert (both[1] - both[0]).abs().max() > 0.1
