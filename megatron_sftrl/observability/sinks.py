"""The optional places for a run's numbers: Weights & Biases and TensorBoard."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from typing import Literal

from megatron_sftrl.config.load import parse_yaml, resolved_yaml
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.metrics import JsonlSink, MetricsSink, MetricsWriter, OptionalSink
from megatron_sftrl.observability.progress import ProgressSink
from megatron_sftrl.observability.run_directory import RunDirectory, write_atomically


def open_metrics(
    directory: RunDirectory, config: TrainingConfig, *, resume_step: int, total_steps: int
) -> MetricsWriter:
    """The writer that config.log asks for: metrics.jsonl always, the others when switched on. Rank 0 only.

    Args:
        directory: the opened run directory.
        config: the run.
        resume_step: last step of the resumed checkpoint, 0 for a new run.
        total_steps: optimizer steps of the whole run.
    Raises:
        UserError: a package that a sink needs is not installed, a damaged metrics.jsonl.
    """
    if config.log.tensorboard:
        _need_package("tensorboard", key="log.tensorboard")
    mode = config.log.wandb
    sinks: list[MetricsSink] = [JsonlSink(directory.metrics, resume_step=resume_step)]
    if config.log.tensorboard:
        sinks.append(
            OptionalSink("log.tensorboard", lambda: TensorBoardSink(directory, resume_step=resume_step))
        )
    if mode != "off":
        sinks.append(OptionalSink("log.wandb", lambda: WandbSink(directory, config, mode=mode)))
    if config.log.progress:
        sinks.append(
            OptionalSink(
                "log.progress", lambda: ProgressSink(total_steps=total_steps, first_step=resume_step)
            )
        )
    return MetricsWriter(sinks)


class WandbSink:
    """One Weights & Biases run per run directory, continued on resume under the id kept there.

    Steps are logged as the x axis `step`, not as wandb's own counter, which refuses to go back when a run
    resumes from a checkpoint older than its last logged step.

    Args:
        directory: holds the id and, in offline mode, the data (`wandb sync <run_dir>/wandb/offline-run-*`).
        config: stored with the run.
        mode: offline or online.
    Raises:
        UserError: wandb itself says that it is used wrongly; online without an API key, say.
    """

    def __init__(
        self, directory: RunDirectory, config: TrainingConfig, *, mode: Literal["offline", "online"]
    ) -> None:
        import wandb
        from wandb.errors import UsageError

        if not directory.wandb_id.exists():
            write_atomically(directory.wandb_id, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=config.log.wandb_project,
                name=directory.path.resolve().name,
                id=directory.wandb_id.read_text(encoding="utf-8").strip(),
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
        """Log one step."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Flush and end the wandb run."""
        self._run.finish()


class TensorBoardSink:
    """Scalar events under <run_dir>/tensorboard; on resume the points after the checkpoint are hidden.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    def __init__(self, directory: RunDirectory, *, resume_step: int) -> None:
        _need_package("tensorboard", key="log.tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(directory.tensorboard), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _need_package(name: str, *, key: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"{key} needs the package {name}, which is not installed: pip install {name}, or {key}=null"
        )
