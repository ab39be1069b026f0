"""Behaviour log-probabilities into a copy of the data: `sftrl score` under the name of a script.

    python tools/score_behavior_logprobs.py behavior.yaml [key=value ...] \\
        --checkpoint DIR --data train.jsonl --out scored.jsonl
    torchrun --nproc-per-node 2 tools/score_behavior_logprobs.py behavior.yaml parallel.tp=2 ...
"""

import sys

from megatron_sftrl.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["score", *sys.argv[1:]]))
