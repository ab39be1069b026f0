"""The contract of rollout engines, held by vLLM whatever the layouts of trainer and engine; its own rules."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_sftrl.config.lora import LoraSection
from megatron_sftrl.types import Prompt
from tests.contract.models import VOCAB_SIZE, greedy_tokens, save_versions
from tests.contract.rollout_contract import (
    GREEDY,
    MAX_LENGTH,
    PLAIN,
    PROMPTS,
    Observed,
    RolloutContract,
    decode,
    load,
    observe,
    whole_logits,
)
from tests.distributed.engine_outputs import engine_config
from tests.grid import cases
from tests.ranks import close_ranks, run_ranks

if TYPE_CHECKING:
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.reshard import WeightStream
    from megatron_sftrl.rollout.vllm import VllmEngine

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here: bash tests/oracles.sh installs it"
)


@dataclass(frozen=True)
class Scenario:
    model: str
    parallel: dict[str, Any] = field(default_factory=dict)
    engine_tp: int = 1
    world_size: int = 2
    has_large_logits: bool = False


SCENARIOS = {
    "llama_tied": Scenario("llama_tied", world_size=1, has_large_logits=True),
    "qwen3_moe": Scenario("qwen3_moe", world_size=1),
    "tp2_to_tp2": Scenario("qwen2", {"tp": 2}, engine_tp=2),
    "dp2_to_two_replicas": Scenario("qwen3"),
    # Consecutive ranks hold one stage and form one engine: each engine gets its other half from the other.
    "tp2_pp2_to_two_of_tp2": Scenario("llama_tied", {"tp": 2, "pp": 2}, engine_tp=2, world_size=4),
    "ep2_to_tp2": Scenario("mixtral", {"ep": 2}, engine_tp=2),
    "stacks_of_ep2_to_tp2": Scenario("gpt_oss", {"ep": 2}, engine_tp=2),
}
# Others have what is new in them, on two ranks.
SELDOM = ["dp2_to_two_replicas", "tp2_pp2_to_two_of_tp2", "stacks_of_ep2_to_tp2"]


def make_engine(policy: PolicyEngine, *, tp: int) -> VllmEngine:
    """Seven responses at once; tiny buckets, and NaN in what a rank's engine is not meant to read."""
    from megatron_sftrl.rollout.vllm import beside_trainer
    from megatron_sftrl.rollout.vllm_settings import VllmSettings

    settings = VllmSettings(
        tp=tp, max_model_len=MAX_LENGTH, max_num_seqs=7, bucket_bytes=2**14, is_checked=True
    )
    return beside_trainer(policy, settings, decode)


@pytest.fixture(scope="module", params=cases(SCENARIOS, rarely=SELDOM))
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    scenario = SCENARIOS[request.param]
    versions = save_versions(
        scenario.model,
        tmp_path_factory.mktemp("versions"),
        num_versions=2,
        has_large_logits=scenario.has_large_logits,
    )
    make = functools.partial(make_engine, tp=scenario.engine_tp)
    ranks = run_ranks(
        scenario.world_size, observe, make, versions.directories, scenario.parallel, timeout_s=300
    )
    return Observed(versions=versions, ranks=ranks)


@needs_vllm
class TestVllmEngine(RolloutContract):
    # The promised bound.
    tolerance = 1e-5


@dataclass(frozen=True)
class OwnRules:
    """What one process saw of an engine, beyond the contract.

    Args:
        lost: what was said when the named tensor was not sent.
        unknown: what was said of a tensor that the engine does not have.
        stacks: what was said of a GPT-OSS's stacks as they are.
        failed: what was said of an update that lost a tensor on its way.
        stale_after_failure: the engine generated after that update all the same.
        tensors: bytes of all tensors alive, before and after five more updates.
        stale: an engine that slept generated before its next update.
        greedy: tokens after all that.
        refused: settings that cannot work, and what was said.
        is_released: nothing holds the engine's model after close().
    """

    lost: dict[str, str]
    unknown: str
    stacks: str
    failed: str
    stale_after_failure: bool
    tensors: tuple[int, int]
    stale: bool
    greedy: list[tuple[int, ...]]
    refused: dict[str, str]
    is_released: bool


@dataclass(frozen=True)
class Mistreated:
    """A model and what was found with it."""

    model: str
    directory: Path
    found: OwnRules


