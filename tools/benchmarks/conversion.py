"""Speed and memory of the conversions against `cp` of the same bytes on the same disk.

    python -m tools.benchmarks.conversion DIR [--family gpt_oss] [--gb 1.5] [--repeats 3] [--out numbers.json]

DIR, on the disk that is to be measured, gets a synthetic model and the outputs, and is emptied at the end: a
Llama in bf16, or another family in files as they are published (published.py). Every repeat runs, one after
the other, so that a noisy machine disturbs all alike: `cp` with fsync, Hugging Face -> Megatron, Megatron ->
Hugging Face, and the loading of the files into a model; the last three in processes of their own, timed
without their imports. Right before each, its source is read once, so that all find theirs in the page cache.
Then a file of the same size is written and removed, for `cp` and the model that is loaded: in a virtual
machine the first use of a page of memory costs more than the copying into it, free pages go back to the host
within seconds, and what ran right after a deletion would find used ones. Reported are the medians over the
repeats, of a ratio the median over those of each repeat (`cp` copies what is published, in eight or four bits
where the weights are). Memory is the peak resident set (VmHWM, reset after the imports) less what was
resident then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_config import from_hf_config
from megatron_sftrl.models.hf_output import force_to_disk
from tools.benchmarks.published import FAMILIES, FILE_BYTES, write_published


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write; made when it is not there")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--gb", type=float, default=1.5, help="size of the weights in bf16 (1.5)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--child", choices=_CHILDREN, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_measured(arguments.child, arguments.directory)))
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="benchmark-") as name:
        facts = _benchmark(Path(name), arguments.family, gb=arguments.gb, repeats=arguments.repeats)
    _print(facts)
    if arguments.out:
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


def _benchmark(folder: Path, family: str, *, gb: float, repeats: int) -> dict:
    sizes = write_published(folder / "hf", family, num_bytes=gb * 1e9)
    total, largest = sum(sizes.values()), max(sizes.values())
    turns: dict[str, list[dict]] = {name: [] for name in ("cp", *_CHILDREN)}
    for _ in range(repeats):
        _prepare(folder, folder / "hf")
        turns["cp"].append({"seconds": _copy(folder / "hf", folder / "copy"), "peak_bytes": 0})
        for child in _CHILDREN:
            turns[child].append(_in_child(child, folder))
        for name in ("copy", "megatron", "back"):
            shutil.rmtree(folder / name)
    # What is built: the model; a conversion builds nothing, it goes tensor by tensor.
    targets = {"hf -> megatron": 0, "megatron -> hf": 0, "load": total}
    return {
        "family": family,
        "bytes": total,
        "largest_tensor_bytes": largest,
        "repeats": repeats,
        "seconds": {name: [turn["seconds"] for turn in found] for name, found in turns.items()},
        "peak_bytes": {name: max(turn["peak_bytes"] for turn in turns[name]) for name in _CHILDREN},
        "bound_bytes": {name: target + 2 * largest for name, target in targets.items()},
        # Both sides of a ratio come from the same turn.
        "share_of_cp": {
            name: statistics.median(
                copy["seconds"] / turn["seconds"] for copy, turn in zip(turns["cp"], turns[name], strict=True)
            )
            for name in _CHILDREN
        },
        "torch": torch.__version__,
    }


def _copy(source: Path, target: Path) -> float:
    """Seconds of cp until everything is on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        force_to_disk(path)
    return time.perf_counter() - start


def _prepare(folder: Path, source: Path) -> None:
    """Have the source in the page cache, and as many free pages that have been used once."""
    sizes = {path: path.stat().st_size for path in source.rglob("*") if path.is_file()}
    for path in sizes:
        with open(path, "rb", buffering=0) as stream:
            while stream.read(2**20):
                pass
    _use_free_pages(folder / "free", sum(sizes.values()))


