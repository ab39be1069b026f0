"""The data of an SFT run: training and validation steps by number."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.data.dataset import Dataset, load_dataset
from megatron_sftrl.data.loader import StepLoader, num_training_steps
from megatron_sftrl.data.rows import scorer_warnings
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.run_directory import RunDirectory
from megatron_sftrl.trainers.plan import RunPlan, batch_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrations:
    """What the loop asks the data for.

    Args:
        train: steps of training data.
        valid: steps that cover the held-out data once; None without data.valid.
        num_steps: optimizer steps of the whole run.
        dataset: the training rows.
    """

    train: StepLoader
    valid: StepLoader | None
    num_steps: int
    dataset: Dataset

    @property
    def num_rows(self) -> int:
        """Rows of the training data."""
        return len(self.dataset)

    def describe(self, row: int) -> str:
        """Where a training row comes from."""
        return self.dataset.describe(row)


def open_demonstrations(
    plan: RunPlan[RunConfig], directory: RunDirectory, parallel: ParallelContext
) -> Demonstrations:
    """Tokenize everything once (rank 0, kept in the run directory) and lay out the steps.

    Raises:
        UserError: a row that cannot be used, or a loss that needs scores the data has not.
    """
    config = plan.config

    def load() -> tuple[Dataset, Dataset | None]:
        train = _load(plan, directory, is_train=True)
        valid = _load(plan, directory, is_train=False) if config.data.valid else None
        return train, valid

    # Rank 0 comes first and the others find its work in the cache; a bad row is an error on all of them.
    on_rank_zero(lambda: load() and None)
    train, valid = load()
    if "behavior_logprobs" in plan.loss.needs:
        for name, dataset in (("train", train), ("valid", valid)):
            if dataset is not None and not dataset.has_behavior_logprobs:
                raise UserError(
                    f"loss {plan.loss.name!r} needs behavior_logprobs, but data.{name} has none: "
                    "score it with tools/score_behavior_logprobs.py"
                )
            for line in scorer_warnings(dataset.scorers if dataset else (), dtype=config.model.dtype):
                if parallel.rank == 0:
                    print(f"warning: data.{name}: {line}", file=sys.stderr, flush=True)
    steps = num_training_steps(
        steps=config.train.steps,
        epochs=config.train.epochs,
        num_rows=len(train),
        global_size=config.batch.global_size,
    )
    return Demonstrations(
        train=_loader(plan, train, parallel, is_train=True),
        valid=_loader(plan, valid, parallel, is_train=False) if valid is not None else None,
        num_steps=steps,
        dataset=train,
    )


def _load(plan: RunPlan[RunConfig], directory: RunDirectory, *, is_train: bool) -> Dataset:
    data = plan.config.data
    return load_dataset(
        data.train if is_train else data.valid,
        plan.tokenizer,
        max_length=data.max_length,
        truncation=data.truncation,
        cache_dir=directory.path / "tokens",
        key="data.train" if is_train else "data.valid",
    )


def _loader(
    plan: RunPlan[RunConfig], dataset: Dataset, parallel: ParallelContext, *, is_train: bool
) -> StepLoader:
    config = plan.config
    return StepLoader(
        dataset,
        batch=config.batch,
        layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
        max_length=config.data.max_length,
        pad_id=plan.tokenizer.pad_id,
        seed=config.seed,
        shuffle=config.data.shuffle,
        mode="train" if is_train else "evaluate",
    )
