"""`sftrl plan`: what it prints, what it refuses, and that what it advises does fit."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_sftrl.apps.plan.job import Hardware
from megatron_sftrl.apps.plan.search import plan_run
from megatron_sftrl.cli import main
from megatron_sftrl.config.load import load_any_config
from megatron_sftrl.models import architecture_of
from tests.unit.config.example import EXAMPLE
from tests.unit.plan.public_models import model_directory

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SHIPPED = {
    "gift_70b": ("Llama-3.3-70B-Instruct", 64),
    "gift_72b_qwen": ("Qwen2.5-72B-Instruct", 64),
    "pear_70b": ("Llama-3.3-70B-Instruct", 64),
    "curiosft_70b": ("Llama-3.3-70B-Instruct", 64),
    "grpo_70b": ("Llama-3.3-70B-Instruct", 64),
    "gift_70b_lora": ("Llama-3.3-70B-Instruct", 8),
    "grpo_lora": ("Qwen2.5-7B", 8),
    "gift_moe": ("Qwen3-30B-A3B", 32),
}


def plan(name: str, directory: Path, *more: str, gpus: int | None = None) -> int:
    model, num_gpus = SHIPPED[name]
    key = "model.hf_config" if name == "grpo_70b" else "model.hf"
    source = directory / model if (directory / model).exists() else model_directory(model, directory)
    return main(
        ["plan", str(EXAMPLES / f"{name}.yaml"), f"{key}={source}", "--gpus", str(gpus or num_gpus), *more]
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_run_fits_the_gpus_that_it_names_with_the_numbers_that_it_states(
    name: str, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    assert plan(name, tmp_path, "--json", str(out)) == 0
    found = json.loads(out.read_text())
    assert found["plan"]["fits"]
    totals = [phase["total"] for stage in found["plan"]["stages"] for phase in stage.values()]
    # A card of 80 GB has 80 GiB. Beside the reserve, a twelfth of it is left for what no plan foresees.
    assert max(totals) < 80 * 2**30 * 11 / 12
    stated = re.search(
        r"^# Planned: sftrl plan examples/(\w+)\.yaml --gpus (\d+) --gpu-memory 80GB: ([\d.]+) GB at the "
        r"fullest moment, ([\d.]+) s a step",
        (EXAMPLES / f"{name}.yaml").read_text(),
        re.MULTILINE,
    )
    assert stated is not None
    assert (stated[1], int(stated[2])) == (name, SHIPPED[name][1])
    assert float(stated[3]) == round(max(totals) / 1e9, 1)
    assert float(stated[4]) == round(found["plan"]["estimate"]["total_seconds"], 1)


RECIPES = [
    shlex.split(line)
    for line in (EXAMPLES / "recipes" / "README.md").read_text().splitlines()
    if line.startswith("    torchrun ")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("Qwen2.5-7B", "Qwen2.5-Math-7B-16k"):
        model_directory(name, root)
    return root


@pytest.mark.parametrize("words", RECIPES, ids=lambda words: " ".join(words[5:8]))
def test_a_recipe_fits_the_gpus_that_it_starts_on(words: list[str], models: Path, tmp_path: Path) -> None:
    """Its models are the published ones; its checkpoints are yet to be trained."""
    assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "megatron_sftrl"]
    kind, file, *overrides = words[5:]
    text = (EXAMPLES.parent / file).read_text()
    copy = tmp_path / "run.yaml"
    copy.write_text(text.replace("/path/to/Qwen", f"{models}/Qwen"))
    changes = [each.replace("/path/to/Qwen", f"{models}/Qwen") for each in overrides]
    config = load_any_config(copy, changes)
    assert (config.grpo is not None) == (kind == "grpo")
    out = tmp_path / "plan.json"
    words = ["plan", str(copy), *changes, "--gpus", "8", "--gpu-memory", "80GB", "--json", str(out)]
    assert main(words) == 0
    assert json.loads(out.read_text())["plan"]["fits"]


def test_the_recipes_have_every_method_for_both_models_and_their_rl() -> None:
    runs = {word.removeprefix("run_dir=") for words in RECIPES for word in words if "run_dir=" in word}
    defaults = {
        load_any_config(EXAMPLES / "recipes" / f"{name}.yaml").run_dir.name for name in ("sft", "grpo")
    }
    assert {Path(run).name for run in runs} | defaults >= {
        f"{method}-{model}" for method in ("sft", "gift", "pear", "curiosft") for model in ("7b", "math-7b")
    } | {"grpo-math-7b", "grpo-curiosft-7b"}
    text = "".join((EXAMPLES / f"{name}.yaml").read_text() for name in ("recipes/sft", "recipes/grpo"))
    for line in text.splitlines():
        # A number without a word about where it is from.
        assert not re.fullmatch(r"  (lr|betas|clip_grad|weight_decay|epochs|steps|global_size): [^#]*", line)


def test_the_tables_name_every_item_and_call_estimates_estimates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("grpo_70b", tmp_path) == 0
    out = capsys.readouterr().out
    for text in (
        "parameters",
        "gradients (fp32)",
        "optimizer",
        "activations",
        "logits and loss",
        "rollout weights",
        "key/value cache",
        "reshard buckets",
        "Estimate of one step",
        "pipeline bubble",
        "sent by a GPU over tp",
        "not measured",
        "responses of full length at once per engine",
    ):
        assert text in out


def test_old_log_probabilities_are_planned_for_all_mini_batches_but_the_first(tmp_path: Path) -> None:
    seconds = []
    for words in ([], ["rollout.passes=2"], ["batch.global_size=1024"], ["batch.global_size=2048"]):
        out = tmp_path / "plan.json"
        assert plan("grpo_70b", tmp_path, *words, "--json", str(out)) == 0
        estimate = json.loads(out.read_text())["plan"]["estimate"]["seconds"]
        seconds.append(estimate.get("old log-probabilities", 0.0))
    quarters, twice, halves, whole = seconds
    assert quarters == twice > halves > whole == 0
    assert quarters == pytest.approx(3 / 4 * 2 * halves, rel=0.1)  # the pipeline fills once in each


def test_a_run_that_names_no_engine_is_planned_with_the_one_of_gpus_that_have_vllm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for words in (["rollout.engine=null"], [], ["rollout.engine=in_process", "rollout.vllm=null"]):
        told.append((plan("grpo_70b", tmp_path, *words), capsys.readouterr().out))
    assert told[0] == told[1] != told[2]
    assert "Rollouts by vllm: " in told[0][1]
    assert "Rollouts by in_process: " in told[2][1]
    words = ["rollout.engine=null", "rollout.vllm=null", "rollout.max_concurrent=8"]
    assert plan("grpo_70b", tmp_path, *words) == 2
    assert "that is vllm on the GPUs that are planned for, since" in capsys.readouterr().err


def test_generators_have_their_own_memory_and_trainers_none_of_an_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight more GPUs that only generate: what is left on the others, and what these hold."""
    out, plans = tmp_path / "plan.json", []
    apart = ["rollout.devices=8", "rollout.ahead=1"]
    in_process = ["rollout.engine=in_process", "rollout.vllm=null", "rollout.max_concurrent=64"]
    for words, gpus in (([], 64), (apart, 72), ([*apart, *in_process, "rollout.tp=8"], 72)):
        assert plan("grpo_70b", tmp_path, *words, "--json", str(out), gpus=gpus) == 0
        plans.append(json.loads(out.read_text())["plan"])
    beside, vllm, embedded = plans
    assert beside["grid"] == vllm["grid"] == embedded["grid"]
    assert beside["generators"] == {}
    for stages in zip(beside["stages"], vllm["stages"], strict=True):
        training = [dict(stage["training"]) for stage in stages]
        asleep = training[0].pop("vLLM asleep")
        assert training[0].pop("total") - asleep == training[1].pop("total")
        assert training[0] == training[1]
        assert "generating" not in stages[1]
        assert stages[1]["sending weights"]["reshard buckets"] == 2 * 512 * 2**20
    for name in ("rollout weights", "key/value cache"):
        assert vllm["generators"]["generating"][name] == beside["stages"][0]["generating"][name]
    # Two bytes of each of 70.6e9 parameters, over tp 8.
    weights = embedded["generators"]["generating"]["rollout weights"]
    assert weights == pytest.approx(2 * 70.55e9 / 8, rel=0.01)
    assert "generating" not in vllm["estimate"]["seconds"]
    assert "on 8 more GPUs, which generate (rollout.devices)" in capsys.readouterr().out
    model = f"model.hf_config={tmp_path / SHIPPED['grpo_70b'][0]}"
    config = load_any_config(EXAMPLES / "grpo_70b.yaml", [model, *apart, *in_process])
    needs, gpu = ("rollout_logprobs",), Hardware(gpu_memory=80e9)
    (problem,) = plan_run(architecture_of(config.model), config, 72, gpu, loss_needs=needs).problems
    assert problem.startswith("a generator of rollout.devices needs 323.8 GB of 80.0 GB")


