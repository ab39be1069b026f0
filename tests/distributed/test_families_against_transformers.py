"""Families: logits, gradients, weights and generated tokens are those of transformers.

Each family runs in one strong layout of each kind; with SFTRL_TEST_FULL=1 in all of them, and those nearest
to Llama as well. Families share the processes of a layout: what costs is the start.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sftrl.apps.plan.model_state import chunk_parameters, grid_of
from megatron_sftrl.models import architecture_of
from tests.distributed.engine_outputs import Case, Numbers, embedded, engine_config, engine_numbers
from tests.distributed.hf_models import (
    CONFIGS,
    VOCAB_SIZE,
    WINDOW,
    experts_apart,
    save_model,
    saved_gradients,
    transformers_logits,
)
from tests.grid import is_full
from tests.hf_models import read_tensors
from tests.ranks import run_ranks

NAMES = (
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "phi3",
    "phi3_longrope",
    "ministral3",
    "qwen2_moe",
    "glm4",
    "glm4_moe",
    "deepseek_v3",
    "mistral4",
    "minimax_m2",
    "gpt_oss",
    "gemma3_text",
    "qwen3_5_text",
    "qwen3_next",
)
if is_full():
    NAMES += ("glm4_moe_ungrouped", "deepseek_v3_plain", "mistral4_plain", "gpt_oss_other_gates")
    NAMES += ("minimax_m2_published", "gemma3_text_published", "qwen3_5_text_published", "qwen3_5_moe_text")
    NAMES += ("llama", "llama_llama3", "mistral", "mistral_without_window", "qwen2", "qwen2_window", "qwen3")
    NAMES += ("qwen3_window", "mixtral", "mixtral_window", "qwen3_moe", "qwen3_moe_unnormalized")
# In the everyday run each of these in the layout that is most of its own.
FEW = {
    "gemma3_text": ("sp2", "cp2"),
    "glm4_moe": ("vp2",),
    "gpt_oss": ("sp2",),
    "minimax_m2": ("sp2", "ep2"),
    "mistral4": ("sp2", "cp2"),
    "phi3_longrope": ("sp2", "cp2"),
    "qwen3_5_text": ("sp2", "vp2"),
    "qwen3_next": ("sp2",),
}
LENGTHS = [12, 100, 4, 72]  # multiples of 4 for cp 2; below and several times as long as a window
# Of similar length, so that they run together and one is filled up, and one alone.
PROMPTS = [(5,), tuple(range(1, 41)), tuple(range(60, 95))]
NUM_NEW = 3 * WINDOW
SEQUENCE = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, {"tp": 2}),
    "sp2": (2, SEQUENCE),
    "pp2": (2, {"pp": 2}),
    "vp2": (2, {"pp": 2, "vp": 2}),
    "cp2": (2, {"cp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2 cp2": (4, {**SEQUENCE, "cp": 2}),
}
# Two ranks cost most of the time: of those that are a part of another only one in the everyday run.
ALWAYS = ("one process", "sp2", "cp2", "ep2")


def random_tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


class Truth:
    """A model of transformers, its logits and the gradients of its mean nll."""

    def __init__(self, name: str, directory: Path) -> None:
        self.directory = directory
        self.model = save_model(name, directory)
        self.tensors = experts_apart(read_tensors(directory))
        self.logits = transformers_logits(self.model, random_tokens(1), LENGTHS)
        self.gradients = gradients_of(self.model, directory / "gradients")
        self.bound = max(1e-5, 2 * self._rounding())

    def _rounding(self) -> float:
        """The most by which transformers' own gradients miss those in float64; so may ours, on another side.

        How much that is depends on the processor's vectors: 1.4e-5 where parts cancel (a gated delta net's
        decays, norms inside of latent attention, biases of keys), 1e-6 to 8e-6 in most families.
        """
        model = copy.deepcopy(self.model).double()
        model.zero_grad()
        model.set_experts_implementation("eager")  # the grouped product knows no float64
        exact = gradients_of(model, self.directory / "gradients in float64")
        rounding = max(relative(exact[name] - ours, exact[name]) for name, ours in self.gradients.items())
        assert rounding < 3e-5, f"{self.directory.name}: float64 is not the same model"
        return rounding


def gradients_of(model: Any, directory: Path) -> dict[str, Tensor]:
    """Of the mean nll, by the names of the model's file; `directory` is where they are written meanwhile."""
    logits = [model(each[None]).logits[0] for each in random_tokens(1).split(LENGTHS)]
    torch.nn.functional.cross_entropy(torch.cat(logits), random_tokens(2)).backward()
    return saved_gradients(model, directory)


def relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.abs().max() / to.abs().max())


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    root = tmp_path_factory.mktemp("families")
    return {name: Truth(name, root / name) for name in NAMES}


