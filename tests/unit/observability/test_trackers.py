"""trackio and MLflow: what they are told, in one run per run directory, also by a resumed run.

Here stand-ins write down each call. With SFTRL_TEST_TRACKERS=DIR the packages themselves are called, from a
folder of their own: pip install --target DIR trackio mlflow-skinny sqlalchemy alembic sqlparse.
"""

from __future__ import annotations

import importlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sftrl.observability.metrics import open_metrics, read_metrics
from megatron_sftrl.observability.run_directory import open_run_directory
from tests.unit.config.example import example

REQUIRED = "SFTRL_TEST_TRACKERS"
real = pytest.mark.skipif(REQUIRED not in os.environ, reason=f"needs {REQUIRED}=DIR with the packages")

STAND_INS = {
    "trackio.py": """
import json
from pathlib import Path

def tell(*call):
    with (Path(__file__).parent / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def log(self, metrics, step):
        tell("log", step, metrics)

def init(*, project, name, config, resume, embed):
    print("hello from trackio")
    tell("init", project, name, config["loss"]["name"], resume, embed)
    return Run()

def finish():
    print("goodbye from trackio")
    tell("finish")
""",
    "mlflow/__init__.py": """
from types import SimpleNamespace
from trackio import tell
from mlflow.exceptions import MlflowException

class MlflowClient:
    def __init__(self, tracking_uri):
        tell("client", tracking_uri)

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        tell("experiment", name)
        return "7"

    def create_run(self, experiment, run_name):
        tell("run", experiment, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="run-of-the-server"))

    def update_run(self, run_id, status):
        if run_id != "run-of-the-server":
            raise MlflowException(run_id)
        tell("update", run_id, status)

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        tell("batch", run_id, [vars(each) for each in (*metrics, *params)])

    def set_terminated(self, run_id):
        tell("end", run_id)
""",
    "mlflow/entities.py": """
class Metric:
    def __init__(self, key, value, timestamp, step):
        assert timestamp > 1e12
        self.key, self.value, self.step = key, value, step

class Param:
    def __init__(self, key, value):
        self.key, self.value = key, value
""",
    "mlflow/exceptions.py": """
class MlflowException(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"
""",
    "sqlalchemy.py": "",
}


@pytest.fixture
def clean_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the trackers that a test imports are gone behind it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in (
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
        "MLFLOW_HTTP_REQUEST_TIMEOUT",
        "MLFLOW_DISABLE_TELEMETRY",
    ):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("trackio", "mlflow", "sqlalchemy")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_modules: None) -> Path:
    """The file in which the stand-ins write what they are told."""
    folder = tmp_path / "stand-ins"
    for name, source in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    monkeypatch.syspath_prepend(folder)
    return folder / "calls.jsonl"


def run(path: Path, *overrides: str, resume_step: int, steps: range) -> None:
    config = example(f"run_dir='{path}'", "log.progress=false", *overrides)
    directory = open_run_directory(config, is_writer=True)
    with open_metrics(directory, config, resume_step=resume_step, total_steps=4) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / step, "valid/a:b": 2.0})


def told(calls: Path) -> list[list[Any]]:
    found = [json.loads(line) for line in calls.read_text().splitlines()]
    calls.unlink()
    return found


def test_trackio_has_one_run_of_a_run_directory(
    tmp_path: Path, calls: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine"
    run(path, "log.trackio=true", resume_step=0, steps=range(1, 3))
    (opened, *logged, closed) = told(calls)
    name = f"mine-{(path / 'trackio_id').read_text()}"
    assert opened == ["init", "megatron_sftrl", name, "gift", "allow", False]
    assert logged == [["log", step, {"loss": 1.0 / step, "valid/a:b": 2.0}] for step in (1, 2)]
    assert closed == ["finish"]
    run(path, "log.trackio=true", resume_step=1, steps=range(2, 3))
    assert told(calls)[0] == opened
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("hello from trackio\n") == said.err.count("goodbye from trackio\n") == 2
    run(tmp_path / "other" / "mine", "log.trackio=true", resume_step=0, steps=range(1, 2))
    assert told(calls)[0][2] != name


def test_mlflow_has_one_run_of_a_run_directory(tmp_path: Path, calls: Path) -> None:
    path = tmp_path / "mine"
    run(path, "log.mlflow=true", resume_step=0, steps=range(1, 3))
    client, experiment, made, *batches, end = told(calls)
    assert client == ["client", f"sqlite:///{path}/mlflow.db"]
    assert (experiment, made) == (["experiment", "megatron_sftrl"], ["run", "7", "mine"])
    values = [value for _, _, batch in batches for value in batch]
    assert {"key": "loss.name", "value": "gift"} in values
    assert [value for value in values if "step" in value] == [
        each
        for step in (1, 2)
        for each in (
            {"key": "loss", "value": 1.0 / step, "step": step},
            {"key": "valid/a_b", "value": 2.0, "step": step},
        )
    ]
    assert {batch[1] for batch in batches} == {"run-of-the-server"}
    assert end == ["end", "run-of-the-server"]

    run(path, "log.mlflow=true", resume_step=1, steps=range(2, 3))
    again = told(calls)
    assert [call[0] for call in again] == ["client", "update", "batch", "end"]
    assert again[1] == ["update", "run-of-the-server", "RUNNING"]


def test_mlflow_goes_where_its_variables_say_and_begins_anew_where_the_run_is_unknown(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker.example:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "sums")
    (tmp_path / "mlflow_id").write_text("of another server")
    run(tmp_path, "log.mlflow=true", resume_step=0, steps=range(1, 2))
    found = told(calls)
    assert found[:2] == [["client", "http://tracker.example:5000"], ["experiment", "sums"]]
    assert (tmp_path / "mlflow_id").read_text() == "run-of-the-server"


def test_a_server_that_fails_in_the_middle_of_a_run_does_not_end_it(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trackio, mlflow = importlib.import_module("trackio"), importlib.import_module("mlflow")

    def fail(*_: object, **values: object) -> None:
        if "params" not in values:
            raise ConnectionError("down")

    monkeypatch.setattr(trackio.Run, "log", fail)
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fail)
    run(tmp_path, "log.trackio=true", "log.mlflow=true", resume_step=0, steps=range(1, 4))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    for name in ("log.trackio", "log.mlflow"):
        assert caplog.text.count(f"{name} failed and is off until the run starts again") == 1


@real
def test_the_packages_themselves_hold_both_parts_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_modules: None
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, os.environ[REQUIRED]])
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    switches = ("log.trackio=true", "log.mlflow=true")
    run(tmp_path / "mine", *switches, resume_step=0, steps=range(1, 3))
    run(tmp_path / "mine", *switches, resume_step=2, steps=range(3, 5))

    mlflow = importlib.import_module("mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mine/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'megatron_sftrl'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params["loss.name"] == "gift"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(step, 1.0 / step) for step in (1, 2, 3, 4)]

    with sqlite3.connect(tmp_path / "trackio" / "megatron_sftrl.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert {row[0] for row in rows} == {f"mine-{(tmp_path / 'mine' / 'trackio_id').read_text()}"}
    assert [(row[1], json.loads(row[2])["loss"]) for row in rows] == [
        (step, 1.0 / step) for step in (1, 2, 3, 4)
    ]
