"""Which arithmetic runs as Triton kernels, and their launch.

The PyTorch versions, in arithmetic.py, say what is to be computed: they are the only ones on the
CPU and in float64, and the kernels are tested against them. Triton comes with PyTorch for CUDA.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from megatron_sftrl.vocab_parallel.statistics import Evaluation, Expectation, Source, Total, finite_maximum

if TYPE_CHECKING:
    from megatron_sftrl.vocab_parallel.statistics import Terms

# A thread holds this many bytes of logits, so that the few threads that fit an SM keep its memory busy, and
# loads them 16 at a time. Registers: test_triton_kernels.py.
_THREAD_BYTES, _LOAD_BYTES = 64, 16
_WARPS, _WARP_THREADS = 4, 32
# Everything is unrolled over the sources; no loss has more.
_MOST_SOURCES = 4

# The first that takes tuples through loops and functions; it comes with PyTorch 2.8.
_OLDEST_TRITON = "3.4"

_LOG2_E, _LN_2 = math.log2(math.e), math.log(2.0)


def covers(evaluation: Evaluation) -> bool:
    """The evaluation, whose logits all exist, is computed by the kernels."""
    return (
        has_kernels(evaluation.sources[0].device)
        and evaluation.dtype == torch.float32
        and len(evaluation.sources) <= _MOST_SOURCES
        and all(source.logits.stride(1) == 1 for source in evaluation.sources)
    )


def has_kernels(device: torch.device) -> bool:
    """Kernels can run there."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    import triton

    return TorchVersion(triton.__version__) >= _OLDEST_TRITON


def fill_sums(evaluation: Evaluation, maxima: Tensor, partitions: Tensor, sums: Tensor) -> None:
    """What `arithmetic.fill_sums` does, for an evaluation that is covered; each logit is read once."""
    from megatron_sftrl.vocab_parallel import triton_kernels as kernels

    logits, origins = _origins(evaluation.sources)
    asked = [(k, s) for k, s in enumerate(evaluation.statistics) if isinstance(s, Total | Expectation)]
    moments = tuple(
        (evaluation.index(s.weights), evaluation.index(s.values))
        if isinstance(s, Expectation)
        else (kernels.COUNT.value, evaluation.index(s.of))
        for _, s in asked
    )
    num_sources, num_tokens = len(evaluation.sources), evaluation.num_tokens
    out = maxima.new_empty(2 * num_sources + len(moments), num_tokens)
    rounds, width = _lane_shape(logits)
    _launch(
        kernels.column_sums,
        (num_tokens,),
        out,
        torch.stack([_bits(source) for source in evaluation.sources]),
        logits,
        tuple(x.stride(0) for x in logits),
        num_tokens,
        evaluation.sources[0].shard.num_columns,
        ORIGINS=origins,
        MOMENTS=moments,
        ROUNDS=rounds,
        LANES=_WARPS * _WARP_THREADS,
        WIDTH=width,
    )
    maxima.copy_(out[:num_sources])
    partitions.copy_(out[num_sources : 2 * num_sources])
    for (k, _), moment in zip(asked, out[2 * num_sources :], strict=True):
        torch.mul(moment, _LN_2, out=sums[k])


def fill_gradient(gradient: Tensor, evaluation: Evaluation, i: int, terms: Terms, maxima: Tensor) -> Tensor:
    """What `arithmetic.fill_gradient` does, for an evaluation that is covered; one read and one write."""
    from megatron_sftrl.vocab_parallel import triton_kernels as kernels

    order = [i, *sorted({*terms.linear, *terms.other} - {i})]
    logits, origins = _origins([evaluation.sources[j] for j in order])
    vectors = [v for j in order for v in (finite_maximum(maxima[j]), _bits(evaluation.sources[j]))]
    in_bits = [coefficient * _LN_2 for coefficient in terms.linear.values()]
    coefficients = [terms.constant, *in_bits, *terms.other.values()]
    coefficients += [] if terms.uniform is None else [terms.uniform]
    coefficients += [coefficient for _, coefficient in terms.onehots]
    vectors += [evaluation.sources[i].scaled(coefficient) for coefficient in coefficients]
    num_tokens, width = gradient.shape
    block = _WARPS * _WARP_THREADS * _THREAD_BYTES // max(x.itemsize for x in logits)
    _launch(
        kernels.logit_gradient,
        (num_tokens, -(-width // block)),
        gradient,
        gradient.stride(0),
        torch.stack(vectors),
        _picked_columns(evaluation.sources[i], terms),
        logits,
        tuple(x.stride(0) for x in logits),
        num_tokens,
        evaluation.sources[i].shard.num_columns,
        width,
        ORIGINS=origins,
        LINEAR=tuple(order.index(j) for j in terms.linear),
        OTHER=tuple(order.index(j) for j in terms.other),
        HAS_UNIFORM=terms.uniform is not None,
        NUM_PICKED=len(terms.onehots),
        BLOCK=block,
    )
    return gradient


def _launch(kernel: Any, grid: tuple[int, ...], out: Tensor, *arguments: object, **constants: object) -> None:
    """Run a kernel on the device of `out`; a * b + c may be one instruction, whatever Triton's default is."""
    with torch.cuda.device_of(out):
        kernel[grid](out, *arguments, **constants, num_warps=_WARPS, enable_fp_fusion=True)


def _origins(sources: Sequence[Source]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Logits without repetition, and which of them each source has."""
    found: dict[tuple[object, ...], Tensor] = {}
    keys = [(source.key, source.logits.stride(0), source.logits.dtype) for source in sources]
    for key, source in zip(keys, sources, strict=True):
        found.setdefault(key, source.logits.detach())
    numbers = {key: number for number, key in enumerate(found)}
    return tuple(found.values()), tuple(numbers[key] for key in keys)


def _lane_shape(logits: Sequence[Tensor]) -> tuple[int, int]:
    """Rounds, and neighbouring columns in each, that a thread sees of a block.

    Neighbours are one load. Rows that do not begin on its bounds (Triton asks for multiples of 16) are read
    column by column, and then neighbouring threads read neighbours.
    """
    loads = max(1, _THREAD_BYTES // _LOAD_BYTES // len(logits))
    width = _LOAD_BYTES // max(x.itemsize for x in logits)
    is_aligned = all(x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in logits)
    return (loads, width) if is_aligned else (loads * width, 1)


def _bits(source: Source) -> Tensor:
    """[T] by what differences of raw logits are multiplied to be log2 ratios."""
    ones = torch.full((source.num_tokens,), _LOG2_E, dtype=source.dtype, device=source.device)
    return source.scaled(ones)


def _picked_columns(source: Source, terms: Terms) -> Tensor:
    """[onehots, T] int32 columns, -1 for ids that live elsewhere."""
    columns = torch.empty(len(terms.onehots), source.num_tokens, dtype=torch.int32, device=source.device)
    for row, (ids, _) in zip(columns, terms.onehots, strict=True):
        column, is_here = source.shard.local_ids(ids)
        row.copy_(column.where(is_here, -1))
    return columns
