"""A Hugging Face directory into a checkpoint: `sftrl convert to-megatron` under the name of a script.

python tools/hf_to_megatron.py --hf DIR --out DIR [--dtype bf16] [--verify]
torchrun --nproc-per-node 8 tools/hf_to_megatron.py --hf DIR --out DIR --tp 8
"""

import sys

from megatron_sftrl.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["convert", "to-megatron", *sys.argv[1:]]))
