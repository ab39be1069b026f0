"""A micro-batch asks its tensors for no value: on a device each such question would empty the launch queue.

Counted are the calls of torch through which a Python program can learn a tensor's value, or a size that
depends on values, while Megatron's schedule runs forward and backward.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_sftrl.models.architecture import from_section
from tests.distributed.mixture_runs import QWEN3_MOE
from tests.distributed.test_layouts import LOSSES, make_config, step_batches
from tests.ranks import ROOT, run_ranks

_ASKING = frozenset(
    (
        "item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__", "__contains__",
        "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal", "allclose",
    )
)  # fmt: skip

_ONLY_ON_THE_CPU = {
    # Looked at only where that stops no device.
    ("megatron_sftrl/vocab_parallel/distribution.py", "_check_ids"),
    ("megatron_sftrl/vocab_parallel/one_pass.py", "backward"),
}


class Questions(TorchFunctionMode):
    """Who asked for a value: (file, function) of the innermost frame outside torch."""

    def __init__(self) -> None:
        super().__init__()
        self.askers: list[tuple[str, str]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _ASKING or (name in ("__getitem__", "__setitem__") and _has_mask(args[1])):
            self.askers.append(next(_places()))
        return func(*args, **(kwargs or {}))


def _has_mask(index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def _places() -> Iterator[tuple[str, str]]:
    for frame in reversed(traceback.extract_stack()[:-2]):
        file = Path(frame.filename)
        if "torch" in file.parts or file == Path(__file__):
            continue
        is_ours = file.is_relative_to(ROOT) and ".venv" not in file.parts
        yield (str(file.relative_to(ROOT)) if is_ours else file.name), frame.name


def askers_of_a_step(
    parallel: dict, loss: str, fused: str, model: dict, num_microbatches: int
) -> list[tuple[str, str]]:
    """Who asks between the start of the first micro-batch and the end of the schedule."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine import schedule
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel
    from megatron_sftrl.losses.registry import build_loss

    kind = {"gift": "frozen", "curiosft": "moving_average"}.get(loss)
    config = make_config(
        parallel, loss=loss, fused=fused, reference={"kind": kind} if kind else None, **model
    )
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture, config, context)
    reference = None
    if config.reference is not None:
        reference = ReferenceModel(architecture, config, config.reference, context)
        reference.copy_from(policy.chunks)
    batches = step_batches(
        0, num_groups=1, group=0, multiple=2 * context.cp_size, num_microbatches=num_microbatches
    )
    questions = Questions()
    original = schedule.get_forward_backward_func

    def watched():
        run = original()

        def run_watched(**kwargs):
            with questions:
                return run(**kwargs)

        return run_watched

    schedule.get_forward_backward_func = watched
    try:
        policy.forward_backward(batches, build_loss(loss, LOSSES[loss]), reference)
        with torch.no_grad():
            policy.token_numbers(batches, lambda p, _, ids: [p.logprobs(ids)])
    finally:
        schedule.get_forward_backward_func = original
    parallel_state.destroy_model_parallel()
    return questions.askers


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fused", ["on", "off"])
def test_no_micro_batch_asks_for_a_value(loss: str, fused: str) -> None:
    (askers,) = run_ranks(1, askers_of_a_step, {}, loss, fused, {}, 3)
    assert askers, "the count sees what is allowed on the CPU"
    assert set(askers) - _ONLY_ON_THE_CPU == set()


def test_no_micro_batch_asks_under_context_parallelism() -> None:
    for askers in run_ranks(2, askers_of_a_step, {"cp": 2}, "pear", "off", {}, 2):
        assert set(askers) - _ONLY_ON_THE_CPU == set()


def test_a_mixture_asks_only_where_megatron_routes_tokens() -> None:
    for askers in run_ranks(2, askers_of_a_step, {"ep": 2}, "sft", "off", QWEN3_MOE, 2):
        ours = {place for place in askers if place[0].startswith("megatron_sftrl")}
        assert ours - _ONLY_ON_THE_CPU == {("megatron_sftrl/engine/cpu_backend.py", "move_to_host")}
        assert ("moe_utils.py", "permute") in askers


def test_the_count_sees_a_question() -> None:
    values = torch.arange(4)
    with Questions() as questions:
        values.max().item()
        int(values.max())
        values.tolist()
        values[values > 1]
        values.nonzero()
        if values.max() == 3:
            pass
    assert len(questions.askers) == 6