def _use_free_pages(file: Path, num_bytes: int) -> None:
    """Write a file through the page cache and remove it, so that as many free pages have been used once."""
    block = os.urandom(2**20)
    with open(file, "wb") as stream:
        for _ in range(num_bytes // len(block) + 1):
            stream.write(block)
    force_to_disk(file)
    file.unlink()


def _in_child(name: str, folder: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tools.benchmarks.conversion", str(folder), "--child", name],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    return json.loads(done.stdout.splitlines()[-1])


def _measured(name: str, folder: Path) -> dict:
    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.observability.watch import return_freed_memory

    return_freed_memory()  # as the tools do
    with parallel_context(ParallelSection()) as parallel:
        work = _CHILDREN[name](folder, parallel)
        _prepare(folder, folder / ("megatron" if name == "megatron -> hf" else "hf"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _status_bytes("VmRSS")
        seconds = work()
    return {"seconds": seconds, "peak_bytes": _status_bytes("VmHWM") - before}


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"no {key} in /proc/self/status: this benchmark needs Linux")


def _to_megatron(folder: Path, _: ParallelContext) -> Callable[[], float]:
    from megatron_sftrl.apps.convert.from_hf import Layout, convert_from_hf

    def work() -> float:
        start = time.perf_counter()
        convert_from_hf(
            folder / "hf",
            folder / "megatron",
            layout=Layout(),
            dtype=None,
            allow_pickle=False,
            on_bytes=lambda done, total: None,
        )
        return time.perf_counter() - start

    return work


def _to_hf(folder: Path, _: ParallelContext) -> Callable[[], float]:
    from megatron_sftrl.apps.convert.to_hf import convert_to_hf

    def work() -> float:
        start = time.perf_counter()
        convert_to_hf(
            folder / "megatron",
            folder / "back",
            dtype=None,
            max_file_bytes=FILE_BYTES,
            on_bytes=lambda done, total: None,
        )
        return time.perf_counter() - start

    return work


def _load(folder: Path, parallel: ParallelContext) -> Callable[[], float]:
    from megatron_sftrl.config.schema import ModelSection, ParallelSection, TrainSection
    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.engine.megatron_config import transformer_config
    from megatron_sftrl.engine.model import build_model_chunks
    from megatron_sftrl.models.hf_weights import open_weights

    architecture = from_hf_config(folder / "hf")
    model = ModelSection(hf=folder / "hf")

    def work() -> float:
        config = transformer_config(
            architecture, model, ParallelSection(), TrainSection(steps=1), is_cuda=False
        )
        chunks = build_model_chunks(architecture, config, parallel)
        start = time.perf_counter()
        with open_weights(folder / "hf") as weights:
            load_hf_weights(chunks, weights, architecture, parallel)
        return time.perf_counter() - start

    return work


_CHILDREN = {"hf -> megatron": _to_megatron, "megatron -> hf": _to_hf, "load": _load}


def _print(facts: dict) -> None:
    total = facts["bytes"]
    print(
        f"{facts['family']}: {total / 1e9:.2f} GB in bf16, "
        f"largest tensor {facts['largest_tensor_bytes'] / 1e6:.0f} MB"
    )
    print(f"{'':16}{'GB/s':>8}{'of cp':>8}{'peak MB':>10}{'bound MB':>10}")
    for name, seconds in facts["seconds"].items():
        line = f"{name:16}{total / 1e9 / statistics.median(seconds):8.2f}"
        if name in facts["share_of_cp"]:
            line += f"{facts['share_of_cp'][name]:8.2f}"
            line += f"{facts['peak_bytes'][name] / 1e6:10.0f}{facts['bound_bytes'][name] / 1e6:10.0f}"
        print(line)
    large = [name for name, peak in facts["peak_bytes"].items() if peak > facts["bound_bytes"][name]]
    print(f"more memory than the bound: {', '.join(large) or 'none'}")


if __name__ == "__main__":
    main()
