#!/usr/bin/env bash
# transformers 5.19.0, tokenizers 0.23.3, Python 3.11: ids in added_tokens_decoder
#
# Guess: "added_tokens_decoder": {"500": {"content": "<|far|>"}} in tokenizer_config.json gives the token <|far|> the id
#        500, or the directory is refused because tokenizer.json has no such token.
# Seen:  the token is appended under the next free id, without a word.
# Hurts: a model whose row 500 was trained for the token is asked about another row.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import pathlib

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

print("transformers", transformers.__version__)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
own = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
directory = pathlib.Path("model")
directory.mkdir()
own.save(str(directory / "tokenizer.json"))
token = {"content": "<|far|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "added_tokens_decoder": {"500": {**token, "single_word": False}},
}
(directory / "tokenizer_config.json").write_text(json.dumps(settings))
loaded = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
seen = loaded.convert_tokens_to_ids("<|far|>")
print("the file says 500, the tokenizer", seen)
assert seen == len(alphabet) == 256, "the behaviour has changed"
PY
