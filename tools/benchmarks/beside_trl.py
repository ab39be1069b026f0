"""SFT and GRPO steps of ours and of TRL's, in turns: seconds, tokens per second, peak memory.

    OMP_NUM_THREADS=2 python -m tools.benchmarks.beside_trl [--trl-python ENV/bin/python] [--json FILE]

The same random Llama of 135M weights, rows, batch, fp32, AdamW and threads. Each turn is a run of its own,
as a user starts it, ours and then TRL's; of each run the first step is left out. Of GRPO ours has
rollout.share_prompts, and `prompts not shared` is without. `recomputed` keeps no activations inside a layer:
train.recompute=full, and gradient_checkpointing, TRL's default; ours has a number of layers, too
(train.recompute_layers). `TRL, by default` does not pack, either.
TRL wants an environment of its own (pip install trl==1.16.0 beside torch), unless this one has it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
LENGTH, GROUP_SIZE, NEW_TOKENS, LR = 1024, 16, 64, 1e-5
LIMITS = {"sft": (1.4, 0.65), "grpo": (1.8, 0.45)}
"""Tokens per second at least, and peak memory at most, of TRL's."""
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
_REWARD = '''"""The reward of trl_side.py."""

from megatron_sftrl import Canary, RewardConfig, RewardInputs, RewardOutput, register_reward


@register_reward(
    "even_words",
    canaries=lambda config: (
        Canary(response="w2", row={}, is_right=True),
        Canary(response="w1", row={}, is_right=False),
    ),
)
def even_words(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Words with an even number."""
    return RewardOutput(reward=float(sum(word[-1] in "02468" for word in inputs.response.split())))
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to run a step.

    Args:
        recomputed: layers without activations, None for all of them.
    """

    name: str
    is_ours: bool = True
    recomputed: int | None = 0
    packs: bool = True
    shares_prompts: bool = True


OURS, TRL = Side(name="ours"), Side(name="TRL", is_ours=False)
WHOLE_PROMPTS = Side(name="ours, prompts not shared", shares_prompts=False)
OURS_RECOMPUTED = Side(name="ours, recomputed", recomputed=None)
TRL_RECOMPUTED = Side(name="TRL, recomputed", is_ours=False, recomputed=None)
TRL_DEFAULT = Side(name="TRL, by default", is_ours=False, recomputed=None, packs=False)


@dataclass(slots=True)
class Measured:
    """Of all turns of one side."""

    seconds: list[float] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)


def main() -> None:
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="beside-trl-") as folder:
        root = Path(folder)
        vocabulary = _write_model(root / "model", arguments)
        found = {}
        for kind in arguments.kinds:
            num_tokens = _write_rows(root, kind, vocabulary, arguments.rows)
            measured = {side: Measured() for side in _sides(kind, arguments)}
            for turn in range(arguments.turns):
                for number, (side, each) in enumerate(measured.items()):
                    _run(kind, side, root / f"{kind}-{turn}-{number}", arguments, each)
            found[kind] = _report(kind, measured, num_tokens)
    if arguments.json is not None:
        temporary = arguments.json.with_name(arguments.json.name + ".tmp")
        temporary.write_text(json.dumps(found, indent=2) + "\n")
        temporary.replace(arguments.json)


def _sides(kind: str, arguments: argparse.Namespace) -> list[Side]:
    sides = [OURS, TRL]
    if kind == "grpo":
        sides.append(WHOLE_PROMPTS)
    if arguments.recomputed:
        some = arguments.recompute_layers
        sides += [Side(name=f"ours, {some} recomputed", recomputed=some), OURS_RECOMPUTED, TRL_RECOMPUTED]
    if kind == "sft" and arguments.default:
        sides.append(TRL_DEFAULT)
    return sides


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="the Python that has TRL; this one")
    parser.add_argument("--kinds", nargs="+", choices=["sft", "grpo"], default=["sft", "grpo"])
    parser.add_argument("--default", action="store_true", help="SFT as TRL does it by default, too")
    parser.add_argument("--recomputed", action="store_true", help="both sides without activations, too")
    parser.add_argument("--recompute-layers", type=int, default=13, help="of one of ours, with --recomputed")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of each run; the first is not counted")
    parser.add_argument("--rows", type=int, default=16, help="of an SFT step, 64 to 256 tokens each")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--json", type=Path, default=None, help="file for the numbers")
    return parser.parse_args()


def _write_model(path: Path, arguments: argparse.Namespace) -> list[str]:
    """Random weights in SmolLM2-135M's shape, and a tokenizer with a word for each id; the words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocab, num_hidden_layers=arguments.layers, hidden_size=576,
        intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    special = ["<|pad|>", "<|end|>", "<unk>", "user", "assistant"]
    words = [f"w{number}" for number in range(arguments.vocab - len(special))]
    ids = {word: index for index, word in enumerate([*special, *words])}
    rules = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<unk>"
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(path)
    return words


def _write_rows(root: Path, kind: str, vocabulary: list[str], num_rows: int) -> int:
    """Conversations that both read; tokens of an SFT step, or of a GRPO step's responses."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(draw.choices(vocabulary, k=length))

    rows: list[dict[str, Any]] = []
    total = 0
    for _ in range(num_rows):
        length = draw.randint(64, 256)
        prompt = [{"role": "user", "content": text(24 if kind == "grpo" else length // 4)}]
        row: dict[str, Any] = {"prompt": prompt}
        if kind == "sft":
            row["completion"] = [{"role": "assistant", "content": text(length - length // 4)}]
            total += length + 4  # two roles, two ends
        rows.append(row)
    (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "my_reward.py").write_text(_REWARD)
    return total or GROUP_SIZE * NEW_TOKENS


def _run(kind: str, side: Side, run: Path, arguments: argparse.Namespace, measured: Measured) -> None:
    """One run of one side, added to what was measured of it."""
    root, threads = run.parent, int(os.environ.get("OMP_NUM_THREADS", "1"))
    start: Callable[..., list[float]] = _ours if side.is_ours else _trl
    settings = {
        "model": str(root / "model"), "data": str(root / f"{kind}.jsonl"), "run_dir": str(run), "lr": LR,
        "steps": arguments.steps, "threads": threads, "packing": side.packs, "max_length": LENGTH,
        "rows_per_pass": 8, "group_size": GROUP_SIZE, "max_new_tokens": NEW_TOKENS,
        "num_rows": arguments.rows, "recompute": side.recomputed != 0, "recompute_layers": side.recomputed,
        "share_prompts": side.shares_prompts,
    }  # fmt: skip
    losses = start(kind, settings, run, arguments.trl_python, measured)
    measured.first_losses.append(losses[0])


def _ours(kind: str, settings: dict[str, Any], run: Path, _: str, measured: Measured) -> list[float]:
    tree: dict[str, Any] = {
        "run_dir": str(run),
        "model": {"hf": settings["model"], "dtype": "fp32"},
        "data": {"train": [settings["data"]]},
        "batch": {"packing": True, "max_tokens": LENGTH, "global_size": settings["num_rows"]},
        "loss": {"name": kind},
        "optim": {"lr": LR, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "train": {"steps": settings["steps"], "recompute": "full" if settings["recompute"] else "none"},
        "log": {"wandb": "off", "progress": False},
    }
    if settings["recompute_layers"]:
        tree["train"]["recompute_layers"] = settings["recompute_layers"]
    if kind == "sft":
        tree["data"]["max_length"] = LENGTH
    else:
        tree["data"]["max_prompt_length"] = 64
        tree["batch"] |= {"global_size": GROUP_SIZE, "max_tokens": GROUP_SIZE * (NEW_TOKENS + 32)}
        tree["rollout"] = {
            "engine": "in_process", "prompts_per_step": 1, "group_size": GROUP_SIZE,
            "max_new_tokens": NEW_TOKENS, "share_prompts": settings["share_prompts"],
        }  # fmt: skip
        tree["rewards"] = [{"name": "even_words", "modules": [str(run.parent / "my_reward.py")]}]
    written = run.with_suffix(".yaml")
    written.write_text(yaml.safe_dump(tree))
    _start([sys.executable, "-m", "megatron_sftrl", kind, str(written)], measured)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [sum(value for name, value in row.items() if name.startswith("seconds/")) for row in rows]
    measured.seconds += seconds[1:]
    return [row["loss"] for row in rows]


def _trl(kind: str, settings: dict[str, Any], run: Path, python: str, measured: Measured) -> list[float]:
    written, answer = run.with_suffix(".json"), run.with_suffix(".answer.json")
    written.write_text(json.dumps(settings))
    side = Path(__file__).with_name("trl_side.py")
    _start([python, "-W", "ignore", str(side), kind, str(written), str(answer)], measured)
    told = json.loads(answer.read_text())
    measured.seconds += told["seconds"][1:]
    return told["losses"]


def _start(command: list[str], measured: Measured) -> None:
    """A program to its end; its peak memory is the kernel's count."""
    environment = {
        **os.environ,
        "SFTRL_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command} ended with {process.returncode}:\n{said.read().decode()[-4000:]}")
    measured.peak_bytes.append(usage.ru_maxrss * 1024)


def _report(kind: str, measured: dict[Side, Measured], num_tokens: int) -> dict[str, Any]:
    """Print the table; the same numbers."""
    seconds = {side: statistics.median(each.seconds) for side, each in measured.items()}
    peaks = {side: max(each.peak_bytes) for side, each in measured.items()}
    print(f"{kind}: {num_tokens} tokens a step")
    for side, each in measured.items():
        print(
            f"  {side.name:<24} {seconds[side]:8.2f} s a step {num_tokens / seconds[side]:8.0f} tokens/s "
            f"{peaks[side] / 1e9:6.2f} GB   first loss {each.first_losses[0]:.6f}"
        )
    fastest, smallest = LIMITS[kind]
    pairs = [(side, TRL) for side in measured if side.is_ours]
    if OURS_RECOMPUTED in measured:
        pairs.append((OURS_RECOMPUTED, TRL_RECOMPUTED))
    for ours, theirs in pairs:
        speed, memory = seconds[theirs] / seconds[ours], peaks[ours] / peaks[theirs]
        print(
            f"  {ours.name} / {theirs.name}: {speed:.2f} of the tokens per second (at least {fastest}), ",
            end="",
        )
        print(f"{memory:.2f} of the memory (at most {smallest})")
    if kind == "sft":
        gap = abs(measured[OURS].first_losses[0] - measured[TRL].first_losses[0])
        print(f"  first losses differ by {gap:.1e} (at most 1e-4)")
    return {
        side.name: {
            "seconds": each.seconds, "tokens_per_second": num_tokens / seconds[side],
            "peak_bytes": peaks[side], "first_loss": each.first_losses[0],
        }
        for side, each in measured.items()
    }  # fmt: skip


if __name__ == "__main__":
    main()
