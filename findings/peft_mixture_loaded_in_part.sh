#!/usr/bin/env bash
# peft 0.21.2, transformers 5.19.0, torch 2.13.0, Python 3.11: an adapter of experts and of the shared expert beside them
#
# Guess: an adapter with tensors for every expert and for the shared expert (gate_proj, up_proj, down_proj of each, as
#        transformers 4 wrote them) is loaded whole over stacked experts, or the loader names what it leaves out.
# Seen:  of a Qwen2-MoE the shared expert's part is loaded and the experts' is not, of a GLM-4.5 the experts' part is
#        loaded and the shared expert's is not, both without a word about missing or unexpected keys.
# Hurts: logits are those of another model than was trained, wherever such an adapter is evaluated or merged.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$folder/venv/bin/python" - <<'PY'
import json
import pathlib
import warnings

import peft
import torch
import transformers
from safetensors.torch import save_file

print("peft", peft.__version__, "transformers", transformers.__version__)
HIDDEN, WIDTH, RANK, EXPERTS = 32, 16, 2, 4
MATRICES = (("gate_proj", WIDTH, HIDDEN), ("up_proj", WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH))
COMMON = {
    "vocab_size": 64, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH, "num_experts_per_tok": 2,
}
QWEN = transformers.Qwen2MoeConfig(**COMMON, num_experts=EXPERTS, shared_expert_intermediate_size=WIDTH)
GLM = transformers.Glm4MoeConfig(
    **COMMON, n_routed_experts=EXPERTS, first_k_dense_replace=0, n_shared_experts=1, n_group=1, topk_group=1, head_dim=16
)


def write_adapter(directory, shared_name, moved):
    """B is 0 but in `moved`, the experts or the shared one."""
    tensors = {}
    for place in (*(f"experts.{number}" for number in range(EXPERTS)), shared_name):
        value = 0.3 if place.startswith(f"{moved}.") or place == moved else 0.0
        for matrix, rows, columns in MATRICES:
            name = f"base_model.model.model.layers.0.mlp.{place}.{matrix}"
            tensors[f"{name}.lora_A.weight"] = torch.ones(RANK, columns)
            tensors[f"{name}.lora_B.weight"] = torch.full((rows, RANK), value)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "task_type": "CAUSAL_LM"}
    said["target_modules"] = [matrix for matrix, _, _ in MATRICES]
    (directory / "adapter_config.json").write_text(json.dumps(said))


def moves(config, shared_name):
    """By how much the experts' part and the shared expert's move the logits."""
    torch.manual_seed(0)
    base = pathlib.Path(config.model_type)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    found = {}
    for moved in ("nothing", "experts", shared_name):
        adapter = pathlib.Path(f"{base}-{moved}")
        write_adapter(adapter, shared_name, moved)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
        about_keys = [str(each.message) for each in said if "adapter keys" in str(each.message)]
        assert not about_keys, f"the behaviour has changed: {about_keys}"
        with torch.no_grad():
            found[moved] = model(torch.arange(8)[None]).logits
    difference = {name: float((found[name] - found["nothing"]).abs().max()) for name in ("experts", shared_name)}
    print(config.model_type, "largest change of the logits:", difference)
    return difference["experts"], difference[shared_name]


experts, shared = moves(QWEN, "shared_expert")
assert experts == 0 and shared > 1e-3, "the behaviour has changed"
experts, shared = moves(GLM, "shared_experts")
assert experts > 1e-3 and shared == 0, "the behaviour has changed"
PY
