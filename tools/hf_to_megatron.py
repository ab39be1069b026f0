"""Converts a Hugging Face directory into a checkpoint that training starts from (model.init_checkpoint).

    python tools/hf_to_megatron.py --hf DIR --out DIR [--dtype bf16] [--verify]
    torchrun --nproc-per-node 8 tools/hf_to_megatron.py --hf DIR --out DIR --tp 8

The checkpoint loads into any layout. --tp, --pp and --ep name the one that will read it: tensors are stored
in the pieces of its ranks. Any number of processes shares the work; --verify builds the model in that layout
and needs a multiple of tp * pp of them. A run can also start from the directory itself, without conversion:
model.hf in its YAML.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sftrl.apps.convert.from_hf import Layout, check_layout, convert_from_hf
from megatron_sftrl.apps.convert.report import ByteProgress, dtype_named, report_assets, verify
from megatron_sftrl.cli import run_command
from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.engine.checkpoint import stored_assets
from megatron_sftrl.engine.parallel import parallel_context
from megatron_sftrl.models.hf_config import from_hf_config
from megatron_sftrl.observability.watch import return_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="directory with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to make")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size of the layout (1)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size (1)")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel size (1)")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), help="of the weights; kept if not given")
    parser.add_argument("--allow-pickle", action="store_true", help="read pickled .bin weights")
    parser.add_argument("--verify", action="store_true", help="compare logits of both sides")
    arguments = parser.parse_args()

    def command() -> None:
        return_freed_memory()
        layout = Layout(tp=arguments.tp, pp=arguments.pp, ep=arguments.ep)
        check_layout(layout, from_hf_config(arguments.hf))
        section = ParallelSection()
        if arguments.verify:
            section = ParallelSection(tp=layout.tp, pp=layout.pp, ep=layout.ep)
        with parallel_context(section) as parallel:
            with ByteProgress("converting") as progress:
                convert_from_hf(
                    arguments.hf,
                    arguments.out,
                    layout=layout,
                    dtype=dtype_named(arguments.dtype),
                    allow_pickle=arguments.allow_pickle,
                    on_bytes=progress.show,
                )
            report_assets(stored_assets(arguments.out).files)
            if arguments.verify:
                verify(arguments.out, arguments.hf, section, parallel)

    raise SystemExit(run_command(command))


if __name__ == "__main__":
    main()
