#!/usr/bin/env bash
# megatron-core 0.16.1, torch 2.13.0, Python 3.11: moe_router_enable_expert_bias with a padding_mask
#
# Guess: the router counts for its biases (arXiv:2408.15664) the experts that tokens visited, without padded tokens.
# Seen:  the mask of [tokens] is laid over the experts of the [tokens, experts] map: an error of two sizes; where a rank
#        has as many tokens as experts there is none, and visits of the experts with the numbers of padded tokens are
#        dropped, of every token, while padded tokens are counted.
# Hurts: packed or padded batches do not train with biases that are updated; at the one size where they do, biases move by
#        wrong counts.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" megatron-core==0.16.1
cd "$folder"
cat > visits.py <<'PY'
from types import SimpleNamespace

import torch
from megatron.core.transformer.moe.router import TopKRouter


def counted(num_tokens: int, num_experts: int) -> list[int] | str:
    """What the router counts if every token visits all experts and the last token is padding."""
    router = SimpleNamespace(enable_expert_bias=True, local_tokens_per_expert=torch.zeros(num_experts))
    visits = torch.ones(num_tokens, num_experts, dtype=torch.bool)
    is_padding = torch.arange(num_tokens) == num_tokens - 1
    try:
        TopKRouter._apply_expert_bias(router, visits, padding_mask=is_padding)
    except RuntimeError as error:
        return str(error)
    return router.local_tokens_per_expert.int().tolist()


few, square = counted(4, 6), counted(4, 4)
print("4 tokens, 6 experts:", few)
print("4 tokens, 4 experts:", square, "right:", [3] * 4)
assert isinstance(few, str) and "must match the size" in few, "the behaviour has changed"
assert square == [4, 4, 4, 0], "the behaviour has changed"
PY
TORCHDYNAMO_DISABLE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 "$folder/venv/bin/python" visits.py
