"""`sftrl coupling`: what each stage of training did to the loss of SFT and to the reward of RL.

Each stage is evaluated (`sftrl eval`) on the same prompts and demonstrations with the same seed, so that all
differences are paired. What is done is passed over; other settings in the same folder are refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sftrl.apps.coupling.measure import Measures, start_of_reference
from megatron_sftrl.apps.coupling.report import Coupling, changes_of, numbers_of, tell
from megatron_sftrl.apps.coupling.rotation import Turns, measure_turns, pair_key
from megatron_sftrl.apps.coupling.stages import CouplingRequest, Stage
from megatron_sftrl.apps.evaluate.run import evaluate_all, read_held_out
from megatron_sftrl.apps.report.page import check_matplotlib
from megatron_sftrl.config.schema import GrpoConfig, TokenizerSection
from megatron_sftrl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sftrl.data.tokenizer_backends import PROBES
from megatron_sftrl.engine.checkpoint import stored_assets
from megatron_sftrl.engine.parallel import ParallelContext, run_context
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_config import is_hugging_face
from megatron_sftrl.models.hf_output import write_assets
from megatron_sftrl.models.tokenizer_files import has_tokenizer
from megatron_sftrl.rollout.build import engine_here
from megatron_sftrl.trainers.checked import checked_run
from megatron_sftrl.trainers.weights import check_sizes, only_read


def run_coupling(config: GrpoConfig, request: CouplingRequest) -> None:
    """Evaluate every stage, measure between them, and report; every rank calls it, rank 0 tells.

    Raises:
        UserError: before anything is generated: stages of another model or tokenizer, or what run_evaluation
            refuses; an output of other stages.
    """
    if request.num_samples < 2:
        raise UserError(f"--samples: expected 2 or more, got {request.num_samples}: RL compares responses")
    if request.rank < 0:
        raise UserError(f"--rank: expected 0 or more, got {request.rank}")
    check_matplotlib()
    config = engine_here(only_read(config))
    checked = checked_run(config)
    evaluations = [request.evaluation(stage) for stage in request.stages]
    held_out = read_held_out(config, evaluations[0])
    _check_stages(request.stages, held_out.architecture, held_out.tokenizer)
    prior = start_of_reference(checked)
    with run_context(config) as parallel:
        evaluate_all(config, evaluations, held_out, parallel)
        facts = on_rank_zero(lambda: {stage: _facts(request, stage) for stage in request.stages})
        measures = Measures(checked, request, held_out, facts, prior, parallel)
        gradients = {stage.name: measures.gradients(stage) for stage in request.stages}
        divergences = {pair_key(*pair): measures.divergences(*pair) for pair in request.pairs}
        measures.close()
        turns = _turns(config, request, held_out.architecture, facts, parallel) if request.rank else {}

        def report() -> None:
            numbers = {
                stage.name: numbers_of(request.out / stage.name, config, held_out.prompts, ks=request.ks)
                for stage in request.stages
            }
            found = Coupling(
                stages={stage.name: str(stage.path) for stage in request.stages},
                numbers=numbers,
                changes=changes_of(numbers, request.pairs, divergences, seed=request.seed),
                gradients=gradients,
                turns=turns,
                seed=request.seed,
            )
            tell(request.out, found)

        on_rank_zero(report)


Facts = Mapping[Stage, Mapping[str, Any]]
"""By stage, what its evaluation was made of."""


def _turns(
    config: GrpoConfig,
    request: CouplingRequest,
    architecture: Architecture,
    facts: Facts,
    parallel: ParallelContext,
) -> Turns:
    weights = {stage.name: facts[stage]["weights"] for stage in request.stages}
    return measure_turns(
        request.out / "rotation.jsonl",
        request.stages,
        request.pairs,
        architecture,
        parallel,
        rank=request.rank,
        of={"rank": request.rank, "weights": weights},
        config=config,
    )


def _facts(request: CouplingRequest, stage: Stage) -> Mapping[str, Any]:
    """What the evaluation of a stage was made of, its place on the disk aside."""
    settings = json.loads((request.out / stage.name / "settings.json").read_text(encoding="utf-8"))
    return {name: value for name, value in settings.items() if name != "checkpoint"}


# What cannot be compared.


def _check_stages(stages: Sequence[Stage], architecture: Architecture, tokenizer: Tokenizer) -> None:
    """Refuse a stage of another model or another tokenizer than the run's, its weights not read.

    Raises:
        UserError: naming the stage.
    """
    for stage in stages:
        try:
            check_sizes(stage.path, architecture)
            _check_ids(stage.path, tokenizer)
        except UserError as error:
            raise UserError(f"--stage {stage.name}: {error}") from error


def _check_ids(path: Path, tokenizer: Tokenizer) -> None:
    """Another chat template is another way to ask; other ids of the same text are another language."""
    with tempfile.TemporaryDirectory() as folder:
        directory = path
        if not is_hugging_face(path):
            directory = Path(folder)
            write_assets(directory, stored_assets(path))
        if not has_tokenizer(directory):
            return
        theirs = load_tokenizer(TokenizerSection(path=directory))
    for text in PROBES.values():
        if theirs.backend.encode(text) != tokenizer.backend.encode(text):
            raise UserError(
                f"{path} was trained with another tokenizer than tokenizer.path: the two make other ids of "
                f"{text!r}; stages that are compared have one tokenizer"
            )
