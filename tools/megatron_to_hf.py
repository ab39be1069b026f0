"""A checkpoint into a Hugging Face directory: `sftrl convert to-hf` under the name of a script.

python tools/megatron_to_hf.py --checkpoint DIR --out DIR [--dtype bf16] [--verify]
torchrun --nproc-per-node 8 tools/megatron_to_hf.py --checkpoint runs/my-run --out DIR
"""

import sys

from megatron_sftrl.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["convert", "to-hf", *sys.argv[1:]]))
