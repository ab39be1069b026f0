"""The rewards that come with the package, on responses of which the right score is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sftrl.config.rewards import RewardSection, RewardWorkersSection
from megatron_sftrl.rl.rewards import RewardOutput, RewardPool, build_rewards, constant_answers
from megatron_sftrl.rl.rewards.registry import Json
from tests.unit.rl.rewards.samples import sample


def output(
    name: str, response: str, *, tokens: int = 1, options: dict | None = None, **row: Json
) -> RewardOutput:
    """What a reward says about a response that is known to be harmless, without a worker."""
    (reward,) = build_rewards([RewardSection(name=name, **(options or {}))])
    reward.check_row(sample(response, **row).row)
    return reward(sample(response, tokens=tokens, **row))


GSM8K = "She sells 9 * 137.11 = 1,234 eggs.\n#### 1,234"


@pytest.mark.parametrize(
    ("gold", "response", "strict", "lenient"),
    [
        (GSM8K, "So 1,234.\n#### 1,234", 1, 1),
        (GSM8K, "#### 1234", 1, 1),
        (GSM8K, "#### $1,234.00", 1, 1),
        (GSM8K, "#### 1,235", 0, 0),
        (GSM8K, "#### 234", 0, 0),
        (GSM8K, "The answer is 1,234 eggs.", 0, 1),
        (GSM8K, "The answer is 1,234 eggs, not 7.", 0, 0),
        (GSM8K, "#### 1,234 eggs", 1, 1),
        (GSM8K, "#### 5\nno, wait\n#### 1,234", 1, 1),
        (GSM8K, "#### 1,234\nno, wait\n#### 5", 0, 0),
        (GSM8K, "", 0, 0),
        ("-5", "5 - 10 = \\boxed{-5}", 1, 1),
        ("5", "so 10-5", 0, 1),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1, 1),
        ("0.5", r"\boxed{\frac{1}{2}}", 1, 1),
        ("1/2", r"\boxed{\dfrac12}", 1, 1),
        ("1/3", r"\boxed{0.33}", 0, 0),
        (r"so $\boxed{3\sqrt{2}}$.", r"\boxed{\sqrt{18}}", 1, 1),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", 1, 1),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1, 1),
        ("(1, 2)", r"\boxed{(2, 1)}", 0, 0),
        (r"\text{Monday}", r"\boxed{Monday}", 1, 1),
        ("Monday", r"\boxed{Tuesday}", 0, 0),
        ("5", r"\boxed{4}, or rather \boxed{5}", 1, 1),
        ("5", r"\boxed{5}, or rather \boxed{4}", 0, 0),
        ("5", r"\boxed{4} #### 5", 1, 1),
        ("5", r"#### \boxed{5}", 1, 1),
        ("5", r"\boxed{\boxed{5}}", 1, 1),
        ("5", r"\boxed{5", 0, 1),
        # Candidates are no answer.
        ("5", r"\boxed{4, 5, 6}", 0, 0),
        ("5", r"\boxed{6 \text{ or } 5}", 0, 1),
        ("5", r"\boxed{$6$ and $5$}", 0, 1),
        ("5", "#### $5$ $6$", 0, 0),
        ("5", r"#### 6} \boxed{5", 0, 1),
        ("5", r"\boxed{\[6\] \[5\]}", 0, 1),
        ("12345678", "#### 12,345,678.", 1, 1),
        ("4", "#### 4" + " " * 1500 + "or 5", 0, 0),
    ],
)
def test_math_compares_values_and_wants_the_format_only_when_strict(
    gold: str, response: str, strict: int, lenient: int
) -> None:
    found = output("math", response, answer=gold)
    assert (found.reward, found.lenient) == (strict, lenient)


def test_math_accepts_the_chosen_format_only_and_a_number_as_the_answer() -> None:
    assert output("math", r"\boxed{5}", answer=5, options={"formats": ["hashes"]}).reward == 0
    assert output("math", "#### 5", answer=5, options={"formats": ["hashes"]}).reward == 1
    assert output("math", "#### 2.5", answer=2.5, options={"formats": ["boxed"]}).reward == 0


@pytest.fixture(scope="module")
def math_pool() -> Iterator[RewardPool]:
    with RewardPool(
        [RewardSection(name="math")], RewardWorkersSection(num_workers=1, seconds=2, memory_gb=1)
    ) as pool:
        yield pool


TOWERS = {
    "power tower": r"\boxed{9^{9^{9^{9}}}}",
    "factorial": r"\boxed{10^{10^{10}}!}",
    "powers of powers": r"\boxed{((x^{9999})^{9999})^{9999}}",
    "sum": r"\boxed{\sum_{k=1}^{999999999} \frac{\sin k}{k!}}",
}


@pytest.mark.parametrize("name", TOWERS)
def test_latex_that_no_computer_evaluates_is_a_wrong_answer_and_not_an_unjudged_one(
    name: str, math_pool: RewardPool
) -> None:
    tower, right = math_pool.score([sample(TOWERS[name], answer="4"), sample(r"\boxed{4}", answer="4")])
    assert (tower.reward, tower.outcome) == (0.0, "ok")
    assert (right.reward, right.outcome) == (1.0, "ok")


@pytest.mark.parametrize(
    "response",
    [
        "1" * 2**20,
        "1," * 2**19,
        r"\boxed{" * 2**17,
        "#" * 2**20,
        "#### " + "{" * 2**20,
        r"\boxed{" + r"\frac{" * 300 + "1" + "}{2}" * 300 + "}",
        "\\boxed{\0\ud800}",
        "#### \ud800\0",
        "<answer>" * 2**17,
        "#### " + "(1 + " * 2**17,
    ],
    ids=lambda text: ascii(text[:16]),
)
def test_a_long_or_odd_response_is_a_wrong_answer_in_no_time(response: str, math_pool: RewardPool) -> None:
    (one,) = math_pool.score([sample(response, answer="4")])
    assert (one.reward, one.outcome) == (0.0, "ok")


@pytest.mark.parametrize(
    ("answer", "response", "strict", "lenient"),
    [
        ("New York", "I think.\nAnswer:  new   york.", 1, 1),
        ("New York", "Answer: York\nAnswer: New York\nBye.", 1, 1),
        ("New York", "Answer: New York, USA", 0, 0),
        ("New York", "It is\nNew York", 0, 1),
        ("New York", "Answer:", 0, 0),
        ("New York", "", 0, 0),
        (["NY", "New York"], "Answer: NY", 1, 1),
        (7, "Answer: 7", 1, 1),
    ],
)
def test_exact_match_reads_behind_the_last_marker(
    answer: Json, response: str, strict: int, lenient: int
) -> None:
    found = output("exact_match", response, answer=answer)
    assert (found.reward, found.lenient) == (strict, lenient)


def test_exact_match_may_take_the_whole_response_and_mind_capitals() -> None:
    options = {"marker": None, "ignore_case": False}
    assert output("exact_match", " yes ", answer="yes", options=options).reward == 1
    assert output("exact_match", "Yes", answer="yes", options=options).reward == 0
    assert output("exact_match", "well\nyes", answer="yes", options=options).reward == 0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (20481, -1.0), (10**6, -1.0)],
)
def test_length_follows_equation_13_of_dapo(tokens: int, expected: float) -> None:
    # The paper's own sizes: at most 20480 tokens, of which the last 4096 are the cache. Exact: powers of two.
    found = output("length", "", tokens=tokens, options={"max_tokens": 20480, "cache": 4096})
    assert found.reward == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>\n1 + 1\n</think>\n<answer>2</answer>", 1),
        ("<think></think><answer>2</answer>\n", 1),
        ("<think>1</think><answer>2</answer> and so on", 0),
        ("<think>1</think><answer>2</answer><answer>3</answer>", 0),
        ("<answer>2</answer>", 0),
        ("<think>1</think>2", 0),
        ("<think>1<think></think></think><answer>2</answer>", 0),
    ],
)
def test_format_wants_one_block_of_thinking_and_one_of_answer(response: str, expected: int) -> None:
    assert output("format", response).reward == expected


TASKS = ("chain_sum", "leg_counting", "word_sorting", "base_conversion", "maze", "countdown")


@pytest.mark.parametrize("task", TASKS)
def test_reasoning_gym_tells_its_own_answers_from_wrong_ones_after_a_trip_through_json(task: str) -> None:
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(task, size=2, seed=5):
        row = json.loads(json.dumps(entry))
        answer = row["answer"]
        right = output("reasoning_gym", f"I see.\n<answer>{answer}</answer>", **row)
        assert (right.reward, right.lenient, right.metrics["solved"]) == (1, 1, 1)
        assert output("reasoning_gym", "<answer>nonsense</answer>", **row).reward < 0.1
        bare = output("reasoning_gym", answer, **row)
        assert (bare.reward, bare.lenient) == (0, 1)
        assert output("reasoning_gym", answer, options={"extraction": "whole"}, **row).reward == 1


@pytest.mark.parametrize("task", ["arc_agi", "rearc"])
def test_reasoning_gym_compares_grids_that_json_has_made_lists(task: str) -> None:
    row: dict[str, Json] = {
        "answer": "1 0\n0 2",
        "metadata": {"source_dataset": task, "output": [[1, 0], [0, 2]]},
    }
    assert output("reasoning_gym", "<answer>1 0\n0 2</answer>", **row).reward == 1
    assert output("reasoning_gym", "<answer>1 0\n0 1</answer>", **row).reward < 0.1


NULL_ANSWERS: dict[str, tuple[dict[str, Json], str, str]] = {
    "graph_color": (
        {
            "puzzle": {"vertices": [0, 1], "edges": [[0, 1]], "num_colors": 2, "color_options": [1, 2]},
        },
        '{"0": 1, "1": 2}',
        '{"0": 1, "1": 1}',
    ),
    "rubiks_cube": ({"cube_size": 3, "scramble_moves": "F R"}, "R' F'", "F R"),
    "propositional_logic": (
        {"variables": ["P", "Q"], "premises": ["P", "(P \u2192 Q)"]},
        "(P \u2227 Q)",
        "\u00acQ",
    ),
}


@pytest.mark.parametrize("task", NULL_ANSWERS)
@pytest.mark.parametrize("held", [{"answer": None}, {}], ids=["null", "absent"])
def test_reasoning_gym_judges_tasks_whose_rows_have_no_answer(task: str, held: dict[str, Json]) -> None:
    metadata, right, wrong = NULL_ANSWERS[task]
    row: dict[str, Json] = {**held, "metadata": {"source_dataset": task, **metadata}}
    assert output("reasoning_gym", f"<answer>{right}</answer>", **row).reward == 1
    assert output("reasoning_gym", f"<answer>{wrong}</answer>", **row).reward == 0


def test_reasoning_gym_gives_nothing_for_effort_unless_asked_to_grade() -> None:
    row: dict[str, Json] = {
        "answer": "1 + 2",
        "metadata": {"source_dataset": "countdown", "numbers": [1, 2], "target": 3},
    }
    response = "<answer>1 + 1</answer>"
    solved = output("reasoning_gym", response, **row)
    graded = output("reasoning_gym", response, options={"score": "graded"}, **row)
    assert (solved.reward, solved.lenient) == (0, 0)
    assert 0 < graded.reward == solved.metrics["grade"] < 0.1


def test_an_answer_that_breaks_the_tasks_verifier_is_wrong_and_a_row_that_does_is_an_error() -> None:
    row: dict[str, Json] = {
        "answer": "2 \u00d7 3",
        "metadata": {"source_dataset": "prime_factorization", "number": 6, "factors": [2, 3]},
    }
    assert output("reasoning_gym", "<answer>two times three</answer>", **row).reward == 0
    assert output("reasoning_gym", "<answer>2 \u00d7 3</answer>", **row).reward == 1
    broken: dict[str, Json] = {"answer": "1 2", "metadata": {"source_dataset": "sudoku"}}
    with pytest.raises(KeyError, match="solution"):
        output("reasoning_gym", "<answer>1 2</answer>", **broken)
    unanswered: dict[str, Json] = {"answer": None, "metadata": {"source_dataset": "chain_sum"}}
    with pytest.raises(ValueError, match="expected `answer` of task 'chain_sum' to be text"):
        output("reasoning_gym", "<answer>7</answer>", **unanswered)


def test_tasks_that_a_constant_answer_solves_are_named_in_one_line() -> None:
    import reasoning_gym

    rows = [
        json.loads(json.dumps(entry))
        for task in ("chain_sum", "puzzle24")
        for entry in reasoning_gym.create_dataset(task, size=4, seed=5)
    ]
    with RewardPool([RewardSection(name="reasoning_gym")], RewardWorkersSection(num_workers=1)) as pool:
        line = constant_answers(pool, rows)
        assert constant_answers(pool, rows[:4]) is None
    assert line is not None
    assert line.startswith("reasoning_gym: tasks solved by a constant answer: puzzle24 (")
    assert line.endswith("solves 100%)")
    with RewardPool([RewardSection(name="math")], RewardWorkersSection(num_workers=1)) as pool:
        assert constant_answers(pool, rows) is None


def test_an_answer_that_is_a_program_does_not_run_in_reasoning_gym(tmp_path: Path) -> None:
    # countdown hands the answer to sympy's parse_expr, which evaluates it.
    program = f"__import__('os').system('touch {tmp_path}/made')"
    row: dict[str, Json] = {
        "answer": "1 + 2",
        "metadata": {"source_dataset": "countdown", "numbers": [1, 2], "target": 3},
    }
    with RewardPool([RewardSection(name="reasoning_gym")], RewardWorkersSection(num_workers=1)) as pool:
        answers = [program, "1 + 2"]
        hostile, right = pool.score([sample(f"<answer>{text}</answer>", **row) for text in answers])
    assert hostile.reward < 0.1
    assert right.reward == 1
    assert not list(tmp_path.iterdir())


def test_reasoning_gym_wants_the_name_of_the_task() -> None:
    with pytest.raises(ValueError, match=r"`metadata\.source_dataset` to name a task .* got None; correct"):
        output("reasoning_gym", "<answer>7</answer>", answer="7", metadata={})
    with pytest.raises(ValueError, match=r"got 'chain_sums' \(did you mean 'chain_sum'"):
        output("reasoning_gym", "<answer>7</answer>", answer="7", metadata={"source_dataset": "chain_sums"})


@pytest.mark.parametrize(
    ("name", "response", "answer"),
    [
        ("math", r"so \boxed{1,234}", "1234"),
        ("math", r"\boxed{ \frac{1} {2} }", r"\frac{1}{2}"),
        ("math", "1234", None),
        ("exact_match", "Answer:  a  Red fox.", "a red fox"),
        ("exact_match", "a Red fox", None),
    ],
)
def test_rewards_say_which_answer_they_read_in_one_spelling(name, response, answer) -> None:
    options = {"marker": "Answer:"} if name == "exact_match" else {}
    assert output(name, response, options=options, answer="1234").answer == answer


def test_an_answer_comes_back_from_the_worker() -> None:
    with RewardPool([RewardSection(name="math")], RewardWorkersSection(num_workers=1)) as pool:
        (scored,) = pool.score([sample(r"\boxed{12}", answer="12")])
    assert scored.parts[0].answer == "12"
