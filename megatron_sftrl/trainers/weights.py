"""Weights for commands that only read a model: of a checkpoint, or of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron_sftrl.config.schema import RolloutSection, TrainingConfig
from megatron_sftrl.engine.checkpoint import checkpoint_at
from megatron_sftrl.engine.checkpoint.directory import read_record
from megatron_sftrl.engine.checkpoint.store import check_architecture
from megatron_sftrl.engine.live_weights import load_hf_weights
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_config import from_hf_config, is_hugging_face
from megatron_sftrl.models.hf_weights import open_weights
from megatron_sftrl.trainers.adapters import load_model
from megatron_sftrl.trainers.origins import hash_of_weights

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


def only_read(config: ConfigT) -> ConfigT:
    """The run for a command that only reads models: adapters are merged where weights are given, every
    process holds the model and generates, and no engine keeps what only training asks for.
    """
    update: dict[str, object] = {"lora": None}
    if (grpo := config.grpo) is not None:
        left_out = {"devices", "tp", "router_replay"}
        rollout = grpo.rollout.model_dump(exclude_unset=True, exclude=left_out)
        update["rollout"] = RolloutSection.model_validate(rollout)
    return config.model_copy(update=update)


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
    policy: PolicyEngine, path: Path, config: TrainingConfig, *, into: Sequence[LanguageModel] | None = None
) -> GivenWeights:
    """Fill a policy that takes no optimizer step from here on; every rank calls it.

    It is a whole model (only_read), and adapters of a checkpoint are merged into it.

    Args:
        path: step directory, run directory, or Hugging Face directory.
        into: chunks of a second model of the policy's layout, which are filled instead.
    Raises:
        UserError: on every rank: nothing there, files that are damaged, or a model of other sizes.
    """
    assert policy.lora is None, "only_read comes first"
    architecture, chunks = policy.architecture, policy.chunks if into is None else into
    if not is_hugging_face(path):
        base = config.model.hf
        found = load_model(chunks, path, architecture=architecture, parallel=policy.parallel, base=base)
        return GivenWeights(
            path=found.path, step=found.record.trainer.step, content=found.record.content_hash()
        )
    check_sizes(path, architecture)
    with open_weights(path, allow_pickle=config.model.allow_pickle) as weights:
        load_hf_weights(chunks, weights, architecture, policy.parallel)
        return GivenWeights(path=path, step=None, content=hash_of_weights(path, weights))


def weights_at(path: Path, config: TrainingConfig) -> GivenWeights:
    """What give_weights would give, no tensor read; every rank calls it.

    Raises:
        UserError: on every rank: nothing there.
    """
    if is_hugging_face(path):
        with open_weights(path, allow_pickle=config.model.allow_pickle) as weights:
            return GivenWeights(path=path, step=None, content=hash_of_weights(path, weights))

    def look() -> GivenWeights:
        found = checkpoint_at(path)
        record = read_record(found)
        return GivenWeights(path=found, step=record.trainer.step, content=record.content_hash())

    return on_rank_zero(look)


def check_sizes(path: Path, architecture: Architecture) -> None:
    """Refuse weights of a model of other sizes, from its description alone.

    Raises:
        UserError: naming each difference; nothing there.
    """
    if not is_hugging_face(path):
        found = checkpoint_at(path)
        check_architecture(read_record(found), architecture, found)
        return
    # Of a multimodal model the part that this one is: check_run has seen that it is asked for.
    theirs, ours = asdict(from_hf_config(path, text_only=True)), asdict(architecture)
    different = [
        f"{name}: expected {ours[name]}, got {theirs[name]}" for name in ours if ours[name] != theirs[name]
    ]
    if different:
        raise UserError(f"{path} is not the model that the YAML describes: {'; '.join(different)}")
