"""The conversion tools in a waiting process, and what they are given: a model as an author publishes it."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.e2e.product import Ended
from tests.e2e.project import VOCAB_SIZE, make_tokenizer
from tests.hf_models import write_model
from tests.ranks import ROOT, run_ranks

TO_MEGATRON, TO_HF = str(ROOT / "tools/hf_to_megatron.py"), str(ROOT / "tools/megatron_to_hf.py")
GENERATION_CONFIG = '{"eos_token_id": 1, "temperature": 0.6, "top_p": 0.95}\n'


def tools(*command_lines: Sequence[object], plant: Callable[[], None] | None = None) -> list[Ended]:
    """Command lines of tools one after the other in a waiting process: a start costs seconds of imports."""
    lines = [[str(part) for part in line] for line in command_lines]
    return run_ranks(1, call_tools, lines, plant, group=False)[0]


def call_tools(command_lines: list[list[str]], plant: Callable[[], None] | None) -> list[Ended]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if plant is not None:
        plant()
    ended = []
    for line in command_lines:
        said, before, code = io.StringIO(), sys.argv, None
        try:
            sys.argv = line
            with contextlib.redirect_stderr(said):
                runpy.run_path(line[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = before
        assert isinstance(code, int)
        ended.append(Ended(code, said.getvalue()))
    return ended


def publish(directory: Path) -> Path:
    """Weights in bf16 in several files, tokenizer, chat template and generation config."""
    changes = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": False}
    write_model(directory, "qwen2", dtype=torch.bfloat16, max_shard_size="20KB", **changes)
    make_tokenizer(directory)
    (directory / "generation_config.json").write_text(GENERATION_CONFIG)
    return directory