def lost_names(model: str) -> list[str]:
    """One tensor of each kind."""
    layer = "model.layers.1."
    mlp = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    if model == "qwen3_moe":
        mlp = ["mlp.gate.weight", *(f"mlp.experts.5.{part}_proj.weight" for part in ("gate", "up", "down"))]
    if model == "gpt_oss":
        stacks = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        mlp = ["mlp.router.weight", "mlp.router.bias", *(f"mlp.experts.{stack}" for stack in stacks)]
    attention = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    own = [f"self_attn.{part}_proj.bias" for part in "qkv"] if model in ("qwen2", "gpt_oss") else []
    own += ["self_attn.q_norm.weight"] if model.startswith("qwen3") else []
    own += ["self_attn.o_proj.bias", "self_attn.sinks"] if model == "gpt_oss" else []
    in_layer = [*attention, *own, *mlp, "input_layernorm.weight", "post_attention_layernorm.weight"]
    ends = ["model.embed_tokens.weight", "model.norm.weight"]
    ends += [] if model == "llama_tied" else ["lm_head.weight"]
    return [*(layer + name for name in in_layer), *ends]


BAD_SETTINGS: dict[str, dict[str, Any]] = {
    "too_long": {"tp": 1, "max_model_len": MAX_LENGTH + 1},
    "tp_of_no_replicas": {"tp": 2, "max_model_len": MAX_LENGTH},
}


def said_by(action: Callable[[], object]) -> str:
    """The text of its error; empty without one."""
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def tensor_bytes() -> int:
    """Of all tensors that Python knows, views counted again."""
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))


@contextlib.contextmanager
def without(stream: WeightStream, name: str) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """A stream that loses the named tensor."""
    with stream:
        yield ((key, tensor) for key, tensor in stream if key != name)


def generates(engine: VllmEngine) -> bool:
    try:
        engine.generate(PROMPTS, GREEDY)
    except AssertionError as error:
        return "update() comes first" not in str(error)
    return True


