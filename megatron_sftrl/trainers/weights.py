"""Weights for commands that only read a model: of a checkpoint, or of a Hugging Face directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.engine.checkpoint import load_weights
from megatron_sftrl.engine.live_weights import load_hf_weights
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_config import from_hf_config, is_hugging_face
from megatron_sftrl.models.hf_weights import open_weights
from megatron_sftrl.trainers.origins import hash_of_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenWeights:
    """Where a model's weights came from.

    Args:
        path: step directory, or Hugging Face directory.
        step: of the checkpoint; None for a Hugging Face directory.
        content: SHA-256 over names and contents of the files.
    """

    path: Path
    step: int | None
    content: str

    @property
    def text(self) -> str:
        """All three, for what is made with them."""
        step = "" if self.step is None else f"step {self.step}, "
        return f"{self.path.resolve()} ({step}weights {self.content[:12]})"


def give_weights(
    policy: PolicyEngine, path: Path, config: TrainingConfig, *, into: ReferenceModel | None = None
) -> GivenWeights:
    """Fill a policy without an optimizer, or a second model of its shape; every rank calls it.

    Args:
        path: step directory, run directory, or Hugging Face directory.
    Raises:
        UserError: on every rank: nothing there, files that are damaged, or a model of other sizes.
    """
    architecture, parallel = policy.architecture, policy.parallel
    chunks = policy.chunks if into is None else into.chunks
    if not is_hugging_face(path):
        found = load_weights(chunks, path, architecture=architecture, parallel=parallel)
        return GivenWeights(
            path=found.path, step=found.record.trainer.step, content=found.record.content_hash()
        )
    _check_sizes(path, architecture)
    with open_weights(path, allow_pickle=config.model.allow_pickle) as weights:
        load_hf_weights(chunks, weights, architecture, parallel)
        return GivenWeights(path=path, step=None, content=hash_of_weights(path, weights))


def _check_sizes(path: Path, architecture: Architecture) -> None:
    theirs, ours = asdict(from_hf_config(path)), asdict(architecture)
    different = [
        f"{name}: expected {ours[name]}, got {theirs[name]}" for name in ours if ours[name] != theirs[name]
    ]
    if different:
        raise UserError(f"{path} is not the model that the YAML describes: {'; '.join(different)}")
