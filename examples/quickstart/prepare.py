"""Writes what the quick start trains on: a small tokenizer and five files of problems.

    python examples/quickstart/prepare.py OUTPUT_DIRECTORY [--seed 0] [--share 1]

tokenizer/        Hugging Face directory: digit by digit, whole words, a chat template
base.jsonl        prompt, response: mixed styles, for the base model
demos.jsonl       prompt, response: correct worked steps, for fine-tuning
held_out.jsonl    prompt, response: as demos, for the loss on problems never trained on
rewarded.jsonl    prompt, answer: problems that GRPO answers by itself
prompts.jsonl     prompt, answer: the held-out problems, for `sftrl generate` and the verifier
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from task import base_text, demonstration, problems
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NUM_HELD_OUT = 256
NUM_DEMONSTRATIONS = 4_000
NUM_BASE = 24_000
NUM_REWARDED = 4_000

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A digit is a token of its own: numbers are then read and written like words, letter by letter.
PIECES = r" ?\d| ?[A-Za-z]+|</?answer>|\s| ?[^\sA-Za-z\d]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="other problems, other texts")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, to see the stages sooner (1)")
    arguments = parser.parse_args()
    share: float = arguments.share
    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)

    # One stream cut in four, and no problem comes twice: what is held out is never trained on.
    stream = problems(arguments.seed)
    held_out = list(islice(stream, round(share * NUM_HELD_OUT)))
    demos = list(islice(stream, round(share * NUM_DEMONSTRATIONS)))
    draw = random.Random(arguments.seed)
    base = [
        {"prompt": p.question, "response": base_text(p, draw)}
        for p in islice(stream, round(share * NUM_BASE))
    ]
    rewarded = list(islice(stream, round(share * NUM_REWARDED)))

    write_rows(directory / "base.jsonl", base)
    write_rows(
        directory / "demos.jsonl", ({"prompt": p.question, "response": demonstration(p)} for p in demos)
    )
    write_rows(
        directory / "held_out.jsonl", ({"prompt": p.question, "response": demonstration(p)} for p in held_out)
    )
    for name, chosen in (("rewarded", rewarded), ("prompts", held_out)):
        write_rows(directory / f"{name}.jsonl", ({"prompt": p.question, "answer": p.answer} for p in chosen))
    tokenizer = build_tokenizer(row["prompt"] + row["response"] for row in base)
    tokenizer.save_pretrained(directory / "tokenizer")
    print(f"{len(base)} base rows, {len(demos)} demonstrations, {len(held_out)} held out in {directory}")
    print(f"for example: {held_out[0].question}\n{demonstration(held_out[0])}")


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `texts`; every text has ids, since each byte is a token too."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE
    )


if __name__ == "__main__":
    main()
