"""mbridge, which maps Megatron's weights to Hugging Face by a table of its own, exports the same bits.

mbridge knows the names of Transformer Engine's layers; on the CPU our layers are Megatron's local ones.
`AsTransformerEngine` shows them under the former names and changes nothing else. mbridge did not build the
model, so it is told how far the vocabulary was padded; and it cannot read a config.json of Mixtral in which
transformers 5 leaves head_dim open.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sftrl.models.architecture import padded_vocab_size
from tests.distributed.test_conversion import export, run_config
from tests.hf_models import differing, read_tensors, write_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mbridge") is None,
    reason="mbridge is not here: bash tests/oracles.sh installs it",
)

SEQUENCE = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "one process": (1, {}),
    "tp2": (2, SEQUENCE),
    "pp2": (2, {"pp": 2}),
    "vp2": (2, {"pp": 2, "vp": 2}),
    "ep2": (2, {"ep": 2}),
}
CASES = [
    ("llama", "one process"),
    ("llama", "tp2"),
    ("llama_tied", "one process"),
    ("qwen2", "one process"),
    ("qwen2", "tp2"),
    ("qwen2_window", "pp2"),
    ("qwen3", "tp2"),
    ("qwen3_window", "vp2"),
    ("mixtral", "one process"),
    ("mixtral", "tp2"),
    ("mixtral", "ep2"),
    ("qwen3_moe", "one process"),
    ("qwen3_moe", "tp2"),
    ("qwen3_moe", "ep2"),
]
LOCAL_TO_TRANSFORMER_ENGINE = {
    r"\.input_layernorm\.weight$": ".self_attention.linear_qkv.layer_norm_weight",
    r"\.mlp\.experts\.local_experts\.(\d+)\.linear_fc(\d)\.weight$": r".mlp.experts.linear_fc\2.weight\1",
}
DENSE_NORM = {r"\.pre_mlp_layernorm\.weight$": ".mlp.linear_fc1.layer_norm_weight"}


class AsTransformerEngine(torch.nn.Module):
    """A model chunk under the names that Transformer Engine's layers give to the same tensors."""

    def __init__(self, chunk: Any, *, is_mixture: bool) -> None:
        super().__init__()
        self.config = chunk.config
        self.decoder = chunk.decoder
        rules = {**LOCAL_TO_TRANSFORMER_ENGINE, **({} if is_mixture else DENSE_NORM)}
        self._held: list[tuple[str, Tensor]] = []
        for name, parameter in chunk.named_parameters():
            for pattern, replacement in rules.items():
                name = re.sub(pattern, replacement, name)
            self._held.append((name, parameter))

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, Any]]:
        yield from self._held

    def state_dict(self, *_: object, **__: object) -> dict[str, Any]:
        return dict(self._held)


def mbridge_export(hf: Path, folder: Path, parallel: dict) -> dict[str, Tensor]:
    """On every rank: load a model, export its checkpoint to folder/export; mbridge's export of the model."""
    import mbridge  # noqa: F401  registers its models
    from mbridge.core.bridge import _MODEL_REGISTRY
    from megatron.core import parallel_state
    from transformers import AutoConfig

    from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.models.hf_weights import open_weights

    config = run_config(hf, parallel, "fp32")
    context = initialize_parallel(config.parallel)
    architecture = architecture_of(config.model)
    policy = PolicyEngine(architecture, config, context)
    with open_weights(hf) as weights:
        load_hf_weights(policy.chunks, weights, architecture, context)
    export(
        CheckpointStore(folder / "checkpoints", context, keep_last=1).save(TrainerState(), policy, None),
        folder / "export",
    )

    hf_config = AutoConfig.from_pretrained(hf)
    kind = _MODEL_REGISTRY[hf_config.model_type]
    # For a tied model mbridge edits the table of its class, and so of every later model of the process.
    kind = type(kind.__name__, (kind,), {"_DIRECT_MAPPING": dict(kind._DIRECT_MAPPING)})
    bridge = kind(hf_config, dtype=torch.float32, make_vocab_size_divisible_by=context.tp_size)
    bridge.vocab_size = architecture.vocab_size
    bridge.padded_vocab_size = padded_vocab_size(architecture.vocab_size, context.tp_size)
    shown = [
        AsTransformerEngine(chunk, is_mixture=architecture.mixture is not None) for chunk in policy.chunks
    ]
    found = {name: tensor.detach().clone() for name, tensor in bridge.export_weights(shown)}
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_mbridge_exports_the_same_bits(name: str, layout: str, tmp_path: Path) -> None:
    num_processes, parallel = LAYOUTS[layout]
    hf = write_model(tmp_path / "hf", name, **({"head_dim": 8} if name == "mixtral" else {}))
    every_rank = run_ranks(num_processes, mbridge_export, hf, tmp_path, parallel)
    ours = read_tensors(tmp_path / "export")
    for theirs in every_rank:
        assert differing(ours, theirs) == []
