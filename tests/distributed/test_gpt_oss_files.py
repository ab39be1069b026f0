"""Published files of a GPT-OSS, experts in MXFP4: written back as transformers dequantises them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_sftrl.apps.convert.from_hf import Layout
from tests.distributed.test_conversion import convert_there_and_back, load_train_and_export
from tests.hf_models import differing, read_tensors, write_model
from tests.ranks import run_ranks


def test_experts_in_mxfp4_come_back_dequantised_and_every_other_bit_as_it_was(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", "gpt_oss", dtype=torch.bfloat16, intermediate_size=64)
    expected = read_tensors(hf)
    generator, stored = torch.Generator().manual_seed(0), {}
    for name, tensor in expected.items():
        if name.endswith((".gate_up_proj", ".down_proj")):
            experts, columns, rows = tensor.shape
            blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator)
            scales = torch.randint(119, 126, (experts, rows, columns // 32), generator=generator)
            stored |= {f"{name}_blocks": blocks.byte(), f"{name}_scales": scales.byte()}
            expected[name] = convert_moe_packed_tensors(blocks, scales)
        else:
            stored[name] = tensor
    save_file(stored, hf / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (hf / "config.json").write_text(json.dumps(config))

    run_ranks(1, convert_there_and_back, hf, tmp_path, [Layout(tp=2, pp=2, ep=2)])
    assert differing(expected, read_tensors(tmp_path / "export-0")) == []
    assert "quantization_config" not in json.loads((tmp_path / "export-0" / "config.json").read_text())

    layout = {"tp": 2, "sequence_parallel": True, "etp": 1, "ep": 2}
    run_ranks(2, load_train_and_export, hf, tmp_path, layout, ("bf16", "bf16"), 0)
    assert differing(expected, read_tensors(tmp_path / "export")) == []
