"""A job in two halves: weights cross from layout to layout, and the end of a side is told to the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sftrl.config.lora import ALL_TARGETS
from megatron_sftrl.errors import UserError
from tests.distributed.engine_outputs import engine_config
from tests.distributed.test_lora import LORA, draw_adapters, write_merged
from tests.grid import cases
from tests.hf_models import write_model
from tests.ranks import run_ranks

SPLIT = {"tp": 2, "sequence_parallel": True}
# A model whose parts have no plain names, a layout of trainers, and tp of the generators.
CROSSINGS = {
    "llama_tied": ({"tp": 2}, 1, 1),
    "glm4_moe": ({"ep": 2}, 1, 1),
    "gpt_oss": ({**SPLIT, "etp": 1, "ep": 2}, 1, 1),
    "qwen3_next": ({"pp": 2}, 2, 2),
    "deepseek_v3": ({"pp": 2}, 1, 1),
    "mistral4": ({"ep": 2}, 1, 1),
    "minimax_m2": ({**SPLIT, "etp": 1, "ep": 2}, 1, 1),
}


def crossed(
    hf: Path,
    layout: dict[str, Any],
    num_generators: int,
    tp: int,
    lora: dict[str, Any] | None = None,
    merged: Path | None = None,
) -> tuple[list[str], int]:
    """Of a generator: parameters that are not those of a model that was loaded there, and bytes that came.

    Args:
        lora: of the trainers, whose adapters draw_adapters() gives; everything is fp32 then.
        merged: what the generator loads in place of `hf`.
    """
    from megatron_sftrl.config.lora import LoraSection
    from megatron_sftrl.engine.live_weights import live_weights, load_hf_weights
    from megatron_sftrl.engine.parallel import run_context
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.sides import Bridge, side_of
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.models.hf_weights import open_weights
    from megatron_sftrl.rollout.reshard import Resharder, wanted_by

    side = side_of(num_generators)
    assert side is not None
    own_layout = {"tp": tp, "sequence_parallel": tp > 1} if side.is_generator else layout
    config = engine_config(hf, own_layout, "bf16" if lora is None else "fp32")
    if lora is not None and not side.is_generator:
        config = config.model_copy(update={"lora": LoraSection.model_validate(lora)})
    architecture = architecture_of(config.model)
    with (
        run_context(config, side.ranks) as parallel,
        Bridge(side, parallel, hang_minutes=1.0) as bridge,
    ):
        policies = [
            PolicyEngine(architecture, config, parallel, with_optimizer=False)
            for _ in range(1 + side.is_generator)
        ]
        loaded, empty = policies[0], policies[-1]
        with open_weights(merged if merged and side.is_generator else hf) as weights:
            load_hf_weights(loaded.chunks, weights, architecture, parallel)
        draw_adapters(loaded.chunks)
        held = live_weights(empty.chunks, architecture)
        resharder = Resharder(
            None if side.is_generator else lambda: held,
            architecture,
            wanted_by(held, architecture) if side.is_generator else {},
            bridge,
            parallel.device,
            bucket_bytes=2000,
            has_checksums=True,
        )
        for _ in range(2):
            if side.is_generator:
                resharder.fill(held)
            else:
                with resharder.stream():
                    pass
        assert resharder.last_report is not None
        pairs = zip(
            [*loaded.chunks[0].named_parameters(), *loaded.chunks[0].named_buffers()],
            [*empty.chunks[0].parameters(), *empty.chunks[0].buffers()],
            strict=True,
        )
        bound = 0 if merged is None else 1e-6
        different = [
            name for (name, truth), found in pairs if not torch.allclose(truth, found, rtol=0, atol=bound)
        ]
        return different, resharder.last_report.received_bytes


@pytest.mark.parametrize(
    "name", cases(CROSSINGS, rarely=("llama_tied", "deepseek_v3", "mistral4", "minimax_m2", "gpt_oss"))
)
def test_what_a_generator_receives_is_the_model_that_it_would_load(name: str, tmp_path: Path) -> None:
    layout, num_generators, tp = CROSSINGS[name]
    hf = write_model(tmp_path / "hf", name, dtype=torch.bfloat16)
    found = run_ranks(2 + num_generators, crossed, hf, layout, num_generators, tp, group=False)
    assert found[:2] == [([], 0)] * 2
    for different, num_bytes in found[2:]:
        assert different == []
        assert num_bytes > 0


ADAPTED = {
    "qwen3_next": ({"pp": 2}, 2, 2),
    "qwen3_5_text": ({"tp": 2, "sequence_parallel": True}, 1, 1),
    "qwen3_5_moe_text": ({"ep": 2}, 1, 1),
}


@pytest.mark.parametrize("name", cases(ADAPTED, rarely=["qwen3_next", "qwen3_5_moe_text"]))
def test_a_generator_of_a_hybrid_receives_what_adapters_make_of_it(name: str, tmp_path: Path) -> None:
    layout, num_generators, tp = ADAPTED[name]
    hf, lora = write_model(tmp_path / "hf", name), {**LORA, "targets": list(ALL_TARGETS)}
    merged = write_merged(hf, lora, tmp_path / "merged")
    lora["targets"] = "all-linear"
    found = run_ranks(2 + num_generators, crossed, hf, layout, num_generators, tp, lora, merged, group=False)
    for different, num_bytes in found[2:]:
        assert different == []
        assert num_bytes > 0


ENDS = {
    "well": ("", ""),
    "a user's error": (
        "",
        "UserError: the trainers have ended with this run: rank 0 on {host}: UserError: no such verifier",
    ),
    "a failure": (
        "RuntimeError: the generators have ended with this run: rank 1 on {host}: MemoryError: no room",
        "",
    ),
    "a death": ("RuntimeError: of the generators rank 1 on {host} gave no sign of life for 2 seconds", ""),
}


def ended(how: str) -> str:
    """What this rank raises when the other side ends like this while it waits."""
    import socket

    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.engine.sides import Bridge, side_of

    side = side_of(1)
    assert side is not None
    said = ""
    with parallel_context(ParallelSection(), ranks=side.ranks) as parallel:
        bridge = Bridge(side, parallel, hang_minutes=1 / 15)
        try:
            with bridge:
                if how == "a user's error" and not side.is_generator:
                    raise UserError("no such verifier")
                if how == "a failure" and side.is_generator:
                    raise MemoryError("no room")
                if how == "a death" and side.is_generator:
                    bridge._closed.set()  # what a killed process does: nothing more
                    time.sleep(5)
                    return ""
                if side.is_generator or how != "well":
                    bridge.wait(lambda: how == "well" and bridge.other_end is not None)
        except (RuntimeError, ValueError, MemoryError) as error:
            if str(error) not in ("no such verifier", "no room"):
                said = f"{type(error).__name__}: {error}".replace(socket.gethostname(), "{host}")
        time.sleep(1)  # the store lives in rank 0
    return said


@pytest.mark.parametrize("how", ENDS)
def test_the_end_of_a_side_ends_the_wait_of_the_other_and_says_whose_it_was(how: str) -> None:
    expected = ENDS[how]
    for said, wanted in zip(run_ranks(2, ended, how, group=False, timeout_s=60), expected, strict=True):
        assert said.startswith(wanted)
        assert bool(said) == bool(wanted)
