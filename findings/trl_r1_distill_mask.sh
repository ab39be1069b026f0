#!/usr/bin/env bash
# trl 1.16.0 and transformers 5.19.0, Python 3.11: DeepSeek-R1-Distill under assistant_only_loss
#
# Guess: trl's training template learns what follows the generation prompt, which ends in an assistant header and an
#        opened thought.
# Seen:  the mask begins in front of the header; a row without a thought is learned right behind the header, a context
#        that a generation is never given: it is given an opened thought.
# Hurts: SFT on plain answers moves a context that serving and RL do not use; the loss falls, and the answers of the
#        served model stay as they were.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 jinja2
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps trl==1.16.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import importlib.util
from pathlib import Path

from transformers import __version__
from transformers.utils.chat_template_utils import render_jinja_template

print("transformers", __version__)
(where,) = importlib.util.find_spec("trl").submodule_search_locations
folder = Path(where) / "chat_templates"
turns = [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": "42"}]


def rendered(name, turns, **options):
    texts, spans = render_jinja_template(
        conversations=[turns], chat_template=(folder / name).read_text(), bos_token="", eos_token="", **options
    )
    return texts[0], spans


prompt, _ = rendered("deepseek_r1_distill.jinja", turns[:1], add_generation_prompt=True)
text, spans = rendered("deepseek_r1_distill_training.jinja", turns, return_assistant_tokens_mask=True)
((start, end),) = spans[0]
print("generation is given:", repr(prompt))
print("learned:            ", repr(text[start:end]), "behind", repr(text[:start]))
assert prompt.endswith("<think>\n"), "the behaviour has changed"
assert "<think>" not in text, "the behaviour has changed"
assert text[start:end].startswith(prompt[start:].removesuffix("<think>\n")), "the behaviour has changed"
assert start < len(prompt.removesuffix("<think>\n")), "the behaviour has changed"
PY
