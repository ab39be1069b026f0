"""Rows to tokens and masks: rows per second and memory of our loading beside datasets.map, in one run.

    python -m tools.benchmarks.tokenizing [--rows 100000] [--words 60] [--tokenizer DIR] [--json FILE]

The same JSON lines go through find_rows().load() with a cache and, as TRL prepares them, through
datasets.load_dataset("json") and Dataset.map of apply_chat_template with the mask of the assistant's tokens.
Both have --processes processes and as many processors, alternate for --turns turns, each in a new process,
and give the same tokens. Ours reads, checks and tokenizes; theirs is shown with its reading and without.
Reported: medians, the ratio of rows per second, whose goal is at least 1.0, and the largest memory of the
whole process tree and of its first process: resident pages other than those of files, which the kernel takes
back when it needs them; pages that processes share since a fork count for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOAL = 1.0
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    arguments = _parse()
    if arguments.contender:
        print(json.dumps(CONTENDERS[arguments.contender](arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.out_dir, prefix="benchmark-tokenizing-") as folder:
        directory = Path(folder)
        _write_rows(directory / "rows.jsonl", arguments.rows, arguments.words)
        tokenizer = arguments.tokenizer or _train_tokenizer(directory)
        names = [name for name in CONTENDERS if arguments.only in (None, name)]
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(arguments.turns):
            for name in names if turn % 2 == 0 else reversed(names):
                results[name].append(_run(name, directory, tokenizer, arguments))
    _report(results, arguments)


def _parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=60, help="words of an answer, on average")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=None, help="trained for the run when not given")
    parser.add_argument("--out-dir", type=Path, default=None, help="disk to write to")
    parser.add_argument("--only", choices=[*CONTENDERS], default=None, help="one side alone")
    parser.add_argument("--json", type=Path, default=None, help="file for the numbers")
    parser.add_argument("--contender", choices=[*CONTENDERS], default=None, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _words() -> tuple[list[str], list[float]]:
    """Words that a text is made of, some often and most seldom."""
    generator = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "ar", "en", "ing")]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(20_000)]
    return words, [1 / (rank + 10) for rank in range(len(words))]


def _write_rows(path: Path, num_rows: int, num_words: int) -> None:
    generator, (words, weights) = random.Random(1), _words()
    stock = generator.choices(words, weights, k=1_000_000)

    def text(mean: int) -> str:
        start, length = (
            generator.randrange(len(stock) - 4 * mean),
            generator.randint(mean // 2, 3 * mean // 2),
        )
        return " ".join(stock[start : start + max(1, length)])

    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            ask = {"role": "user", "content": f"{number}: {text(max(1, num_words // 4))}?"}
            answer = {"role": "assistant", "content": f"{text(num_words)}.\n\n{text(num_words // 2 or 1)}."}
            file.write(json.dumps({"messages": [ask, answer]}) + "\n")


def _train_tokenizer(directory: Path) -> Path:
    """A byte-level BPE of 8,000 tokens, in the form of a Hugging Face directory."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_words()[0], trainer)
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    out = directory / "tokenizer"
    out.mkdir()
    tokenizer.save(str(out / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(facts))
    return out


def _run(name: str, directory: Path, tokenizer: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.benchmarks.tokenizing", "--contender", name]
    command += ["--directory", str(directory), "--tokenizer", str(tokenizer)]
    command += ["--processes", str(arguments.processes)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


class _Memory:
    """Largest memory, in bytes, of this process, and of it with all processes below it."""

    def __enter__(self) -> _Memory:
        self.whole = self.first = 0
        self._seconds: dict[int, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def processor_seconds(self) -> float:
        """Of all these processes together, up to when each was last seen."""
        return sum(self._seconds.values())

    def _look(self) -> None:
        is_over = False
        while not is_over:
            found = [self._of(process) for process in _family(os.getpid())]
            self.first, self.whole = max(self.first, found[0]), max(self.whole, sum(found))
            is_over = self._is_over.wait(0.1)

    def _of(self, process: int) -> int:
        """Resident bytes that are none of files; notes the seconds of processors."""
        try:
            resident, shared = Path(f"/proc/{process}/statm").read_text().split()[1:3]
            user, system = _stat(process)[11:13]
        except OSError:  # it has ended
            return 0
        self._seconds[process] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _stat(process: int) -> list[str]:
    """What the kernel says of a process, behind its name: state, parent and so on."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _family(process: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def _ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_sftrl.config.schema import TokenizerSection
    from megatron_sftrl.data.dataset import find_rows
    from megatron_sftrl.data.tokenizer import load_tokenizer

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.processes])
    template = arguments.directory / "chatml.jinja"
    template.write_text(CHATML)
    tokenizer = load_tokenizer(TokenizerSection(path=arguments.tokenizer, chat_template=template))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as cache, _Memory() as memory:
        start = time.perf_counter()
        dataset = find_rows(
            [arguments.directory / "rows.jsonl"],
            tokenizer,
            max_length=2**20,
            truncation="error",
            cache_dir=Path(cache),
        ).load()
        seconds = time.perf_counter() - start
        sample = [dataset[index] for index in (0, len(dataset) // 2, len(dataset) - 1)]
        tokens = [[each.tokens.tolist(), each.loss_mask.tolist()] for each in sample]
    return _result(memory, seconds, seconds, tokens)


def _theirs(arguments: argparse.Namespace) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.processes])
    tokenizer = AutoTokenizer.from_pretrained(str(arguments.tokenizer))
    tokenizer.chat_template = CHATML

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    with tempfile.TemporaryDirectory(dir=arguments.directory) as cache, _Memory() as memory:
        start = time.perf_counter()
        rows: Any = datasets.load_dataset(
            "json", data_files=str(arguments.directory / "rows.jsonl"), split="train", cache_dir=cache
        )
        read = time.perf_counter()
        mapped = rows.map(tokenize, num_proc=arguments.processes, remove_columns=rows.column_names)
        seconds = time.perf_counter() - start
        sample = [mapped[index] for index in (0, len(mapped) // 2, len(mapped) - 1)]
        # Ours ends behind the last token that is learned.
        ends = [max(i for i, learned in enumerate(each["assistant_masks"]) if learned) + 1 for each in sample]
        tokens = [
            [each["input_ids"][:end], [bool(learned) for learned in each["assistant_masks"][:end]]]
            for each, end in zip(sample, ends, strict=True)
        ]
    return _result(memory, seconds, seconds - (read - start), tokens)


def _result(memory: _Memory, seconds: float, without_reading: float, sample: list) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "seconds_without_reading": without_reading,
        "whole_mb": memory.whole / 1e6,
        "first_mb": memory.first / 1e6,
        "processor_seconds": memory.processor_seconds,
        "sample": sample,
    }


_LINES = [
    ("ours", "ours", "seconds"),
    ("datasets, with reading", "datasets", "seconds"),
    ("datasets.map alone", "datasets", "seconds_without_reading"),
]

CONTENDERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"ours": _ours, "datasets": _theirs}


def _report(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    samples = [each.pop("sample") for turns in results.values() for each in turns]
    assert all(sample == samples[0] for sample in samples), "the two give different tokens"

    def median(name: str, of: str) -> float:
        return statistics.median(each[of] for each in results[name])

    print(f"{arguments.rows} rows of {arguments.words} words, {arguments.processes} processes")
    print(f"{'':<24} {'rows/s':>10} {'tree MB':>10} {'first MB':>10} {'CPU s':>10}")
    for label, name, of in _LINES:
        if name in results:
            numbers = [median(name, each) for each in ("whole_mb", "first_mb", "processor_seconds")]
            told = [arguments.rows / median(name, of), *numbers]
            print(f"{label:<24} {' '.join(f'{each:10.0f}' for each in told)}")
    ratios = {}
    for label, name, of in _LINES[1:] if len(results) == 2 else ():
        ratios[label] = median(name, of) / median("ours", "seconds")
        print(f"ours / {label:<24} {ratios[label]:6.2f}   at least {GOAL}")
    if arguments.json is not None:
        temporary = arguments.json.with_name(arguments.json.name + ".tmp")
        facts = {"rows": arguments.rows, "words": arguments.words, "processes": arguments.processes}
        temporary.write_text(
            json.dumps({"facts": facts, "turns": results, "ratios": ratios}, indent=2) + "\n"
        )
        temporary.replace(arguments.json)


if __name__ == "__main__":
    main()
