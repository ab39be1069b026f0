"""The examples that newcomers start from: they load, fit together, and say what they claim to say."""

from __future__ import annotations

import importlib.util
import random
import sys
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from megatron_sftrl.apps.compare.config import read_compare_config
from megatron_sftrl.apps.compare.plan import stages_of
from megatron_sftrl.config.checks import check_run
from megatron_sftrl.config.load import config_from_text, load_any_config, load_config
from megatron_sftrl.config.schema import ArchitectureSection, GrpoConfig
from megatron_sftrl.models.architecture import Architecture, from_section
from megatron_sftrl.models.engine_shards import EngineLayout, check_cut
from megatron_sftrl.rl.rewards import RewardInputs, RewardPool, check_canaries

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GRPO = EXAMPLES / "grpo.yaml"
GRPO_VLLM = EXAMPLES / "grpo_vllm.yaml"
CLUSTER = [EXAMPLES / f"{name}.yaml" for name in ("curiosft", "gift", "pear")]
AS_RELEASED = [EXAMPLES / f"{name}_as_released.yaml" for name in ("curiosft", "gift")]
SEVERAL_NODES = [
    EXAMPLES / f"{name}.yaml"
    for name in ("curiosft_70b", "gift_70b", "gift_72b_qwen", "gift_moe", "grpo_70b", "pear_70b")
]
LORA = [EXAMPLES / f"{name}.yaml" for name in ("gift_70b_lora", "grpo_lora")]  # tests/unit/plan plans them
COMPARE = [EXAMPLES / f"compare_{name}.yaml" for name in ("smollm2", "tiny")]
WRITER = EXAMPLES / "compare_smollm2_writer.yaml"
QUICKSTART = sorted((EXAMPLES / "quickstart").glob("*.yaml"))


