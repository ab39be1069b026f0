"""Converts a checkpoint into a Hugging Face directory that transformers and vLLM load.

    python tools/megatron_to_hf.py --checkpoint DIR --out DIR [--dtype bf16] [--verify]
    torchrun --nproc-per-node 8 tools/megatron_to_hf.py --checkpoint runs/my-run --out DIR

--checkpoint takes a converted checkpoint, a checkpoint of a training run (the policy is exported), or a run
directory (its latest one), whatever layout wrote it. Any number of processes shares the work, a file each.
Tokenizer, chat template and generation config come along.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sftrl.apps.convert.report import ByteProgress, dtype_named, report_assets, verify
from megatron_sftrl.apps.convert.to_hf import convert_to_hf
from megatron_sftrl.cli import run_command
from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.engine.parallel import parallel_context
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.watch import return_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint or run directory")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to make")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), help="of the weights; kept if not given")
    parser.add_argument("--max-file-gb", type=float, default=5.0, help="size of a safetensors file (5)")
    parser.add_argument("--verify", action="store_true", help="compare logits of both sides")
    parser.add_argument(
        "--verify-pp",
        type=int,
        default=1,
        metavar="PP",
        help="processes that hold the model for --verify (1)",
    )
    arguments = parser.parse_args()

    def command() -> None:
        return_freed_memory()
        if not arguments.max_file_gb > 0:
            raise UserError(f"--max-file-gb: expected a size above 0, got {arguments.max_file_gb}")
        if arguments.verify_pp != 1 and not arguments.verify:
            raise UserError("--verify-pp has no effect without --verify")
        section = ParallelSection(pp=arguments.verify_pp)
        with parallel_context(section) as parallel:
            with ByteProgress("exporting") as progress:
                convert_to_hf(
                    arguments.checkpoint,
                    arguments.out,
                    dtype=dtype_named(arguments.dtype),
                    max_file_bytes=int(arguments.max_file_gb * 1e9),
                    on_bytes=progress.show,
                )
            report_assets(path.name for path in arguments.out.iterdir())
            if arguments.verify:
                verify(arguments.checkpoint, arguments.out, section, parallel)

    raise SystemExit(run_command(command))


if __name__ == "__main__":
    main()
