"""Everything about a run that can be wrong is found here, before a process group or a model exists."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from megatron_sftrl.config.checks import check_run
from megatron_sftrl.config.lora import ALL_TARGETS, NARROW_TARGETS
from megatron_sftrl.config.schema import GrpoConfig, TrainingConfig
from megatron_sftrl.data.loader import BatchLayout
from megatron_sftrl.data.prompts import end_token_ids
from megatron_sftrl.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_sftrl.engine.checkpoint import checkpoint_at, complete_checkpoints, stored_assets
from megatron_sftrl.engine.device import check_device
from megatron_sftrl.engine.megatron_config import check_megatron
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.registry import Loss, build_loss
from megatron_sftrl.models import architecture_of, notes_on
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_config import hf_config_values, is_hugging_face
from megatron_sftrl.models.hf_output import GENERATION_CONFIG, HfAssets, end_ids, read_assets, with_end_ids
from megatron_sftrl.models.hf_weights import open_weights
from megatron_sftrl.models.tensors import hf_matrices, short_name
from megatron_sftrl.observability.trackers import check_trackers
from megatron_sftrl.trainers.adapters import open_start
from megatron_sftrl.types import SamplingParams

LOGGER = logging.getLogger(__name__)

# Where a response ends: the ids and texts that rollouts, evaluations and `sftrl generate` stop at.


def model_directory(config: TrainingConfig) -> Path | None:
    """The Hugging Face directory that the run's model is described in, where there is one."""
    model = config.model.hf or config.model.hf_config
    return model.parent if model is not None and model.is_file() else model


def stop_ids(
    config: TrainingConfig, tokenizer: Tokenizer, *, vocab_size: int, checkpoint: Path | None = None
) -> frozenset[int]:
    """Ids that end a response: of the tokenizer, its template, the model's files and rollout.stop_ids.

    Args:
        checkpoint: step, run or Hugging Face directory whose weights are used; what they were trained to end
            with counts.
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
        if path is not None and is_hugging_face(path):
            ids.update(end_ids(read_assets(model=path, tokenizer=None, chat_template=None)))
        elif path is not None:
            ids.update(end_ids(stored_assets(checkpoint_at(path))))
    if (grpo := config.grpo) is not None:
        check_stop_ids("rollout.stop_ids", grpo.rollout.stop_ids, vocab_size)
        ids.update(grpo.rollout.stop_ids)
    return frozenset(ids)


def check_stop_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids of the setting `name` that the model cannot draw."""
    if foreign := [each for each in ids if not 0 <= each < vocab_size]:
        raise UserError(f"{name}: expected ids from 0 to {vocab_size - 1}, got {foreign}")


def response_text(tokenizer: Tokenizer, tokens: Sequence[int], sampling: SamplingParams) -> str:
    """What a person or a reward reads of a response: nothing from its end token or stop text on."""
    text = tokenizer.decode([token for token in tokens if token not in sampling.stop_ids])
    return text[: min((place for each in sampling.stop if (place := text.find(each)) >= 0), default=None)]


ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun(Generic[ConfigT]):
    """A configuration that has passed its checks, and what was read to check it; `sft_loss`: of sft.loss."""

    config: ConfigT
    architecture: Architecture
    loss: Loss
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    sft_loss: Loss | None = None


def checked_run(config: ConfigT) -> CheckedRun[ConfigT]:
    """Check this machine and its packages, and all that checked_configuration does."""
    check_device(config)
    checked = checked_configuration(config)
    check_megatron(config, checked.architecture, is_cuda=torch.cuda.is_available())
    return checked


def checked_configuration(config: ConfigT, *, world_size: int | None = None) -> CheckedRun[ConfigT]:
    """Check sections against each other, the model, the loss, the tokenizer and the number of processes.

    `world_size` is that of a run which is yet to be started, maybe on another machine; this job's when None.
    """
    check_trackers(config.log)
    architecture, notes = architecture_of(config.model), notes_on(config.model)
    if config.model.hf is not None:
        with open_weights(config.model.hf, allow_pickle=config.model.allow_pickle) as weights:
            weights.check_model(architecture)
            notes += weights.notes
    say_notes(notes)
    loss = _loss(config)
    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    sft_loss = None if config.grpo is None else sft_term_loss(config.grpo)
    loss_needs = loss.needs + (() if sft_loss is None else sft_loss.needs)
    check_original_length(config, architecture)
    check_run(config, architecture, world_size, loss_needs=loss_needs)
    check_targets(config, architecture)
    if config.lora is not None and config.lora.start is not None:
        open_start(config, architecture).close()
    tokenizer = _tokenizer(config, architecture)
    return CheckedRun(
        config=config,
        architecture=architecture,
        loss=loss,
        sft_loss=sft_loss,
        tokenizer=tokenizer,
        stop_ids=stop_ids(config, tokenizer, vocab_size=architecture.vocab_size),
    )


