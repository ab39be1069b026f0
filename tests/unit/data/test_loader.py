"""Steps: the same tokens, labels, masks and weights however a step is cut into micro-batches and ranks."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_sftrl.config.schema import BatchSection, TokenizerSection
from megatron_sftrl.data.dataset import Dataset, find_rows
from megatron_sftrl.data.loader import BatchLayout, StepData, StepLoader
from megatron_sftrl.data.tokenizer import load_tokenizer
from tests.unit.data.tokenizers_for_tests import write_byte_level

MAX_LENGTH = 48


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """23 rows of very different lengths, with behaviour scores."""
    directory: Path = tmp_path_factory.mktemp("loader")
    tokenizer = load_tokenizer(TokenizerSection(path=write_byte_level(directory / "t", adds_bos=True)))
    generator = random.Random(11)
    rows = [
        {"prompt": "Hello " * generator.randint(1, 9) + str(i), "response": "4 " * generator.randint(1, 9)}
        for i in range(23)
    ]
    file = directory / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = find_rows([file], tokenizer, max_length=MAX_LENGTH, truncation="error").load()
    for index, row in enumerate(rows):
        ids = plain[index].loss_token_ids.tolist()
        row["behavior_token_ids"] = ids
        row["behavior_logprobs"] = [-generator.random() for _ in ids]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find_rows([file], tokenizer, max_length=MAX_LENGTH, truncation="error").load()


def steps_of_all_ranks(
    dataset: Dataset, step: int, *, batch: dict, layout: dict, mode="train"
) -> list[StepData]:
    return [
        StepLoader(
            dataset,
            batch=BatchSection(**{"global_size": 8, **batch}),
            layout=BatchLayout(dp_rank=rank, **layout),
            max_length=MAX_LENGTH,
            pad_id=0,
            seed=1,
            shuffle=True,
            mode=mode,
        ).step(step)
        for rank in range(layout.get("dp_size", 1))
    ]


def sequences(data: list[StepData]) -> Counter:
    """Each real sequence as (tokens, labels, positions, masks, weights, scores) up to its last loss token."""
    found: Counter = Counter()
    for batch in (batch for rank in data for batch in rank.batches):
        assert batch.behavior_logprobs is not None
        borders = batch.cu_seqlens.tolist()
        columns = (
            batch.tokens,
            batch.labels,
            batch.positions,
            batch.loss_mask,
            batch.token_weight,
            batch.behavior_logprobs,
        )
        for start, end in itertools.pairwise(borders):
            if batch.loss_mask[start:end].any():
                last = start + int(batch.loss_mask[start:end].nonzero().max()) + 1
                found[tuple(tuple(column[start:last].tolist()) for column in columns)] += 1
            else:
                assert not batch.token_weight[start:end].any()
    return found


LAYOUTS = [
    ({"micro_size": 3}, {}),
    ({"packing": True, "max_tokens": 64}, {}),
    ({"micro_size": 2}, {"dp_size": 3}),
    (
        {"packing": True, "max_tokens": 100},
        {"dp_size": 2, "sequence_multiple_of": 4, "pad_to_multiple_of": 6},
    ),
    ({"micro_size": 1}, {"dp_size": 2, "microbatch_multiple": 3, "uniform_length": True}),
    ({"packing": True, "max_tokens": 48}, {"dp_size": 5, "uniform_length": True, "sequence_multiple_of": 16}),
]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
def test_packing_microbatches_and_ranks_change_nothing_that_is_trained(dataset, aggregation) -> None:
    for step in (0, 2):
        plain = steps_of_all_ranks(dataset, step, batch={"aggregation": aggregation}, layout={})
        expected = sequences(plain)
        assert sum(expected.values()) == 8
        total = sum(float(batch.token_weight.double().sum()) for batch in plain[0].batches)
        # fp32 weights: 1/N rounded to 2^-24 relative, fewer than 1000 of them.
        if aggregation != "constant_length":
            assert total == pytest.approx(1.0, abs=1e-6)
        else:
            assert total == pytest.approx(plain[0].num_loss_tokens / (8 * MAX_LENGTH), abs=1e-6)
        for batch, layout in LAYOUTS:
            data = steps_of_all_ranks(
                dataset, step, batch={"aggregation": aggregation, **batch}, layout=layout
            )
            assert sequences(data) == expected, (batch, layout)


@pytest.mark.parametrize(("batch", "layout"), LAYOUTS)
def test_all_ranks_agree_on_the_facts_and_shapes_of_a_step(batch, layout, dataset) -> None:
    data = steps_of_all_ranks(dataset, 1, batch=batch, layout=layout)
    facts = {(d.rows, d.num_sequences, d.num_loss_tokens, d.num_tokens, d.num_padded_tokens) for d in data}
    assert len(facts) == 1
    assert len({len(d.batches) for d in data}) == 1
    batches = [b for d in data for b in d.batches]
    assert sum(b.num_tokens for b in batches) == data[0].num_padded_tokens
    assert sum(int(b.loss_mask.sum()) for b in batches) == data[0].num_loss_tokens
    assert data[0].num_tokens == sum(len(dataset[row].tokens) - 1 for row in data[0].rows)
    for b in batches:
        assert b.num_tokens % layout.get("pad_to_multiple_of", 1) == 0
        assert not (b.cu_seqlens % layout.get("sequence_multiple_of", 1)).any()
        assert b.cu_seqlens[-1] == b.num_tokens
    if layout.get("uniform_length"):
        assert len({b.num_tokens for b in batches}) == 1


def test_more_ranks_than_sequences_gives_padding_and_no_missing_microbatch(dataset) -> None:
    data = steps_of_all_ranks(dataset, 0, batch={"global_size": 2}, layout={"dp_size": 4})
    assert [len(d.batches) for d in data] == [1, 1, 1, 1]
    assert sum(sequences(data).values()) == 2


def test_an_evaluation_covers_every_row_once_and_weighs_to_the_mean_over_all(dataset) -> None:
    batch, layout = {"global_size": 10, "packing": True, "max_tokens": 64}, {"dp_size": 2}
    steps = [
        steps_of_all_ranks(dataset, step, batch=batch, layout=layout, mode="evaluate") for step in range(3)
    ]
    assert [row for step in steps for row in step[0].rows] == list(range(23))
    weights = [b.token_weight for step in steps for d in step for b in d.batches]
    assert sum(float(w.double().sum()) for w in weights) == pytest.approx(1.0, abs=1e-6)
    assert len({float(v) for w in weights for v in w if v}) == 1
    loader = StepLoader(
        dataset,
        batch=BatchSection(**batch),
        layout=BatchLayout(),
        max_length=MAX_LENGTH,
        pad_id=0,
        seed=1,
        shuffle=True,
        mode="evaluate",
    )
    assert loader.num_evaluation_steps == 3


def test_steps_run_through_the_epochs_in_order_and_do_not_depend_on_the_layout(dataset) -> None:
    plain = [steps_of_all_ranks(dataset, s, batch={}, layout={})[0].rows for s in range(23)]
    flat = [row for rows in plain for row in rows]
    for epoch in range(8):
        assert sorted(flat[23 * epoch : 23 * (epoch + 1)]) == list(range(23))
    other = [
        steps_of_all_ranks(dataset, s, batch={"micro_size": 2}, layout={"dp_size": 2}) for s in (0, 5, 22)
    ]
    assert [data[0].rows for data in other] == [plain[s] for s in (0, 5, 22)]
