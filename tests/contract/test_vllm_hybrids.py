"""Hybrids with vLLM: after two updates an engine is, bit for bit, one that read the second model's files.

vLLM's kernels for gated delta nets on the CPU know bf16 alone, where engine and trainer differ by rounding: a
misplaced weight is found beside a second engine, and what vLLM computes is held by its error to fp32, of
which transformers' own bf16 is the measure.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sftrl.types import Prompt, RolloutGroup, SamplingParams
from tests.contract.models import VOCAB_SIZE, save_versions, scores
from tests.contract.rollout_contract import GREEDY, MAX_LENGTH, PLAIN, PROMPTS, decode, load, whole_logits
from tests.contract.test_vllm_engine import needs_vllm, said_by
from tests.contract.test_vllm_experts import experts_of_both
from tests.distributed.engine_outputs import engine_config
from tests.distributed.hf_models import auto_model
from tests.grid import HOW_TO_RUN_ALL, cases, is_full
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.vllm import VllmEngine

STAND_INS = Path(__file__).resolve().parents[1] / "stand_ins"
# Heads that vLLM has kernels for on the CPU.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "qwen3_next": {
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
}
CHANGES["qwen3_5_moe_text"] = {**CHANGES["qwen3_next"], **CHANGES["qwen3_5_text"]}
SPLIT = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, SPLIT),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
}
MIXTURES = ("qwen3_next", "qwen3_5_moe_text")
CASES: list[tuple[str, int, tuple[str, ...]]] = [("tp2", 2, ("qwen3_5_text",))]
if is_full():
    CASES += [
        ("one process", 1, tuple(CHANGES)),
        ("tp2", 1, tuple(CHANGES)),
        ("tp2", 2, MIXTURES),
        ("pp2", 1, tuple(CHANGES)),
        ("pp2", 2, tuple(CHANGES)),
        ("ep2", 1, MIXTURES),
        ("ep2", 2, MIXTURES),
    ]


@contextlib.contextmanager
def torchvision_to_import() -> Iterator[None]:
    """Also in processes that vLLM starts to look at a model's code."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STAND_INS))
        inherited = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", str(STAND_INS) + (os.pathsep + inherited if inherited else ""))
        yield


def write_versions(name: str, root: Path, **changes: Any) -> tuple[Path, ...]:
    """Two models in bf16 whose states remember tens of tokens, as those of trained ones do, and a few one."""
    directories = save_versions(name, root, num_versions=2, **CHANGES[name], **changes).directories
    for number, directory in enumerate(directories):
        model = auto_model().from_pretrained(directory, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("A_log"):
                    parameter.uniform_(-5, 1, generator=generator)
        model.save_pretrained(directory)
    return directories


def policy_of(directory: Path, parallel: dict[str, Any]) -> PolicyEngine:
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of

    config = engine_config(directory, parallel, "bf16")
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture_of(config.model), config, context, with_optimizer=False)
    load(policy, directory)
    return policy


def make_engine(policy: PolicyEngine, *, tp: int, **settings: Any) -> VllmEngine:
    from megatron_sftrl.rollout.vllm import beside_trainer
    from megatron_sftrl.rollout.vllm_settings import VllmSettings

    sizes = {"max_model_len": MAX_LENGTH, "max_num_seqs": 7, **settings}
    checks: dict[str, Any] = {"bucket_bytes": 2**14, "is_checked": True, "has_checksums": True}
    return beside_trainer(policy, VllmSettings(tp=tp, **sizes, **checks), decode)


