"""The weights of a Hugging Face model directory: shapes at once, tensors or parts of them when asked for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError, error_of, first_of, hub_hint
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_families import hf_family
from megatron_sftrl.models.hf_hybrids import is_multimodal, language_model_name
from megatron_sftrl.models.hf_tensor_file import (
    BLOCKS,
    INDEX_FILE,
    SCALES,
    SINGLE_FILE,
    BlockScales,
    StoredTensor,
    packed_experts,
    part_of_stack,
    read_packed,
    read_part,
    read_pickle_header,
    read_safetensors_header,
    with_scales,
)
from megatron_sftrl.models.tensors import MegatronTensor, Region, hf_regions, hf_shapes

# Which files of a model directory hold its weights, and where each tensor is.


_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BLOCK = "weight_block_size"
_PICKLE_FILE = "pytorch_model.bin"
_PICKLE_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """Every tensor by its name, and notes on the choice of the files for a tool to print."""

    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]


def is_old_rope_buffer(name: str) -> bool:
    """Rotary frequencies, which early Llama files hold as a tensor though the config determines them."""
    return name.endswith(".rotary_emb.inv_freq")


def find_weights(directory: Path, *, allow_pickle: bool) -> WeightFiles:
    """Find every tensor of a model directory.

    Preferred as transformers does (modeling_utils._get_resolved_checkpoint_files, 5.19): the file that
    config.json names as transformers_weights, model.safetensors, its index, pytorch_model.bin, its index.

    Args:
        allow_pickle: read pickled weights, as tensors only, when there are no others.
    Raises:
        UserError: no directory, no weights, pickled weights that are not allowed, broken files, or an index
            that does not agree with its shards.
    """
    if not directory.is_dir():
        raise UserError(
            f"no such directory: {directory}; expected a Hugging Face model directory with config.json and "
            f"{SINGLE_FILE} or {INDEX_FILE}{hub_hint(directory)}"
        )
    name, notes = _choose(directory, allow_pickle=allow_pickle)
    path = directory / name
    if name.endswith(".index.json"):
        tensors = _read_sharded(path, is_pickled=name == _PICKLE_INDEX)
    else:
        tensors = _read_header(path, is_pickled=name == _PICKLE_FILE)
    if is_multimodal(_config(directory)):
        tensors = {
            own: entry for name, entry in tensors.items() if (own := language_model_name(name)) is not None
        }
    quantised = _config(directory).get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("quant_method") == "fp8" and _BLOCK in quantised:
        tensors = with_scales(tensors, quantised[_BLOCK], readable=_READABLE)
    return WeightFiles(tensors=_experts_apart(directory, tensors), notes=notes)


def _choose(directory: Path, *, allow_pickle: bool) -> tuple[str, tuple[str, ...]]:
    """The file or index to read, and what to say about it."""
    if named := _named_in_config(directory):
        return named, (f"{directory}: weights from {named}, which config.json names as transformers_weights",)
    if (directory / SINGLE_FILE).is_file():
        both = (directory / INDEX_FILE).is_file()
        note = (
            f"{directory} holds {SINGLE_FILE} and {INDEX_FILE}: {SINGLE_FILE} is used, as transformers does"
        )
        return SINGLE_FILE, (note,) if both else ()
    if (directory / INDEX_FILE).is_file():
        return INDEX_FILE, ()
    pickled = next((name for name in (_PICKLE_FILE, _PICKLE_INDEX) if (directory / name).is_file()), None)
    if pickled is None:
        found = sorted(path.name for path in directory.iterdir() if path.suffix in _LOOKS_LIKE_WEIGHTS)
        raise UserError(
            f"no weights in {directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found "
            f"{', '.join(found) if found else 'no weight file at all'}; give the directory of a whole model, "
            "as save_pretrained writes it"
        )
    if not allow_pickle:
        raise UserError(
            f"{directory} holds only pickled weights ({pickled}), expected safetensors: pickled files can "
            "run code when loaded. Convert them to safetensors, or allow it with --allow-pickle "
            "(model.allow_pickle: true in a run's YAML), which reads tensors only (torch's weights_only)"
        )
    return pickled, (f"{directory}: pickled weights ({pickled}) are read with torch's weights_only loading",)


_LOOKS_LIKE_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"})


def _config(directory: Path) -> dict[str, Any]:
    """config.json; empty where there is none, and who reads the whole file complains about it."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _named_in_config(directory: Path) -> str | None:
    """File that config.json asks for; None when it asks for none."""
    name = _config(directory).get("transformers_weights")
    if name is None:
        return None
    if not _is_plain_name(name) or not str(name).endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(
            f"{directory / 'config.json'}: transformers_weights: expected the name of a .safetensors file or "
            f"of its .index.json in the same directory, got {name!r}"
        )
    if not (directory / name).is_file():
        raise UserError(f"{directory / 'config.json'}: transformers_weights names {name}, which is not there")
    return name


