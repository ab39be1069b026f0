"""Commands that take the YAML of any run: which kind it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sftrl.config.grpo import GrpoConfig
from megatron_sftrl.config.load import load_config, read_config_text
from megatron_sftrl.config.schema import RunConfig, TrainingConfig
from megatron_sftrl.config.yaml_text import parse_yaml


def load_any_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The configuration of a run of `sftrl sft` or, where it has a section `rollout`, of `sftrl grpo`.

    Args:
        path, overrides: as in load_config.
    Raises:
        UserError: as load_config.
    """
    tree = parse_yaml(read_config_text(Path(path)), source=str(path)).value
    is_grpo = isinstance(tree, dict) and "rollout" in tree
    return load_config(path, overrides, schema=GrpoConfig if is_grpo else RunConfig)
