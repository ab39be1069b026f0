#!/usr/bin/env bash
# transformers 5.19.0, tokenizers 0.23.3, Python 3.11: AutoTokenizer and tokenizer.json
#
# Guess: AutoTokenizer reads the rules of a directory's tokenizer.json; tokenizer_class in tokenizer_config.json
#        only names the Python class around them.
# Seen:  where config.json says model_type llama (or qwen3) and tokenizer_class is LlamaTokenizerFast, as in the files
#        that DeepSeek publishes, the pre-tokenizer and decoder are rebuilt as that class's own. A byte-level BPE
#        loses every space and all Chinese text, without a warning. With model_type qwen2 the text comes back, but by
#        other ids than tokenizer.json gives. PreTrainedTokenizerFast.from_pretrained keeps the file.
# Hurts: training and serving read the same file and see different tokens.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import pathlib

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
text = "What is 2+2?\nIt is 4. 你好"
own = Tokenizer(models.BPE())
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
own.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet)
own.train_from_iterator([text] * 50, trainer)
right = own.encode(text).ids
assert own.decode(right) == text

directory = pathlib.Path("model")
directory.mkdir()
own.save(str(directory / "tokenizer.json"))
settings = {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<eos>"}
(directory / "tokenizer_config.json").write_text(json.dumps(settings))
seen = {}
for model_type in ("llama", "qwen3", "qwen2"):
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    seen[model_type] = (type(loaded).__name__, ids == right, loaded.decode(ids) == text)
    print(model_type, *seen[model_type], repr(loaded.decode(ids)))
plain = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
seen["plain"] = plain(text, add_special_tokens=False)["input_ids"] == right
print("PreTrainedTokenizerFast: same ids", seen["plain"])
assert seen == {
    "llama": ("LlamaTokenizer", False, False),
    "qwen3": ("LlamaTokenizer", False, False),
    "qwen2": ("Qwen2Tokenizer", False, True),
    "plain": True,
}, "the behaviour has changed"
PY
