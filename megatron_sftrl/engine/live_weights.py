"""The live weights of this rank, addressed as regions of Hugging Face tensors, adapters merged into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sftrl.engine.checkpoint.tensors import (
    first_replicas,
    model_tensors,
    send_to_replicas,
    weights_of,
)
from megatron_sftrl.engine.lora import LowRank, low_ranks
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.together import on_every_rank
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_weights import ModelWeights, fill_part
from megatron_sftrl.models.tensors import Region, hf_regions, megatron_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveWeights:
    """Disjoint parts of Hugging Face tensors that this rank's parameters hold, without vocabulary padding.

    Args:
        parts: views of the parameters.
        added: what this rank's adapters add to its parts of a tensor.
    """

    parts: Mapping[str, Mapping[Region, Tensor]]
    added: Mapping[str, Sequence[LowRank]]

    def read(self, name: str, region: Region) -> Tensor:
        """`region`, which lies inside one part: a view, or with adapters a copy that they are merged into."""
        for place, view in self.parts[name].items():
            if place.intersect(region) == region:
                weight = view[region.relative_to(place.start).slices]
                low_ranks = [each for each in self.added.get(name, ()) if each.has(region)]
                return low_ranks[0].merged(weight, region) if low_ranks else weight
        raise AssertionError(f"{name} {region} lies in none of {list(self.parts[name])}")

    def regions(self) -> dict[str, tuple[Region, ...]]:
        """The regions alone, to tell other ranks."""
        return {name: tuple(parts) for name, parts in self.parts.items()}

    def dtypes(self) -> set[torch.dtype]:
        return {view.dtype for _, view in self._views()}

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        for name, parts in self.parts.items():
            for view in parts.values():
                yield name, view


def live_weights(chunks: Sequence[LanguageModel], architecture: Architecture) -> LiveWeights:
    """The weights of this rank's chunks, in any layout, as they are now.

    What is fp32 in a model of bf16 is seen as twice as many bf16 numbers: its bits.
    """
    dtype: torch.dtype = chunks[0].config.params_dtype
    table = {(tensor.key, tensor.index): tensor for tensor in megatron_tensors(architecture)}
    num_stacked = {key: len(index) for key, index in table}
    parts: dict[str, dict[Region, Tensor]] = {}
    for shard in model_tensors(chunks, prefix=""):
        key = shard.key.removeprefix(".")
        stacked = num_stacked[key]
        tensor = table[key, tuple(shard.global_offset[:stacked])]
        shape = shard.local_shape[stacked:]
        assert shard.data is not None
        data = shard.data.detach().view(shape)
        for each in hf_regions(tensor, Region.of(shape, shard.global_offset[stacked:])):
            place, view = each.source, each.as_in_file(data[each.target.slices])
            if tensor.is_fp32:
                words = view.element_size() // dtype.itemsize
                place, view = place.stretched(words), view.view(dtype)
            parts.setdefault(each.name, {})[place] = view
    return LiveWeights(parts=parts, added=low_ranks(chunks))


# Fills a model's shards straight from Hugging Face files: each part is read by one of the ranks that hold it.


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[LanguageModel],
    weights: ModelWeights,
    architecture: Architecture,
    parallel: ParallelContext,
) -> None:
    """Fill the chunks, in any layout; every rank calls it. Dtypes are cast, vocabulary padding becomes zero.

    An optimizer over bf16 weights keeps fp32 copies: build it after this call, or call its
    reload_model_params().

    Raises:
        UserError, RuntimeError: on every rank: every missing, extra or differently shaped tensor, before
            anything is changed; or a file that cannot be read.
    """
    table = {(tensor.key, tensor.index): tensor for tensor in megatron_tensors(architecture)}
    num_stacked = {key: len(index) for key, index in table}
    parts = first_replicas(model_tensors(chunks, prefix=""))

    def read() -> None:
        weights.check_model(architecture)
        for part in parts:
            key = part.key.removeprefix(".")
            stacked = num_stacked[key]
            tensor = table[key, tuple(part.global_offset[:stacked])]
            offset, shape = part.global_offset[stacked:], part.local_shape[stacked:]
            assert part.data is not None
            fill_part(part.data.view(shape), tensor, offset, weights)

    on_every_rank(read)
    send_to_replicas(weights_of(chunks), parallel)
