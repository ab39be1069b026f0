"""Before a run, each reward must tell its known right answers from its known wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.config.rewards import RewardSection, RewardWorkersSection
from megatron_sftrl.rl.rewards import RewardPool, check_canaries

HOSTILE = str(Path(__file__).with_name("hostile.py"))


def refusal(*sections: dict) -> str:
    """What the check says against the rewards; nothing where they pass."""
    made = [RewardSection.model_validate(section) for section in sections]
    with RewardPool(made, RewardWorkersSection(num_workers=1, memory_gb=1)) as pool:
        try:
            check_canaries(pool)
        except ValueError as error:
            return str(error)
    return ""


def test_every_built_in_reward_passes_with_its_defaults_and_with_other_options() -> None:
    defaults = refusal(
        {"name": "math"},
        {"name": "exact_match"},
        {"name": "reasoning_gym"},
        {"name": "format"},
        {"name": "length", "max_tokens": 1, "cache": 1},
    )
    others = refusal(
        {"name": "math", "formats": ["hashes"], "decimals": 2},
        {"name": "exact_match", "marker": None, "ignore_case": False},
        {"name": "reasoning_gym", "extraction": "whole"},
        {"name": "format", "pattern": "yes|no", "example": "no"},
        {"name": "length", "max_tokens": 20480, "cache": 4096},
    )
    assert (defaults, others) == ("", "")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"name": "always_zero", "modules": [HOSTILE]},
            "reward 'always_zero' does not tell right from wrong: it gave 0 to the right example 'a' and 0 "
            "to the wrong example 'b'",
        ),
        (
            {"name": "upside_down", "modules": [HOSTILE]},
            "it gave 1 to the right example '1' and 2 to the wrong example '2'",
        ),
        (
            {"name": "broken", "modules": [HOSTILE]},
            "reward 'broken' failed on its own example 'a': error: ImportError: no module named verifier; "
            "the run would train on zeros",
        ),
        (
            {"name": "one_sided", "modules": [HOSTILE]},
            "reward 'one_sided': expected right and wrong examples, got one kind; add the other",
        ),
        (
            {"name": "format", "pattern": ".*"},
            "reward 'format' does not tell right from wrong: it gave 1 to the right example",
        ),
    ],
)
def test_a_reward_that_fails_its_examples_is_refused_by_name_and_example(section: dict, message: str) -> None:
    assert message in refusal(section)
