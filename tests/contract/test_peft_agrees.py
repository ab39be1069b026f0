"""PEFT over transformers is the truth for LoRA: same losses, gradients, and adapters after some steps.

Of mixtures it is the definition (lora_by_hand.py): PEFT 0.21 over transformers 5, which stacks the experts,
gives gate and up one adapter of twice the rank, and nothing to dense layers and shared experts beside them.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sftrl.config.lora import LoraSection
from megatron_sftrl.models.architecture import MIXTURE_FAMILIES
from tests.contract.lora_by_hand import Adapters, adapted_by_hand
from tests.distributed.engine_outputs import engine_config
from tests.distributed.hf_models import save_model
from tests.distributed.te_layers import layers_like_transformer_engines
from tests.distributed.test_layouts import step_batches
from tests.grid import cases, is_full
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not here: bash tests/oracles.sh installs it"
)

NUM_STEPS = 20 if is_full() else 6
OPTIM = {"lr": 0.003, "eps": 1e-4, "weight_decay": 0.1, "clip_grad": 1.0}
MODEL = "qwen2_window"  # the first: four layers, biases, a window, tied embeddings
RANK, ALPHA = 4, 6.0
LATENT = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
SP2 = {"tp": 2, "sequence_parallel": True}
DISTRIBUTED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "one process": (1, {}, {}),
    "rslora, two matrices": (1, {}, {"rslora": True, "targets": ["q_proj", "down_proj"]}),
    "tp2": (2, {"tp": 2}, {}),
    "tp2, q v gate": (2, {"tp": 2}, {"targets": ["q_proj", "v_proj", "gate_proj"]}),
    "sp2": (2, SP2, {}),
    "sp2, Transformer Engine's layers": (2, SP2, {}),
    "pp2": (2, {"pp": 2}, {}),
    "vp2": (2, {"pp": 2, "vp": 2}, {}),
    "cp2": (2, {"cp": 2}, {}),
    "dp2, distributed optimizer": (2, DISTRIBUTED, {}),
    "phi3": (1, {}, {}),
    "phi3, tp2": (2, {"tp": 2}, {}),
    "phi3, sp2": (2, SP2, {}),
    "phi3, pp2": (2, {"pp": 2}, {"targets": ["qkv_proj", "down_proj"]}),
    "latent attention": (1, {}, {"targets": LATENT[1:]}),
    "latent attention, sp2": (2, SP2, {"targets": LATENT[1:]}),
    "latent attention with whole queries, pp2": (2, {"pp": 2}, {"targets": [LATENT[0], *LATENT[3:]]}),
    "experts": (1, {}, {}),
    "experts, ep2": (2, {"ep": 2}, {}),
    "experts, ep2, Transformer Engine's layers": (2, {"ep": 2}, {}),
    "experts, etp2": (2, {"etp": 2}, {}),
    "experts beside a shared one, sp2": (2, SP2, {}),
    "experts beside a shared one, sp2, etp1, ep2": (
        2,
        {**SP2, "etp": 1, "ep": 2},
        {"targets": ["q_proj", "gate_proj", "down_proj"]},
    ),
    "experts of a mixtral, dp2, distributed optimizer": (2, DISTRIBUTED, {}),
    "experts of a minimax, sp2": (2, SP2, {}),
    "experts and dense layers, ep2": (2, {"ep": 2}, {}),
    "experts and dense layers, sp2": (2, SP2, {}),
    "experts and dense layers, pp2": (2, {"pp": 2}, {}),
    "hybrid": (1, {}, {}),
    "hybrid, tp2": (2, {"tp": 2}, {"targets": ["q_proj", "v_proj", "in_proj_qkv", "in_proj_a", "out_proj"]}),
    "hybrid, sp2": (2, SP2, {}),
    "hybrid, pp2": (2, {"pp": 2}, {"targets": ["k_proj", "in_proj_z", "in_proj_b", "down_proj"]}),
    "hybrid, vp2": (2, {"pp": 2, "vp": 2}, {}),
    "hybrid, dp2, distributed optimizer": (2, DISTRIBUTED, {}),
    "hybrid with experts": (1, {}, {}),
    "hybrid with experts, sp2, etp1, ep2": (2, {**SP2, "etp": 1, "ep": 2}, {}),
    "hybrid with experts, pp2": (2, {"pp": 2}, {"targets": ["in_proj_qkvz", "gate_proj", "out_proj"]}),
    "hybrid with experts of a Qwen3.5, sp2": (2, SP2, {}),
}
FUSED = ["sp2, Transformer Engine's layers", "experts, ep2, Transformer Engine's layers"]
MODELS = {
    "phi3": "phi3",
    "latent attention with whole queries": "deepseek_v3_plain",
    "latent attention": "deepseek_v3",
    "experts of a mixtral": "mixtral",
    "experts of a minimax": "minimax_m2",
    "experts beside a shared one": "qwen2_moe",
    "experts and dense layers": "glm4_moe",
    "experts": "qwen3_moe",
    "hybrid with experts of a Qwen3.5": "qwen3_5_moe_text",
    "hybrid with experts": "qwen3_next",
    "hybrid": "qwen3_5_text",
}
"""Of LAYOUTS those with other layers, and by the beginning of their names those with another model."""


def model_of(layout: str) -> str:
    return next((model for start, model in MODELS.items() if layout.startswith(start)), MODEL)


RARELY = [
    *("phi3", "phi3, tp2", "phi3, pp2", "latent attention", "experts", "experts, ep2", "experts, etp2"),
    *("latent attention with whole queries, pp2", "experts beside a shared one, sp2"),
    *("experts of a mixtral, dp2, distributed optimizer", "experts and dense layers, ep2"),
    *("experts and dense layers, sp2", "experts of a minimax, sp2"),
    *("hybrid", "hybrid, tp2", "hybrid, sp2", "hybrid, pp2", "hybrid, dp2, distributed optimizer"),
    "hybrid with experts",
    *("hybrid with experts, pp2", "hybrid with experts of a Qwen3.5, sp2"),
]
Part = tuple[str, tuple[int, ...]]
"""Name of a tensor, and where the part of a rank begins in it."""


@dataclass(frozen=True)
class Trained:
    """Losses and gradient norms of all steps, gradients of the first one, weights after the last one."""

    curve: list[tuple[float, float]]
    gradients: dict[Part, Tensor]
    weights: dict[Part, Tensor]


@dataclass(frozen=True)
class Truth:
    """The same of whole tensors, gradients in float64, and the adapters that training starts from.

    `rounding` is the most by which PEFT's own fp32 misses a gradient, as a part of the largest in its tensor.
    """

    start: dict[str, Tensor]
    curve: list[tuple[float, float]]
    gradients: dict[str, Tensor]
    rounding: float
    weights: dict[str, Tensor]


def adapted_model(directory: Path, lora: dict) -> tuple[Any, Adapters]:
    """fp32, with B that is not zero, or A would have no gradient."""
    if json.loads((directory / "config.json").read_text())["model_type"] in MIXTURE_FAMILIES:
        section = LoraSection.model_validate({"rank": RANK, "alpha": ALPHA, **lora})
        model, adapters = adapted_by_hand(directory, section)
    else:
        model = peft_model(directory, lora)
        adapters = adapters_of(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.05, generator=generator)
    return model, adapters


def peft_model(directory: Path, lora: dict) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"targets": "all-linear", "rslora": False, **lora}
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,  # type: ignore[arg-type]
        target_modules=settings["targets"],
        use_rslora=settings["rslora"],
        task_type="CAUSAL_LM",
    )
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    return get_peft_model(base, config)


def adapters_of(model: Any) -> Adapters:
    """By the names of PEFT's files, inside of the model."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def train_peft(
    model: Any, parameters: Adapters, *, num_steps: int = NUM_STEPS
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """The curve, and the gradients of the first step; the model is trained in place."""
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=OPTIM["lr"],
        betas=(0.9, 0.95),
        eps=OPTIM["eps"],
        weight_decay=OPTIM["weight_decay"],
    )
    curve, first = [], {}
    for step in range(num_steps):
        total = 0.0
        for batch in step_batches(step, num_groups=1, group=0, multiple=1, num_microbatches=8):
            ends = batch.cu_seqlens.tolist()
            for start, stop in itertools.pairwise(ends):
                logits = model(batch.tokens[None, start:stop]).logits[0].double()
                logprobs = logits.log_softmax(-1).gather(1, batch.labels[start:stop, None])[:, 0]
                loss = -(logprobs * batch.token_weight[start:stop]).sum()
                loss.backward()
                total += loss.item()
        if not first:
            first = {name: parameter.grad.clone() for name, parameter in parameters.items()}  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIM["clip_grad"])
        optimizer.step()
        optimizer.zero_grad()
        curve.append((total, float(norm)))
    return curve, first