def load_quickstart(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the quick start as a module; its folder is on the path, as when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "quickstart"))
    spec = importlib.util.spec_from_file_location(
        f"quickstart_{name}", EXAMPLES / "quickstart" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def smollm2() -> Architecture:
    """The sizes of SmolLM2-135M."""
    section = ArchitectureSection(
        family="llama",
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_embeddings=True,
    )
    return from_section(section)


def qwen_7b() -> Architecture:
    """The sizes that the placeholder /path/to/Qwen2.5-7B stands for."""
    section = ArchitectureSection(
        family="qwen2",
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        vocab_size=152064,
        max_position_embeddings=131072,
    )
    return from_section(section)


def test_there_is_an_example_for_each_method() -> None:
    assert {*CLUSTER, *AS_RELEASED, *SEVERAL_NODES, *LORA, GRPO, GRPO_VLLM, *COMPARE, WRITER} == {
        *EXAMPLES.glob("*.yaml")
    }
    assert [path.stem for path in QUICKSTART] == ["base", "gift", "grpo"]


@pytest.mark.parametrize("path", [*CLUSTER, *AS_RELEASED], ids=lambda path: path.stem)
def test_a_cluster_example_fits_a_7b_model_on_eight_gpus(path: Path) -> None:
    config = load_config(path)
    loss = build_loss(config.loss.name, config.loss.options)
    check_run(config, qwen_7b(), 8, loss_needs=loss.needs)
    assert config.loss.name == path.stem.removesuffix("_as_released")


def test_the_grpo_example_fits_a_7b_model_on_eight_gpus_and_its_rewards_know_right_from_wrong() -> None:
    config = load_config(GRPO, schema=GrpoConfig)
    options = {**config.loss.options, "temperature": config.rollout.temperature}
    loss = build_loss(config.loss.name, options)
    check_run(config, qwen_7b(), 8, loss_needs=loss.needs)
    assert loss.name == "grpo"
    assert "advantages" in loss.needs
    with RewardPool(config.rewards, config.reward_workers) as rewards:
        check_canaries(rewards)


def test_the_vllm_example_is_the_grpo_example_with_another_engine_that_fits_too() -> None:
    ours, other = (load_config(path, schema=GrpoConfig) for path in (GRPO_VLLM, GRPO))
    loss = build_loss(ours.loss.name, {**ours.loss.options, "temperature": ours.rollout.temperature})
    check_run(ours, qwen_7b(), 8, loss_needs=loss.needs)
    assert (ours.rollout.engine, ours.rollout.offload) == ("vllm", True)
    check_cut(qwen_7b(), ours.rollout.vllm.tp)
    assert EngineLayout(tp=ours.rollout.vllm.tp, world_size=8).num_replicas == 4
    changed = {name for name in type(ours).model_fields if getattr(ours, name) != getattr(other, name)}
    assert changed == {"run_dir", "rollout"}


@pytest.mark.parametrize("path", COMPARE, ids=lambda path: path.stem)
def test_a_comparison_has_every_method_and_scores_by_the_writer_of_its_demonstrations(
    path: Path,
) -> None:
    config = read_compare_config(path, [])
    stages = stages_of(config)
    arms = {stage.arm: stage for stage in stages if stage.kind == "sft"}
    assert set(arms) == {"sft", "gift", "pear", "curiosft", "dft"}
    for name, stage in arms.items():
        run = config_from_text(stage.text, source=name)
        loss = build_loss(run.loss.name, run.loss.options)
        assert loss.name == name
        sizes = smollm2() if run.model.architecture is None else from_section(run.model.architecture)
        check_run(run, sizes, 1, loss_needs=loss.needs)
    (score,) = (stage for stage in stages if stage.kind == "score")
    writer, shown = (score.words[score.words.index(key) + 1] for key in ("--checkpoint", "--data"))
    folder = f"runs/{path.stem}"
    assert (writer, shown) == (f"{folder}/writer", f"{folder}/demonstrations.jsonl")
    script = path.with_suffix(".sh").read_text()
    assert f"out={folder}\n" in script
    assert "run_dir=$out/writer" in script or load_config(WRITER).run_dir == Path(writer)


def test_a_recipe_as_released_differs_from_the_papers_in_what_it_says_and_in_nothing_else() -> None:
    """GIFT sums the gradients of 128 / 8 / 2 micro-batches undivided before it clips at 1.0."""
    everyday = ("run_dir", "checkpoint.every", "checkpoint.keep_last", "train.eval_every")
    expected = {
        "gift": {
            "data.truncation": "right",
            "batch.aggregation": "sequence_mean",
            "optim.decay_all": True,
            "optim.clip_grad": 1.0 / (128 / 8 / 2),
        },
        "curiosft": {
            "batch.aggregation": "sequence_mean",
            "optim.schedule_steps": 4 * 3 * 178,
            "optim.betas": [0.9, 0.999],
            "optim.decay_all": True,
        },
    }
    for name, differing in expected.items():
        paper, released = (
            flat(load_config(EXAMPLES / f"{name}{suffix}.yaml").model_dump(mode="json"))
            for suffix in ("", "_as_released")
        )
        changed = {key: value for key, value in released.items() if paper[key] != value}
        if name == "curiosft":
            assert released["reference.decay"] == 0.01
            changed.pop("reference.decay", None)
        assert {key: value for key, value in changed.items() if key not in everyday} == differing


def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Every setting by its dotted key."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_the_options_of_a_cluster_example_are_the_published_defaults(path: Path) -> None:
    config = load_config(path)
    written = build_loss(config.loss.name, config.loss.options).config.model_dump()
    defaults = build_loss(config.loss.name).config.model_dump()
    # PEAR weighs single tokens by default; the example takes the paper's blocks of 4.
    assert written == {**defaults, **({"variant": "block"} if path.stem == "pear" else {})}


@pytest.mark.parametrize("path", QUICKSTART, ids=lambda path: path.stem)
def test_a_quick_start_stage_fits_two_processes(path: Path) -> None:
    config = load_any_config(path)
    assert config.model.architecture is not None
    loss = build_loss(config.loss.name, config.loss.options)
    check_run(config, from_section(config.model.architecture), 2, loss_needs=loss.needs)


def test_each_stage_of_the_quick_start_goes_on_with_the_model_of_the_one_before() -> None:
    base, gift, grpo = stages = [load_any_config(path) for path in QUICKSTART]
    for before, after in pairwise(stages):
        assert after.model.architecture == before.model.architecture
        assert after.model.init_checkpoint == before.run_dir
        assert after.tokenizer == before.tokenizer
    assert (base.loss.name, gift.loss.name, grpo.loss.name) == ("sft", "gift", "grpo")
    assert gift.parallel.tp == 2


def test_the_quick_start_rewards_what_its_report_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(EXAMPLES / "quickstart" / "grpo.yaml", schema=GrpoConfig)
    monkeypatch.chdir(EXAMPLES.parent)
    task = load_quickstart("task", monkeypatch)
    answer = next(task.problems(seed=3)).answer
    responses = [f"<answer>{answer}</answer>", f"<answer>-{answer}</answer>", f"The answer is {answer}.", ""]
    with RewardPool(config.rewards, config.reward_workers) as rewards:
        check_canaries(rewards)
        scores = rewards.score(
            [
                RewardInputs(
                    prompt="?",
                    response=response,
                    row={"answer": answer},
                    num_response_tokens=9,
                    is_finished=True,
                )
                for response in responses
            ]
        )
    assert [score.reward for score in scores] == [1.0, 0.0, 0.0, 0.0]
    assert [task.is_correct(response, answer, is_strict=True) for response in responses] == [
        score.reward == 1.0 for score in scores
    ]


def test_the_loss_in_a_users_file_is_gift_without_eps() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, prior = (torch.randn(7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = TokenBatch(
        tokens=torch.arange(7),
        labels=torch.arange(1, 8),
        positions=torch.arange(7),
        loss_mask=torch.ones(7, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 7], dtype=torch.int32),
        token_weight=torch.full((7,), 1 / 7),
    )
    mine = build_loss("my_gift", {"beta": 4.0}, modules=[EXAMPLES / "my_loss.py"])
    built_in = build_loss("gift", {"beta": 4.0, "eps": 0.0})
    losses = [
        loss(
            LossInputs(
                policy=TokenDistribution.from_logits(policy, vocab_size=11),
                reference=TokenDistribution.from_logits(prior, vocab_size=11),
                batch=batch,
            )
        ).token_loss
        for loss in (mine, built_in)
    ]
    # The same operations in the same order.
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_demonstrations_are_accepted_and_wrong_or_unfinished_answers_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = load_quickstart("task", monkeypatch)
    problem = next(task.problems(seed=3))
    right = task.demonstration(problem)
    assert task.is_correct(right, problem.answer, is_strict=True)
    wrong = f"<answer>{int(problem.answer) + 1}</answer>"
    for is_strict in (True, False):
        assert not task.is_correct(wrong, problem.answer, is_strict=is_strict)
        assert not task.is_correct("", problem.answer, is_strict=is_strict)
        # reasoning-gym gives partial credit to an answer that contains the right one.
        assert not task.is_correct("<answer>15</answer>", "5", is_strict=is_strict)
    prose = f"The answer is {problem.answer}."
    assert task.is_correct(prose, problem.answer, is_strict=False)
    for loose in (prose, right + "!", right.removesuffix("</answer>"), f"{right}\n{right}"):
        assert not task.is_correct(loose, problem.answer, is_strict=True)


def test_problems_of_a_seed_repeat_exactly_and_never_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_quickstart("task", monkeypatch)
    # 80,000 sums of 4 terms: among 3,000 problems about 14 would come twice if nothing held them back.
    first, again, other = (list(islice(task.problems(seed), 3000)) for seed in (1, 1, 2))
    assert first == again
    assert len({problem.question for problem in first}) == 3000
    assert len({problem.question for problem in first} & {problem.question for problem in other}) < 300


def test_base_texts_mix_styles_and_contain_slips(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_quickstart("task", monkeypatch)
    draw = random.Random(0)
    chosen = list(islice(task.problems(seed=1), 400))
    texts = [task.base_text(problem, draw) for problem in chosen]
    worked = [(t, p) for t, p in zip(texts, chosen, strict=True) if "=" in t]
    slips = [t for t, p in worked if not task.is_correct(t, p.answer, is_strict=True)]
    # 400 draws at 0.4: five standard deviations are 0.12. With slips in 2 % of 3 steps, 6 % go wrong.
    assert 0.28 < len(worked) / 400 < 0.52
    assert 0.0 < len(slips) / len(worked) < 0.2


def accuracy_of(report: ModuleType, greedy: float, rewards: tuple[float, ...]) -> object:
    shares = {"greedy": greedy, "sampled": sum(rewards) / len(rewards)}
    return report.Accuracy(stage="s", step=1, strict=shares, lenient=shares, rewards=rewards, answers=[])


@pytest.mark.parametrize(("after", "problems"), [(0.4, 0), (0.32, 1), (0.2, 1)])
def test_the_quick_start_fails_unless_both_stages_together_raise_accuracy(
    monkeypatch: pytest.MonkeyPatch, after: float, problems: int
) -> None:
    report = load_quickstart("report", monkeypatch)
    before = accuracy_of(report, 0.9, (0.3, 0.3))
    assert len(report.check_accuracy(before, accuracy_of(report, 0.1, (after, after)))) == problems


def test_the_quick_start_fails_unless_grpo_raises_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    report = load_quickstart("report", monkeypatch)
    before = accuracy_of(report, 0.5, (0.0, 0.25, 1.0, 0.75))
    better = accuracy_of(report, 0.1, (0.25, 0.5, 1.0, 1.0))
    # Rises of 0.25, 0.25, 0 and 0.25: mean 3/16; squared deviations 3 (1/16)^2 + (3/16)^2 = 12/256.
    assert report.reward_rise(before, better) == pytest.approx((3 / 16, (12 / 256) ** 0.5 / 4))
    assert report.check_reward(before, better) == []
    for worse in (before, accuracy_of(report, 0.9, (0.0, 0.25, 1.0, 0.5))):
        (message,) = report.check_reward(before, worse)
        assert "the reward did not rise" in message
        assert f"expected a rise of {report.SMALLEST_REWARD_RISE} or more" in message
