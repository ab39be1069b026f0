"""`sftrl score`: behaviour log-probabilities of any checkpoint, written into a copy of the data (for PEAR).

A run's model, tokenizer, parallel and batch sections say how to score. Each row gets behavior_logprobs (nats,
one per loss token, at temperature 1), behavior_token_ids, the ids that they belong to, and behavior_scorer:
model, dtype and versions. Training refuses other ids and warns of scores made in another dtype.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sftrl.config.data import ALL_TURNS, DataSection
from megatron_sftrl.config.schema import RunConfig, TrainingConfig
from megatron_sftrl.data.dataset import Dataset
from megatron_sftrl.data.formats import read_formatted
from megatron_sftrl.data.loader import StepLoader
from megatron_sftrl.data.rows import LOGPROBS_COLUMN, SCORER_COLUMN, TOKEN_IDS_COLUMN, scorer
from megatron_sftrl.data.store import StoreWriter
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.data.tokenizing import Tokenizing, processes_of_this_rank, tokenize_rows
from megatron_sftrl.engine.parallel import run_context
from megatron_sftrl.engine.policy import Ask, PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.trainers.checked import batch_layout, checked_model
from megatron_sftrl.trainers.experience import ask_logprobs, look_at_tokens
from megatron_sftrl.trainers.weights import give_weights, only_read


def score(config: TrainingConfig, *, checkpoint: Path | None, data: Path, out: Path) -> None:
    """Score every row of `data`; `out` appears when all of it is there.

    `checkpoint` is a step, run or Hugging Face directory; None takes the weights of model.hf.

    Raises:
        UserError: a row that cannot be used or is longer than the model's positions, an output that exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out, or remove it")
    if (checkpoint := checkpoint or config.model.hf) is None:
        raise UserError("score: the YAML has no model.hf; name the weights by --checkpoint")
    config = only_read(config)
    architecture, tokenizer = checked_model(config)
    # What a GRPO run says about its data is about prompts.
    said = config.data if isinstance(config, RunConfig) else None
    max_length = architecture.max_position_embeddings
    rows, dataset = read_whole(data, tokenizer, said, max_length=max_length, key="--data")
    with run_context(config) as parallel:
        policy = PolicyEngine(architecture, config, parallel, with_optimizer=False)
        by = scorer(give_weights(policy, checkpoint, config).text, config.model.dtype)
        found = score_dataset(policy, config, dataset, ask_logprobs, pad_id=tokenizer.pad_id)
        scores = {number: logprobs for number, (logprobs,) in found.items()}
        on_rank_zero(lambda: _write(out, rows, dataset, scores, by))


def read_whole(
    data: Path, tokenizer: Tokenizer, said: DataSection | None, *, max_length: int, key: str
) -> tuple[list[dict[str, Any]], Dataset]:
    """Rows as they are, and tokenized whole: training may cut a row later, the scores are cut with it."""
    rows = []
    formatted = read_formatted(
        data, "demonstrations", columns=None if said is None else said.columns, key=key
    )
    whole = Tokenizing(
        tokenizer=tokenizer,
        max_length=max_length,
        truncation="error",
        learning=ALL_TURNS if said is None else said.learning,
        use_scores=False,  # those that a row has already are replaced
    )
    num_processes = processes_of_this_rank(is_alone=False)  # every rank reads all rows
    with StoreWriter() as writer:
        for chunk, tokenized in tokenize_rows(formatted, whole, num_processes=num_processes):
            rows += [dict(row.values) for row in chunk]
            writer.add(chunk, tokenized, source=0)
        if not rows:
            raise UserError(f"{data} holds no row")
        return rows, Dataset(writer.finish())


def score_dataset(
    policy: PolicyEngine,
    config: TrainingConfig,
    dataset: Dataset,
    ask: Ask,
    *,
    pad_id: int,
    reference: ReferenceModel | None = None,
) -> dict[int, list[list[float]]]:
    """What `ask` answers of the learned tokens, by the number of the sequence.

    Every rank calls it and gets all of them.
    """
    parallel = policy.parallel
    loader = StepLoader(
        dataset,
        batch=config.batch,
        layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
        max_length=config.max_length,
        pad_id=pad_id,
        seed=0,
        shuffle=False,
        mode="evaluate",
    )
    found: dict[int, list[list[float]]] = {}
    for step in range(loader.num_evaluation_steps):
        found |= look_at_tokens(policy, loader.step(step), ask, reference)
    return found


def _write(
    out: Path,
    rows: list[dict[str, Any]],
    dataset: Dataset,
    scores: dict[int, list[float]],
    by: dict[str, str],
) -> None:
    for number in range(len(dataset)):
        # The sequences of one row stand one after the other in its columns; a row of weight 0 has none.
        example = dataset[number]
        row = rows[example.row]
        if row.get(SCORER_COLUMN) is not by:
            row |= {LOGPROBS_COLUMN: [], TOKEN_IDS_COLUMN: [], SCORER_COLUMN: by}
        row[LOGPROBS_COLUMN] += scores[number]
        row[TOKEN_IDS_COLUMN] += example.loss_token_ids.tolist()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, "".join(lines))
    except OSError as error:
        raise error_of(f"{out} cannot be written: {error}", error) from error
