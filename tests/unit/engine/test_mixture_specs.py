"""Where a layer's spec keeps its mixture's router, in the versions of megatron-core."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from tests.ranks import run_ranks


def routers() -> list[list[str]]:
    """Names of the routers of neither, of a coefficient and of a rate, in a ModuleSpec and in a partial."""
    from megatron_sftrl.engine import cpu_backend

    cpu_backend.install()
    from megatron_sftrl.engine.mixtures import balance_experts

    found = []
    for wraps in (SimpleNamespace, partial(partial, dict)):
        names = []
        for coefficient, rate in ((0.0, 0.0), (0.01, 0.0), (0.0, 0.01)):
            submodules = SimpleNamespace(router=object)
            layer = SimpleNamespace(submodules=SimpleNamespace(mlp=wraps(submodules=submodules)))
            asked = {"moe_aux_loss_coeff": coefficient, "moe_router_bias_update_rate": rate}
            balance_experts(layer, SimpleNamespace(**asked))  # type: ignore[arg-type]
            names.append(submodules.router.__name__)
        found.append(names)
    return found


def test_the_router_that_is_asked_for_is_put_into_the_spec_of_either_version() -> None:
    assert run_ranks(1, routers)[0] == [["object", "BalancedRouter", "CountingRouter"]] * 2
