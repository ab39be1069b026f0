#!/usr/bin/env bash
# datasets 5.2.0, Python 3.11: load_dataset("json") and a column of answers
#
# Guess: a column that holds text and, in one row, a number is refused, as earlier versions did, or becomes text.
# Seen:  one number among text answers makes a column of type Json, and its text is then parsed as JSON: "1.50" comes
#        back as 1.5, "007" as 7 and "null" as None. A column of dates in ISO form, text in every row, comes back as
#        datetime objects.
# Hurts: gold answers of a verifier change before anyone sees them, and stay changed in what save_to_disk writes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - <<'PY'
import datetime
import json

import datasets

print("datasets", datasets.__version__)
answers = ["1.50", "007", "null", "3/4", 12]
dates = ["2024-01-02", "2025-03-04"]
for name, column in (("mixed", answers), ("dates", dates), ("text", answers[:-1])):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps({"answer": value}) + "\n" for value in column)
seen = {}
for name in ("mixed", "dates", "text"):
    table = datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train")
    seen[name] = table["answer"][:]
    print(name, table.features, seen[name])
assert seen == {
    "mixed": [1.5, 7, None, "3/4", 12],
    "dates": [datetime.datetime(2024, 1, 2), datetime.datetime(2025, 3, 4)],
    "text": ["1.50", "007", "null", "3/4"],
}, "the behaviour has changed"
PY
