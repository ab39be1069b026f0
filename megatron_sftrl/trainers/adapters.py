"""Checkpoints of adapters (LoRA), and the whole models that they make of the weights under them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sftrl.config.lora import LoraSection
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.engine.checkpoint import (
    FoundCheckpoint,
    StoredTensors,
    checkpoint_at,
    find_checkpoint,
    load_weights,
)
from megatron_sftrl.engine.checkpoint.directory import read_record
from megatron_sftrl.engine.checkpoint.store import check_architecture
from megatron_sftrl.engine.live_weights import live_weights, load_hf_weights
from megatron_sftrl.engine.lora import PREFIX, adapter_shapes, adapters_of
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_tensor_file import read_safetensors_header
from megatron_sftrl.models.hf_weights import HfWeights, mismatch_lines, open_weights
from megatron_sftrl.models.tensor_rules import WHOLE_WEIGHTS
from megatron_sftrl.models.tensors import Region
from megatron_sftrl.trainers.origins import hash_of_weights

LOGGER = logging.getLogger(__name__)

_STORED = "policy.lora."


_SCALED = ("rank", "alpha", "rslora")


class StoredAdapters:
    """The adapters of a checkpoint; close them (contextlib.closing).

    Args:
        lora: of the checkpoint's record.
        vocab_size: of the model.
    """

    def __init__(self, path: Path, lora: Mapping[str, Any], vocab_size: int) -> None:
        self.lora = lora
        self._stored = StoredTensors(path)
        self.scale = LoraSection.model_validate({key: lora[key] for key in _SCALED}).scale
        whole = (WHOLE_WEIGHTS[name] for name in lora.get("modules_to_save", ()))
        self._keys = {hf: f"policy.{megatron}" for hf, megatron in whole}
        self.whole_names = (*self._keys,)
        """Of weights that were trained as they are."""
        self._keys |= {
            key.removeprefix(_STORED): key for key in self._stored.shapes if key.startswith(_STORED)
        }
        self.kinds = {name: (self._stored.dtypes[key], self._shape(key)) for name, key in self._keys.items()}
        """Dtype and shape of those, and of A and B of each matrix, by PEFT's names inside the model."""
        for name in self.whole_names:
            dtype, (_, columns) = self.kinds[name]
            self.kinds[name] = dtype, (vocab_size, columns)  # rows of padding may follow

    def _shape(self, key: str) -> tuple[int, int]:
        rows, columns = self._stored.shapes[key]
        return rows, columns

    def read(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        """Of the weight or the A or B of that name `part`, the whole without."""
        dtype, shape = self.kinds[name]
        places = [each.indices(size) for each, size in zip(part or (slice(None),) * 2, shape, strict=True)]
        found = torch.empty([stop - start for start, stop, _ in places], dtype=dtype)
        self._stored.read_into(found, self._keys[name], tuple(start for start, _, _ in places))
        return found

    def merged(self, name: str, weight: Tensor, part: tuple[slice, ...] = ()) -> Tensor:
        """W + scale B A in fp32 of the Hugging Face weight `name`; the weight itself without an adapter, or
        what was trained in its place.

        `part` is where `weight` lies in it, the whole without.
        """
        if name in self.whole_names:
            return self.read(name, part)
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in self.kinds:
            return weight
        down, up = (self.read(f"{module}.lora_{letter}.weight").float() for letter in "AB")
        rows, columns = part or (slice(None), slice(None))
        return weight.float() + self.scale * (up[rows] @ down[:, columns])

    def close(self) -> None:
        self._stored.close()


class MergedWeights:
    """A model with adapters merged into it, in fp32 and rounded once; close it (contextlib.closing)."""

    def __init__(self, base: HfWeights, adapters: StoredAdapters) -> None:
        self._base, self._adapters = base, adapters

    def check_model(self, architecture: Architecture) -> None:
        self._base.check_model(architecture)

    def read(self, name: str) -> Tensor:
        """A whole tensor, fp32 where there is an adapter, else of the stored dtype."""
        return self._adapters.merged(name, self._base.read(name))

    def read_into(self, target: Tensor, name: str, part: tuple[slice, ...]) -> None:
        """A region, into a tensor of its shape, of any dtype and device."""
        target.copy_(self._adapters.merged(name, self._base.read(name, part), part))

    def close(self) -> None:
        self._base.close()
        self._adapters.close()


def open_base(
    path: Path, lora: Mapping[str, Any], architecture: Architecture, base: Path | None
) -> HfWeights:
    """The weights that the adapters were trained over; every rank calls it.

    Args:
        path: of the checkpoint, for messages.
        base: where they are now; None for the place that the run read them from.
    Raises:
        UserError: on every rank: nothing there, or other weights.
    """
    directory = Path(lora["base_path"]) if base is None else base
    if not directory.is_dir():
        raise UserError(
            f"{path} holds adapters over the weights of {directory}, which is not there: put that model "
            "back, or give its directory to sftrl convert to-hf as --base"
        )
    # Pickled files are read as tensors only, and the run has been told to.
    weights = open_weights(directory, allow_pickle=True)
    weights.check_model(architecture)
    found = hash_of_weights(directory, weights)
    if found != lora["base"]:
        raise UserError(
            f"{path} holds adapters over other weights than those of {directory}: expected files with hash "
            f"{lora['base'][:12]}, got {found[:12]}; give the directory that they were trained over"
        )
    return weights


def open_merged(
    path: Path, lora: Mapping[str, Any], architecture: Architecture, base: Path | None
) -> MergedWeights:
    """The model that a checkpoint of adapters makes of its base; every rank calls it.

    Args:
        base: where that is if it is no longer where the run read it.
    Raises:
        UserError: on every rank: what open_base refuses.
    """
    moved = None if Path(lora["base_path"]).is_dir() else base
    weights = open_base(path, lora, architecture, moved)
    return MergedWeights(weights, StoredAdapters(path, lora, architecture.vocab_size))


def load_model(
    chunks: Sequence[LanguageModel],
    path: Path,
    *,
    architecture: Architecture,
    parallel: ParallelContext,
    base: Path | None = None,
) -> FoundCheckpoint:
    """load_weights, and of a checkpoint of adapters the model that they make of their base.

    Args:
        base: as in open_merged.
    Raises:
        UserError: on every rank: what load_weights and open_merged refuse.
    """
    if on_rank_zero(lambda: read_record(checkpoint_at(path)).lora) is None:
        return load_weights(chunks, path, architecture=architecture, parallel=parallel)
    verification = find_checkpoint(path)
    found, record = verification.path, verification.finish()
    check_architecture(record, architecture, found)
    assert record.lora is not None
    with closing(open_merged(found, record.lora, architecture, base)) as weights:
        load_hf_weights(chunks, weights, architecture, parallel)
    return FoundCheckpoint(path=found, record=record)


# An adapter of PEFT's as a start.

_OUTER = "base_model.model."
"""PEFT's names begin with it."""
_BASE_MOVES = ("pissa", "olora", "loftq", "corda")
"""PEFT's initialisations that change the weights under the adapter, by their beginning."""


def open_start(config: TrainingConfig, architecture: Architecture) -> HfWeights:
    """The adapter of lora.start, held against the section lora; close it.

    Raises:
        UserError: nothing there; a variant that this run would not continue; another rank, scale or targets;
            tensors of another model.
    """
    lora = config.lora
    assert lora is not None and lora.start is not None
    directory = lora.start
    said = _adapter_config(directory)
    problems = [
        f"{name}: expected {expected}, got {found}"
        for name, (found, expected) in _compared(said, lora).items()
        if found != expected
    ]
    if not problems:
        weights = HfWeights(directory, read_safetensors_header(directory / "adapter_model.safetensors"))
        expected = {_OUTER + name: shape for name, shape in adapter_shapes(architecture, lora).items()}
        whole_shape = (architecture.vocab_size, architecture.hidden_size)
        expected |= {_OUTER + WHOLE_WEIGHTS[name][0]: whole_shape for name in lora.modules_to_save}
        missing = [name for name in expected if name not in weights.shapes]
        unexpected = [name for name in weights.shapes if name not in expected]
        other = [
            f"{name}: expected {list(shape)}, got {list(weights.shapes[name])}"
            for name, shape in expected.items()
            if name in weights.shapes and tuple(weights.shapes[name]) != shape
        ]
        problems = mismatch_lines(missing=missing, unexpected=unexpected, other=other)
        if not problems:
            return weights
        weights.close()
    raise UserError("\n  ".join([f"lora.start: {directory} is no start of this run:", *problems]))


def _adapter_config(directory: Path) -> dict[str, Any]:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise UserError(
                f"lora.start: {directory} has no {name}: expected the directory of a PEFT adapter, as peft's "
                "save_pretrained and sftrl convert to-hf --adapters write it"
            )
    try:
        said = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"lora.start: {directory / 'adapter_config.json'} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise UserError(f"lora.start: {directory / 'adapter_config.json'}: expected an object")
    return said


def _compared(said: Mapping[str, Any], lora: LoraSection) -> dict[str, tuple[Any, Any]]:
    """What PEFT's file says and what this run needs of it, by the file's keys."""
    targets = said.get("target_modules")
    initial = str(said.get("init_lora_weights", True)).lower()
    plain = {
        "use_dora": False,
        "use_qalora": False,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "layers_to_transform": None,
        "trainable_token_indices": None,
        "target_parameters": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return {
        "peft_type": (said.get("peft_type"), "LORA"),
        "r": (said.get("r"), lora.rank),
        "lora_alpha": (float(said.get("lora_alpha") or 0), lora.alpha),
        "use_rslora": (bool(said.get("use_rslora")), lora.rslora),
        "target_modules": (
            sorted(targets) if isinstance(targets, list) and lora.targets != "all-linear" else targets,
            sorted(lora.names) if lora.targets != "all-linear" else targets,  # its tensors tell
        ),
        "modules_to_save": (sorted(said.get("modules_to_save") or []), sorted(lora.modules_to_save)),
        "init_lora_weights": (initial, "any" if initial.startswith(_BASE_MOVES) else initial),
        **{key: (said.get(key) or value, value) for key, value in plain.items()},
    }


def load_start(policy: PolicyEngine, config: TrainingConfig, weights: HfWeights) -> None:
    """Fill the adapters from open_start's tensors; every rank calls it.

    Raises:
        UserError: on every rank: it names a directory as its base that holds other weights than model.hf.
    """
    assert config.lora is not None and config.lora.start is not None and policy.base is not None
    named = _adapter_config(config.lora.start).get("base_model_name_or_path")
    base = Path(named) if isinstance(named, str) and on_rank_zero(lambda: Path(named).is_dir()) else None
    if base is not None and str(base.resolve()) != policy.base.path:
        with open_weights(base, allow_pickle=config.model.allow_pickle) as theirs:
            content = hash_of_weights(base, theirs)
        if content != policy.base.weights:
            raise UserError(
                f"lora.start: {config.lora.start} was trained over {base}, whose weights {content[:12]} are "
                f"not those of model.hf = {policy.base.path} ({policy.base.weights[:12]})"
            )
    LOGGER.info("adapters from lora.start: %s, trained over %s", config.lora.start, named)
    with torch.no_grad():
        for adapter in adapters_of(policy.chunks):
            for _, place in adapter.places():
                assert place.data is not None
                region = Region.of(place.local_shape, place.global_offset)
                weights.read_into(place.data, _OUTER + place.key.removeprefix(PREFIX), region.slices)
        live = live_weights(policy.chunks, policy.architecture)
        for name, _ in (WHOLE_WEIGHTS[each] for each in config.lora.modules_to_save):
            for region, view in live.parts.get(name, {}).items():
                weights.read_into(view, _OUTER + name, region.slices)
