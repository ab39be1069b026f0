"""Runs commands until standard input closes, then kills them and all that came of them.

    python daemons.py '["munged", "--foreground"]' '["slurmctld", "-D"]' ...

The descendants of slurmd detach themselves (a step outlives the daemon that began it). This process is
the reaper of whatever loses its parent, so it finds them all; and its standard input closes also when the
test that started it was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import time

import psutil

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for command in sys.argv[1:]:
        subprocess.Popen(json.loads(command), stdin=subprocess.DEVNULL)
    sys.stdin.read()
    while family := psutil.Process().children(recursive=True):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.wait_procs(family, timeout=1)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