def checked_model(config: TrainingConfig) -> tuple[Architecture, Tokenizer]:
    """What generation and scoring need: the model's sizes and its tokenizer, checked against the layout."""
    check_device(config)
    architecture = architecture_of(config.model)
    say_notes(notes_on(config.model))
    needs = ("reference",) if config.reference is not None else ()
    check_original_length(config, architecture)
    check_run(config, architecture, int(os.environ.get("WORLD_SIZE", "1")), loss_needs=needs)
    check_targets(config, architecture)
    check_megatron(config, architecture, is_cuda=torch.cuda.is_available())
    tokenizer = _tokenizer(config, architecture)
    return architecture, tokenizer


def check_original_length(config: TrainingConfig, architecture: Architecture) -> None:
    """Refuse sequences for which a longrope has other factors than those that are built.

    Raises:
        UserError: naming the settings that make them.
    """
    rope = architecture.rope
    if rope.kind != "longrope" or rope.original_length is None:
        return
    lengths = {config.length_keys: config.max_length}
    if config.grpo is not None and config.grpo.sft is not None:
        lengths["sft.data.max_length"] = config.grpo.sft.data.max_length
    for keys, length in lengths.items():
        if length > rope.original_length:
            raise UserError(
                f"{keys} = {length}: a model with rope_type longrope is only trained and run with sequences "
                f"of up to its original_max_position_embeddings = {rope.original_length} tokens; beyond that "
                "transformers and vLLM choose between short_factor and long_factor by different lengths, and "
                "trainer and rollouts would be two networks: shorten sequences"
            )


def check_targets(config: TrainingConfig, architecture: Architecture) -> None:
    """Hold lora.targets and lora.rank against the matrices of the model.

    Raises:
        UserError: naming what is not there, and what there is instead.
    """
    if (lora := config.lora) is None:
        return
    sides: dict[str, int] = {}
    for name, shape in hf_matrices(architecture, ALL_TARGETS).items():
        target = short_name(name)
        smaller = lora.rank if target in NARROW_TARGETS else min(shape)
        sides[target] = min(smaller, sides.get(target, smaller))
    if lora.targets != "all-linear" and (missing := [name for name in lora.names if name not in sides]):
        raise UserError(
            f"lora.targets: a {architecture.family} has no {', '.join(missing)} that an adapter could be put "
            f"beside: choose among {', '.join(name for name in ALL_TARGETS if name in sides)}"
        )
    if lora.modules_to_save and architecture.tie_embeddings:
        raise UserError(
            "lora.modules_to_save: the output layer of this model is its embedding, of which PEFT would make "
            "two weights, another model: remove it"
        )
    too_large = [name for name in lora.names if lora.rank > sides.get(name, lora.rank)]
    if too_large:
        name = min(too_large, key=lambda each: sides[each])
        raise UserError(
            f"lora.rank = {lora.rank} is larger than {name}, whose smaller side is {sides[name]}: lower it"
        )


def _tokenizer(config: TrainingConfig, architecture: Architecture) -> Tokenizer:
    tokenizer = load_tokenizer(config.tokenizer)
    check_vocabulary(tokenizer, architecture.vocab_size)
    say_notes(tokenizer.notes)
    return tokenizer


def say_notes(notes: Sequence[str]) -> None:
    """What a user should know about the model's files, once for all ranks."""
    for note in notes:
        LOGGER.info("note: %s", note)


def _loss(config: TrainingConfig) -> Loss:
    """The run's loss; in GRPO at the temperature that responses are sampled at, which has one place.

    Responses of earlier weights (rollout.ahead) are corrected for unless the run says that they are not.

    Raises:
        UserError: what build_loss refuses, a loss for another kind of run, or a temperature of its own.
    """
    grpo, defaults = config.grpo, {}
    if grpo is not None:
        defaults["temperature"] = grpo.rollout.temperature
        if grpo.rollout.ahead:
            defaults["correction"] = "tis"
    loss = build_loss(config.loss.name, config.loss.options, modules=config.loss.modules, defaults=defaults)
    if grpo is None:
        if "advantages" in loss.needs:
            raise UserError(f"loss '{loss.name}' needs advantages, which `sftrl grpo` makes of rewards")
        if loss.is_on_policy:
            raise UserError(f"loss '{loss.name}' is about the policy's own responses: use `sftrl grpo`")
        return loss
    if not loss.is_on_policy:
        raise UserError(f"loss '{loss.name}' does not use advantages: `sftrl sft` trains with it")
    if "temperature" in config.loss.options:
        raise UserError("loss.temperature follows rollout.temperature: set that one, and remove this one")
    _check_loss_of_responses(loss, grpo)
    return loss