def engine_from_disk(policy: PolicyEngine, directory: Path, *, tp: int) -> VllmEngine:
    """One that read the files in `directory` by itself, and has had no update."""
    import vllm

    real: Any = vllm.LLM

    def from_disk(_: str, **settings: Any) -> Any:
        return real(str(directory), **{**settings, "load_format": "auto"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "LLM", from_disk)
        engine = make_engine(policy, tp=tp)
    engine._version = 1
    return engine


@torch.no_grad()
def tensors_of(engine: VllmEngine) -> dict[str, Tensor]:
    """Every number that a forward multiplies with: vLLM packs matrices into functions."""
    found = dict(engine._model.named_parameters()) | dict(engine._model.named_buffers())
    for name, module in engine._model.named_modules():
        linear: Any = getattr(module, "cpu_linear", None)
        if linear is not None:
            widths = (
                getattr(module, each, 0)
                for each in ("input_size_per_partition", "input_size", "embedding_dim")
            )
            unit = torch.eye(next(width for width in widths if width), dtype=torch.bfloat16)
            found[f"{name} (packed)"] = linear(unit, module.weight, None)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def most_together(engine: VllmEngine) -> tuple[int, int]:
    """Of responses that fill all engines: most of them at one time here, and how many lost their place."""
    core: Any = engine._llm.llm_engine.engine_core
    scheduler, real = core.engine_core.scheduler, core.get_output
    seen: list[int] = []

    def told() -> Any:
        output = real()
        seen.append(len(scheduler.running))
        return output

    core.get_output = told
    shape = (7 * engine._layout.num_replicas, MAX_LENGTH - 8)
    tokens = torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(1))
    prompts = [Prompt(id=number, tokens=tuple(each)) for number, each in enumerate(tokens.tolist())]
    preempted: list[int] = []
    real_preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *each: (preempted.append(1), real_preempt(*each))[1]
    engine.generate(prompts, GREEDY)
    core.get_output, scheduler._preempt_request = real, real_preempt
    return max(seen), len(preempted)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one family on one rank.

    Args:
        first: greedy tokens after the first update.
        updated, read: responses after the second one, and of the engine that read the files.
        unequal: names of what the two engines multiply with that differs; and how many do not.
        states: dtypes of what gated delta nets remember.
        together: see most_together.
    """

    first: list[tuple[int, ...]]
    updated: list[RolloutGroup]
    read: list[RolloutGroup]
    unequal: tuple[list[str], int]
    states: set[torch.dtype]
    together: tuple[int, int]


def answers(engine: VllmEngine) -> list[RolloutGroup]:
    return [*engine.generate(PROMPTS, GREEDY), *engine.generate(PROMPTS, PLAIN)]


def observe(parallel: dict[str, Any], tp: int, families: dict[str, tuple[Path, ...]]) -> dict[str, Seen]:
    from megatron.core import parallel_state

    seen = {}
    with torchvision_to_import():
        for name, (first, second) in families.items():
            policy = policy_of(first, parallel)
            engine = make_engine(policy, tp=tp)
            engine.update(policy, version=0)
            greedy = [group.rollouts[0].response_tokens for group in engine.generate(PROMPTS, GREEDY)]
            engine.sleep()
            load(policy, second)
            engine.update(policy, version=1)
            updated, ours = answers(engine), tensors_of(engine)
            together = most_together(engine)
            nets: Any = [each for each in engine._model.modules() if hasattr(each, "A_log")]
            states = {net.kv_cache[1].dtype for net in nets}
            del nets
            engine.close()
            engine = engine_from_disk(policy, second, tp=tp)
            read, theirs = answers(engine), tensors_of(engine)
            engine.close()
            parallel_state.destroy_model_parallel()
            assert ours.keys() == theirs.keys()
            unequal = [each for each, tensor in ours.items() if not torch.equal(tensor, theirs[each])]
            seen[name] = Seen(
                first=greedy,
                updated=updated,
                read=read,
                unequal=(unequal, len(ours) - len(unequal)),
                states=states,
                together=together,
            )
    return seen


@needs_vllm
@pytest.mark.parametrize(("layout", "tp", "names"), CASES)
def test_an_engine_after_two_updates_is_one_that_read_the_files(
    layout: str, tp: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    world_size, parallel = LAYOUTS[layout]
    families = {name: write_versions(name, tmp_path) for name in names}
    ranks = run_ranks(world_size, observe, parallel, tp, families, timeout_s=600)
    for name in names:
        for rank in (each[name] for each in ranks):
            assert rank.unequal[0] == [], name
            assert rank.unequal[1] > 20
            assert rank.updated == rank.read, name
            greedy = [group.rollouts[0].response_tokens for group in rank.updated[: len(PROMPTS)]]
            assert rank.first != greedy, f"{name}: both versions say the same, the test is blind"
            assert rank.states == {torch.float32}, name
            assert rank.together == (7, 0), name


def lost_names(name: str) -> list[str]:
    """A tensor of each kind that hybrids alone have."""
    projections = ("qkvz", "ba") if name == "qwen3_next" else ("qkv", "z", "b", "a")
    parts = [f"in_proj_{part}.weight" for part in projections]
    parts += ["conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight"]
    in_nets = [f"model.layers.0.linear_attn.{part}" for part in parts]
    return [*in_nets, "model.layers.1.self_attn.q_proj.weight"]


def module_of(name: str) -> str:
    """The engine's own name of what holds a tensor: vLLM fuses some."""
    fused = {"q_proj": "qkv_proj", "in_proj_qkv": "in_proj_qkvz", "in_proj_z": "in_proj_qkvz"}
    fused |= {"in_proj_b": "in_proj_ba", "in_proj_a": "in_proj_ba"}
    module = name.removesuffix(".weight")
    before, _, last = module.rpartition(".")
    return before if last in ("A_log", "dt_bias") else f"{before}.{fused.get(last, last)}"


