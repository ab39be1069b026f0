"""Paths of a run as people write them: `~` and $VARIABLES."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.config.load import config_from_text, resolved_yaml
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.errors import UserError
from megatron_sftrl.registry import load_module
from tests.unit.config.example import example

OF_PATHS = {
    "run_dir": "run_dir={}",
    "tokenizer.path": "tokenizer.path={}",
    "tokenizer.chat_template": "tokenizer.chat_template={}",
    "model.init_checkpoint": "model.init_checkpoint={}",
    "reference.checkpoint": "reference={{kind: frozen, checkpoint: {}}}",
    "data.train.0": "data.train=[{}]",
    "data.valid.0": "data.valid=[{}]",
    "loss.modules.0": "loss.modules=[{}]",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/ada")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)
    return tmp_path


@pytest.mark.parametrize("key", OF_PATHS)
def test_every_path_of_a_run_is_expanded_and_resolved_yaml_has_it_so(key: str, home: Path) -> None:
    written = {"~/mine.py": f"{home}/mine.py", "$SCRATCH/x/${SCRATCH}.py": "/scratch/ada/x//scratch/ada.py"}
    for text, expected in written.items():
        config = example(OF_PATHS[key].format(f"'{text}'"))
        found: object = config.model_dump(mode="json")
        for part in key.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]  # type: ignore[index]
        assert found == (expected if key == "loss.modules.0" else str(Path(expected)))
        assert str(found) in resolved_yaml(config)


def test_a_path_of_the_file_itself_is_expanded(home: Path) -> None:
    text = resolved_yaml(example()).replace("run_dir: ", "run_dir: ~/")
    assert config_from_text(text, source="run.yaml").run_dir.is_relative_to(home)


@pytest.mark.parametrize("key", OF_PATHS)
def test_a_variable_that_is_not_set_is_refused_by_its_name_and_place(key: str) -> None:
    with pytest.raises(UserError, match=r"variable \$ABSENT in '\$\{ABSENT\}/x\.py' is not set") as caught:
        example(OF_PATHS[key].format("'${ABSENT}/x.py'"))
    assert "(override '" in str(caught.value), "the place is named as for every other problem"


def test_an_empty_variable_and_an_unknown_user_are_refused() -> None:
    with pytest.raises(UserError, match=r"variable \$EMPTY .* is empty"):
        example("run_dir='$EMPTY/run'")
    with pytest.raises(UserError, match=r"no home directory for ~nobody-here; .* write \./~nobody-here"):
        example("run_dir='~nobody-here/run'")


def test_other_dollar_signs_and_tildes_are_themselves() -> None:
    assert str(example("run_dir='runs/5$ a$1 b~'").run_dir) == "runs/5$ a$1 b~"


def test_the_paths_of_grpo_are_expanded_too(home: Path) -> None:
    text = (
        "run_dir: ~/run\nmodel: {hf: ~/model}\ndata: {train: [$SCRATCH/p.jsonl], max_prompt_length: 8}\n"
        "batch: {global_size: 8, micro_size: 8}\nloss: {name: grpo}\noptim: {lr: 1.0e-6}\ntrain: {steps: 1}\n"
        "rewards: [{name: length, modules: [~/r.py, a.module]}]\n"
        "rollout: {prompts_per_step: 1, group_size: 8, max_new_tokens: 8}\n"
    )
    config = config_from_text(text, source="run.yaml", schema=GrpoConfig)
    assert config.model.hf == config.tokenizer.path == home / "model"
    assert config.data.train == [Path("/scratch/ada/p.jsonl")]
    assert config.rewards[0].modules == [f"{home}/r.py", "a.module"]


BROKEN = {
    "raise KeyError('token')": "line 2: KeyError: 'token'",
    "import absent_package": "line 2: ModuleNotFoundError: No module named 'absent_package'",
    "import json; json.loads('{')": "line 2: JSONDecodeError: Expecting property name",
    "def f(:": "line 2: SyntaxError: invalid syntax",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_users_file_that_cannot_be_imported_is_told_with_file_and_line(line: str, home: Path) -> None:
    file = home / "broken.py"
    file.write_text(f'"""Mine."""\n{line}\n')
    with pytest.raises(UserError) as caught:
        load_module("~/broken.py", key="loss.modules")
    assert str(caught.value).startswith(f"loss.modules: {file} cannot be imported: {file}, {BROKEN[line]}")


def test_a_file_system_that_fails_under_a_users_file_is_a_failure(home: Path) -> None:
    (home / "stale.py").write_text("raise OSError(116, 'Stale file handle')\n")
    with pytest.raises(RuntimeError, match=r"stale\.py, line 1: OSError: \[Errno 116\]"):
        load_module(home / "stale.py")
