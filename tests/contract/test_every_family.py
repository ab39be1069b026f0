"""After two updates engine and trainer agree on every family, whatever the layouts of trainer and engine.

The contract (rollout_contract.py) looks at everything an engine promises, for some models and layouts; here
every family meets each of the trainer's layouts and each tp of the engine, and gives the two answers that a
misplaced weight changes. Families share the processes of a layout: what costs is the start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.contract.models import NAMES, OTHER_NAMES, Versions, greedy_tokens, save_versions
from tests.contract.rollout_contract import GREEDY, PLAIN, PROMPTS, load, whole_logits
from tests.contract.test_in_process_engine import make_engine as make_in_process
from tests.contract.test_vllm_engine import make_engine as make_vllm
from tests.contract.test_vllm_engine import needs_vllm
from tests.distributed.engine_outputs import engine_config
from tests.grid import is_full
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.api import RolloutEngine
    from megatron_sftrl.types import RolloutGroup

MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek_v3", "mistral4", "gpt_oss")
MIXTURES += ("minimax_m2",)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    **({"sp2": (2, {"tp": 2, "sequence_parallel": True})} if is_full() else {}),
}
SOME, OTHERS = ("llama", "llama_tied", "qwen3_moe"), ("qwen2", "qwen3", "mixtral")
# A few of the pairs: which box of which tensor goes where is tested for all of them, bit for bit, in
# tests/distributed/test_reshard.py.
VLLM = {("tp2", 2): (*OTHERS, "gpt_oss")}
if is_full():
    VLLM |= {("pp2", 2): (*SOME, "gpt_oss"), ("tp2", 1): (*SOME, "gpt_oss"), ("pp2", 1): OTHERS}
    NAMES += OTHER_NAMES
    # vLLM runs the first three with transformers' code, at tp 1 only.
    VLLM |= {("one process", 1): (*OTHER_NAMES, "gpt_oss"), ("sp2", 2): OTHER_NAMES[3:]}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one family on one rank.

    Args:
        greedy: responses after each update.
        error: largest |difference| of log-probabilities, nats, of greedy and sampled tokens after the second
            update; None before the last pipeline stage.
    """

    greedy: list[list[tuple[int, ...]]]
    error: float | None


def observe(
    make_engine: Callable[[PolicyEngine], RolloutEngine],
    parallel: dict[str, Any],
    families: dict[str, tuple[Path, ...]],
) -> dict[str, Seen]:
    """Two updates of an engine for each family, in one process."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of

    seen = {}
    for name, directories in families.items():
        # Megatron's experts want sequence parallelism beside tensor parallelism.
        sequence = {"sequence_parallel": True} if name in MIXTURES and "tp" in parallel else {}
        # And experts with biases uncut.
        whole = {"etp": 1} if name == "gpt_oss" and "tp" in parallel else {}
        config = engine_config(directories[0], {**parallel, **sequence, **whole}, "fp32")
        context = initialize_parallel(config.parallel)
        policy = PolicyEngine(architecture_of(config.model), config, context, with_optimizer=False)
        engine = make_engine(policy)
        greedy = []
        for version, directory in enumerate(directories):
            load(policy, directory)
            engine.update(policy, version=version)
            greedy.append(engine.generate(PROMPTS, GREEDY))
            if version + 1 < len(directories):
                engine.sleep()
        groups = [*greedy[-1], *engine.generate(PROMPTS, PLAIN)]
        seen[name] = Seen(
            greedy=[[group.rollouts[0].response_tokens for group in each] for each in greedy],
            error=largest_error(policy, groups),
        )
        engine.close()
        parallel_state.destroy_model_parallel()
    return seen


def largest_error(policy: PolicyEngine, groups: list[RolloutGroup]) -> float | None:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    logits = whole_logits(policy, [[*each.prompt_tokens, *each.response_tokens] for each in rollouts])
    errors = [0.0]
    for rows, rollout in zip(logits, rollouts, strict=bool(logits)):
        first, tokens = len(rollout.prompt_tokens), torch.tensor(rollout.response_tokens)
        expected = rows[first - 1 : first - 1 + len(tokens)].double().log_softmax(dim=1)
        expected = expected.gather(1, tokens[:, None])[:, 0]
        errors.append(float((torch.tensor(rollout.logprobs, dtype=torch.float64) - expected).abs().max()))
    return max(errors) if logits else None


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Versions]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_versions(name, root, num_versions=2) for name in NAMES}


@pytest.fixture(scope="module")
def expected(families: dict[str, Versions]) -> dict[str, list[list[tuple[int, ...]]]]:
    """Greedy tokens of transformers, for each version of each family."""
    prompts = [prompt.tokens for prompt in PROMPTS]
    return {
        name: [
            greedy_tokens(directory, prompts, num_new=GREEDY.max_new_tokens)
            for directory in versions.directories
        ]
        for name, versions in families.items()
    }


def assert_agrees(
    ranks: list[dict[str, Seen]], expected: dict[str, list[list[tuple[int, ...]]]], tolerance: float
) -> None:
    for name in ranks[0]:
        tokens = expected[name]
        assert tokens[0] != tokens[1], f"{name}: both versions say the same, the test is blind"
        assert [rank[name].greedy for rank in ranks] == [tokens] * len(ranks), name
        errors = [error for rank in ranks if (error := rank[name].error) is not None]
        assert errors, name
        print(f"{name}: largest difference {max(errors):.1e} nats")
        assert max(errors) <= tolerance, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_process_agrees_with_the_trainer_and_with_transformers(
    layout: str, families: dict[str, Versions], expected: dict[str, list[list[tuple[int, ...]]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    directories = {name: versions.directories for name, versions in families.items()}
    ranks = run_ranks(world_size, observe, make_in_process, parallel, directories, timeout_s=300)
    # 1e-6, and the rounding of fp32 between 8 and 16 nats.
    assert_agrees(ranks, expected, tolerance=2e-6)


@needs_vllm
@pytest.mark.parametrize(("layout", "engine_tp"), VLLM)
def test_vllm_agrees_with_the_trainer_and_with_transformers(
    layout: str,
    engine_tp: int,
    families: dict[str, Versions],
    expected: dict[str, list[list[tuple[int, ...]]]],
) -> None:
    world_size, parallel = LAYOUTS[layout]
    directories = {name: families[name].directories for name in VLLM[layout, engine_tp]}
    make = functools.partial(make_vllm, tp=engine_tp)
    ranks = run_ranks(world_size, observe, make, parallel, directories, timeout_s=600)
    # The promised bound.
    assert_agrees(ranks, expected, tolerance=1e-5)
