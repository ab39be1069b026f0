"""Reading a run: what is accepted, and what the user reads when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.config.load import config_from_text, load_config, resolved_yaml
from tests.unit.config.example import EXAMPLE, example, message_of


def test_a_file_and_overrides_become_one_typed_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EXAMPLE)
    config = load_config(path, ["parallel.tp=2", "data.train=[a.jsonl, b.jsonl]", "loss.smoothing=0.1"])
    assert config.parallel.tp == 2
    assert config.data.train == [Path("a.jsonl"), Path("b.jsonl")]
    assert config.loss.options == {"beta": 5, "smoothing": 0.1}
    assert config.optim.lr == 1e-5
    assert config.optim.betas == (0.9, 0.95)


def test_the_last_override_of_a_key_wins_over_the_file_and_over_earlier_ones() -> None:
    assert example("optim.lr=1", "optim.lr=2").optim.lr == 2


def test_null_takes_a_key_or_a_section_out() -> None:
    config = example("optim.lr=3", "train.steps=null", "train.epochs=2", "reference=null")
    assert (config.train.steps, config.train.epochs, config.reference) == (None, 2, None)
    assert example("data.max_length=64", "batch.micro_size=null").batch.micro_size == 1


def test_null_takes_out_what_every_loss_has_and_a_field_of_megatrons() -> None:
    config = example("loss.chunk_mb=3", "loss.fused=off", "loss.chunk_mb=null", "loss.fused=null")
    assert config.loss.fused == "auto"
    assert "chunk_mb" not in config.loss.model_fields_set
    config = example("parallel.megatron={bucket_size: 1, nccl_ub: true}", "parallel.megatron.nccl_ub=null")
    assert config.parallel.megatron == {"bucket_size": 1}


def test_null_reaches_a_loss_option_as_a_value() -> None:
    assert example("loss.clip=null").loss.options == {"beta": 5, "clip": None}


def test_an_override_can_add_a_section_that_the_file_leaves_empty() -> None:
    text = EXAMPLE.replace("reference: {kind: frozen}", "reference:")
    config = example("reference.kind=frozen", text=text)
    assert config.reference is not None


def test_off_and_exponents_mean_what_they_say() -> None:
    config = example("log.wandb=off", "optim.lr=2e-6", "loss.rate=1e3", "loss.word=yes")
    assert (config.log.wandb, config.optim.lr) == ("off", 2e-6)
    assert config.loss.options == {"beta": 5, "rate": 1000.0, "word": "yes"}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run_dir='1e-5'", "log.wandb=off", "loss.word='true'", "loss.none='null'"],
        ["reference.kind=moving_average", "optim.name=sgd", "optim.schedule=cosine"],
        ["batch.packing=true", "batch.max_tokens=128", "data.valid=[v.jsonl]", "optim.betas=[0.5, 0.75]"],
        ["reference=null", "train.steps=null", "train.epochs=1", "loss.list=[1, x, {a: b}]"],
    ],
)
def test_the_resolved_text_loads_to_an_equal_configuration_and_the_same_text(overrides: list[str]) -> None:
    config = example(*overrides)
    text = resolved_yaml(config)
    again = config_from_text(text, source="resolved.yaml")
    assert again == config
    assert resolved_yaml(again) == text


def test_the_resolved_text_writes_defaults_but_no_setting_without_effect() -> None:
    text = resolved_yaml(example())
    assert "clip_grad: 1.0" in text
    assert "sync_every" not in text
    assert "momentum" not in text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("parallel.tpp=2", ["'parallel.tpp'", "override 'parallel.tpp=2'", "did you mean 'parallel.tp'?"]),
        ("paralel.tp=2", ["'paralel'", "did you mean 'parallel'?"]),
        ("tp=2", ["'tp'", "did you mean 'parallel.tp'?"]),
        ("model.architecture.num_layer=2", ["'model.architecture.num_layer'", "architecture.num_layers'?"]),
        ("optim.zzz=1", ["'optim.zzz'", "the keys of 'optim' are name, lr, schedule"]),
        ("parallel.tpp=null", ["'parallel.tpp'", "did you mean 'parallel.tp'?"]),
        ("parallel.tp=two", ["parallel.tp (override", "expected a whole number, got 'two'"]),
        ("parallel.tp=2.0", ["parallel.tp", "expected a whole number, got 2.0"]),
        ("parallel.tp=true", ["parallel.tp", "expected a whole number, got true"]),
        ("parallel.tp='2'", ["parallel.tp", "expected a whole number, got '2'"]),
        ("parallel.tp=0", ["parallel.tp", "expected a number >= 1, got 0"]),
        ("optim.lr=-1", ["optim.lr", "expected a number > 0, got -1"]),
        ("optim.lr=.inf", ["optim.lr", "expected a finite number, got inf"]),
        ("optim.momentum=1", ["optim.momentum", "expected a number < 1"]),
        ("optim.min_lr_ratio=1.5", ["optim.min_lr_ratio", "expected a number <= 1"]),
        ("parallel=3", ["parallel", "expected a section of keys, got 3"]),
        ("data.train=a.jsonl", ["data.train", "expected a list, such as [a, b], got 'a.jsonl'"]),
        ("data.train=[]", ["data.train", "expected at least 1 item(s)"]),
        ("optim.betas=[1, 2, 3]", ["optim.betas", "expected at most 2 item(s)"]),
        ("data.shuffle=yes", ["data.shuffle", "expected true or false, got 'yes'"]),
        ("run_dir=3", ["run_dir", "expected text, got 3"]),
        ("reference.kind=froze", ["reference.kind", "expected one of frozen, moving_average, got 'froze'"]),
        ("optim=null", ["missing key 'optim'", "AdamW"]),
        ("optim.lr=null", ["missing key 'optim.lr'", "Peak learning rate"]),
        ("train.epochs=2", ["exactly one of train.steps and train.epochs", "override 'train.epochs=2'"]),
        ("batch.packing=true", ["batch.packing and batch.max_tokens go together"]),
        ("model.hf_config=x", ["exactly one of model.hf, model.hf_config and model.architecture"]),
        ("seed", ["override 'seed': expected key=value"]),
        ("=3", ["expected key=value"]),
        ("a..b=3", ["expected key=value"]),
        ("seed=", ["no value; write seed=null"]),
        ("seed=[1", ["override 'seed=[1'", "not valid YAML"]),
        ("run_dir.x=1", ["run_dir is 'runs/example', not a section"]),
        ("seed.x=null", ["unknown key 'seed.x'", "'seed' has no keys of its own"]),
    ],
)
def test_a_wrong_override_is_named_with_what_was_expected(override: str, parts: list[str]) -> None:
    message = message_of(override)
    for part in parts:
        assert part in message
    assert "pydantic" not in message
    assert "http" not in message


def test_every_problem_is_listed_with_the_line_it_stands_on() -> None:
    text = EXAMPLE.replace("dtype: fp32", "dtype: fp16").replace("{lr: 1e-5}", "{lr: fast, wamup_steps: 3}")
    message = message_of("seed=x", text=text)
    assert "run.yaml: 4 problem(s)" in message
    assert "model.dtype (run.yaml, line 12): expected one of bf16, fp32, got 'fp16'" in message
    assert "optim.lr (run.yaml, line 18): expected a number, got 'fast'" in message
    assert (
        "unknown key 'optim.wamup_steps' (run.yaml, line 18): did you mean 'optim.warmup_steps'?" in message
    )
    assert "seed (override 'seed=x'): expected a whole number, got 'x'" in message


def test_a_value_that_an_override_replaced_is_not_blamed_on_the_file() -> None:
    assert "optim.lr (override 'optim.lr=slow')" in message_of("optim.lr=slow")
    assert "optim.lr (override 'optim={lr: slow}')" in message_of("optim.lr=1", "optim={lr: slow}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: 1\nseed: 2\n", "run.yaml, line 2: 'seed' is given twice, first on line 1"),
        ("optim:\n  lr: 1\n  lr: 2\n", "run.yaml, line 3: 'optim.lr' is given twice, first on line 2"),
        ("a: [1\nb: 2\n", "run.yaml, line 2"),
        ("", "got an empty file"),
        ("[1, 2]", "got a list"),
        ("1: x\n", "a key must be a name, got '1'"),
        ("a: &x {b: *x}\n", "an alias refers to what contains it"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_text_that_is_no_configuration_is_refused_with_its_line(text: str, part: str) -> None:
    assert part in message_of(text=text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such configuration file: .*nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml", [])


def test_a_folder_instead_of_a_file_is_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the configuration file"):
        load_config(tmp_path, [])


def test_loading_does_not_change_the_given_overrides() -> None:
    overrides = ["parallel.tp=2"]
    config_from_text(EXAMPLE, source="run.yaml", overrides=overrides)
    assert overrides == ["parallel.tp=2"]


def test_the_columns_of_the_data_are_kept_and_a_name_that_does_nothing_is_refused() -> None:
    columns = {"prompt": "question", "response": "meta.answer", "messages": None}
    config = example("data.columns={prompt: question, response: meta.answer}")
    assert config.data.columns is not None
    assert config.data.columns.model_dump() == columns
    assert config_from_text(resolved_yaml(config), source="resolved.yaml") == config
    assert "'data.columns.answer'" in message_of("data.columns={messages: a, answer: b}")
    assert "did you mean 'data.columns.response'?" in message_of("data.columns={prompt: a, respones: b}")
    assert "or messages alone (override 'data.columns.prompt=a')" in message_of("data.columns.prompt=a")
    assert example("data.columns={messages: a}", "data.columns=null").data.columns is None
