"""Reads a run's configuration as the run will, and prints where the run will be.

    read_config.py KIND CONFIG key=value ...

A mistake in it is one message and exit code 2, before anything waits in a queue.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_sftrl.config.load import load_config
from megatron_sftrl.config.schema import GrpoConfig, RunConfig
from megatron_sftrl.errors import UserError


def run_directory(kind: str, config: str, *overrides: str) -> Path:
    """The run's directory, absolute.

    Args:
        kind: sft or grpo.
        config: the YAML file.
        overrides: key=value.
    Raises:
        UserError: everything that is wrong with the configuration.
    """
    loaded = load_config(config, overrides, schema={"sft": RunConfig, "grpo": GrpoConfig}[kind])
    return loaded.run_dir.absolute()


if __name__ == "__main__":
    try:
        print(run_directory(*sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