def train_fused_layers(directory: Path, parallel: dict, lora: dict, start: dict[str, Tensor]) -> Trained:
    """train_engine on what stands in for Transformer Engine's layers."""
    with layers_like_transformer_engines():
        return train_engine(directory, parallel, lora, start)


def train_engine(directory: Path, parallel: dict, lora: dict, start: dict[str, Tensor]) -> Trained:
    """Runs on every rank."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.engine.lora import adapters_of
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.models.hf_weights import open_weights

    values = engine_config(directory, parallel, "fp32").model_dump()
    values["lora"] = {"rank": RANK, "alpha": ALPHA, **lora}
    values["optim"] = OPTIM
    config = type(engine_config(directory, parallel, "fp32")).model_validate(values)
    architecture = architecture_of(config.model)
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture, config, context)
    with open_weights(directory) as weights:
        load_hf_weights(policy.chunks, weights, architecture, context)
    places: list[Any] = [pair for adapter in adapters_of(policy.chunks) for pair in adapter.places()]
    with torch.no_grad():
        for _, place in places:
            place.data.copy_(start[place.key.removeprefix("lora.")][place.global_slice()])
    policy.reload_optimizer_weights()
    curve, gradients = [], {}
    for step in range(NUM_STEPS):
        batches = step_batches(
            step,
            num_groups=context.dp_size,
            group=context.dp_rank,
            multiple=2 * context.cp_size * context.tp_size,
            num_microbatches=4 if context.pp_size > 1 else 2,
        )
        report = policy.forward_backward(batches, build_loss("sft", {}))
        if step == 0 and not config.parallel.distributed_optimizer:
            gradients = {name(place): gradient_of(parameter, place) for parameter, place in places}
        update = policy.optim_step(step, num_steps=NUM_STEPS)
        curve.append((report.loss, update.grad_norm))
    policy.gather_parameters()
    frozen = [weight for chunk in policy.chunks for weight in chunk.parameters() if not weight.requires_grad]
    assert frozen
    assert all(weight.grad is None and not hasattr(weight, "main_grad") for weight in frozen)
    parallel_state.destroy_model_parallel()
    trained = {name(place): place.data.detach().clone() for _, place in places}
    return Trained(curve=curve, gradients=gradients, weights=trained)


def gradient_of(parameter: Any, place: Any) -> Tensor:
    """That of the rows of the parameter that have this place."""
    first = (place.data.storage_offset() - parameter.storage_offset()) // parameter.shape[1]
    return parameter.main_grad[first : first + len(place.data)].clone()


def name(place: Any) -> Part:
    return place.key.removeprefix("lora."), place.global_offset


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model."""
    found = {name: tmp_path_factory.mktemp("base") for name in (MODEL, *MODELS.values())}
    for name, path in found.items():
        save_model(name, path)
    return found