def test_a_run_that_does_not_fit_is_refused_with_changes_that_do_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without recomputation the activations of 16 layers in flight are too much.
    words = ["train.recompute=none", "parallel.vp=1"]
    assert plan("gift_70b", tmp_path, *words, gpus=32) == 2
    error = capsys.readouterr().err
    assert "does not fit on 32 GPUs" in error
    assert re.search(r"pipeline stage 0 needs [\d.]+ GB of 80.0 GB in the phase 'training'", error)
    advised = error.split("fits with any one of:" if "any one of" in error else "what to change:")[1]
    changes = [line.split(" (")[0].split() for line in advised.splitlines() if "=" in line]
    assert changes
    for change in changes:
        assert plan("gift_70b", tmp_path, *words, *change, gpus=32) == 0


def test_a_model_that_needs_more_gpus_is_told_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("pear_70b", tmp_path, "parallel.pp=2", "parallel.cp=1", gpus=8) == 2
    advised = re.search(r"(\d+) GPUs with (.+) \([\d.]+ GB\)", capsys.readouterr().err)
    assert advised is not None
    assert plan("pear_70b", tmp_path, *advised[2].split(), gpus=int(advised[1])) == 0


def test_what_no_change_makes_fit_is_said_to_be_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_stage = ["parallel.pp=1", "parallel.vp=1", "parallel.cp=1"]
    assert plan("pear_70b", tmp_path, *one_stage, "--gpu-memory", "8GB", gpus=4) == 2
    assert "on up to 32 GPUs: shorten data.max_length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.tpp=2"], "unknown key 'parallel.tpp'"),
        (["--gpu-memory", "80"], "expected a size such as 80GB"),
        (["--gpu-memory", "0GB"], "expected a size such as 80GB"),
        (["--efficiency", "1.5"], "efficiency: expected a number between 0 and 1, got 1.5"),
        (["--network", "0"], "network: expected a number above 0"),
        (["parallel.tp=3"], "8 attention heads do not divide by parallel.tp = 3"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EXAMPLE)
    assert main(["plan", str(path), "--gpus", "6", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--gpus", "--mean-length", "--top", "--gpus-per-node"])
def test_a_count_below_one_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["plan", "run.yaml", "--gpus", "6", option, "0"])
    assert exited.value.code == 2
    assert f"argument {option}: expected a number of at least 1, got 0" in capsys.readouterr().err


def test_explicit_sizes_need_no_model_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EXAMPLE)
    assert main(["plan", str(path), "--gpus", "2", "--gpu-memory", "8GiB", "--search", "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "layouts fit; fastest by estimate" in out
    assert out.count("train.recompute=") == 3
    assert "2 GPUs: tp 1, pp 1, vp 1, cp 1, dp 2" in out
