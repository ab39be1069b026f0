"""The exported tokenizer gives the ids that training saw, also to programs that load it by its class."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sftrl.data.tokenizer_backends import PROBES, class_defaults
from megatron_sftrl.models.hf_output import HfAssets, write_assets

_RULES, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_GENERIC = "PreTrainedTokenizerFast"


def with_ids_of_tokenizer_json(assets: HfAssets) -> HfAssets:
    """The same files, with the generic `tokenizer_class` where AutoTokenizer would make other ids without it.

    Training takes its ids from tokenizer.json; transformers and vLLM rebuild the tokenizer from the class
    that tokenizer_config.json or config.json names. Prints a line when the two differ.

    Args:
        assets: files of an export.
    Returns:
        New assets, or the same ones when nothing differs or there is no tokenizer.json.
    """
    if _RULES not in assets.files:
        return assets
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_assets(directory, assets)
        text = _first_difference(directory)
        if text is None:
            return assets
        config: dict[str, Any] = json.loads(assets.files.get(_CONFIG, b"{}"))
        before = config.get("tokenizer_class")
        config |= class_defaults(directory, config, _own(directory).get_vocab())
        config["tokenizer_class"] = _GENERIC
        content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        changed = replace(assets, files={**assets.files, _CONFIG: content})
        write_assets(directory, changed)
        left = _first_difference(directory)
    if left is None:
        print(
            f"note: {_CONFIG}: tokenizer_class {before} is now {_GENERIC}: AutoTokenizer made other ids of "
            f"{text!r} with it than {_RULES}, whose ids were trained",
            file=sys.stderr,
        )
        return changed
    print(
        f"note: AutoTokenizer makes other ids of {left!r} than {_RULES}, whose ids were trained, because "
        f"of the model_type in config.json; load the tokenizer with {_GENERIC}.from_pretrained",
        file=sys.stderr,
    )
    return changed


def _own(directory: Path) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(directory / _RULES))


def _first_difference(directory: Path) -> str | None:
    """A text of which AutoTokenizer makes other ids than tokenizer.json; None when there is none."""
    from transformers import AutoTokenizer

    own = _own(directory)
    try:
        theirs: Any = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception:
        # What it cannot load it cannot load wrongly; code beside a tokenizer, say, is left out of exports.
        return None
    for text in PROBES.values():
        if theirs.encode(text, add_special_tokens=False) != own.encode(text, add_special_tokens=False).ids:
            return text
    return None
