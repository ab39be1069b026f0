"""CUDA calls of megatron-core land on the CPU; torch's own behaviour stays."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend does nothing beside CUDA")


def redirected() -> dict[str, object]:
    from megatron_sftrl.engine import cpu_backend

    before = torch.zeros
    is_active = cpu_backend.install()
    cpu_backend.install()
    tensor = torch.zeros(2, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        moved = torch.ones(3).cuda().to("cuda:0")
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    return {
        "active": is_active,
        "devices": {tensor.device.type, moved.device.type, torch.empty(1, pin_memory=True).device.type},
        "type": torch.zeros(1).type(),
        "cast": torch.zeros(1).type(torch.float64).dtype,
        "same_random_numbers": torch.equal(first, torch.rand(4)),
        "torch_untouched": torch.zeros is before,
        "still_no_cuda": torch.cuda.is_available(),
    }


def test_cuda_calls_land_on_the_cpu_and_torch_functions_stay_themselves() -> None:
    # In a worker process: the redirection lasts as long as the process.
    seen = run_ranks(1, redirected)[0]
    assert seen == {
        "active": True,
        "devices": {"cpu"},
        "type": "torch.cuda.FloatTensor",
        "cast": torch.float64,
        "same_random_numbers": True,
        "torch_untouched": True,
        "still_no_cuda": False,
    }


def rotary_frequencies() -> torch.Tensor:
    from megatron_sftrl.engine import cpu_backend

    cpu_backend.install()
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4)).inv_freq


def test_transformers_still_computes_its_rotary_frequencies_under_the_redirection() -> None:
    # Replacing torch's factory functions gives transformers a garbage inv_freq; a mode must not.
    expected = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(run_ranks(1, rotary_frequencies)[0], expected)


def test_importing_megatron_loads_neither_wandb_nor_torch_s_compilers_and_is_never_garbage() -> None:
    look = (
        "import sys, torch; compiler = torch.compile; import megatron_sftrl.engine.model;"
        "from megatron_sftrl.engine.determinism import choose_kernels; choose_kernels(deterministic=False);"
        "print([name for name in ('wandb', 'torch._dynamo', 'torch._inductor') if name in sys.modules]);"
        "from megatron.core.jit import jit_fuser;"
        "print(torch.compile is compiler, jit_fuser(look := lambda: 1) is look);"
        "import wandb; print(wandb.__version__);"
        "import gc; print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", look], capture_output=True, text=True, timeout=300
    )
    assert ended.stdout.splitlines() == ["[]", "True True", version("wandb"), "True True"], ended.stderr
    assert "leaked" not in ended.stderr, "what is not looked at has to be released at the end"
