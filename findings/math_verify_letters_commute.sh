#!/usr/bin/env bash
# math-verify 0.9.0, Python 3.11: answers that are words, numerals in a base, tiny numbers
#
# Guess: an answer that is a word is compared as text; 101 in base 2 is another number than 101 in base 3; two numbers
#        are equal up to a relative tolerance.
# Seen:  the letters of a word are symbols whose product commutes, so every anagram is right ("sey" for "yes"); the base
#        is dropped; below 1e-6 or so any two numbers are equal (1/2006! for 1/2004!).
# Hurts: as a reward it pays for wrong answers, and RL finds such answers.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'math-verify[antlr4_13_2]==0.9.0'
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"))
wrong = {
    "yes": "sey",
    "listen": "silent",
    "101_2": "101_3",
    r"\frac{1}{2004!}": r"\frac{1}{2006!}",
    "0.0000002": "0.0000001",
}
seen = {gold: verify(parse(f"${gold}$"), parse(f"${answer}$")) for gold, answer in wrong.items()}
for gold, answer in wrong.items():
    print(f"{answer} for {gold}: {seen[gold]}")
right = verify(parse("$12$"), parse("$12.0$")), verify(parse("$12$"), parse("$13$"))
assert right == (True, False)
assert all(seen.values()), "the behaviour has changed"
PY
