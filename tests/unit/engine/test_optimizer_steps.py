"""How many updates an optimizer has applied, where it counts them for each group of parameters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.ranks import run_ranks


class CountsPerGroup:
    """A fused Adam: `counts_empty` as Transformer Engine 2.20 does, else as earlier ones and Apex."""

    def __init__(self, *, counts_empty: bool) -> None:
        self.param_groups: list[dict] = [{"params": []}, {"params": ["a weight"]}, {"params": []}]
        self.state: dict = {}
        self._counts_empty = counts_empty

    def step(self) -> None:
        for group in self.param_groups:
            if self._counts_empty or group["params"]:
                group["step"] = group.get("step", 0) + 1


def steps_around_a_resume(counts_empty: bool) -> list[int]:
    """After three updates, after a resume of them, and after one more."""
    from megatron_sftrl.engine import cpu_backend

    cpu_backend.install()
    from megatron_sftrl.engine.checkpoint.tensors import optimizer_step, set_optimizer_step

    def leaf() -> SimpleNamespace:
        inner = CountsPerGroup(counts_empty=counts_empty)
        return SimpleNamespace(optimizer=inner, config=SimpleNamespace(optimizer="adam"))

    before, resumed = leaf(), leaf()
    for _ in range(3):
        before.optimizer.step()
    found = [optimizer_step(before)]  # type: ignore[arg-type]
    set_optimizer_step(resumed, found[0])  # type: ignore[arg-type]
    found.append(optimizer_step(resumed))  # type: ignore[arg-type]
    resumed.optimizer.step()
    return [*found, optimizer_step(resumed)]  # type: ignore[arg-type]


@pytest.mark.parametrize("counts_empty", [False, True])
def test_groups_without_parameters_do_not_disturb_the_count(counts_empty: bool) -> None:
    """The distributed optimizer leaves most ranks without a norm or a bias."""
    assert run_ranks(1, steps_around_a_resume, counts_empty)[0] == [3, 3, 4]