def _read_header(path: Path, *, is_pickled: bool) -> dict[str, StoredTensor]:
    return read_pickle_header(path) if is_pickled else read_safetensors_header(path)


def _read_sharded(index: Path, *, is_pickled: bool) -> dict[str, StoredTensor]:
    placement = _read_index(index)
    names = sorted(set(placement.values()))
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index} names {len(absent)} of {len(names)} shards that are not there: "
            f"{', '.join(first_of(absent))}; copy or download the missing files"
        )
    shards = {name: _read_header(index.parent / name, is_pickled=is_pickled) for name in names}
    if problems := list(_disagreements(placement, shards)):
        raise UserError("\n  ".join([f"{index} does not agree with its shards:", *first_of(problems)]))
    return {name: shards[shard][name] for name, shard in placement.items()}


def _read_index(index: Path) -> dict[str, str]:
    """Name of the shard of each tensor."""
    try:
        placement = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not placement or not all(isinstance(name, str) for name in placement.values()):
            raise TypeError("weight_map is not a table of file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise error_of(
            f'{index} is no index of shards: expected {{"weight_map": {{tensor: file, ...}}}}, '
            f"got {type(error).__name__}: {error}",
            error,
        ) from error
    if foreign := sorted({name for name in placement.values() if not _is_plain_name(name)}):
        raise UserError(
            f"{index} names shards by paths, which is refused: {', '.join(first_of(foreign))}; expected "
            "names of files beside it"
        )
    return placement


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _disagreements(
    placement: Mapping[str, str], shards: Mapping[str, Mapping[str, StoredTensor]]
) -> Iterator[str]:
    """Each way in which an index and its shards contradict each other."""
    holders: dict[str, list[str]] = {}
    for shard, tensors in shards.items():
        for name in tensors:
            holders.setdefault(name, []).append(shard)
    for name, shard in placement.items():
        if shard not in holders.get(name, ()):
            yield f"{name}: the index says {shard}, which does not hold it"
    for name, found in holders.items():
        if len(found) > 1:
            yield f"{name}: in {len(found)} shards: {', '.join(found)}"
        if name not in placement and not is_old_rope_buffer(name):
            yield f"{name}: in {found[0]}, but not in the index"


# Mixtures that transformers 5 saved as it holds them (save_original_format=False): each layer's experts are
# two tensors, gate_up_proj [E, 2 width, H] and down_proj [E, H, width]. Their parts lie in the file as those
# of single experts would, one behind the other.


_STACK = re.compile(r"(?P<block>.*\.)(?:mlp|block_sparse_moe)\.experts\.(?P<which>gate_up_proj|down_proj)")
_LIKE_MIXTRAL = ("mixtral", "minimax_m2")
"""Families whose published files have Mixtral's names of a mixture's tensors."""


