"""Where a layer's spec keeps its mixture's router, in the versions of megatron-core."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from tests.ranks import run_ranks


def routers() -> list[tuple[str, str]]:
    """Names of the routers with and without a coefficient, in a ModuleSpec and in a partial."""
    from megatron_sftrl.engine import cpu_backend

    cpu_backend.install()
    from megatron_sftrl.engine.mixtures import balance_experts

    found = []
    for wraps in (SimpleNamespace, partial(partial, dict)):
        names = []
        for coefficient in (0.0, 0.01):
            submodules = SimpleNamespace(router=object)
            layer = SimpleNamespace(submodules=SimpleNamespace(mlp=wraps(submodules=submodules)))
            balance_experts(layer, SimpleNamespace(moe_aux_loss_coeff=coefficient))  # type: ignore[arg-type]
            names.append(submodules.router.__name__)
        found.append((names[0], names[1]))
    return found


def test_the_balancing_router_is_put_into_the_spec_of_either_version() -> None:
    assert run_ranks(1, routers)[0] == [("object", "BalancedRouter")] * 2
