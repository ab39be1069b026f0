"""The optional places for a run's numbers: Weights & Biases, TensorBoard, trackio and MLflow.

Each is one run of the tracker per run directory, which a resumed run continues.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping

from megatron_sftrl.config.load import parse_yaml, resolved_yaml
from megatron_sftrl.config.schema import LogSection, TrainingConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.run_directory import RunDirectory, flat, write_atomically


def check_trackers(log: LogSection) -> None:
    """Raise UserError where the package of a tracker that is switched on is not installed."""
    needed = [
        ("log.tensorboard", log.tensorboard, "tensorboard", "tensorboard"),
        ("log.trackio", log.trackio, "trackio", "'megatron-sftrl[trackio]'"),
        ("log.mlflow", log.mlflow, "mlflow", "'megatron-sftrl[mlflow]'"),
    ]
    if log.mlflow and not os.environ.get("MLFLOW_TRACKING_URI"):
        needed.append(("log.mlflow", True, "sqlalchemy", "'megatron-sftrl[mlflow]'"))
    for key, is_on, package, source in needed:
        if is_on and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{key} needs the package {package}, which is not installed: pip install {source}, "
                f"or {key}=false"
            )


class WandbSink:
    """One Weights & Biases run per run directory, continued on resume under the id kept there.

    Steps are logged as the x axis `step`, not as wandb's own counter, which refuses to go back when a run
    resumes from a checkpoint older than its last logged step.

    Args:
        directory: holds the id and, in offline mode, the data (`wandb sync <run_dir>/wandb/offline-run-*`).
    Raises:
        UserError: wandb itself says that it is used wrongly; online without an API key, say.
    """

    def __init__(self, directory: RunDirectory, config: TrainingConfig) -> None:
        import wandb
        from wandb.errors import UsageError

        mode = config.log.wandb
        assert mode != "off"
        try:
            self._run = wandb.init(
                project=config.log.wandb_project,
                name=directory.path.resolve().name,
                id=_kept_id(directory, "wandb"),
                resume="allow",
                mode=mode,
                dir=str(directory.path.resolve()),
                config=parse_yaml(resolved_yaml(config), source="resolved.yaml").value,
                settings=wandb.Settings(silent=True),
            )
        except UsageError as error:
            raise UserError(f"log.wandb: {mode} cannot begin: {error}") from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """Scalar events under <run_dir>/tensorboard; on resume the points after the checkpoint are hidden."""

    def __init__(self, directory: RunDirectory, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(directory.tensorboard), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self._writer.close()


class TrackioSink:
    """One trackio run per run directory, in trackio's own folder, or where its variables say (TRACKIO_DIR).

    trackio tells runs of a project apart by their names: a part of this one is drawn and kept.
    """

    def __init__(self, directory: RunDirectory, config: TrainingConfig) -> None:
        import trackio

        self._finish = trackio.finish
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=config.log.wandb_project,
                name=f"{directory.path.resolve().name}-{_kept_id(directory, 'trackio')}",
                config=parse_yaml(resolved_yaml(config), source="resolved.yaml").value,
                resume="allow",
                embed=False,
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._finish()


class MlflowSink:
    """One MLflow run per run directory, in <run_dir>/mlflow.db or where MLFLOW_TRACKING_URI says.

    The server chooses the id, which is kept for a resumed run.
    """

    _PARAMETERS_IN_A_CALL = 100  # MLflow's limit

    def __init__(self, directory: RunDirectory, config: TrainingConfig) -> None:
        # Steps wait for the server: one that is down is to be given up long before a run counts as hung.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        local = f"sqlite:///{directory.path.resolve()}/mlflow.db"
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)
        self._id = self._continued(directory) or self._new(directory, config)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = [Metric(_allowed(name), float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=numbers)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _continued(self, directory: RunDirectory) -> str | None:
        """The kept run, going on; None where there is none, or where this server does not know it."""
        from mlflow.exceptions import MlflowException

        path = directory.tracker_id("mlflow")
        if not path.exists():
            return None
        kept = path.read_text(encoding="utf-8").strip()
        try:
            self._client.update_run(kept, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return kept

    def _new(self, directory: RunDirectory, config: TrainingConfig) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or config.log.wandb_project
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run = self._client.create_run(experiment, run_name=directory.path.resolve().name)
        write_atomically(directory.tracker_id("mlflow"), run.info.run_id)
        values = [Param(_allowed(key), str(value)) for key, value in flat(resolved_yaml(config)).items()]
        for start in range(0, len(values), self._PARAMETERS_IN_A_CALL):
            self._client.log_batch(run.info.run_id, params=values[start : start + self._PARAMETERS_IN_A_CALL])
        return run.info.run_id


def _allowed(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w/. -]", "_", name)


def _kept_id(directory: RunDirectory, tracker: str) -> str:
    """An id drawn for the run directory at its first use."""
    path = directory.tracker_id(tracker)
    if not path.exists():
        write_atomically(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
