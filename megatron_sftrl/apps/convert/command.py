"""`sftrl convert`: both directions, with progress, the memory needed, and the verdict of --verify."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor

from megatron_sftrl.apps.convert.adapters import convert_to_peft
from megatron_sftrl.apps.convert.from_hf import Layout, check_layout, convert_from_hf
from megatron_sftrl.apps.convert.to_hf import convert_to_hf
from megatron_sftrl.config.schema import ModelSection, ParallelSection, TrainSection
from megatron_sftrl.engine.checkpoint import find_checkpoint, stored_assets
from megatron_sftrl.engine.megatron_config import transformer_config
from megatron_sftrl.engine.model import LanguageModel, build_model_chunks
from megatron_sftrl.engine.parallel import ParallelContext, parallel_context
from megatron_sftrl.engine.schedule import LastStageInput, as_megatron_loss, run_schedule
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, from_record
from megatron_sftrl.models.hf_config import from_hf_config
from megatron_sftrl.models.tokenizer_files import TOKENIZER_FILES
from megatron_sftrl.observability.watch import peak_memory_bytes, return_freed_memory
from megatron_sftrl.trainers.adapters import load_model
from megatron_sftrl.types import TokenBatch


def run_to_megatron(
    hf: Path,
    out: Path,
    *,
    layout: Layout,
    dtype: str | None,
    allow_pickle: bool,
    text_only: bool,
    with_verify: bool,
) -> None:
    """`sftrl convert to-megatron`: a Hugging Face directory becomes a checkpoint; every rank calls it.

    Args:
        layout: that will read the checkpoint; with_verify compares the logits of both sides in it.
        dtype: a name of --dtype; kept when None.
        text_only: of a multimodal model the language model alone.
    Raises:
        UserError: a directory that cannot be converted, an output that exists, sides that differ.
    """
    return_freed_memory()
    architecture = from_hf_config(hf, text_only=text_only)
    check_layout(layout, architecture)
    section = ParallelSection()
    if with_verify:
        # Experts with biases are stored as tp would cut them, and run uncut.
        etp = 1 if architecture.all_biases else None
        section = ParallelSection(tp=layout.tp, pp=layout.pp, ep=layout.ep, etp=etp)
    with parallel_context(section) as parallel:
        with ByteProgress("converting") as progress:
            convert_from_hf(
                hf,
                out,
                layout=layout,
                dtype=_dtype_named(dtype),
                allow_pickle=allow_pickle,
                text_only=text_only,
                on_bytes=progress.show,
            )
        _report_assets(stored_assets(out).files)
        if with_verify:
            _verify(out, hf, section, parallel)


def run_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None,
    max_file_gb: float,
    with_verify: bool,
    verify_pp: int,
    base: Path | None = None,
    adapters: bool = False,
) -> None:
    """`sftrl convert to-hf`: a checkpoint becomes a Hugging Face directory; every rank calls it.

    Args:
        checkpoint: or a run directory.
        dtype: a name of --dtype; kept when None.
        max_file_gb: size of a file of weights.
        with_verify: compare the logits of both sides, with the model on `verify_pp` processes.
        base: of a checkpoint of adapters, the model that they are merged into.
        adapters: write those alone, as PEFT does.
    Raises:
        UserError: a checkpoint that cannot be read, an output that exists, sides that differ.
    """
    return_freed_memory()
    if not max_file_gb > 0:
        raise UserError(f"--max-file-gb: expected a size above 0, got {max_file_gb}")
    if verify_pp != 1 and not with_verify:
        raise UserError("--verify-pp has no effect without --verify")
    section = ParallelSection(pp=verify_pp)
    if adapters:
        if base is not None or with_verify or dtype is not None:
            raise UserError(
                "--adapters writes the adapters as they are: --base, --dtype, --verify go without"
            )
        with parallel_context(section):
            convert_to_peft(checkpoint, out)
        return
    with parallel_context(section) as parallel:
        with ByteProgress("exporting") as progress:
            convert_to_hf(
                checkpoint,
                out,
                dtype=_dtype_named(dtype),
                max_file_bytes=int(max_file_gb * 1e9),
                on_bytes=progress.show,
                base=base,
            )
        _report_assets(path.name for path in out.iterdir())
        if with_verify:
            _verify(checkpoint, out, section, parallel, base)


# Both sides of a conversion compute the same logits: transformers from one, Megatron from the other.

_LARGEST_DIFFERENCE = 1e-4
"""Of the logit scale. fp32 rounding over a deep model stays ten times below, a wrong weight far above."""

_NUM_PROMPTS, _PROMPT_LENGTH = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitDifference:
    """Logits of the fixed prompts on both sides, in fp32: the largest difference, and the largest logit."""

    largest: float
    scale: float
    num_logits: int

    @property
    def is_acceptable(self) -> bool:
        """Rounding explains it."""
        return self.largest <= _LARGEST_DIFFERENCE * self.scale


def compare_logits(
    checkpoint: Path,
    hf: Path,
    section: ParallelSection,
    parallel: ParallelContext,
    base: Path | None = None,
) -> LogitDifference:
    """Load both sides in fp32 and compare; every rank calls it, rank 0 also holds the transformers model.

    `checkpoint` may be a run directory, `base` the place of the model under its adapters. `section` and
    `parallel` are the layout of the Megatron model.

    Raises:
        UserError: on every rank: a checkpoint that cannot be loaded.
    """
    architecture = from_record(find_checkpoint(checkpoint).record.architecture)
    config = transformer_config(
        architecture,
        ModelSection(hf_config=hf, dtype="fp32"),
        section,
        TrainSection(steps=1),
        is_cuda=parallel.device.type == "cuda",
    )
    chunks = build_model_chunks(architecture, config, parallel)
    load_model(chunks, checkpoint, architecture=architecture, parallel=parallel, base=base)
    prompts = _prompts(architecture)
    ours = _megatron_logits(chunks, prompts, architecture, parallel)
    outcome: list[LogitDifference | None] = [None]
    if parallel.rank == 0:
        assert ours is not None
        theirs = _transformers_logits(hf, prompts, parallel.device)
        outcome = [
            LogitDifference(
                largest=float((ours - theirs).abs().max()),
                scale=float(theirs.abs().max()),
                num_logits=theirs.numel(),
            )
        ]
    dist.broadcast_object_list(outcome, src=0)
    assert outcome[0] is not None
    return outcome[0]


def _prompts(architecture: Architecture) -> Tensor:
    """[prompts, length] token ids, the same in every run."""
    length = min(_PROMPT_LENGTH, architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(20260209)
    return torch.randint(architecture.vocab_size, (_NUM_PROMPTS, length), generator=generator)


@torch.no_grad()
def _megatron_logits(
    chunks: Sequence[LanguageModel], prompts: Tensor, architecture: Architecture, parallel: ParallelContext
) -> Tensor | None:
    """[prompts, length, V] fp32 on the CPU of rank 0, None elsewhere."""

    def logits(stage: LastStageInput) -> tuple[Tensor, Tensor, Tensor]:
        local = stage.model.logits(stage.hidden_states).contiguous()  # [length, V_padded/tp]
        shards = [torch.empty_like(local) for _ in range(parallel.tp_size)]
        dist.all_gather(shards, local, group=parallel.tp_group)
        whole = torch.cat(shards, dim=-1)[:, : architecture.vocab_size].float().cpu()
        return as_megatron_loss(local.new_zeros(()), whole)

    for chunk in chunks:
        chunk.eval()
    batches = [_batch(prompt) for prompt in prompts]
    found = run_schedule(chunks, batches, logits, parallel, forward_only=True)
    is_sender = parallel.is_last_stage and parallel.dp_rank == parallel.tp_rank == 0
    everyone: list[Tensor | None] = [None] * parallel.world_size
    dist.gather_object(torch.stack(found) if is_sender else None, everyone if parallel.rank == 0 else None)
    return next((each for each in everyone if each is not None), None)


def _batch(prompt: Tensor) -> TokenBatch:
    length = prompt.numel()
    return TokenBatch(
        tokens=prompt,
        labels=torch.zeros_like(prompt),
        positions=torch.arange(length),
        loss_mask=torch.zeros(length, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        token_weight=torch.zeros(length),
    )


@torch.no_grad()
def _transformers_logits(hf: Path, prompts: Tensor, device: torch.device) -> Tensor:
    import transformers

    # By the name that config.json has: AutoModelForCausalLM (5.19) does not find every family's.
    names = transformers.AutoConfig.from_pretrained(hf, local_files_only=True).architectures
    kind = getattr(transformers, names[0]) if names else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(hf, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    model = model.to(device)  # type: ignore[arg-type]
    return model(prompts.to(device)).logits.float().cpu()


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def _dtype_named(name: str | None) -> torch.dtype | None:
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


def _report_assets(names: Iterable[str]) -> None:
    """Print on rank 0 which files came along beside the weights, and whether a tokenizer did."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    beside = sorted(name for name in names if ".safetensors" not in name)
    print(f"beside the weights: {', '.join(beside)}", file=sys.stderr)
    if TOKENIZER_FILES.isdisjoint(beside):
        print(
            "no tokenizer came along: the source has none; programs that load this need one", file=sys.stderr
        )


def _verify(
    checkpoint: Path,
    hf: Path,
    section: ParallelSection,
    parallel: ParallelContext,
    base: Path | None = None,
) -> None:
    """Compare the logits of both sides and print the largest difference; every rank calls it.

    Raises:
        UserError: on every rank: the sides differ by more than rounding.
    """
    found = compare_logits(checkpoint, hf, section, parallel, base)
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