def own_rules(model: str, directory: Path) -> OwnRules:
    """Build an engine, mistreat it."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.models.hf_weights import open_weights
    from megatron_sftrl.models.tensors import hf_shapes
    from megatron_sftrl.rollout import vllm
    from megatron_sftrl.rollout.vllm import beside_trainer, load_weights
    from megatron_sftrl.rollout.vllm_settings import VllmSettings

    config = engine_config(directory, {}, "fp32")
    architecture = architecture_of(config.model)
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture, config, context, with_optimizer=False)
    refused = {}
    for name, settings in BAD_SETTINGS.items():
        refused[name] = said_by(lambda settings=settings: beside_trainer(policy, VllmSettings(**settings)))
    load(policy, directory)
    engine = make_engine(policy, tp=1)
    with open_weights(directory) as weights:
        tensors = {name: weights.read(name) for name in hf_shapes(architecture)}

    def send(sent: dict) -> None:
        engine._guest.run(lambda: load_weights(engine._llm, engine._model, sent.items(), is_cuda=False))

    lost = {
        name: said_by(lambda name=name: send({key: tensors[key] for key in tensors if key != name}))
        for name in lost_names(model)
    }
    first, *_ = tensors
    unknown = said_by(
        lambda: send(
            {first: tensors[first], "model.layers.1.self_attn.r_proj.weight": tensors[first], **tensors}
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "with_experts_apart", lambda weights: weights)
        stacks = said_by(lambda: send(tensors))
    engine.update(policy, version=0)
    stream = engine._resharder.stream
    engine._resharder.stream = lambda: without(stream(), lost_names(model)[0])  # type: ignore[assignment]
    failed = said_by(lambda: engine.update(policy, version=1))
    stale_after_failure = generates(engine)
    engine._resharder.stream = stream
    engine.update(policy, version=0)
    engine.generate(PROMPTS, GREEDY)  # which keeps a few numbers of its last requests
    before = tensor_bytes()
    for version in range(1, 6):
        engine.update(policy, version=version)
        engine.generate(PROMPTS, GREEDY)
    after = tensor_bytes()
    engine.sleep()
    stale = generates(engine)
    engine.update(policy, version=6)
    greedy = [group.rollouts[0].response_tokens for group in engine.generate(PROMPTS, GREEDY)]
    model_lives = weakref.ref(engine._model)
    engine.close()
    parallel_state.destroy_model_parallel()
    return OwnRules(
        lost=lost,
        unknown=unknown,
        stacks=stacks,
        failed=failed,
        stale_after_failure=stale_after_failure,
        tensors=(before, after),
        stale=stale,
        greedy=greedy,
        refused=refused,
        is_released=model_lives() is None,
    )


MISTREATED = ["qwen2", "qwen3_moe", "llama_tied", "gpt_oss"]


@pytest.fixture(scope="module", params=cases(MISTREATED, rarely=["qwen2"]))
def rules(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mistreated:
    (directory,) = save_versions(request.param, tmp_path_factory.mktemp("rules"), num_versions=1).directories
    (found,) = run_ranks(1, own_rules, request.param, directory, timeout_s=300)
    return Mistreated(model=request.param, directory=directory, found=found)


@needs_vllm
class TestOwnRules:
    def test_a_tensor_that_is_not_sent_is_missed_by_the_name_of_the_engine(self, rules: Mistreated) -> None:
        for name, said in rules.found.lost.items():
            assert "no weight of the policy reached" in said, name
            assert module_of(name, rules.model) in said, name

    def test_a_tensor_that_the_engine_does_not_have_is_refused(self, rules: Mistreated) -> None:
        # vLLM's GPT-OSS passes over names that it does not know.
        assert ("r_proj" in rules.found.unknown) == (rules.model != "gpt_oss")

    def test_a_tensor_that_the_engine_copies_past_its_loaders_is_missed(self, rules: Mistreated) -> None:
        """Where the engine itself says that it has it."""
        layers = "'model.layers.0.mlp.experts.routed_experts (0 of 198656 elements)'"
        assert (layers in rules.found.stacks) == (rules.model == "gpt_oss")
        assert "w13_weight'" not in rules.found.stacks

    def test_an_update_that_lost_a_tensor_fails_and_nothing_is_generated_with_it(
        self, rules: Mistreated
    ) -> None:
        assert "the rollout engine stopped" in rules.found.failed
        assert "no weight of the policy reached" in rules.found.failed
        assert module_of(lost_names(rules.model)[0], rules.model) in rules.found.failed
        assert not rules.found.stale_after_failure

    def test_an_update_that_failed_leaves_nothing_to_the_next(self, rules: Mistreated) -> None:
        prompts = [prompt.tokens for prompt in PROMPTS]
        assert rules.found.greedy == greedy_tokens(rules.directory, prompts, num_new=GREEDY.max_new_tokens)

    def test_updates_leave_no_tensor_behind(self, rules: Mistreated) -> None:
        before, after = rules.found.tensors
        assert after <= before

    def test_an_engine_that_slept_waits_for_an_update(self, rules: Mistreated) -> None:
        assert not rules.found.stale

    def test_a_closed_engine_is_released(self, rules: Mistreated) -> None:
        assert rules.found.is_released

    def test_settings_that_cannot_work_are_refused_with_advice(self, rules: Mistreated) -> None:
        said = rules.found.refused
        assert (
            f"max_model_len = {MAX_LENGTH + 1} passes the model's {MAX_LENGTH} positions" in said["too_long"]
        )
        assert "1 processes cannot form rollout engines of tp 2" in said["tp_of_no_replicas"]


def adapted_difference(engine: VllmEngine, policy: PolicyEngine) -> float:
    """Largest difference of the engine's log-probabilities from the trainer's, of adapters far from 0."""
    from megatron_sftrl.engine.lora import adapter_parameters

    base = {
        name: weight.clone() for name, weight in policy.chunks[0].named_parameters() if "lora" not in name
    }
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.chunks):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    before = [group.rollouts[0].response_tokens for group in engine.generate(PROMPTS, GREEDY)]
    engine.update(policy, version=7)
    rollouts = [group.rollouts[0] for group in engine.generate(PROMPTS, GREEDY)]
    assert [rollout.response_tokens for rollout in rollouts] != before, "the adapters change nothing"
    for name, weight in policy.chunks[0].named_parameters():
        assert name not in base or torch.equal(weight, base[name]), f"{name} was merged in place"
    largest = 0.0
    logits = whole_logits(policy, [[*each.prompt_tokens, *each.response_tokens] for each in rollouts])
    for rows, rollout in zip(logits, rollouts, strict=True):
        first, tokens = len(rollout.prompt_tokens) - 1, torch.tensor(rollout.response_tokens)
        ours = rows[first : first + len(tokens)].double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
        largest = max(largest, float((ours - torch.tensor(rollout.logprobs)).abs().max()))
    return largest


@dataclass(frozen=True)
class Crowded:
    """Responses to 60 prompts of 100 tokens, together and the last three by themselves.

    Args:
        adapted: adapted_difference, of the same engine.
    """

    together: list[tuple[int, ...]]
    alone: list[tuple[int, ...]]
    adapted: float


def many_prompts(directory: Path) -> Crowded:
    """The policy has adapters, which add nothing until the end."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.rollout.vllm import beside_trainer
    from megatron_sftrl.rollout.vllm_settings import VllmSettings

    config = engine_config(directory, {}, "fp32").model_copy(update={"lora": LoraSection(rank=4, alpha=8)})
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture_of(config.model), config, context, with_optimizer=False)
    load(policy, directory)
    engine = beside_trainer(policy, VllmSettings(tp=1, max_model_len=MAX_LENGTH, max_num_seqs=60))
    engine.update(policy, version=0)
    drawn = torch.randint(VOCAB_SIZE, (60, 100), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [Prompt(id=number, tokens=tuple(tokens)) for number, tokens in enumerate(drawn)]
    sampling = replace(PLAIN, num_samples=1)
    together, alone = (
        [group.rollouts[0].response_tokens for group in engine.generate(asked, sampling)]
        for asked in (prompts, prompts[-3:])
    )
    adapted = adapted_difference(engine, policy)
    engine.close()
    parallel_state.destroy_model_parallel()
    return Crowded(together=together, alone=alone, adapted=adapted)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Crowded:
    (directory,) = save_versions("llama", tmp_path_factory.mktemp("crowded"), num_versions=1).directories
    (found,) = run_ranks(1, many_prompts, directory, timeout_s=300)
    return found


@needs_vllm
def test_more_prompts_than_vllm_reads_in_one_step_get_the_same_responses_as_alone(crowded: Crowded) -> None:
    """6,000 tokens; vLLM reads at most 4,096 at once and would cut a prompt in two."""
    assert len(crowded.together) == 60
    assert crowded.together[-3:] == crowded.alone


@needs_vllm
def test_adapters_arrive_merged(crowded: Crowded) -> None:
    assert 0 < crowded.adapted <= TestVllmEngine.tolerance


def start_without_memory(directory: Path) -> str:
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of

    config = engine_config(directory, {}, "fp32")
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture_of(config.model), config, context, with_optimizer=False)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1000000"  # GB: what the user sets holds
    said = said_by(lambda: make_engine(policy, tp=1))
    del os.environ["VLLM_CPU_KVCACHE_SPACE"]
    parallel_state.destroy_model_parallel()
    return said