def assert_parts(found: dict[Part, Tensor], whole: dict[str, Tensor], bound: float) -> None:
    """Each part is that of the whole tensor of its name, to `bound` of the largest value in that."""
    for (key, offset), part in found.items():
        slices = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
        scale = float(whole[key].abs().max())
        torch.testing.assert_close(
            part.double(), whole[key][slices].double(), rtol=0, atol=bound * scale, msg=key
        )


@pytest.fixture(scope="module")
def truth_of(directories: dict[str, Path]) -> Callable[[str, str], Truth]:
    """PEFT's training of a model under the settings of `lora`, as text; each once."""

    @functools.cache
    def train(name: str, lora: str) -> Truth:
        model, adapters = adapted_model(directories[name], json.loads(lora))
        start = copied(adapters)
        curve, rounded = train_peft(model, adapters)
        exact, same = adapted_model(directories[name], json.loads(lora))
        exact.double()
        if hasattr(exact, "set_experts_implementation"):
            exact.set_experts_implementation("eager")  # the grouped product knows no float64
        _, gradients = train_peft(exact, same, num_steps=1)
        rounding = max(
            float((rounded[key] - gradient).abs().max() / gradient.abs().max())
            for key, gradient in gradients.items()
        )
        assert rounding < 1e-4
        return Truth(
            start=start, curve=curve, gradients=gradients, rounding=rounding, weights=copied(adapters)
        )

    return train


def copied(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in parameters.items()}


@pytest.mark.parametrize("layout", cases(LAYOUTS, rarely=RARELY))
def test_every_layout_trains_what_peft_trains(
    directories: dict[str, Path], truth_of: Callable[[str, str], Truth], layout: str
) -> None:
    world_size, parallel, lora = LAYOUTS[layout]
    name = model_of(layout)
    truth = truth_of(name, json.dumps(lora))
    train = train_fused_layers if layout in FUSED else train_engine
    ranks = run_ranks(world_size, train, directories[name], parallel, lora, truth.start)
    expected = torch.tensor(truth.curve)
    for trained in ranks:
        ours = torch.tensor(trained.curve)
        torch.testing.assert_close(ours[:, 0], expected[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[:, 1], expected[:, 1], rtol=1e-4, atol=0)
        # How far fp32 is from float64 depends on the processor's vectors, in PEFT as in ours.
        assert_parts(trained.gradients, truth.gradients, max(2e-5, 3 * truth.rounding))
        # Adam divides small gradients by their own size, and so makes their rounding larger.
        assert_parts(trained.weights, truth.weights, 1e-3)
    assert {key for trained in ranks for key, _ in trained.weights} == truth.start.keys()
    assert truth.curve[-1][0] != pytest.approx(truth.curve[0][0], abs=1e-3), "nothing was learned"
