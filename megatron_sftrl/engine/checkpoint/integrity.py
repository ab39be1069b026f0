"""Every file of a checkpoint is hashed when written and again before it is used, by all ranks together.

torch reads tensors without comparing the checksums in its own files (measured with torch 2.13: a
flipped bit in a weight loads without a word), so nothing else would notice a damaged disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from megatron_sftrl.engine.checkpoint.directory import file_problem, file_record
from megatron_sftrl.engine.checkpoint.record import CheckpointRecord, FileRecord, read_record
from megatron_sftrl.engine.together import on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError, first_of


def hashed_files(
    directory: Path,
    group: dist.ProcessGroup | None = None,
    *,
    names: Sequence[str] | None = None,
    on_progress: Callable[[], None] | None = None,
) -> dict[str, FileRecord]:
    """Size and hash of files below `directory`; each rank reads its share.

    Args:
        directory: whose files do not change any more.
        group: of all ranks; the default one when not given.
        names: of the files; all of them when not given.
        on_progress: called for each file.
    Raises:
        UserError, RuntimeError: on every rank, when any rank could not read.
    """
    if names is None:
        names = on_rank_zero(
            lambda: sorted(
                str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()
            ),
            group,
        )

    def record(name: str) -> FileRecord:
        if on_progress is not None:
            on_progress()
        return file_record(directory / name)

    mine = on_every_rank(lambda: {name: record(name) for name in _share(names)}, group)
    everyone: list[dict[str, FileRecord]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    merged = {name: record for each in everyone for name, record in each.items()}
    return {name: merged[name] for name in names}


class Verification:
    """Hashes a checkpoint's files in a thread, each rank its share, while the checkpoint is used.

    Args:
        path: of the checkpoint; every rank makes a Verification of it.
    Raises:
        UserError: on every rank: no checkpoint.json that can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: CheckpointRecord = on_rank_zero(lambda: read_record(path))
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._mine = pool.submit(self._problems_of_share)
        pool.shutdown(wait=False)

    def finish(self) -> CheckpointRecord:
        """Wait for all ranks; every rank calls it before anything made of the checkpoint counts.

        Raises:
            UserError: on every rank, naming the first files that are missing or have another size or content.
        """
        mine = on_every_rank(self._mine.result)
        everyone: list[list[str | None]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if problems := sorted(text for each in everyone for text in each if text is not None):
            raise UserError(
                f"checkpoint {self.path} is damaged: {'; '.join(first_of(problems))}. Nothing was loaded; "
                "delete this directory to go back to the checkpoint before it"
            )
        return self.record

    def _problems_of_share(self) -> list[str | None]:
        files = self.record.files
        return [file_problem(self.path / name, files[name]) for name in _share(list(files))]


def verified_record(path: Path) -> CheckpointRecord:
    """The record of a checkpoint whose files all are what was written.

    Raises:
        UserError: on every rank, naming the first files that are missing or have another size or content.
    """
    return Verification(path).finish()


def _share(names: Sequence[str]) -> list[str]:
    return list(names)[dist.get_rank() :: dist.get_world_size()]
