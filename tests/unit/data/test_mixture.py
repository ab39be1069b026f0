"""Shares of several sources: reached in every epoch, each row as often as any other of its source."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_sftrl.config.checks import idle_settings
from megatron_sftrl.config.load import config_from_text, resolved_yaml
from megatron_sftrl.config.schema import BatchSection, TokenizerSection
from megatron_sftrl.data.dataset import Dataset, find_rows
from megatron_sftrl.data.loader import BatchLayout, SampleOrder, StepLoader
from megatron_sftrl.data.mixture import Mixture, plan_mixture, with_mixture
from megatron_sftrl.data.prompts import PromptSet, read_prompt_set
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.trainers.demonstrations import _mixture
from tests.unit.config.example import example, message_of
from tests.unit.data.tokenizers_for_tests import write_byte_level

PATHS = [Path("a"), Path("b"), Path("c")]
MIXTURE = Mixture(sizes=(10, 30, 7), taken=(10, 15, 5))


def test_an_epoch_ends_when_the_scarcest_source_has_been_seen_once() -> None:
    by_rows = plan_mixture([0.5, 0.25, 0.25], sizes=[100, 400, 60], amounts=[100, 400, 60], paths=PATHS)
    assert by_rows.taken == (100, 50, 50)
    # 10, 1 and 4 tokens a row: 1000 * 0.5 / 0.5 = 1000 tokens in all, 250 of them from each of the others.
    by_tokens = plan_mixture([0.5, 0.25, 0.25], sizes=[50, 400, 90], amounts=[500, 400, 360], paths=PATHS)
    assert by_tokens.taken == (50, 250, 62)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_its_shares_and_sources_go_on_where_they_stopped(shuffle: bool) -> None:
    seen: Counter[int] = Counter()
    for epoch in range(14):
        rows = MIXTURE.epoch(epoch, seed=3, shuffle=shuffle)
        seen.update(rows.tolist())
        for (low, high), taken in zip(((0, 10), (10, 40), (40, 47)), MIXTURE.taken, strict=True):
            assert ((rows >= low) & (rows < high)).sum() == taken
            times = [seen[row] for row in range(low, high)]
            assert max(times) - min(times) <= 1
    assert [seen[0], seen[10], seen[40]] == [14, 7, 10]


def test_an_order_is_a_function_of_seed_and_epoch_alone() -> None:
    epochs = [MIXTURE.epoch(epoch, seed=1, shuffle=True).tolist() for epoch in range(4)]
    assert epochs == [MIXTURE.epoch(epoch, seed=1, shuffle=True).tolist() for epoch in range(4)]
    assert len({tuple(rows) for rows in [*epochs, MIXTURE.epoch(0, seed=2, shuffle=True).tolist()]}) == 5
    assert Mixture(sizes=(3, 4), taken=(3, 2)).epoch(1, seed=1234, shuffle=True).tolist() == [1, 6, 2, 0, 3]


def test_a_resumed_order_of_a_mixture_continues_at_the_exact_sample() -> None:
    for shuffle in (True, False):
        whole = SampleOrder(47, seed=3, shuffle=shuffle, mixture=MIXTURE).rows(0, 100)
        assert whole[30:60] == MIXTURE.epoch(1, seed=3, shuffle=shuffle).tolist()
        for consumed in (0, 1, 29, 30, 31, 77):
            resumed = SampleOrder(47, seed=3, shuffle=shuffle, mixture=MIXTURE)
            assert resumed.rows(consumed, 100 - consumed) == whole[consumed:]


def test_without_shuffling_the_sources_are_spread_evenly_in_the_order_of_their_files() -> None:
    mixture = Mixture(sizes=(2, 8), taken=(2, 6))
    assert mixture.epoch(0, seed=0, shuffle=False).tolist() == [2, 0, 3, 4, 5, 1, 6, 7]
    assert mixture.epoch(1, seed=0, shuffle=False).tolist() == [8, 0, 9, 2, 3, 1, 4, 5]


def test_a_source_that_cannot_have_its_share_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no row is left of b"):
        plan_mixture([0.5, 0.25, 0.25], sizes=[1, 0, 1], amounts=[1, 0, 1], paths=PATHS)
    with pytest.raises(ValueError, match=r"weight of 0\.001 an epoch takes less than one row of c"):
        plan_mixture([0.5, 0.499, 0.001], sizes=[9, 9, 9], amounts=[9, 9, 9], paths=PATHS)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(TokenizerSection(path=write_byte_level(tmp_path / "tokenizer", template="chatml")))


def write(path: Path, count: int, response: str) -> Path:
    rows = [{"prompt": f"{path.stem} {i}", "response": f"{response * (i % 5 + 1)}{i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed(directory: Path, tokenizer: Tokenizer, mix_by: str) -> tuple[Dataset, Mixture]:
    """40 rows of many tokens and 400 of few, of which 0.6 and 0.4 are wanted."""
    paths = [write(directory / "long.jsonl", 40, "Hello there. "), write(directory / "short.jsonl", 400, "x")]
    weighted = ", ".join(f"{{path: {path}, weight: {w}}}" for path, w in zip(paths, (0.6, 0.4), strict=True))
    config = example(f"data.train=[{weighted}]", f"data.mix_by={mix_by}")
    assert config.data.train_paths == paths
    dataset = find_rows(paths, tokenizer, max_length=128, truncation="error").load()
    mixture = _mixture(config.data, dataset, "data.train", seed=config.seed)
    assert mixture is not None
    return dataset, mixture


def test_shares_of_learned_tokens_and_of_rows_are_reached(tokenizer, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    dataset, mixture = mixed(tmp_path, tokenizer, "tokens")
    for epoch in range(3):
        rows = mixture.epoch(epoch, seed=1234, shuffle=True)
        counts = dataset.num_loss_tokens[rows]
        assert abs(counts[dataset.sources[rows] == 0].sum() / counts.sum() - 0.6) < 0.01
    assert mixture.sizes == (40, 400)
    assert mixture.taken[0] == 40
    assert caplog.messages[-1].startswith(
        f"data.train: an epoch takes 40 of 40 rows of {tmp_path}/long.jsonl ("
    )
    assert f"% of the learned tokens), {mixture.taken[1]} of 400 rows of " in caplog.messages[-1]
    dataset, mixture = mixed(tmp_path, tokenizer, "rows")
    assert mixture.taken == (40, 27)
    assert "(59.7% of the rows), 27 of 400 rows of" in caplog.text


def test_steps_of_a_mixture_are_the_same_on_every_layout(tokenizer, tmp_path) -> None:
    dataset, mixture = mixed(tmp_path, tokenizer, "rows")

    def rows_of(step: int, rank: int, size: int) -> tuple[tuple[int, ...], set[int]]:
        data = StepLoader(
            dataset,
            batch=BatchSection(global_size=8),
            layout=BatchLayout(dp_rank=rank, dp_size=size),
            max_length=128,
            pad_id=0,
            seed=5,
            shuffle=True,
            mixture=mixture,
        ).step(step)
        return data.rows, {row for batch in data.microbatch_rows[rank] for row in batch}

    for step in (0, 8, 9):
        whole, _ = rows_of(step, 0, 1)
        assert list(whole) == SampleOrder(440, seed=5, shuffle=True, mixture=mixture).rows(8 * step, 8)
        parts = [rows_of(step, rank, 2) for rank in range(2)]
        assert {rows for rows, _ in parts} == {whole}
        assert set().union(*(mine for _, mine in parts)) == set(whole)


def test_other_weights_are_other_data() -> None:
    other = Mixture(sizes=MIXTURE.sizes, taken=(10, 14, 5))
    assert len({with_mixture("f", each) for each in (None, MIXTURE, other)}) == 3
    assert with_mixture("f", None) == "f"


def test_prompts_are_mixed_by_their_number(tokenizer, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    paths = [write(tmp_path / "a.jsonl", 6, "x"), write(tmp_path / "b.jsonl", 50, "y")]
    plain: PromptSet = read_prompt_set(paths, tokenizer, max_prompt_length=64)
    assert (plain.sizes, plain.num_drawn, plain.mixture) == ((6, 50), 56, None)
    weighted = plain.with_weights((0.25, 0.75), paths)
    assert (weighted.num_drawn, weighted.mixture) == (24, Mixture(sizes=(6, 50), taken=(6, 18)))
    assert weighted.rows == plain.rows
    assert weighted.fingerprint != plain.fingerprint
    assert "6 of 6 rows of" in caplog.text
    assert "(25.0% of the prompts), 18 of 50 rows of" in caplog.text


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[{path: a, weight: 0.7}, {path: b, weight: 0.2}]", r"add up to 1, got 0\.7 \+ 0\.2 = 0\.9 "),
        ("[{path: a, weight: 0.7}, {path: b, weight: 0.300002}]", r"= 1\.000002 "),
        ("[{path: a, weight: 0.7}, b, {path: c}]", r"b, c has no weight, but others do"),
        ("[{path: a, weight: 0}, {path: b, weight: 1}]", r"above 0 and at most 1 for a, got 0"),
        ("[{path: a, weight: 70}, {path: b, weight: 30}]", r"above 0 and at most 1 for a, got 70"),
        ("[{path: a, weight: '1'}]", r"for a, got '1'"),
        ("[{path: a, weight: .nan}]", r"data\.train.*got nan"),
        ("[{path: a, wieght: 1}]", r"expected paths, or \{path: a\.jsonl, weight: 0\.5\}"),
        ("[{weight: 1}]", r"expected paths, or"),
        ("[{path: 7, weight: 1}]", r"expected a path as text, got 7"),
        ("[3]", r"expected paths, or"),
    ],
)
def test_weights_that_say_no_mixture_are_refused(train, message) -> None:
    assert re.search(message, message_of(f"data.train={train}"))


def test_weights_that_were_rounded_and_paths_in_full_are_taken() -> None:
    thirds = example("data.train=[" + ", ".join(f"{{path: {p}, weight: 0.3333333}}" for p in "abc") + "]")
    assert thirds.data.train_weights == (0.3333333,) * 3
    bare = example("data.train=[{path: a}, b]")
    assert (bare.data.train, bare.data.train_weights) == ([Path("a"), Path("b")], None)


def test_mix_by_without_weights_has_no_effect_and_is_told_so() -> None:
    (idle,) = (each for each in idle_settings(example("data.mix_by=rows")) if each.key == "data.mix_by")
    assert (idle.is_written, idle.reason) == (True, "data.train has no weights")
    weighted = example("data.train=[{path: a, weight: 1}]", "data.mix_by=rows")
    assert "data.mix_by" not in {each.key for each in idle_settings(weighted)}


def test_weights_are_part_of_the_resolved_configuration() -> None:
    text = resolved_yaml(example("data.train=[{path: a, weight: 0.7}, {path: b, weight: 0.3}]"))
    again = config_from_text(text, source="resolved.yaml")
    assert (again.data.train_weights, resolved_yaml(again)) == ((0.7, 0.3), text)
