"""The command line of `sftrl compare`: check everything, run what is missing, report what is there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sftrl.errors import UserError

if TYPE_CHECKING:
    from megatron_sftrl.apps.compare.config import CompareConfig
    from megatron_sftrl.apps.compare.plan import Stage

COMPARE = {
    "help": "which SFT leaves the best policy after RL, over several seeds",
    "description": "Runs SFT, its evaluation, GRPO and the evaluation of that for each arm and seed of "
    "compare.yaml, as far as they are not done, and reports; `sftrl keys compare` explains it. Exit code 1 "
    "where a run has failed: other arms go on, and the next start tries it again.",
    "example": "seeds=[0,1,2]",
}

_FAILED = 1


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line may hold beside the YAML file and its overrides."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report-only", action="store_true", help="start nothing, report what is there")
    what.add_argument("--list", action="store_true", help="what is done, running, failed or missing")


def compare_command(parsed: argparse.Namespace) -> int:
    """Run `sftrl compare`.

    Returns:
        The exit code: 0, 1 where a stage has failed, 75 where a signal ended it.
    Raises:
        UserError: before anything starts: what does not fit together, or another comparison in out_dir.
    """
    from megatron_sftrl.apps.compare.config import read_compare_config
    from megatron_sftrl.apps.compare.launch import Local, slots_of, submit, visible_devices
    from megatron_sftrl.apps.compare.plan import check, stages_of, write_files
    from megatron_sftrl.apps.report.page import check_matplotlib
    from megatron_sftrl.observability.run_lock import RunLock

    path: Path = Path(parsed.config)
    config = read_compare_config(path, parsed.overrides)
    stages = stages_of(config)
    if parsed.list:
        _list(config, stages)
        return 0
    check_matplotlib()
    if parsed.report_only:
        if not config.out_dir.is_dir():
            raise UserError(f"--report-only: there is no comparison to report in out_dir {config.out_dir}")
        return _report(config, stages)
    slots = slots_of(config.launch, visible_devices() if config.launch.kind == "local" else [])
    with RunLock(config.out_dir):
        write_files(config, stages, check(config, stages))
        if config.launch.kind == "slurm":
            submit(config, stages, ["compare", str(path.absolute()), *parsed.overrides, "--report-only"])
            return 0
        is_ended = Local(config, stages, slots).run()
        return _report(config, stages) if is_ended else os.EX_TEMPFAIL


def _report(config: CompareConfig, stages: Sequence[Stage]) -> int:
    from megatron_sftrl.apps.compare.report import tell
    from megatron_sftrl.apps.compare.results import results_of

    results = results_of(config, stages)
    tell(config, results)
    print(f"\nwritten: {config.out_dir / 'report.html'}")
    return _FAILED if any(arm.failures for arm in results.arms.values()) else 0


def _list(config: CompareConfig, stages: Sequence[Stage]) -> None:
    """Every stage with its state, and the last error of those that failed."""
    from megatron_sftrl.apps.compare.launch import files_of, states_of
    from megatron_sftrl.apps.report.page import Table, print_table

    states = states_of(config, stages)
    rows = []
    for stage in stages:
        state = states[stage.name]
        error = files_of(config, stage).last_error() if state == "failed" else ""
        rows.append((stage.name, state, error.partition("\n")[0]))
    counts = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
    title = ", ".join(f"{count} {state}" for state, count in counts.items())
    print_table(Table(title=title, columns=("stage", "state", ""), rows=tuple(rows)))
