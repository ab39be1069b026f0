"""Rewards by name: a user's file, and every mistake answered before a model is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sftrl.config.rewards import RewardSection
from megatron_sftrl.rl.rewards import BUILT_IN, RewardConfig, RewardOutput, build_rewards, register_reward
from megatron_sftrl.rl.rewards.registry import DEFAULT_REGISTRY, RewardRegistry

ROOT = Path(__file__).resolve().parents[4]


def build(**section: object) -> object:
    return build_rewards([RewardSection.model_validate(section)])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"name": "maht"},
            r"unknown reward 'maht' \(did you mean 'math'\?\); registered: .*exact_match, format, ",
        ),
        ({"name": "mine"}, r"A reward of your own needs its file in the reward's modules"),
        ({"name": "math", "format": "boxed"}, r"unknown option 'format' \(did you mean 'formats'\?\)"),
        ({"name": "math", "formats": []}, r"formats: Tuple should have at least 1 item"),
        ({"name": "length", "max_tokens": 5}, r"cache: Field required"),
        ({"name": "length", "max_tokens": 5, "cache": 6}, r"cache 6 is above max_tokens 5; lower cache"),
        ({"name": "format", "pattern": "("}, r"pattern '\(' is no regular expression"),
        ({"name": "format", "pattern": "yes|no"}, r"does not match the example '<think>.*give as `example`"),
        ({"name": "math", "modules": ["no_such.py"]}, r"the reward's modules: no such file .*/no_such\.py"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(section: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**section)


def test_the_run_s_list_gives_names_weights_and_options() -> None:
    sections = [
        RewardSection(name="math"),
        RewardSection.model_validate({"name": "length", "weight": 0.1, "max_tokens": 8, "cache": 2}),
    ]
    rewards = build_rewards(sections)
    assert [(reward.name, reward.weight) for reward in rewards] == [("math", 1.0), ("length", 0.1)]
    assert rewards[1].config.model_dump() == {"max_tokens": 8, "cache": 2}


def test_a_name_may_be_taken_once() -> None:
    registry = RewardRegistry()

    def one(inputs: object, config: RewardConfig) -> RewardOutput:
        return RewardOutput(reward=1.0)

    def other(inputs: object, config: RewardConfig) -> RewardOutput:
        return RewardOutput(reward=2.0)

    register_reward("mine", registry=registry)(one)
    register_reward("mine", registry=registry)(one)
    with pytest.raises(ValueError, match=r"reward 'mine' is registered twice: in .* rename one of them"):
        register_reward("mine", registry=registry)(other)


def test_every_built_in_reward_documents_its_options_and_declares_examples() -> None:
    options = {"length": {"max_tokens": 8, "cache": 2}}
    files = {module.__name__ for module in BUILT_IN}
    for name in ("exact_match", "format", "length", "math", "reasoning_gym"):
        entry = DEFAULT_REGISTRY.get(name)
        assert entry.function.__module__ in files
        assert all(field.description for field in entry.config.model_fields.values())
        kinds = {canary.is_right for canary in entry.canaries(entry.config(**options.get(name, {})))}
        assert kinds == {True, False}


def test_rewards_load_neither_torch_nor_a_verifier() -> None:
    code = (
        "import sys\nfrom megatron_sftrl import register_reward, RewardInputs\n"
        "import megatron_sftrl.rl.rewards.worker\n"
        "print([x for x in ('torch', 'sympy', 'math_verify', 'reasoning_gym', 'numpy') if x in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_package_has_every_public_name_and_no_other() -> None:
    import megatron_sftrl

    assert all(getattr(megatron_sftrl, name) is not None for name in megatron_sftrl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'register_rewards'"):
        megatron_sftrl.register_rewards  # noqa: B018