def _check_loss_of_responses(loss: Loss, config: GrpoConfig) -> None:
    """Raise UserError for settings that the loss does not look at."""
    knows_demonstrations = "shaping" in type(loss.config).model_fields
    if config.rollout.demonstrations and not knows_demonstrations:
        raise UserError(
            f"rollout.demonstrations: loss '{loss.name}' does not tell demonstrations from the policy's own "
            "responses, as loss 'grpo' does: remove it, or take that loss"
        )
    if not config.rollout.demonstrations and "shaping" in config.loss.options and knows_demonstrations:
        raise UserError(
            "loss.shaping has no effect: rollout.demonstrations is 0, so that no group holds one; set it to "
            "at least 1, or remove loss.shaping"
        )
    if "advantages" in loss.needs:
        return
    idle = {
        "filters.dynamic_sampling": config.filters.dynamic_sampling,
        "advantages.estimator": "estimator" in config.advantages.model_fields_set,
    }
    for key in (key for key, is_said in idle.items() if is_said):
        raise UserError(
            f"{key} has no effect: loss '{loss.name}' learns from every response, whatever its reward; "
            "remove it"
        )


def sft_term_loss(config: GrpoConfig) -> Loss | None:
    """The loss of the run's demonstrations (sft.loss); None without any.

    Raises:
        UserError: what build_loss refuses, or a loss of the policy's own responses.
    """
    if config.sft is None:
        return None
    named = config.sft.loss
    try:
        loss = build_loss(named.name, named.options, modules=config.loss.modules)
    except UserError as error:
        raise UserError(f"sft.loss: {error}") from error
    if loss.is_on_policy:
        raise UserError(f"sft.loss: loss '{loss.name}' is about the policy's own responses: take sft, say")
    return loss


def export_assets(checked: CheckedRun[ConfigT]) -> HfAssets:
    """What a checkpoint carries for an export to Hugging Face: configuration and tokenizer files.

    generation_config.json ends at everything that the run's responses end with; rank 0 says where the model's
    does not.
    """
    config, tokenizer = checked.config, checked.tokenizer
    model = model_directory(config)
    assets = read_assets(
        model=model, tokenizer=config.tokenizer.path, chat_template=config.tokenizer.chat_template
    )
    if model is not None:
        missing = sorted(checked.stop_ids - set(end_ids(assets)))
        if missing:
            named = ", ".join(f"{each} ({tokenizer.decode([each])!r})" for each in missing)
            LOGGER.info(
                "note: responses of this run end with %s, too; the %s of %s ends at %s: checkpoints and "
                "their exports end at all of them",
                named,
                GENERATION_CONFIG,
                model,
                list(end_ids(assets)),
            )
        return with_end_ids(assets, checked.stop_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    made = {
        "config.json": {**hf_config_values(checked.architecture, dtype=None), **ids},
        GENERATION_CONFIG: ids,
    }
    texts = {name: (json.dumps(values, indent=2) + "\n").encode() for name, values in made.items()}
    return with_end_ids(HfAssets(files={**assets.files, **texts}), checked.stop_ids)


def batch_layout(config: TrainingConfig, *, dp_rank: int, dp_size: int) -> BatchLayout:
    parallel = config.parallel
    # Sequence parallelism splits the context-parallel share of T over tp.
    pieces = parallel.tp * parallel.cp if parallel.sequence_parallel else parallel.cp
    multiple = pieces if parallel.sequence_parallel else 1
    if config.train.fp8 is not None:
        multiple = pieces * config.train.fp8.multiple
    return BatchLayout(
        dp_rank=dp_rank,
        dp_size=dp_size,
        sequence_multiple_of=2 * parallel.cp if parallel.cp > 1 else 1,
        pad_to_multiple_of=multiple,
        microbatch_multiple=parallel.pp if parallel.vp > 1 else 1,
        # Pipeline stages exchange tensors of one size.
        uniform_length=parallel.pp > 1,
    )