@needs_vllm
def test_an_engine_without_enough_memory_says_what_to_change(tmp_path: Path) -> None:
    (directory,) = save_versions("llama", tmp_path, num_versions=1).directories
    (said,) = run_ranks(1, start_without_memory, directory)
    # A start that failed leaves vLLM's groups behind in its process.
    close_ranks()
    assert "vLLM has not enough memory with gpu_memory_utilization 0.5, max_num_seqs 7" in said
    assert "lower the next two, or raise tp" in said


def module_of(name: str, model: str) -> str:
    """The engine's own name of what holds a tensor: vLLM fuses some."""
    if model == "gpt_oss":
        name = name.replace(".self_attn.", ".attn.").replace(".embed_tokens.", ".embedding.")
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    if ".experts." in name:
        return name.split(".experts.")[0] + ".experts"
    module = name.rsplit(".", 1)[0]
    last = module.rsplit(".", 1)[-1]
    return module.removesuffix(last) + fused.get(last, last)


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, "needs vLLM, which is not installed: install vllm>=0.32"),
        ({"vllm": "0.31.2"}, "vLLM 0.31.2 is installed, which is too old for rollout.engine: vllm: install"),
        ({"vllm-cpu": "0.9.1"}, "vLLM 0.9.1 is installed"),
        ({"vllm": "0.32.0"}, ""),
        ({"vllm-cpu": "0.32.0+cpu"}, ""),
        ({"vllm": "1.0.0rc1"}, ""),
    ],
)
def test_a_vllm_that_is_missing_or_too_old_is_refused_with_what_to_install(
    installed: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_sftrl.rollout.vllm_settings import check_version

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = said_by(check_version)
    assert said in found
    assert bool(said) == bool(found)
