#!/usr/bin/env bash
# megatron-core 0.16.1, torch 2.13.0, Python 3.11: vocab_parallel_cross_entropy
#
# Guess: a loss function leaves the logits that it is given as they were.
# Seen:  fp32 logits hold their softmax afterwards (exp and division are done in place); bf16 logits are untouched,
#        since they are first copied to fp32.
# Hurts: an entropy, a KL term or a second loss computed from the same logits after it is wrong in an fp32 run (or behind
#        a model that returns fp32 logits), and right in bf16.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" megatron-core==0.16.1
cd "$folder"
cat > loss.py <<'PY'
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

dist.init_process_group("gloo")
parallel_state.initialize_model_parallel()
torch.manual_seed(0)
given = torch.randn(4, 1, 11)
seen = {}
for dtype in (torch.float32, torch.bfloat16):
    logits = given.to(dtype)
    before = logits.clone()
    vocab_parallel_cross_entropy(logits, torch.zeros(4, 1, dtype=torch.int64))
    seen[dtype] = "unchanged" if torch.equal(logits, before) else "other values"
    if torch.allclose(logits, torch.softmax(before.float(), -1).to(dtype)):
        seen[dtype] = "the softmax"
    print(dtype, "logits after the call:", seen[dtype])
assert seen == {torch.float32: "the softmax", torch.bfloat16: "unchanged"}, "the behaviour has changed"
dist.destroy_process_group()
PY
PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 1 loss.py
