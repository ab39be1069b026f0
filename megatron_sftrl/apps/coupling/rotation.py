"""How far the leading singular vectors of each weight matrix turned between stages.

Of a matrix W = U S V^T the first r columns of U and of V span two subspaces. Their principal angles to those
of another stage are 0 where nothing turned, and do not depend on signs, nor on the order of equal singular
values. One matrix is read at a time, of all stages; ranks share the matrices.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.apps.coupling.stages import Stage
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.engine.checkpoint import StoredModel
from megatron_sftrl.engine.checkpoint.directory import read_record
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.together import on_every_rank, on_rank_zero
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_config import is_hugging_face
from megatron_sftrl.models.hf_weights import HfWeights, open_weights
from megatron_sftrl.models.tensors import hf_shapes
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.trainers.adapters import MergedWeights, open_merged

_SMALLEST = 1e-6
"""Of the largest singular value: below, a direction is rounding of the weights and none of the matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leading:
    """The r largest singular values [r], falling, and their vectors [rows, r] and [columns, r]; float64."""

    left: Tensor
    values: Tensor
    right: Tensor


def leading(matrix: Tensor, rank: int) -> Leading:
    """Of a matrix [rows, columns]; fewer than `rank` where it has fewer.

    By the eigenvectors of the smaller of W W^T and W^T W in float64. The full decomposition takes many times
    as long; for singular values above a millionth of the largest the two agree to 1e-8.
    """
    wide = matrix.to(torch.float64)
    is_tall = wide.shape[0] > wide.shape[1]
    if is_tall:
        wide = wide.T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    values = squares.flip(0)[:rank].clamp(min=0).sqrt()
    count = int((values > _SMALLEST * values[:1]).sum())
    values, near = values[:count], vectors.flip(1)[:, :count]
    far = torch.linalg.qr(wide.T @ near).Q
    return Leading(left=far if is_tall else near, values=values, right=near if is_tall else far)


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """[r] radians, rising, between the spans of two orthonormal bases [n, r].

    From cosines and sines together: an arc cosine alone cannot tell angles below 1e-8 from 0.
    """
    overlap = one.T @ other
    cosines = torch.linalg.svdvals(overlap)
    sines = torch.linalg.svdvals(other - one @ overlap).flip(0)
    return torch.atan2(sines, cosines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A matrix between two stages.

    Args:
        left, right: principal angles in radians, rising.
        values: ||s' - s|| / ||s|| of the leading singular values.
        weights: ||W' - W||_F / ||W||_F.
    """

    left: list[float]
    right: list[float]
    values: float
    weights: float


def turn_between(one: Leading, other: Leading, difference: Tensor, before: Tensor) -> Turn:
    """`difference` is that of the two matrices, `before` the first of them."""
    rank = min(len(one.values), len(other.values))
    changed = (other.values[:rank] - one.values[:rank]).norm()
    return Turn(
        left=principal_angles(one.left[:, :rank], other.left[:, :rank]).tolist(),
        right=principal_angles(one.right[:, :rank], other.right[:, :rank]).tolist(),
        values=_ratio(changed, one.values[:rank].norm()),
        weights=_ratio(difference.norm(), before.norm()),
    )


def _ratio(change: Tensor, of: Tensor) -> float:
    return float(change / of) if of else 0.0


Turns = dict[str, dict[str, Turn]]
"""By the name of the matrix in a Hugging Face model, then by the pair's key."""


def pair_key(before: Stage, after: Stage) -> str:
    return f"{before.name} -> {after.name}"


def measure_turns(
    file: Path,
    stages: Sequence[Stage],
    pairs: Sequence[tuple[Stage, Stage]],
    architecture: Architecture,
    parallel: ParallelContext,
    *,
    rank: int,
    of: Mapping[str, Any],
    config: TrainingConfig,
) -> Turns:
    """Every matrix of the model between every pair; every rank calls it, and gets what rank 0 keeps.

    Args:
        file: a line for what it is `of`, and one for each matrix that is done. One of other stages is begun
            again.
    """
    shapes = {
        name: shape
        for name, shape in hf_shapes(architecture).items()
        if len(shape) == 2 and not name.endswith("bias")  # of all experts
    }
    # Those of about one size side by side: a round takes as long as its largest.
    names = sorted(shapes, key=lambda name: (-shapes[name][0] * shapes[name][1], name))
    done = on_rank_zero(lambda: _read(file, of))
    left = [name for name in names if name not in done]
    with contextlib.ExitStack() as stack:
        readers = {stage: _reader(stage, architecture, stack, config) for stage in stages}
        for start in range(0, len(left), parallel.world_size):
            mine = left[start : start + parallel.world_size][parallel.rank : parallel.rank + 1]
            found = on_every_rank(
                lambda mine=mine: {
                    name: _turns_of(name, readers, pairs, parallel.device, rank=rank) for name in mine
                }
            )
            everyone: list[dict[str, dict[str, Turn]]] = [{}] * parallel.world_size
            dist.all_gather_object(everyone, found)
            new = {name: turns for each in everyone for name, turns in each.items()}
            on_rank_zero(lambda new=new: _append(file, new))
            done |= new
    return {name: done[name] for name in shapes}


Reader = Callable[[str], Tensor]


def _reader(
    stage: Stage, architecture: Architecture, stack: contextlib.ExitStack, config: TrainingConfig
) -> Reader:
    """Of whole tensors by their Hugging Face names; every rank calls it."""
    opened: HfWeights | StoredModel | MergedWeights
    if is_hugging_face(stage.path):
        pickle = config.model.allow_pickle
        opened = on_every_rank(lambda: open_weights(stage.path, allow_pickle=pickle))
    elif (lora := on_rank_zero(lambda: read_record(stage.path).lora)) is not None:
        opened = open_merged(stage.path, lora, architecture, config.model.hf)
    else:
        opened = on_every_rank(lambda: StoredModel(stage.path, architecture))
    stack.callback(opened.close)
    return opened.read


def _turns_of(
    name: str,
    readers: Mapping[Stage, Reader],
    pairs: Sequence[tuple[Stage, Stage]],
    device: torch.device,
    *,
    rank: int,
) -> dict[str, Turn]:
    """One matrix between all pairs; at most two stages' are in memory."""
    vectors = {stage: leading(read(name).to(device), rank) for stage, read in readers.items()}

    def turn(before: Stage, after: Stage) -> Turn:
        first = readers[before](name).to(device, torch.float64)
        difference = readers[after](name).to(device, torch.float64) - first
        return turn_between(vectors[before], vectors[after], difference, first)

    return {pair_key(*pair): turn(*pair) for pair in pairs}


def _read(file: Path, of: Mapping[str, Any]) -> Turns:
    """What is kept of these stages; the file begins again where it is of others."""
    head = json.dumps({"of": of})
    if file.exists():
        # Without the line that a kill has torn.
        first, *lines = file.read_text(encoding="utf-8").split("\n")[:-1] or [""]
        if first == head:
            write_atomically(file, "".join(f"{line}\n" for line in (head, *lines)))
            return {
                each["matrix"]: {key: Turn(**turn) for key, turn in each["turns"].items()}
                for each in map(json.loads, lines)
            }
    write_atomically(file, head + "\n")
    return {}


def _append(file: Path, new: Turns) -> None:
    with file.open("a", encoding="utf-8") as stream:
        for name, turns in new.items():
            told = {key: asdict(turn) for key, turn in turns.items()}
            stream.write(json.dumps({"matrix": name, "turns": told}) + "\n")


# Hundreds of matrices in a few lines.


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSummary:
    """Means over matrices: of their mean angles in degrees, of the largest, and of relative changes."""

    num_matrices: int
    left: float
    right: float
    largest: float
    values: float
    weights: float


def kind_of(name: str) -> str:
    """The name without the numbers of layer and expert."""
    return re.sub(r"\.\d+(?=\.)", "", name.removeprefix("model.")).removesuffix(".weight")


def layer_of(name: str) -> str:
    """The number of the layer, or the kind of what stands in none."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return found[1] if found else kind_of(name)


def summarize(turns: Turns, pair: str, by: Callable[[str], str]) -> dict[str, TurnSummary]:
    """The matrices of a pair in groups, in the order of the model."""
    groups: defaultdict[str, list[Turn]] = defaultdict(list)
    for name, each in turns.items():
        groups[by(name)].append(each[pair])
    return {group: _summary(found) for group, found in groups.items()}


def _summary(turns: Sequence[Turn]) -> TurnSummary:
    def mean(values: Iterator[float]) -> float:
        return float(torch.tensor(list(values), dtype=torch.float64).mean())

    def degrees(angles: Sequence[float]) -> float:
        return float(torch.rad2deg(torch.tensor(angles, dtype=torch.float64)).mean()) if angles else 0.0

    return TurnSummary(
        num_matrices=len(turns),
        left=mean(degrees(each.left) for each in turns),
        right=mean(degrees(each.right) for each in turns),
        largest=mean(degrees(max((each.left[-1:], each.right[-1:]))) for each in turns),
        values=mean(each.values for each in turns),
        weights=mean(each.weights for each in turns),
    )