def mistreated(name: str, directory: Path) -> dict[str, str]:
    """What was said when each of lost_names() was not sent."""
    from megatron.core import parallel_state

    from megatron_sftrl.models.hf_weights import open_weights
    from megatron_sftrl.models.tensors import hf_shapes
    from megatron_sftrl.rollout.vllm import load_weights

    with torchvision_to_import():
        policy = policy_of(directory, {})
        engine = make_engine(policy, tp=1)
        with open_weights(directory) as weights:
            tensors = {each: weights.read(each) for each in hf_shapes(policy.architecture)}

        def send(lost: str) -> None:
            sent = ((each, tensor) for each, tensor in tensors.items() if each != lost)
            engine._guest.run(lambda: load_weights(engine._llm, engine._model, sent, is_cuda=False))

        said = {lost: said_by(lambda lost=lost: send(lost)) for lost in (*lost_names(name), "")}
        engine.close()
    parallel_state.destroy_model_parallel()
    return said


@needs_vllm
@pytest.mark.parametrize("name", cases(CHANGES, rarely=["qwen3_next", "qwen3_5_moe_text"]))
def test_a_tensor_that_is_not_sent_is_missed_by_the_name_of_the_engine(name: str, tmp_path: Path) -> None:
    (said,) = run_ranks(1, mistreated, name, write_versions(name, tmp_path)[0], timeout_s=300)
    assert said.pop("") == ""
    for lost, words in said.items():
        assert "no weight of the policy reached" in words, lost
        assert f"'{module_of(lost)}" in words, lost


LENGTHS = (1, 40, 300, 1000)
LONGEST = 1200


def long_answers(directory: Path) -> list[tuple[list[int], int, tuple[float, ...], tuple[float, ...]]]:
    """Two responses to each prompt: all tokens, how many are of the prompt, vLLM's nats, the trainer's."""
    from megatron.core import parallel_state

    with torchvision_to_import():
        policy = policy_of(directory, {})
        engine = make_engine(policy, tp=1, max_model_len=LONGEST)
        engine.update(policy, version=0)
        generator = torch.Generator().manual_seed(1)
        prompts = [
            Prompt(
                id=length, tokens=tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())
            )
            for length in LENGTHS
        ]
        groups = engine.generate(prompts, SamplingParams(max_new_tokens=100, num_samples=2, seed=3))
        engine.close()
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sequences = [[*each.prompt_tokens, *each.response_tokens] for each in rollouts]
    found = []
    for tokens, rows, each in zip(sequences, whole_logits(policy, sequences), rollouts, strict=True):
        first, labels = len(each.prompt_tokens), torch.tensor(each.response_tokens)[:, None]
        ours = rows[first - 1 : -1].double().log_softmax(1).gather(1, labels)[:, 0]
        found.append((tokens, first, each.logprobs, tuple(ours.tolist())))
    parallel_state.destroy_model_parallel()
    return found


@needs_vllm
@pytest.mark.parametrize("name", cases(CHANGES, rarely=["qwen3_5_text", "qwen3_5_moe_text"]))
def test_vllm_is_as_close_to_fp32_as_transformers_in_bf16(name: str, tmp_path: Path) -> None:
    directory, _ = write_versions(name, tmp_path, max_position_embeddings=LONGEST)
    (found,) = run_ranks(1, long_answers, directory, timeout_s=300)
    truth, theirs = (
        scores(directory, [tokens for tokens, *_ in found], temperature=1.0, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    errors: dict[str, list[Tensor]] = {"vllm": [], "trainer": [], "transformers": []}
    for exact, rounded, (_, first, vllm, ours) in zip(truth, theirs, found, strict=True):
        for who, each in zip(errors, (vllm, ours, rounded[first - 1 :]), strict=True):
            errors[who].append((torch.as_tensor(each).double() - exact[first - 1 :]).abs())
    means = {who: [float(each.mean()) for each in parts] for who, parts in errors.items()}
    medians = {who: float(torch.cat(parts).median()) for who, parts in errors.items()}
    print(f"{name}: medians of {len(torch.cat(errors['vllm']))} tokens {medians}, means of responses {means}")
    for who in ("vllm", "trainer"):
        assert medians[who] <= 1.25 * medians["transformers"], who
        assert max(means[who]) <= 2 * max(means["transformers"]), who


def experts_in_bf16(directory: Path) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Not for a prompt of one token by itself, which vLLM's kernel for a Qwen3.5's convolution refuses."""
    with torchvision_to_import():
        return experts_of_both(directory, "bf16", [prompt for prompt in PROMPTS if len(prompt.tokens) > 1])


@needs_vllm
@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
@pytest.mark.parametrize("name", MIXTURES)
def test_vllm_chooses_the_experts_that_the_trainer_chooses(name: str, tmp_path: Path) -> None:
    """But for some whose logits are close, in bf16; those of another layer would be 3 of 8."""
    (found,) = run_ranks(1, experts_in_bf16, write_versions(name, tmp_path)[0], timeout_s=300)
    shared = [
        len({*theirs.tolist()} & {*ours.tolist()}) / len(ours)
        for both in found
        for theirs, ours in zip(*(each.reshape(-1, each.shape[-1]) for each in both), strict=True)
    ]
    print(f"{name}: {len(shared)} choices, of which {sum(shared) / len(shared):.4f} are the same")
    assert sum(shared) / len(shared) > 0.98
