"""Asks the exported model in transformers, and fails unless it answers as it did in the training engine.

python examples/quickstart/ask.py runs/quickstart/hf runs/quickstart/answers/grpo/greedy.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_QUESTIONS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("answers", type=Path, help="what `sftrl generate` wrote at temperature 0")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    rows = [json.loads(line) for line in arguments.answers.read_text(encoding="utf-8").splitlines()]
    for row in rows[:NUM_QUESTIONS]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(  # type: ignore[attr-defined]
            **prompt,
            max_new_tokens=row["num_tokens"][0],
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        length = prompt["input_ids"].shape[1]
        answer = tokenizer.decode(output[0, length:], skip_special_tokens=True)
        if answer != row["responses"][0]:
            print(
                f"error: {arguments.model} in transformers answers {row['prompt']!r} with {answer!r}; "
                f"expected {row['responses'][0]!r}, as in the training engine",
                file=sys.stderr,
            )
            return 1
    print(
        f"transformers gives the same answers as the training engine, {NUM_QUESTIONS} of {NUM_QUESTIONS}. "
        f"For example:\n{rows[0]['prompt']}\n{rows[0]['responses'][0]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
