"""Where a response ends: the ids and texts that rollouts, evaluations and `sftrl generate` stop at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sftrl.config.schema import GrpoConfig, TrainingConfig
from megatron_sftrl.data.prompts import end_token_ids
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.engine.checkpoint import checkpoint_at, complete_checkpoints, stored_assets
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_output import end_ids, read_assets
from megatron_sftrl.types import SamplingParams


def model_directory(config: TrainingConfig) -> Path | None:
    """The Hugging Face directory that the run's model is described in, where there is one."""
    model = config.model.hf or config.model.hf_config
    return model.parent if model is not None and model.is_file() else model


def stop_ids(
    config: TrainingConfig, tokenizer: Tokenizer, *, vocab_size: int, checkpoint: Path | None = None
) -> frozenset[int]:
    """Ids that end a response: of the tokenizer, its template, the model's files and rollout.stop_ids.

    Args:
        config: of the run.
        tokenizer: with its chat template.
        vocab_size: V.
        checkpoint: step or run directory whose weights are used; what they were trained to end with counts.
    Raises:
        UserError: no such checkpoint, files that cannot be read, or a rollout.stop_ids outside of V.
    """
    ids = set(end_token_ids(tokenizer))
    if (model := model_directory(config)) is not None:
        ids.update(end_ids(read_assets(model=model, tokenizer=None, chat_template=None)))
    # A run's own checkpoints end where its start ended, which may be gone or another one by now.
    is_begun = bool(complete_checkpoints(config.run_dir / "checkpoints"))
    start = config.run_dir if is_begun else config.model.init_checkpoint
    for path in (start, checkpoint):
        if path is not None:
            ids.update(end_ids(stored_assets(checkpoint_at(path))))
    if isinstance(config, GrpoConfig):
        check_stop_ids("rollout.stop_ids", config.rollout.stop_ids, vocab_size)
        ids.update(config.rollout.stop_ids)
    return frozenset(ids)


def check_stop_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids that the model cannot draw.

    Args:
        name: of the setting, for the message.
        ids: what it says.
        vocab_size: V.
    """
    if foreign := [each for each in ids if not 0 <= each < vocab_size]:
        raise UserError(f"{name}: expected ids from 0 to {vocab_size - 1}, got {foreign}")


def response_text(tokenizer: Tokenizer, tokens: Sequence[int], sampling: SamplingParams) -> str:
    """What a person or a reward reads of a response: nothing from its end token or stop text on."""
    text = tokenizer.decode([token for token in tokens if token not in sampling.stop_ids])
    return text[: min((place for each in sampling.stop if (place := text.find(each)) >= 0), default=None)]
