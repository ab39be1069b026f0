"""Which weights a run began with: found once, kept in origins.json, and the same ones at every resume.

A run directory names its newest checkpoint, and a Hugging Face directory can be written again: the same path
is another model after a while, and a frozen reference read from it would change in the middle of the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sftrl.engine.checkpoint import FoundCheckpoint, checkpoint_at, hashed_files
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_weights import HfWeights
from megatron_sftrl.observability.run_directory import RunDirectory, write_atomically

LOGGER = logging.getLogger(__name__)

FILE_NAME = "origins.json"

_WHAT_TO_DO = (
    "put the weights back as they were, or begin again in another run_dir; a run that goes on removes its "
    "older checkpoints (checkpoint.keep_last): copy the one that another run depends on, and name the copy"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Weights that a run was given.

    Args:
        place: of the checkpoint below the path that the configuration names; "." where they are the same.
        step: of the checkpoint; None for a Hugging Face directory.
        weights: SHA-256 over the names and contents of the files.
    """

    place: str
    step: int | None
    weights: str

    @property
    def text(self) -> str:
        what = "weights" if self.step is None else f"{self.place} (step {self.step}), weights"
        return f"{what} {self.weights[:12]}"


class Origins:
    """The weights that a run began with, by the key that names them. Every method is called by every rank.

    Args:
        directory: of the run; what an earlier start recorded there holds.
        is_resumed: the run has a checkpoint of its own.
    Raises:
        UserError: origins.json cannot be read.
    """

    def __init__(self, directory: RunDirectory, *, is_resumed: bool) -> None:
        self._file = directory.path / FILE_NAME
        # Without resolved.yaml no run has begun here, and the next one may name other weights.
        self._recorded = on_rank_zero(lambda: _read(self._file) if directory.resolved.exists() else {})
        self._is_resumed = is_resumed
        self._found = dict(self._recorded)

    def checkpoint(self, key: str, path: Path) -> Path:
        """The checkpoint to read for a key of the configuration and its path: that of the run's first start.

        Raises:
            UserError: on every rank: nothing there, or not the recorded one any more.
        """
        return on_rank_zero(lambda: self._choose(key, path))

    def take_checkpoint(self, key: str, path: Path, found: FoundCheckpoint) -> None:
        """Compare a verified checkpoint with the recorded one, or record it.

        Raises:
            UserError: on every rank: it is another one.
        """
        place = str(found.path.relative_to(path)) if found.path.is_relative_to(path) else "."
        origin = Origin(place=place, step=found.record.trainer.step, weights=found.record.content_hash())
        self._take(key, path, origin)

    def take_hf(self, key: str, path: Path, weights: HfWeights) -> str:
        """The same for a Hugging Face directory, whose weight files are hashed, each rank its share.

        Returns:
            hash_of_weights.
        Raises:
            UserError: on every rank: their content is another one.
        """
        content = hash_of_weights(path, weights)
        self._take(key, path, Origin(place=".", step=None, weights=content))
        return content

    def write(self) -> None:
        """Keep them in the run's directory; rank 0 only."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        values = {key: asdict(origin) for key, origin in sorted(self._found.items())}
        write_atomically(self._file, json.dumps(values, indent=2) + "\n")

    def _choose(self, key: str, path: Path) -> Path:
        before = self._recorded.get(key)
        if before is None:
            return checkpoint_at(path)
        recorded = path / before.place
        if not recorded.is_dir():
            raise UserError(
                f"{key}: this run began with {recorded}, step {before.step}, which is gone{_instead(path)}. "
                f"The run would go on with another model: {_WHAT_TO_DO}"
            )
        newest = _newest(path)
        if newest is not None and newest.name != recorded.name:
            LOGGER.info(
                "%s: this run stays with %s, as it began; %s has come to %s", key, recorded, path, newest.name
            )
        return recorded

    def _take(self, key: str, path: Path, origin: Origin) -> None:
        before = self._recorded.get(key)
        if before is not None and before.weights != origin.weights:
            raise UserError(
                f"{key}: {path / before.place} holds other weights than this run began with: expected "
                f"{before.text}, got {origin.text}. The run would go on with another model: {_WHAT_TO_DO}"
            )
        if before is None and self._is_resumed:
            on_rank_zero(
                lambda: LOGGER.warning(
                    "%s: an older version began this run and did not record which weights it took from %s; "
                    "now it is %s, and stays so",
                    key,
                    path,
                    origin.text,
                )
            )
        self._found[key] = origin


def hash_of_weights(path: Path, weights: HfWeights) -> str:
    """Of the weight files of a Hugging Face directory, their names and contents; each rank hashes a share."""
    files = hashed_files(path, names=[str(file.relative_to(path)) for file in weights.files])
    text = json.dumps({name: file.sha256 for name, file in sorted(files.items())})
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: Path) -> Mapping[str, Origin]:
    try:
        return {key: Origin(**values) for key, values in json.loads(file.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): it says which weights this run began with; restore it, or "
            "begin again in another run_dir"
        ) from error


def _newest(path: Path) -> Path | None:
    try:
        return checkpoint_at(path)
    except UserError:
        return None


def _instead(path: Path) -> str:
    newest = _newest(path)
    return "" if newest is None else f"; {path} now holds {newest.name}"
