#!/usr/bin/env bash
# megatron-core 0.16.1, torch 2.13.0, Python 3.11: perform_initialization=False
#
# Guess: perform_initialization=False leaves the random numbers out, for weights that are loaded anyway; whatever else
#        the layers know about their shards stays.
# Seen:  the same branch marks a weight as a shard (tensor_model_parallel). Without the mark every rank but the first
#        takes its shard for a copy of rank 0's and leaves it out of the gradient norm.
# Hurts: at tp 2 the gradient norm misses half of each matrix, so clipping is another one; losses and gradients are
#        right, and no error is raised.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" megatron-core==0.16.1
cd "$folder"
cat > shards.py <<'PY'
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.transformer_config import TransformerConfig

dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
counted = {}
for perform in (True, False):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        use_cpu_initialization=True,
        perform_initialization=perform,
        gradient_accumulation_fusion=False,
    )
    layer = ColumnParallelLinear(
        8, 16, config=config, init_method=torch.nn.init.xavier_normal_, bias=False, gather_output=False
    )
    counted[perform] = param_is_not_tensor_parallel_duplicate(layer.weight)
both = [None, None]
dist.all_gather_object(both, counted)
if os.environ["RANK"] == "0":
    print("shard counted in the gradient norm, by perform_initialization:", dict(enumerate(both)))
    assert both == [{True: True, False: True}, {True: True, False: False}], "the behaviour has changed"
dist.destroy_process_group()
PY
PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 shards.py
