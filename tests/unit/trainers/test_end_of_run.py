"""The commands that a finished run says: processes, files and weights of any layout and start."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megatron_sftrl.config.load import config_from_text, load_config
from megatron_sftrl.config.schema import GrpoConfig, TrainingConfig
from megatron_sftrl.observability.run_directory import RunDirectory, open_run_directory
from megatron_sftrl.trainers.run import last_numbers, next_commands
from tests.unit.config.example import EXAMPLE, example

GRPO = EXAMPLE.replace("name: gift, beta: 5", "name: grpo").replace("reference: {kind: frozen}\n", "") + (
    "rollout: {prompts_per_step: 4, max_new_tokens: 8}\nrewards: [{name: math}]\n"
)
GRPO = GRPO.replace("max_length: 128", "max_prompt_length: 16")
STEP = Path("runs/example/checkpoints/step-00000020")


def commands(config: TrainingConfig, *, world_size: int = 1, per_node: int = 8) -> list[str]:
    return next_commands(config, STEP, num_positions=256, world_size=world_size, per_node=per_node)


@pytest.mark.parametrize(
    ("layout", "world_size", "generate", "go_on"),
    [
        ("{}", 1, "sftrl", "sftrl"),
        ("{}", 8, "sftrl", "torchrun --nproc-per-node 8 -m megatron_sftrl"),
        (
            "{tp: 2, pp: 2}",
            8,
            "torchrun --nproc-per-node 4 -m megatron_sftrl",
            "torchrun --nproc-per-node 8 -m megatron_sftrl",
        ),
        (
            "{tp: 2, etp: 1, ep: 4, sequence_parallel: true}",
            8,
            "torchrun --nproc-per-node 4 -m megatron_sftrl",
            "torchrun --nproc-per-node 8 -m megatron_sftrl",
        ),
        *(
            (
                layout,
                32,
                generate,
                "torchrun --nnodes 4 --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 --nproc-per-node 8 "
                "-m megatron_sftrl",
            )
            for layout, generate in (
                ("{tp: 8}", "torchrun --nproc-per-node 8 -m megatron_sftrl"),
                (
                    "{tp: 8, pp: 2}",
                    "torchrun --nnodes 4 --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 --nproc-per-node 8 "
                    "-m megatron_sftrl",
                ),
            )
        ),
    ],
)
def test_a_command_has_the_processes_that_its_layout_needs(
    layout: str, world_size: int, generate: str, go_on: str
) -> None:
    said = commands(example(f"parallel={layout}"), world_size=world_size)
    assert said[0].startswith("export: sftrl convert to-hf --checkpoint runs/example/")
    assert said[1].startswith(f"try it: {generate} generate runs/example/resolved.yaml ")
    assert said[2].startswith(f"go on with GRPO: {go_on} grpo GRPO.yaml ")


@pytest.mark.parametrize(
    ("row", "is_asked"),
    [
        ({"prompt": "2+2=", "response": "4"}, True),
        ({"question": "2+2=", "answer": "4"}, True),
        ({"messages": [{"role": "user", "content": "2+2="}]}, True),
        ({"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "4"}]}, False),
    ],
)
def test_held_out_rows_are_the_prompts_where_they_can_be_asked(
    row: dict, is_asked: bool, tmp_path: Path
) -> None:
    path = tmp_path / "valid.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for valid in ([path], [tmp_path / "gone.jsonl", path]):
        given = f"data.valid=[{', '.join(map(str, valid))}]"
        assert f"--prompts {path if is_asked else 'PROMPTS.jsonl'} " in commands(example(given))[1]
    assert "--prompts PROMPTS.jsonl " in commands(example())[1]


@pytest.mark.parametrize(
    "model",
    ["hf: runs/base, allow_pickle: true", "hf_config: runs/base", "architecture"],
    ids=lambda name: name,
)
def test_a_new_run_of_grpo_starts_from_the_checkpoint_and_from_no_other_weights(
    model: str, tmp_path: Path
) -> None:
    text = GRPO.replace("runs/example", str(tmp_path / "my run"))
    (tmp_path / "my run-2").mkdir()
    start = () if model == "architecture" else (f"model={{{model}}}",)
    config = config_from_text(text, source="run.yaml", overrides=start, schema=GrpoConfig)
    open_run_directory(config, is_writer=True)
    program, command, resolved, *changes = shlex.split(commands(config)[2].partition(": ")[2])
    assert (program, command) == ("sftrl", "grpo")
    new = load_config(resolved, changes, schema=GrpoConfig)
    assert new.run_dir == tmp_path / "my run-3"
    assert (new.model.hf, new.model.init_checkpoint, new.model.allow_pickle) == (None, STEP, False)
    assert new.model.hf_config == (None if model == "architecture" else Path("runs/base"))
    before = config.model_copy(update={"run_dir": new.run_dir, "model": new.model})
    assert new == before


def test_the_last_numbers_are_named_with_their_step_where_a_later_one_has_none(tmp_path: Path) -> None:
    directory = RunDirectory(path=tmp_path)
    rows = [
        {"step": 1, "loss": 2.0, "reward/mean": 0.5, "valid/reward/mean": 0.25, "nll": 3.0},
        {"step": 2, "reward/mean": None},
    ]
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_numbers(directory) == (
        "loss 2 (step 1), reward/mean not finite, valid/reward/mean 0.25 (step 1)"
    )
    directory.metrics.write_text("")
    assert last_numbers(directory) == ""
