"""A sigmoid router's biases of experts, and layers that draft tokens, in training and exports."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_sftrl.apps.convert.from_hf import Layout
from tests.distributed.engine_outputs import _loaded_policy, engine_config
from tests.distributed.test_conversion import convert_there_and_back, load_train_and_export
from tests.hf_models import differing, read_tensors, write_model
from tests.ranks import run_ranks

BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
DRAFTS = ("model.layers.4.eh_proj.weight", "model.layers.4.mlp.gate.weight")


def test_biases_of_experts_stay_in_fp32_as_they_are_and_draft_layers_are_left_out(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", "glm4_moe", dtype=torch.bfloat16)
    expected = read_tensors(hf)
    assert expected[BIAS].dtype == torch.float32
    assert not torch.equal(expected[BIAS], expected[BIAS].bfloat16().float())
    save_file(
        expected | {name: torch.ones(4, 4) for name in DRAFTS},
        hf / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))

    run_ranks(1, convert_there_and_back, hf, tmp_path, [Layout(tp=2, pp=2, ep=2)])
    assert differing(expected, read_tensors(tmp_path / "export-0")) == []
    assert json.loads((tmp_path / "export-0" / "config.json").read_text())["num_nextn_predict_layers"] == 0

    # The bias reaches the rank that does not read it, and no update moves it.
    run_ranks(2, load_train_and_export, hf, tmp_path, {"ep": 2}, ("bf16", "bf16"), 1)
    trained = read_tensors(tmp_path / "export")
    moved = differing(expected, trained)
    assert "model.layers.2.mlp.gate.weight" in moved
    assert not [name for name in moved if name.endswith("e_score_correction_bias")]


def streamed(hf: Path) -> dict[str, torch.Tensor]:
    """On every rank: what an update of a rollout engine yields in bf16."""
    from megatron.core import parallel_state

    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.models.engine_shards import EngineLayout
    from megatron_sftrl.rollout.reshard import between_all_ranks

    config = engine_config(hf, {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1}, "bf16")
    architecture = architecture_of(config.model)
    context, policy = _loaded_policy(config, architecture)
    layout = EngineLayout(tp=1, world_size=2)
    resharder = between_all_ranks(
        policy.chunks, architecture, context, layout, bucket_bytes=4096, is_checked=True
    )
    with resharder.stream() as stream:
        found = {name: tensor.clone() for name, tensor in stream}
    parallel_state.destroy_model_parallel()
    return found


def test_an_engine_is_given_the_biases_in_fp32_beside_bf16_weights(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", "glm4_moe", dtype=torch.bfloat16)
    for found in run_ranks(2, streamed, hf):
        assert differing(read_tensors(hf), found) == []
