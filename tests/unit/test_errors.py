"""Parts of refusals: long lists stay short, and a name on a hub is met with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.sources import check_source
from megatron_sftrl.data.tokenizer import load_tokenizer
from megatron_sftrl.engine.checkpoint.directory import checkpoint_at
from megatron_sftrl.errors import first_of, hub_hint
from megatron_sftrl.models.hf_config import from_hf_config
from megatron_sftrl.models.hf_output import read_assets
from megatron_sftrl.models.hf_weights import open_weights

HUB = Path("Qwen/Qwen2.5-7B")


def test_a_list_that_is_not_long_is_kept_and_a_long_one_says_how_many_it_leaves_out() -> None:
    assert first_of(["a", "b"], 2) == ["a", "b"]
    assert first_of([str(i) for i in range(10)], 3) == ["0", "1", "... and 8 more"]


@pytest.mark.parametrize(
    "look_up",
    [
        from_hf_config,
        open_weights,
        lambda path: load_tokenizer(TokenizerSection(path=path)),
        lambda path: read_assets(model=path, tokenizer=None, chat_template=None),
        lambda path: read_assets(model=None, tokenizer=path, chat_template=None),
        check_source,
        checkpoint_at,
    ],
    ids=["config.json", "weights", "tokenizer", "model files", "tokenizer files", "data", "checkpoint"],
)
def test_a_name_on_the_hub_is_told_that_nothing_is_downloaded(look_up: Callable[[Path], object]) -> None:
    with pytest.raises(ValueError, match=r"hf download Qwen/Qwen2\.5-7B --local-dir DIR") as raised:
        look_up(HUB)
    assert "nothing is downloaded here" in str(raised.value)


@pytest.mark.parametrize("path", ["https://huggingface.co/Qwen/Qwen2.5-7B", "hf://Qwen/Qwen2.5-7B"])
def test_an_address_on_the_hub_is_read_as_its_name(path: str) -> None:
    assert "hf download Qwen/Qwen2.5-7B " in hub_hint(Path(path))


def test_a_path_that_is_only_misspelt_gets_no_such_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/gift", "data/train.jsonl", "/models/Qwen2.5-7B", "../models/base", "base", "a/b/c"):
        assert hub_hint(path) == ""
