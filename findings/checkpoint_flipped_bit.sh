#!/usr/bin/env bash
# torch 2.13.0, Python 3.11: torch.distributed.checkpoint and a damaged file
#
# Guess: tensors lie in the zip archives of torch.save, each with a CRC-32 of its bytes; a reader that meets a flipped
#        bit fails.
# Seen:  it loads without a word, and one weight is another number (0.7 comes back as 2.4e+38).
# Hurts: a disk, a network file system or a copy that damages a checkpoint is noticed by the loss, if at all.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import pathlib

import torch
import torch.distributed.checkpoint as dcp

print("torch", torch.__version__)
dcp.save({"weight": torch.full((1024,), 0.7)}, checkpoint_id="checkpoint", no_dist=True)
(file,) = pathlib.Path("checkpoint").glob("*.distcp")
data = bytearray(file.read_bytes())
pattern = torch.full((1024,), 0.7).numpy().tobytes()
start = data.find(pattern)
assert start > 0, "the tensor's bytes stand in the file as they are"
data[start + 4 * 100 + 3] ^= 0x40  # the exponent of element 100
file.write_bytes(data)
state = {"weight": torch.zeros(1024)}
dcp.load(state, checkpoint_id="checkpoint", no_dist=True)
changed = (state["weight"] != torch.full((1024,), 0.7)).nonzero().flatten().tolist()
print("loaded without an error; changed elements:", changed, "now", state["weight"][changed].tolist())
assert changed == [100], "the behaviour has changed"
PY
