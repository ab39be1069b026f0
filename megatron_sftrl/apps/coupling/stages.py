"""The stages of a training as checkpoints, in order, and what is asked about them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sftrl.apps.evaluate.run import EvalRequest
from megatron_sftrl.engine.checkpoint import checkpoint_at, complete_checkpoints
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_config import is_hugging_face


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A checkpoint with a name for the reader: a step directory, or a Hugging Face directory."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CouplingRequest:
    """What is measured, and where it goes.

    Args:
        out: folder for STAGE/ (an evaluation and gradients.json each), kl/, rotation.jsonl and the report.
        stages: at least two, in the order of training.
        prompts: as for an evaluation; so are demonstrations, num_samples, ks and seed.
        rank: singular vectors of each matrix whose rotation is measured; 0 for none.
    """

    out: Path
    stages: tuple[Stage, ...]
    prompts: tuple[Path, ...]
    demonstrations: Path
    num_samples: int
    ks: tuple[int, ...]
    seed: int
    rank: int

    @property
    def pairs(self) -> tuple[tuple[Stage, Stage], ...]:
        """(before, after): each stage after the one before it, then each after the first."""
        follow = list(zip(self.stages, self.stages[1:], strict=False))
        return tuple(dict.fromkeys([*follow, *((self.stages[0], stage) for stage in self.stages[1:])]))

    def evaluation(self, stage: Stage) -> EvalRequest:
        """What `sftrl eval` does with a stage."""
        return EvalRequest(
            out=self.out / stage.name,
            checkpoint=stage.path,
            prompts=self.prompts,
            demonstrations=self.demonstrations,
            num_samples=self.num_samples,
            ks=self.ks,
            seed=self.seed,
        )


def stages_of(named: Sequence[tuple[str, Path, bool]]) -> tuple[Stage, ...]:
    """The stages of a command line: (name, directory, whether every checkpoint of that run is one).

    Raises:
        UserError: fewer than two, a name or a checkpoint twice, no checkpoint, a name that is no folder's.
    """
    stages: list[Stage] = []
    for name, path, is_run in named:
        if not is_run:
            stages.append(Stage(name=name, path=path if is_hugging_face(path) else checkpoint_at(path)))
            continue
        steps = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
        if not steps:
            raise UserError(f"--along {name}={path}: expected a run directory with checkpoints/step-*")
        stages += [Stage(name=f"{name}-{int(step.name.partition('-')[2])}", path=step) for step in steps]
    if len(stages) < 2:
        raise UserError(f"coupling: expected two stages or more, got {len(stages)}; name each by --stage")
    for place, stage in enumerate(stages):
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", stage.name, re.ASCII) or stage.name.lower() in _OURS:
            raise UserError(
                f"--stage {stage.name}: a stage names a folder: expected letters, digits, '_', '-' and '.', "
                f"and none of {', '.join(_OURS)}"
            )
        for other in stages[:place]:
            if other.name.lower() == stage.name.lower():
                raise UserError(f"--stage {stage.name}: two stages have this name; rename one")
            if other.path.resolve() == stage.path.resolve():
                raise UserError(
                    f"--stage {stage.name}: {stage.path} is {other.name}, too: nothing would have changed; "
                    "name the checkpoint of another stage"
                )
    return tuple(stages)


_OURS = ("kl", "rotation.jsonl", "coupling.json", "report.html")
