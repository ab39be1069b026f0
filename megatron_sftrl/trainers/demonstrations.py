"""What is learned from demonstrations, by step: the data of an SFT run, and of the SFT term of a GRPO run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_sftrl.config.data import DemonstrationSection, SftTermSection
from megatron_sftrl.config.schema import BatchSection, GrpoConfig, RunConfig, TrainingConfig
from megatron_sftrl.data.dataset import Dataset, RowsToTokenize, find_rows
from megatron_sftrl.data.loader import StepData, StepLoader, num_training_steps
from megatron_sftrl.data.mixture import Mixture, describe_mixture, plan_mixture, with_mixture
from megatron_sftrl.data.rows import scorer_warnings
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.together import on_every_rank
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.registry import Loss
from megatron_sftrl.observability.run_directory import RunDirectory
from megatron_sftrl.observability.watch import HangWatch
from megatron_sftrl.trainers.checked import CheckedRun, ConfigT, batch_layout
from megatron_sftrl.trainers.run import shared_progress

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrations:
    """What the loop of an SFT run asks the data for.

    Args:
        train: steps of training data.
        valid: steps that cover the held-out data once; None without data.valid.
        num_steps: optimizer steps of the whole run.
        mixture: what an epoch takes of each path of data.train; None where it takes all rows.
    """

    train: StepLoader
    valid: StepLoader | None
    num_steps: int
    dataset: Dataset
    mixture: Mixture | None

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self.dataset) if self.mixture is None else self.mixture.num_rows

    @property
    def fingerprint(self) -> str:
        """Equal means that a run goes on with the same samples."""
        return with_mixture(self.dataset.fingerprint, self.mixture)

    def describe(self, row: int) -> str:
        """Where a training row comes from."""
        return self.dataset.describe(row)


def open_demonstrations(
    checked: CheckedRun[RunConfig], directory: RunDirectory, parallel: ParallelContext
) -> Demonstrations:
    """Tokenize everything once, into the run directory, and lay out the steps.

    Raises:
        UserError: a row that cannot be used, or a loss that needs scores the data has not.
    """
    config, data = checked.config, checked.config.data
    paths = {"data.train": data.train_paths} | ({"data.valid": data.valid} if data.valid else {})
    sets = _tokenized(checked, checked.loss, data, paths, directory, parallel)
    train, valid = sets["data.train"], sets.get("data.valid")
    mixture = _mixture(data, train, "data.train", seed=config.seed)
    steps = num_training_steps(
        steps=config.train.steps,
        epochs=config.train.epochs,
        num_rows=len(train) if mixture is None else mixture.num_rows,
        global_size=config.batch.global_size,
    )
    held_out = None
    if valid is not None:
        held_out = _loader(checked, data, config.batch, valid, parallel, is_train=False)
    return Demonstrations(
        train=_loader(checked, data, config.batch, train, parallel, is_train=True, mixture=mixture),
        valid=held_out,
        num_steps=steps,
        dataset=train,
        mixture=mixture,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SftTerm:
    """The demonstrations that each update of a GRPO run learns, too.

    Args:
        loss: of them.
        train: updates by number.
        fingerprint: equal means that a run goes on with the same demonstrations.
    """

    section: SftTermSection
    loss: Loss
    train: StepLoader
    fingerprint: str

    def draw(self, consumed: int) -> StepData:
        """This rank's micro-batches of the update behind `consumed` demonstrations."""
        return self.train.step(consumed // self.section.global_size)


def open_sft_term(
    checked: CheckedRun[GrpoConfig], directory: RunDirectory, parallel: ParallelContext
) -> SftTerm | None:
    """The run's `sft`, tokenized as the data of an SFT run is; None without one.

    Raises:
        UserError: as open_demonstrations.
    """
    section, loss, key = checked.config.sft, checked.sft_loss, "sft.data.train"
    if section is None or loss is None:
        return None
    sizes = {"global_size": section.global_size, "aggregation": section.aggregation}
    batch = checked.config.batch.model_copy(update=sizes)
    try:
        paths = {key: section.data.train_paths}
        train = _tokenized(checked, loss, section.data, paths, directory, parallel)[key]
        mixture = _mixture(section.data, train, key, seed=checked.config.seed)
    except UserError as error:
        raise UserError(f"section sft: {error}") from error
    return SftTerm(
        section=section,
        loss=loss,
        train=_loader(checked, section.data, batch, train, parallel, is_train=True, mixture=mixture),
        fingerprint=with_mixture(train.fingerprint, mixture),
    )


def _tokenized(
    checked: CheckedRun[ConfigT],
    loss: Loss,
    data: DemonstrationSection,
    paths: Mapping[str, Sequence[Path]],
    directory: RunDirectory,
    parallel: ParallelContext,
) -> dict[str, Dataset]:
    """The rows of the paths by the key where they stand, with what the loss needs of them."""
    config: TrainingConfig = checked.config
    rows = on_every_rank(
        lambda: [
            find_rows(
                found,
                checked.tokenizer,
                max_length=data.max_length,
                truncation=data.truncation,
                columns=data.columns,
                learning=data.learning,
                cache_dir=directory.path / "tokens",
                key=key,
            )
            for key, found in paths.items()
        ]
    )
    tokenize_once(rows, parallel, hang_minutes=config.train.hang_minutes)
    sets = {each.key: each.load() for each in rows}
    for key, dataset in sets.items() if "behavior_logprobs" in loss.needs else ():
        if not dataset.has_behavior_logprobs:
            raise UserError(
                f"loss {loss.name!r} needs behavior_logprobs, but {key} has none: score it with `sftrl score`"
            )
        for line in scorer_warnings(dataset.scorers, dtype=config.model.dtype):
            if parallel.rank == 0:
                LOGGER.warning("%s: %s", key, line)
    return sets


def _mixture(data: DemonstrationSection, train: Dataset, key: str, *, seed: int) -> Mixture | None:
    """What an epoch takes of each path, told in the log; None where it takes all rows."""
    if data.train_weights is None:
        return None
    paths, sources = data.train_paths, train.sources
    counts, unit = np.ones(len(train), np.int64), "rows"
    if data.mix_by == "tokens":
        counts, unit = train.num_loss_tokens, "learned tokens"
    sizes = np.bincount(sources, minlength=len(paths))
    amounts = np.bincount(sources, weights=counts, minlength=len(paths))
    mixture = plan_mixture(data.train_weights, sizes=sizes.tolist(), amounts=amounts.tolist(), paths=paths)
    first = np.concatenate(mixture.rows_of_sources(0, seed=seed, shuffle=data.shuffle))
    LOGGER.info("%s: %s", key, describe_mixture(mixture, counts[first], unit, paths))
    return mixture


def tokenize_once(rows: Sequence[RowsToTokenize], parallel: ParallelContext, *, hang_minutes: float) -> None:
    """Fill the caches of `rows`, a share of the files on each node; every rank calls it.

    Ranks that wait do so at the job's store, not in a collective: as long as a rank that tokenizes goes on,
    nothing ends them. A set that is finished, or a node's share of one, is found by the next start.

    Raises:
        UserError, RuntimeError: on every rank, with the text of each rank that raised.
    """
    local_ranks = [0] * parallel.world_size
    dist.all_gather_object(local_ranks, int(os.environ.get("LOCAL_RANK", "0")))
    leaders = [rank for rank, local_rank in enumerate(local_ranks) if local_rank == 0]
    with HangWatch(hang_minutes) as watch:
        progress = shared_progress(parallel, watch, hang_minutes=hang_minutes)

        def tokenize_share() -> None:
            for each in rows if parallel.rank in leaders else ():
                each.write_part(leaders.index(parallel.rank), len(leaders), progress.moved)

        def join_shares() -> None:
            for each in rows if parallel.rank == 0 else ():
                each.load(num_parts=len(leaders), on_move=progress.moved)

        on_every_rank(lambda: progress.together(tokenize_share))
        on_every_rank(lambda: progress.together(join_shares))


def _loader(
    checked: CheckedRun[ConfigT],
    data: DemonstrationSection,
    batch: BatchSection,
    dataset: Dataset,
    parallel: ParallelContext,
    *,
    is_train: bool,
    mixture: Mixture | None = None,
) -> StepLoader:
    config: TrainingConfig = checked.config
    return StepLoader(
        dataset,
        batch=batch,
        layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
        max_length=data.max_length,
        pad_id=checked.tokenizer.pad_id,
        seed=config.seed,
        shuffle=data.shuffle,
        mode="train" if is_train else "evaluate",
        mixture=mixture,
    )
