"""The doctor passes every loss of the package, and names the properties that a planted defect breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

import megatron_sftrl
from megatron_sftrl.apps.doctor.checks import CHECKS, Examination, Finding, examine
from megatron_sftrl.apps.doctor.evaluation import LossSpec
from megatron_sftrl.apps.doctor.ranks import RankError, RankPool
from megatron_sftrl.losses.registry import DEFAULT_REGISTRY
from tests.ranks import POOL

PACKAGE = Path(megatron_sftrl.__file__).parent
PLANTED = Path(__file__).parent / "planted"
REGISTERED = [
    name
    for name in DEFAULT_REGISTRY.names()
    if Path(DEFAULT_REGISTRY.get(name).origin).is_relative_to(PACKAGE)
]
REQUIRED = {"sed": {"tau": 0.8}, "aesl": {"tau": 1.0}, "ts_opsd": {"tau": 2.0}}
VARIANTS = [
    ("gift", {"beta": 2.0, "smoothing": 0.05, "eps": 0.0}),
    ("pear", {"variant": "sequence", "base": "gift", "center": "sequence", "normalize": "mean_one"}),
    ("pear", {"variant": "block"}),
    ("curiosft", {"divergence": "reverse_kl"}),
    ("kd", {"direction": "reverse", "temperature": 2.0, "top_k": 8, "alpha": 0.3}),
    ("grpo", {"ratio": "sequence", "correction": "tis", "kl_coefficient": 0.1, "temperature": 0.7}),
]
ON_RANKS = {"extreme", "fused", "tp2", "tp3", "pp2", "dp2", "cp2", "tp2-cp2"}
WHOLE_STEP = {"one-token", "microbatches", "packing", "pp2", "dp2", "cp2", "tp2-cp2"}


def findings_of(
    name: str,
    options: dict,
    *,
    module: str = "",
    only: set[str] | None = None,
    pool: RankPool = POOL,
    seed: int = 0,
) -> list[Finding]:
    """All findings, or those of some checks."""
    modules = (str(PLANTED / module),) if module else ()
    spec = LossSpec(name=name, options=options, modules=modules)
    examination = Examination(spec=spec, loss=spec.build(), seed=seed, pool=pool, timeout_s=120)
    return list(examine(examination, [check for check in CHECKS if only is None or check.name in only]))


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, REQUIRED.get(name, {})) for name in REGISTERED), *VARIANTS],
    ids=lambda value: str(value),
)
def test_every_registered_loss_holds(name: str, options: dict) -> None:
    findings = findings_of(name, options)
    assert [finding.check for finding in findings] == [check.name for check in CHECKS]
    assert {finding.check: finding.problems for finding in findings if finding.problems} == {}


def test_a_metric_that_is_rounding_alone_has_no_digits_to_keep() -> None:
    findings = findings_of("pear", {}, only={"microbatches", "packing"}, seed=9)  # 9e-16 nats in one process
    assert [finding.problems for finding in findings] == [(), ()]


@pytest.mark.parametrize(
    ("module", "name", "options", "broken"),
    [
        ("z_loss", "z_loss", {"defect": "none"}, {"fused"}),
        ("z_loss", "z_loss", {"defect": "local"}, {"extreme", "fused", "tp2", "tp3", "tp2-cp2"}),
        ("z_loss", "z_loss", {"defect": "with_padding"}, {"padding", "fused", "tp2", "tp3", "tp2-cp2"}),
        ("z_loss", "z_loss", {"defect": "constant"}, {"extreme", "fused", "tp2", "tp3", "tp2-cp2"}),
        ("z_loss", "z_loss", {"defect": "doubled"}, {"extreme", "fused", "tp2", "tp3", "tp2-cp2"}),
        ("reduces", "reduces", {"shape": "expanded"}, WHOLE_STEP),
        ("counts", "counts", {"defect": "local_count"}, WHOLE_STEP | {"empty-mask"}),
        ("counts", "counts", {"defect": "world_size"}, ON_RANKS),
        ("counts", "counts", {"defect": "own_sequences"}, {"cp2", "tp2-cp2"}),
        ("counts", "neighbours", {}, {"fused", "cp2", "tp2-cp2"}),
    ],
)
def test_a_planted_defect_breaks_these_properties(
    module: str, name: str, options: dict, broken: set[str]
) -> None:
    findings = findings_of(name, options, module=f"{module}.py")
    assert {finding.check for finding in findings if finding.problems} == broken


@pytest.mark.parametrize(
    ("module", "name", "options", "broken"),
    [
        ("reduces", "reduces", {"shape": "scalar"}, {"output"}),
        ("in_place", "in_place", {"target": "advantages"}, {"inputs"}),
        ("in_place", "in_place", {"target": "logits"}, {"inputs"}),
        ("z_loss", "z_loss", {"defect": "own_dtype"}, {"bf16"}),
        ("counts", "counts", {"defect": "weight"}, {"weights"}),
        ("counts", "counts", {"defect": "unbiased"}, {"one-token"}),
        ("counts", "numbers", {}, {"extreme"}),
        ("counts", "cancels", {}, {"one-token", "float32"}),
        ("counts", "undeclared", {}, {"output"}),
    ],
)
def test_a_defect_that_one_process_shows(module: str, name: str, options: dict, broken: set[str]) -> None:
    only = {check.name for check in CHECKS} - ON_RANKS | {"extreme"}
    findings = findings_of(name, options, module=f"{module}.py", only=only)
    assert {finding.check for finding in findings if finding.problems} == broken


def test_a_problem_says_where_and_by_how_much() -> None:
    (finding,) = findings_of("z_loss", {"defect": "constant"}, module="z_loss.py", only={"tp2"})
    # 0.02 log_sum p(label) is missing in the gradient of a label: the column may be on either rank
    assert finding.problems[0] == (
        "tp 2, padding huge, float64: gradient at token 51 (sequence 5, position 7), column 586, on rank 1: "
        "got -0.00351012376, expected 0.00319015675, off by 6.7e-03, 6.7e-02 of its scale"
    )


def test_ranks_that_hang_are_a_failed_property_that_says_where_they_stood() -> None:
    class Hanging(RankPool):
        def run(self, world_size: int, function: object, *args: object, **_: object) -> list:
            raise RankError(f"{world_size} ranks: did not finish\nrank 0 stood here: all_reduce")

    (finding,) = findings_of("sft", {}, only={"pp2"}, pool=Hanging())
    assert finding.problems == ("2 ranks: did not finish\nrank 0 stood here: all_reduce",)