def case(truth: Truth, parallel: dict[str, Any]) -> Case:
    config = engine_config(truth.directory, parallel, "fp32")
    if "gpt_oss" in truth.directory.name and "tp" in parallel:
        config = engine_config(truth.directory, {**parallel, "etp": 1}, "fp32")
        # Its experts' clamped gates and biases, made again in the backward.
        recomputes = config.train.model_copy(update={"recompute": "selective"})
        config = config.model_copy(update={"train": recomputes})
    if "linear_num_key_heads" in CONFIGS[truth.directory.name] and parallel:
        kind = "full" if "vp" in parallel else "selective"
        config = config.model_copy(update={"train": config.train.model_copy(update={"recompute": kind})})
    return Case(
        config=config,
        architecture=architecture_of(config.model),
        tokens=random_tokens(1),
        labels=random_tokens(2),
        lengths=LENGTHS,
        prompts=[] if "cp" in parallel else PROMPTS,
        num_new=NUM_NEW,
    )


def largest_difference(ranks: list[dict], expected: dict[str, Tensor]) -> float:
    return max(differences(ranks, expected).values())


def differences(ranks: list[dict], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor the largest of all ranks' parts, which are all of it, over its largest |value|."""
    seen = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in expected.items()}
    largest = dict.fromkeys(expected, 0.0)
    for parts in ranks:
        for name, regions in parts.items():
            scale = float(expected[name].abs().max())
            for region, values in regions:
                known, whole = seen[name], expected[name]
                if len(region.shape) > whole.dim():  # the rows of two halves take turns
                    known, whole = known.unflatten(-1, (-1, 2)), whole.unflatten(-1, (-1, 2))
                known[region.slices] = True
                difference = float((values - whole[region.slices]).abs().max())
                largest[name] = max(largest[name], difference / scale)
    assert all(bool(mask.all()) for mask in seen.values())
    return largest


def assert_is(truth: Truth, ranks: list[Numbers], name: str) -> None:
    scale = truth.logits.abs().max()
    logits = [rank.logits for rank in ranks if rank.logits is not None]
    error = max(float((each - truth.logits).abs().max() / scale) for each in logits)
    weights = differences([rank.weights for rank in ranks], truth.tensors)
    gradients = differences([rank.gradients for rank in ranks], truth.gradients)
    print(f"{name}: logits {error:.1e}, gradients {max(gradients.values()):.1e}")
    assert not any(weights.values()), name
    assert error <= 1e-5, name
    assert not {each: size for each, size in gradients.items() if size > truth.bound}, name
    for number, prompt in enumerate(PROMPTS[: len(ranks[0].responses)]):
        response = ranks[0].responses[number]
        assert all(rank.responses[number] == response for rank in ranks), (name, number)
        whole = torch.tensor([*prompt, *response])
        likeliest = transformers_logits(truth.model, whole, [len(whole)]).argmax(dim=1)
        assert response == tuple(likeliest[len(prompt) - 1 : -1].tolist()), (name, number)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if is_full() or name in ALWAYS])
def test_every_number_of_a_family_is_that_of_transformers(layout: str, truths: dict[str, Truth]) -> None:
    world_size, parallel = LAYOUTS[layout]
    names = [name for name in NAMES if is_possible(name, parallel)]
    ranks = run_ranks(world_size, engine_numbers, [case(truths[name], parallel) for name in names])
    for number, name in enumerate(names):
        assert_is(truths[name], [rank[number] for rank in ranks], f"{layout}, {name}")
        one = case(truths[name], parallel)
        assert [rank[number].sizes for rank in ranks] == planned_sizes(one, world_size), name


def test_the_factor_on_an_embedding_is_rounded_as_in_transformers(tmp_path: Path) -> None:
    """Of a Gemma 3 to bf16, before it is multiplied with."""
    model, tokens = save_model("gemma3_text", tmp_path).bfloat16(), torch.arange(VOCAB_SIZE)
    (found,) = run_ranks(1, embedded, engine_config(tmp_path, {}, "bf16"), tokens)
    assert torch.equal(found, model.model.embed_tokens(tokens))


def planned_sizes(case: Case, world_size: int) -> list[list[list[int]]]:
    """Elements of each parameter of each chunk, by rank, as the planner counts them."""
    grid = grid_of(case.config.parallel, world_size)
    found = []
    for rank in range(world_size):
        stage = rank // (world_size // grid.pp)
        a = case.architecture
        ends = [(stage == 0 and c == 0, stage == grid.pp - 1 and c == grid.vp - 1) for c in range(grid.vp)]
        chunks = [
            chunk_parameters(
                a,
                grid,
                kinds=grid.chunk_kinds(a, stage=stage, chunk=chunk),
                has_embedding=first,
                has_output=last,
            )
            for chunk, (first, last) in enumerate(ends)
        ]
        found.append([[parameter.num_elements for parameter in chunk] for chunk in chunks])
    return found


def is_possible(name: str, parallel: dict[str, Any]) -> bool:
    """Only experts spread over ep; Megatron's want sequence parallelism beside tensor parallelism."""
    if not is_full() and parallel not in [LAYOUTS[layout][1] for layout in FEW.get(name, LAYOUTS)]:
        return False
    config = CONFIGS[name]
    if "cp" in parallel and "linear_num_key_heads" in config:
        return False
    if "vp" in parallel and config["num_hidden_layers"] < 4:
        return False
    if {"num_experts", "n_routed_experts", "num_local_experts"} & config.keys():
        return "tp" not in parallel or "sequence_parallel" in parallel
    return "ep" not in parallel