def _experts_apart(directory: Path, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensors under their published names, one of each expert; UserError: an expert is there twice."""
    # Those with biases beside them are published so (GPT-OSS).
    if not any(_STACK.fullmatch(name) and f"{name}_bias" not in tensors for name in tensors):
        return tensors
    config = _config(directory)
    classes = [[hf_family(family).architecture] for family in _LIKE_MIXTRAL]
    is_mixtral = config.get("architectures") in classes or config.get("model_type") in _LIKE_MIXTRAL
    apart: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        for each, part in _parts_of_stack(name, stored, is_mixtral=is_mixtral):
            if each in apart:
                raise UserError(f"{directory}: {each} is there twice: alone, and in a tensor of all experts")
            apart[each] = part
    return apart


def _parts_of_stack(
    name: str, stored: StoredTensor, *, is_mixtral: bool
) -> Iterator[tuple[str, StoredTensor]]:
    """Of a stack each expert's matrices; any other tensor is its own part."""
    if is_mixtral:
        name = name.replace(".mlp.", ".block_sparse_moe.")
    stack = _STACK.fullmatch(name)
    names = (("gate_proj", "up_proj"), ("down_proj",))
    if is_mixtral:
        names = (("w1", "w3"), ("w2",))
    parts = names[0] if stack and stack["which"] == "gate_up_proj" else names[1]
    if stack is None or len(stored.shape) != 3 or stored.shape[1] % len(parts):
        yield name, stored
        return
    shape = (stored.shape[1] // len(parts), stored.shape[2])
    block = stack["block"] + ("block_sparse_moe" if is_mixtral else "mlp")
    for number in range(stored.shape[0] * len(parts)):
        expert, part = divmod(number, len(parts))
        place = part_of_stack(stored, number, shape, parts=len(parts))
        yield f"{block}.experts.{expert}.{parts[part]}.weight", place


# What tells the weights of a file from those that a model needs, in a few lines.


_EACH_AT_MOST = 4
"""Problems that are listed one by one; of more, each kind is counted and its first ones are shown."""
_SHOWN = 2
_BODY_NAME = re.compile(r"(?P<prefix>.*?)(?P<rest>layers\.\d+\..*|embed_tokens\.weight|norm\.weight)")
_HF_PREFIX = "model."
_SIGNS = (
    (
        r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\.",
        "these are adapters ({name}): merge them into their model (peft's merge_and_unload) and save that",
    ),
    (
        r"\.(weight_scale|weight_scale_inv|weight_packed|qweight|qzeros|scales|g_idx|absmax|quant_map)$"
        r"|\.weight\.(absmax|quant_map|quant_state\.[\w.]+)$",
        "these weights are quantised ({name}): give the unquantised model",
    ),
    (
        r"\.(qkv_proj|query_key_value|W_pack|c_attn|gate_up_proj)\.",
        "projections are fused into one tensor here ({name}): expected q_proj, k_proj, v_proj, gate_proj and "
        "up_proj, as transformers' own classes of this architecture save them",
    ),
)


def mismatch_lines(*, missing: Sequence[str], unexpected: Sequence[str], other: Sequence[str]) -> list[str]:
    """The problems, at most four lines with a hint; never one line for each of thousands of tensors.

    Args:
        missing: tensors that are not there, each as it is shown: name, shape and anything to say about it.
        unexpected: tensors that no model of this kind has, likewise.
        other: whole sentences about tensors of another shape or dtype.
    """
    hint = _hint([each.split(" ")[0] for each in unexpected], [each.split(" ")[0] for each in missing])
    lines = [f"missing: {each}" for each in missing] + [f"not expected: {each}" for each in unexpected]
    lines += other
    if len(lines) + len(hint) > _EACH_AT_MOST:
        kinds = (("missing", missing), ("not expected", unexpected), ("of another shape or dtype", other))
        lines = [f"{len(of)} {kind}: {_shown(of)}" for kind, of in kinds if of]
    return lines + hint


def _shown(problems: Sequence[str]) -> str:
    return "; ".join(problems[:_SHOWN]) + ("; ..." if len(problems) > _SHOWN else "")


def _hint(unexpected: Sequence[str], missing: Sequence[str]) -> list[str]:
    """What the names show about how the file was made, and what to do; nothing where they show nothing."""
    for pattern, text in _SIGNS:
        if name := next((name for name in unexpected if re.search(pattern, name)), None):
            return [text.format(name=name)]
    absent = {*missing}
    found = [match for name in unexpected if (match := _BODY_NAME.fullmatch(name))]
    renamed = [match["prefix"] for match in found if f"{_HF_PREFIX}{match['rest']}" in absent]
    if len({*renamed}) != 1:
        return []
    count = "every name" if len(renamed) == len(unexpected) else f"{len(renamed)} of {len(unexpected)} names"
    return [
        f"{count} not expected would fit with {_HF_PREFIX!r} in front instead of {renamed[0]!r}: rename the "
        "tensors, or load the language model alone with transformers' AutoModelForCausalLM and save it with "
        "save_pretrained"
    ]


_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_BYTES = 32 * 2**20
"""Of each of two tensors that are compared, in memory at a time."""


class HfWeights:
    """Open weight files; close them, or use this as a context manager.

    Reading moves no state, so threads may share it. `notes` on the choice of the files are for the user.
    """

    def __init__(
        self, directory: Path, tensors: Mapping[str, StoredTensor], *, notes: tuple[str, ...] = ()
    ) -> None:
        self.directory = directory
        self.notes = notes
        self._packed = packed_experts(tensors)
        plain = {
            name: entry
            for name, entry in tensors.items()
            if name.removesuffix(BLOCKS).removesuffix(SCALES) not in self._packed
        }
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: entry.shape for name, entry in {**plain, **self._packed}.items()
        }
        self.dtypes: Mapping[str, torch.dtype] = {
            name: entry.dtype if entry.scales is None else torch.bfloat16 for name, entry in plain.items()
        } | {name: entry.dtype for name, entry in self._packed.items()}
        """Of what read() gives; of products with scales that in which such models compute."""
        self._tensors = tensors
        self._descriptors = {file: os.open(file, os.O_RDONLY) for file in self.files}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, sorted."""
        scales = (entry.scales.stored for entry in self._tensors.values() if entry.scales)
        return tuple(sorted({entry.file for entry in (*self._tensors.values(), *scales)}))

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """Read only the bytes of a tensor or a region: CPU, of its dtype, contiguous, memory of its own.

        Tensors of experts in MXFP4 are dequantised to bf16.

        Args:
            part: slices of step 1 of the leading dimensions, the others whole; None for the whole tensor.
                One more than the tensor has dimensions: the last one is seen as [..., 2].
        Raises:
            UserError: the file was cut short after it was opened.
        """
        return self._seen(name, part or ()).contiguous()

    def _seen(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """As read(), perhaps with other strides: what puts it elsewhere then moves it once."""
        if len(part) > len(self.shapes[name]):
            *outer, last, half = part
            pairs = self._seen(name, (*outer, slice(2 * last.start, 2 * last.stop)))
            return pairs.unflatten(-1, (-1, 2))[..., half]
        if (packed := self._packed.get(name)) is not None:
            return read_packed(self._read_stored, packed, part)
        stored = self._tensors[name]
        if stored.scales is not None:
            return self._scaled(stored, stored.scales, part).to(self.dtypes[name])
        return self._read_stored(stored, part)

    def _read_stored(self, stored: StoredTensor, part: tuple[slice, ...]) -> Tensor:
        return read_part(self._descriptors[stored.file], stored, part)

    def read_into(self, target: Tensor, name: str, part: tuple[slice, ...]) -> None:
        """As read(), into a tensor of the region's shape, any dtype and device; directly where both agree."""
        if name in self._packed or len(part) > len(self.shapes[name]):
            target.copy_(self._seen(name, part))
            return
        stored = self._tensors[name]
        if stored.scales is not None:
            target.copy_(self._scaled(stored, stored.scales, part))
            return
        is_direct = target.dtype == stored.dtype and target.device.type == "cpu" and target.is_contiguous()
        found = read_part(
            self._descriptors[stored.file], stored, part, out=target.detach() if is_direct else None
        )
        if not is_direct:
            target.copy_(found)

    def check_model(self, architecture: Architecture) -> None:
        """As check(), of the model of this architecture; layers that draft tokens may be there, too."""
        names: list[str] = []
        if hf_family(architecture.family).draft_keys:
            layers = ((name, re.match(r"model\.layers\.(\d+)\.", name)) for name in self.shapes)
            names = [name for name, found in layers if found and int(found[1]) >= architecture.num_layers]
            names += [name for name in self.shapes if name.startswith("mtp.")]
        self.check(hf_shapes(architecture), tied=architecture.tie_embeddings, left_out=frozenset(names))

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        *,
        tied: bool,
        left_out: frozenset[str] = frozenset(),
    ) -> None:
        """Refuse weights that are not exactly those of a model.

        Two extras are harmless: rotary frequencies of early Llama files, and in a model with tied embeddings
        an output layer that equals the embedding bit by bit.

        Raises:
            UserError: tensors that are missing, not expected, of another shape or of another kind of dtype:
                up to four one by one; of more, the number of each kind, its first ones and what they share.
        """
        other = []
        for name in expected:
            if name not in self.shapes:
                continue
            shape, dtype = self.shapes[name], self.dtypes[name]
            if shape != tuple(expected[name]):
                other.append(f"wrong shape: {name}: expected {list(expected[name])}, got {list(shape)}")
            if dtype not in _READABLE:
                other.append(
                    f"wrong dtype: {name}: expected a float of 16, 32 or 64 bits, got {str(dtype)[6:]}: "
                    "a quantised model must be dequantised first"
                )
        missing = list(self._missing(expected))
        unexpected = list(self._unexpected({*expected, *left_out}, tied=tied))
        if count := len(missing) + len(unexpected) + len(other):
            raise UserError(
                "\n  ".join(
                    [
                        f"{self.directory}: the weights are not those of its config.json ({count} "
                        "problem(s)); give a directory whose config.json and weights belong together:",
                        *mismatch_lines(missing=missing, unexpected=unexpected, other=other),
                    ]
                )
            )

    def _scaled(self, stored: StoredTensor, scales: BlockScales, part: tuple[slice, ...]) -> Tensor:
        """[*part] fp32: the values times the factors of their blocks."""
        values = read_part(self._descriptors[stored.file], stored, part).float()
        parts = (*part, *[slice(None)] * (2 - len(part)))
        bounds = [range(size)[each] for size, each in zip(stored.shape, parts, strict=True)]
        pairs = [*zip(bounds, scales.block, strict=True)]
        blocks = [slice(bound.start // length, -(-bound.stop // length)) for bound, length in pairs]
        factors = read_part(self._descriptors[scales.stored.file], scales.stored, blocks).float()
        for dim, (bound, length) in enumerate(pairs):
            factors = factors.repeat_interleave(length, dim).narrow(dim, bound.start % length, len(bound))
        return values.mul_(factors)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _missing(self, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        for name, shape in expected.items():
            if name not in self.shapes:
                hint = (
                    " (a model that ties its embeddings says tie_word_embeddings: true)"
                    if name == _OUTPUT
                    else ""
                )
                yield f"{name} {list(shape)}{hint}"

    def _unexpected(self, expected: Collection[str], *, tied: bool) -> Iterator[str]:
        for name, shape in self.shapes.items():
            if name in expected or is_old_rope_buffer(name):
                continue
            if tied and name == _OUTPUT and _EMBEDDING in self.shapes:
                if not self._are_equal(_OUTPUT, _EMBEDDING):
                    yield (
                        f"{name} {list(shape)}: config.json ties it to {_EMBEDDING}, but they "
                        "differ; set tie_word_embeddings to false if the two are meant to differ"
                    )
                continue
            yield f"{name} {list(shape)}"

    def _are_equal(self, one: str, other: str) -> bool:
        if self.shapes[one] != self.shapes[other] or self.dtypes[one] != self.dtypes[other]:
            return False
        if len(self.shapes[one]) != 2:
            return False
        row = self.read(one, (slice(0, 1),))
        rows = max(1, _COMPARED_BYTES // max(1, row.nbytes))
        for start in range(0, self.shapes[one][0], rows):
            part = (slice(start, start + rows),)
            pair = [self.read(name, part).view(-1).view(torch.uint8) for name in (one, other)]
            if not torch.equal(*pair):
                return False
        return True


def open_weights(directory: Path, *, allow_pickle: bool = False) -> HfWeights:
    """Open the weights of a Hugging Face model directory: one file or shards with an index.

    Args:
        allow_pickle: also read pytorch_model.bin and its shards, tensors only.
    Raises:
        UserError: nothing there that can be read, files that are broken or do not agree; the message says
            which, and what to do.
    """
    found = find_weights(Path(directory), allow_pickle=allow_pickle)
    return HfWeights(Path(directory), found.tensors, notes=found.notes)


# Copies values between parts of Megatron tensors and Hugging Face tensors, as the table of names says.


class ModelWeights(Protocol):
    """A whole model by Hugging Face names; HfWeights says what each method does."""

    def check_model(self, architecture: Architecture) -> None: ...
    def read_into(self, target: Tensor, name: str, part: tuple[slice, ...]) -> None: ...


def fill_part(part: Tensor, tensor: MegatronTensor, offset: tuple[int, ...], weights: ModelWeights) -> None:
    """Fill `part`, which begins at `offset` of `tensor`, in place; rows of vocabulary padding become zero."""
    if tensor.has_padding and offset[0] + part.shape[0] > tensor.shape[0]:
        part.zero_()
    for each in hf_regions(tensor, Region.of(part.shape, offset)):
        weights.read_into(each.as_in_file(part[each.target.slices]), each.name, each.source.slices)


def fill_whole(
    whole: Tensor, name: str, tensor: MegatronTensor, read_into: Callable[[Tensor, tuple[int, ...]], None]
) -> None:
    """Fill the Hugging Face tensor `name` in place from the Megatron tensor that it is a part of.

    Args:
        read_into: fills its first argument with the region of the Megatron tensor that begins at the second.
    """
    for each in hf_regions(tensor, Region.of(tensor.shape)):
        if each.name == name:
            box = whole if each.run.half is None else whole.unflatten(-1, (-1, 2))
            read_into(each.as_in_megatron(box[each.source.slices]), each.target.start)
