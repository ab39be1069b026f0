#!/usr/bin/env bash
# reasoning-gym 0.1.25, Python 3.11: verifiers of single tasks
#
# Guess: score_answer gives 1.0 to right answers only; a text that is no answer gets about 0.01 at most.
# Seen:  game_of_life_halting gives 1.0 to any text.
# Hurts: as a reward it teaches nothing and looks solved; in a mixture of tasks it raises the mean.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

import reasoning_gym

print("reasoning-gym", version("reasoning-gym"))
seen = {}
for task in ("game_of_life_halting", "basic_arithmetic", "graph_color"):
    entries = list(reasoning_gym.create_dataset(task, size=20, seed=1))
    score = reasoning_gym.get_score_answer_fn(task)
    seen[task] = sum(score(answer="I do not know", entry=entry) for entry in entries) / len(entries)
    print(f"{task}: 'I do not know' earns {seen[task]:.2f} on average")
assert seen["basic_arithmetic"] < 0.05 and seen["graph_color"] < 0.05
assert seen["game_of_life_halting"] == 1.0, "the behaviour has changed"
PY
