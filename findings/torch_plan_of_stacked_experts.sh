#!/usr/bin/env bash
# torch 2.13.0, Python 3.11: torch.distributed.checkpoint plans a save whose tensors have very many chunks
#
# Guess: DefaultSavePlanner.create_global_plan, which sorts the chunks of a tensor before it looks for overlaps, takes
#        time in proportion to their number, as sweeps over sorted boxes do.
# Seen:  it does where chunks lie behind each other along the tensor's longest dimension. Where they are stacked along
#        a shorter one, as megatron-core stacks the experts of all layers ([layers, experts, rows, columns], a chunk
#        for each), every chunk is compared with every other: twice the experts take four times as long.
# Hurts: every rank waits for it at every save that makes its plan again. 58 layers of 256 experts are 14,848 chunks:
#        half a minute or more for one tensor, and a checkpoint has a tensor for each of two matrices and their
#        optimizer states.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import time

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

print("torch", torch.__version__)
ROWS, COLUMNS = 1536, 2048


def seconds(size, chunk, offsets):
    """Processor seconds of one global plan of one tensor, whose chunks cover it once."""
    properties = TensorProperties(dtype=torch.bfloat16)
    items = [
        WriteItem(
            index=MetadataIndex("experts.weight", torch.Size(offset)),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(chunk)),
                properties=properties,
                size=torch.Size(size),
            ),
        )
        for offset in offsets
    ]
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    started = time.process_time()
    planner.create_global_plan([SavePlan(items, planner_data={})])
    return time.process_time() - started


def stacked(layers, experts):
    offsets = [(layer, expert, 0, 0) for layer in range(layers) for expert in range(experts)]
    return seconds((layers, experts, ROWS, COLUMNS), (1, 1, ROWS, COLUMNS), offsets)


def in_a_row(count):
    return seconds((count * ROWS, COLUMNS), (ROWS, COLUMNS), [(number * ROWS, 0) for number in range(count)])


stacked(2, 2)
found = {layers * 128: (stacked(layers, 128), in_a_row(layers * 128)) for layers in (6, 12, 24)}
for count, (one, other) in found.items():
    print(f"{count:5} chunks: stacked {one:6.2f} s, in a row {other:6.3f} s")
growth = [found[2 * count][0] / found[count][0] for count in (768, 1536)]
print("twice as many stacked chunks take", *(f"{each:.1f}" for each in growth), "times as long")
assert min(growth) > 2.8, growth
assert found[3072][0] > 4 * found[3072][1], found
PY
