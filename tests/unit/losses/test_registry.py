"""Losses by name: a user's file, and every mistake answered before a model is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sftrl import LossInputs, LossOptions, LossOutput, build_loss
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.registry import Registry, load_module, register_loss
from tests.unit.losses.batches import inputs_for

USER_FILE = '''
"""A researcher's whole contribution."""
from __future__ import annotations

from pydantic import Field

from megatron_sftrl import LossOptions, LossInputs, LossOutput, register_loss


class MyOptions(LossOptions):
    beta: float = Field(default=20.0, ge=0)
    """Log-odds."""


@register_loss("{name}", config=MyOptions, needs=("reference",))
def my_gift(inputs: LossInputs, config: MyOptions) -> LossOutput:
    target = inputs.reference.tilted(inputs.batch.labels, config.beta)
    return LossOutput(token_loss=inputs.policy.cross_entropy(target))
'''


def logits(seed: int) -> torch.Tensor:
    """[5, 11] float64."""
    return torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_loss_from_a_users_file_is_built_by_name_and_may_be_imported_twice(tmp_path: Path):
    file = tmp_path / "my_loss.py"
    file.write_text(USER_FILE.format(name="from_a_file"))
    inputs = inputs_for(logits(1), logits(2))
    loss = build_loss("from_a_file", {"beta": 3.0}, modules=[file])
    again = build_loss("from_a_file", {"beta": 3.0}, modules=[str(file), tmp_path / "." / "my_loss.py"])
    expected = build_loss("gift", {"beta": 3.0, "eps": 0.0})(inputs).token_loss
    assert torch.equal(loss(inputs).token_loss, expected)
    assert torch.equal(again(inputs).token_loss, expected)
    assert loss.needs == ("reference",)


def test_the_same_name_in_another_file_is_refused_with_both_places(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_loss.py").write_text(USER_FILE.format(name="taken"))
    load_module(tmp_path / "a" / "my_loss.py")
    with pytest.raises(
        ValueError, match=r"'taken' is registered twice: in .*a/my_loss.py and in .*b/my_loss.py"
    ):
        load_module(tmp_path / "b" / "my_loss.py")


def test_a_file_that_fails_may_be_repaired_and_loaded_again(tmp_path: Path):
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('half written')")
    with pytest.raises(UserError, match="half written"):
        load_module(file)
    file.write_text(USER_FILE.format(name="repaired"))
    assert build_loss("repaired", modules=[file]).name == "repaired"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gitf", {}, r"unknown loss 'gitf' \(did you mean 'gift'\?\); registered: (\w+, )*curiosft, "),
        (
            "gift",
            {"betta": 1.0},
            r"unknown option 'betta' \(did you mean 'beta'\?\); its options: beta, smoo",
        ),
        ("sft", {"beta": 1.0}, r"unknown option 'beta'; its options: none"),
        ("gift", {"beta": -1.0}, r"beta: Input should be greater than or equal to 0, got -1.0"),
        ("gift", {"beta": "hot"}, r"beta: Input should be a valid number"),
        ("pear", {"variant": "tokens"}, r"variant: Input should be 'token', 'block' or 'sequence'"),
        ("pear", {"clip_ratio": [0.3, -0.08]}, r"clip_ratio: expected low <= high"),
        ("pear", {"base": "sfd"}, r"unknown loss 'sfd' \(did you mean 'sft'\?\)"),
        ("pear", {"base": "pear"}, r"expected another loss, got 'pear' itself"),
        ("pear", {"base": "gift", "base_options": {"bta": 1}}, r"unknown option 'bta' \(did you mean 'beta'"),
        ("curiosft", {"tau_min": 2.0}, r"tau_min 2.0 is above tau_max 1.5"),
    ],
)
def test_a_mistake_in_the_name_or_the_options_is_answered_with_what_was_meant(
    name: str, options: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        build_loss(name, options)


@pytest.mark.parametrize("module", ["no/such/file.py", "no_such_module_anywhere", "megatron_sftrl.no_such"])
def test_a_module_that_is_not_there_is_refused(module: str):
    with pytest.raises(ValueError, match=r"loss\.modules: "):
        build_loss("sft", modules=[module])


def test_a_module_whose_own_import_fails_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wants_more.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"line 1: ModuleNotFoundError: .*surely_not_installed"):
        build_loss("sft", modules=["wants_more"])


def test_defaults_hold_where_the_loss_has_them_and_nothing_else_is_said():
    defaults = {"correction": "tis", "temperature": 0.7}
    assert "rollout_logprobs" in build_loss("grpo", {"correction_cap": 3.0}, defaults=defaults).needs
    assert "rollout_logprobs" not in build_loss("grpo", {"correction": "none"}, defaults=defaults).needs
    build_loss("gift", {"beta": 3.0}, defaults=defaults)  # it has neither


def test_needs_are_those_of_the_loss_and_of_its_base():
    assert build_loss("pear").needs == ("behavior_logprobs",)
    assert build_loss("pear", {"base": "gift"}).needs == ("behavior_logprobs", "reference")


@pytest.mark.parametrize("name", ["gift", "curiosft"])
def test_a_missing_reference_is_an_error_that_says_where_to_get_it(name: str):
    with pytest.raises(ValueError, match=f"'{name}' needs reference, got none: add a `reference` section"):
        build_loss(name)(inputs_for(logits(1)))


def test_what_a_loss_returns_must_be_one_value_per_token_and_detached_metrics():
    registry = Registry()
    wrong = {
        "reduced": lambda inputs, config: LossOutput(token_loss=torch.zeros(())),
        "tensor": lambda inputs, config: torch.zeros(5),
        "integer": lambda inputs, config: LossOutput(token_loss=torch.zeros(5, dtype=torch.int64)),
        "attached": lambda inputs, config: LossOutput(
            token_loss=torch.zeros(5), metrics={"m": torch.zeros(5, requires_grad=True)}
        ),
        "number": lambda inputs, config: LossOutput(token_loss=0.5),  # type: ignore[arg-type]
        "number as metric": lambda inputs, config: LossOutput(
            token_loss=torch.zeros(5),
            metrics={"m": 0.5},  # type: ignore[dict-item]
        ),
        "mean as metric": lambda inputs, config: LossOutput(
            token_loss=torch.zeros(5), metrics={"m": torch.zeros(())}
        ),
        "elsewhere": lambda inputs, config: LossOutput(
            token_loss=torch.zeros(5), metrics={"m": torch.zeros(5, device="meta")}
        ),
        "list": lambda inputs, config: LossOutput(
            token_loss=torch.zeros(5),
            metrics=["m"],  # type: ignore[arg-type]
        ),
    }
    messages = {
        "reduced": r"token_loss to be a floating point tensor \[T\] = \[5\] on cpu, got torch.float32 \[\]",
        "tensor": "expected it to return a LossOutput, got Tensor",
        "integer": "got torch.int64",
        "attached": "loss 'attached': expected metric 'm' to be detached",
        "number": r"loss 'number': expected token_loss to be .* \[5\] on cpu, got float",
        "number as metric": r"expected metric 'm' to be .* \[5\] on cpu, got float",
        "mean as metric": r"expected metric 'm' to be .* got torch.float32 \[\]",
        "elsewhere": r"expected metric 'm' to be .* on cpu, got torch.float32 \[5\] on meta",
        "list": "expected metrics to be a dictionary .* got list",
    }
    for name, function in wrong.items():
        register_loss(name, config=LossOptions, registry=registry)(function)
        with pytest.raises(ValueError, match=messages[name]):
            build_loss(name, registry=registry)(inputs_for(logits(1)))


@pytest.mark.parametrize(
    "metric", ["loss", "grad_norm", "lr", "step", "updates", "seconds/data", "valid/loss", "reward/mean", 7]
)
def test_a_metric_does_not_take_the_name_of_a_number_that_every_step_has(metric: str):
    registry = Registry()

    @register_loss("mine", registry=registry)
    def mine(inputs: LossInputs, config: LossOptions) -> LossOutput:
        values = inputs.policy.logprobs(inputs.batch.labels)
        return LossOutput(token_loss=-values, metrics={"losses": values.detach(), metric: values.detach()})

    with pytest.raises(UserError, match=rf"loss 'mine': metric '?{metric}'? would stand in the place"):
        build_loss("mine", registry=registry)(inputs_for(logits(1)))


def test_an_unknown_need_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown need 'refernce' \(did you mean 'reference'\?\)"):
        register_loss("x", needs=("refernce",), registry=Registry())


def test_logits_of_another_number_of_tokens_than_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"LossInputs\.reference: expected T = 5 tokens"):
        inputs_for(logits(1), logits(2)[:4])


def test_importing_the_package_brings_neither_megatron_nor_vllm_nor_transformers():
    code = (
        "import sys, megatron_sftrl as m; m.build_loss('sft');"
        "print([x for x in ('megatron', 'vllm', 'transformers') if x in sys.modules])"
    )
    root = Path(__file__).resolve().parents[3]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_options_of_losses_written_before_have_their_base_class():
    import megatron_sftrl

    assert megatron_sftrl.LossConfig is LossOptions
