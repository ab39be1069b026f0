#!/usr/bin/env bash
# torch 2.13.0, Python 3.11: torch.save where the file cannot grow
#
# Guess: writing to a full disk (or over a quota) raises OSError, whose errno says so.
# Seen:  a RuntimeError of the zip writer, "[enforce fail at inline_container.cc ...] unexpected pos ...", without an errno
#        and without the OSError as its cause. A plain write to the same file raises OSError 27 (file too large) here.
# Hurts: a program that tells a full disk, where it must stop, from a failure, after which it starts again, cannot tell
#        them apart; the person at the terminal reads of a position in a container.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import resource
import signal

import torch

print("torch", torch.__version__)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # a disk with room for this much
seen = {}
for name, write in (
    ("plain", lambda file: (file.write(bytes(10**6)), file.flush())),
    ("torch.save", lambda file: torch.save(torch.zeros(10**6), file)),
):
    try:
        with open(name, "wb") as file:
            write(file)
    except Exception as error:
        seen[name] = (type(error).__name__, getattr(error, "errno", None))
        print(name, *seen[name], str(error).splitlines()[0], "caused by", repr(error.__cause__))
assert seen == {"plain": ("OSError", 27), "torch.save": ("RuntimeError", None)}, "the behaviour has changed"
PY
