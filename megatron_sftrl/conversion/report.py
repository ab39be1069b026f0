"""What the conversion tools show: progress, the verdict of --verify, and the memory that was needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.conversion.verify import compare_logits
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_output import TOKENIZER_FILES
from megatron_sftrl.observability.watch import peak_memory_bytes

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of a command line's --dtype; None for none."""
    return None if name is None else _DTYPES[name]


class ByteProgress:
    """A bar over the bytes that rank 0 writes; on no terminal, one line at the end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._is_shown = int(os.environ.get("RANK", "0")) == 0
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not (self._is_shown and console.is_terminal))
        self._task = self._bar.add_task(what, total=None)
        self._total = 0

    def __enter__(self) -> ByteProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.stop()
        if self._is_shown and kind is None:
            peak = peak_memory_bytes(torch.device("cpu"))
            print(
                f"{self._what}: {self._total / 1e9:.3f} GB by this process, peak memory {peak / 1e9:.3f} GB",
                file=sys.stderr,
            )

    def show(self, done: int, total: int) -> None:
        """Tell how far the writing is, in bytes."""
        self._total = total
        self._bar.update(self._task, completed=done, total=total)


def report_assets(names: Iterable[str]) -> None:
    """Print on rank 0 which files came along beside the weights, and whether a tokenizer is among them.

    Args:
        names: of the files of the output; weights are left out.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    beside = sorted(name for name in names if ".safetensors" not in name)
    print(f"beside the weights: {', '.join(beside)}", file=sys.stderr)
    if TOKENIZER_FILES.isdisjoint(beside):
        print(
            "no tokenizer came along: the source has none; programs that load this need one", file=sys.stderr
        )


def verify(checkpoint: Path, hf: Path, section: ParallelSection, parallel: ParallelContext) -> None:
    """Compare the logits of both sides and print the largest difference; every rank calls it.

    Args:
        checkpoint: or run directory.
        hf: directory of the other side.
        section, parallel: layout of the Megatron model.
    Raises:
        UserError: on every rank: the sides differ by more than rounding.
    """
    found = compare_logits(checkpoint, hf, section, parallel)
    if parallel.rank == 0:
        print(
            f"verify: largest logit difference {found.largest:.3e}, logit scale {found.scale:.3e}, "
            f"ratio {found.largest / found.scale:.1e}, over {found.num_logits} logits in fp32",
            file=sys.stderr,
        )
    if not found.is_acceptable:
        raise UserError(
            f"the logits of {checkpoint} and {hf} differ by {found.largest:.3e} at a scale of "
            f"{found.scale:.3e}: more than rounding; do not use the result"
        )
