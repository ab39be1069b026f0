"""The Triton kernels without a GPU: interpreted, against PyTorch and float64; and compiled for one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_sftrl import LossInputs, TokenDistribution, build_loss
from megatron_sftrl.vocab_parallel.one_pass import weighted_sum
from tests.grid import cases
from tests.ranks import ROOT
from tests.unit.vocab_parallel import kernel_checks

pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for CUDA and with vLLM")

# As `kernel_checks.gap` counts. Sums and values: a few fp32 roundings. Gradients: one unit of their own
# dtype, since Triton's interpreter does not round bf16 to the nearest; in fp32 what cancellation leaves of
# a thousandth of the largest.
SUMS = 3e-6
GRADIENTS = {"bf16": 2**-7 * 1.05, "fp16": 2**-10 * 1.05, "fp32": 2e-4}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, list[float]]]:
    """What kernel_checks finds in a process of its own: Triton decides at its import that it interprets."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.vocab_parallel.kernel_checks"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=1200,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", cases(["bf16", "fp32"], rarely=["fp32"]))  # fp32: the golden file below
def test_every_loss_has_the_value_and_gradient_of_pytorch_and_of_float64(interpreted, dtype: str) -> None:
    found = interpreted[f"losses {dtype}"]
    assert len(found) == 2 * len(kernel_checks.LOSSES)
    assert not {
        case: errors
        for case, errors in found.items()
        if max(errors) > (GRADIENTS[dtype] if case.endswith("gradient") else SUMS)
    }


@pytest.mark.parametrize("shard", kernel_checks.SHARDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_shard_has_the_sums_and_gradients_of_pytorch_and_of_float64(
    interpreted, dtype: str, shard: str
) -> None:
    found = interpreted[f"{shard} {dtype}"]
    assert len([name for name in found if name.startswith("d ")]) == 5
    assert len(found) == 2 + 13 + 5
    assert not {
        name: errors
        for name, errors in found.items()
        if max(errors) > (GRADIENTS[dtype] if name.startswith("d ") else SUMS)
    }


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_whole_vocabulary_at_once_is_what_pytorch_makes_of_it(interpreted, num_tokens: int) -> None:
    found = interpreted[f"wide {num_tokens}"]
    assert {
        name for name, error in found.items() if error > (GRADIENTS["bf16"] if "gradient" in name else SUMS)
    } == set()


def test_fp16_is_what_pytorch_makes_of_it(interpreted) -> None:
    """Not float64: gradients below 6e-5 lose digits in fp16."""
    found = interpreted["padded fp16"]
    assert not {
        name: errors
        for name, errors in found.items()
        if errors[0] > (GRADIENTS["fp16"] if name.startswith("d ") else SUMS)
    }


def test_the_one_pass_with_kernels_equals_the_golden_truth(interpreted) -> None:
    """Chunks of an output layer, gradients in the place of logits; the bound is that of test_golden.py."""
    assert len(interpreted["golden"]) >= 8
    assert not {case: errors for case, errors in interpreted["golden"].items() if max(errors) > 1e-5}


def test_float64_and_the_cpu_stay_with_pytorch() -> None:
    z = torch.zeros(2, 8, dtype=torch.float64)
    ids = torch.zeros(2, dtype=torch.int64)
    for dtype, has_kernels, is_covered in [
        (torch.float64, True, False),
        (torch.float32, True, True),
        (torch.float32, False, False),
    ]:
        evaluation, _ = kernel_checks.everything(z.to(dtype), z.to(dtype), 0, 8, ids)
        with kernel_checks.arithmetic(kernels=has_kernels):
            assert kernel_checks.triton_rows.covers(evaluation) == is_covered
    evaluation, _ = kernel_checks.everything(z.float(), z.float(), 0, 8, ids)
    assert not kernel_checks.triton_rows.covers(evaluation)
    evaluation, _ = kernel_checks.everything(z.t().float(), z.t().float(), 0, 2, ids)
    with kernel_checks.arithmetic(kernels=True):
        assert not kernel_checks.triton_rows.covers(evaluation), "columns that are not neighbours"


@pytest.fixture
def compiled() -> Iterator[dict]:
    """Kernels launched inside of the test, by their hash: compiled for an H100 or H200, and not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    found, run = {}, JITFunction.run

    def compile_only(kernel: JITFunction, *args, grid, warmup, **options):
        result = run(kernel, *args, grid=grid, warmup=True, **options)
        found[result.hash] = result
        return result

    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(JITFunction, "run", compile_only),
        kernel_checks.arithmetic(kernels=True),
    ):
        yield found


def registers_and_spills(kernel, path: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory."""
    from triton import knobs

    path.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


@pytest.mark.parametrize(("dtype", "vocab_size"), [("bf16", 151_936), ("fp32", 50_257)])
def test_what_the_losses_launch_compiles_for_hopper_without_spills(
    compiled: dict, tmp_path: Path, dtype: str, vocab_size: int
) -> None:
    """A real vocabulary in rows that are a multiple of 128 wide, as Megatron pads them."""
    width = -(-vocab_size // 128) * 128
    batch = kernel_checks.small_batch(torch.arange(5))
    z, u = (torch.zeros(5, width, dtype=kernel_checks.DTYPES[dtype]) for _ in range(2))
    for name, options in kernel_checks.LOSSES:
        policy = TokenDistribution.from_logits(z.clone().requires_grad_(), vocab_size=vocab_size)
        reference = TokenDistribution.from_logits(u, vocab_size=vocab_size)
        inputs = LossInputs(policy=policy, batch=batch, reference=reference)
        weighted_sum(build_loss(name, options)(inputs).token_loss, batch.token_weight).backward()
    names = {kernel.metadata.name for kernel in compiled.values()}
    assert names == {"column_sums", "logit_gradient"}
    for kernel in compiled.values():
        registers, spilled = registers_and_spills(kernel, tmp_path / "kernel.cubin")
        assert spilled == 0
        # At least four programs of 128 threads on an SM, with 64 bytes on their way for each thread.
        assert registers <= 128
        # 16 bytes at a time; without that the kernels wait for instructions, not for memory.
        assert "ld.global.v4.b32" in kernel.asm["ptx"]
        if kernel.metadata.name == "logit_gradient":
            assert "st.global.v4.b32" in kernel.asm["ptx"]
