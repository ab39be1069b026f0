"""What every test shares: the import path, stages and failures told at once, the end of the rank workers."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")


class Stages:
    """Says when a folder's first test is over, and shows a failure at once; the summary shows it again."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._start = config, time.monotonic()
        self._begun: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        stage = "/".join(report.nodeid.split("/")[:2])
        if stage not in self._begun:
            self._begun.add(stage)
            terminal.write_line(f"\n== {stage} (after {time.monotonic() - self._start:.0f} s)")
        if report.failed:
            terminal.write_line(f"\nFAILED {report.nodeid} ({report.when})", red=True)
            terminal.write_line(report.longreprtext)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's processes of tests report to the first one
        config.pluginmanager.register(Stages(config), "stages")


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets the level of the package's log, and where it goes."""
    log = logging.getLogger("megatron_sftrl")
    level, handlers = log.level, list(log.handlers)
    yield
    log.setLevel(level)
    log.handlers[:] = handlers


def pytest_sessionfinish(session: pytest.Session) -> None:
    from tests.ranks import close_ranks

    close_ranks()
