"""The runs of a comparison as commands on YAML files, and what is refused before any of them starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sftrl.apps.compare.config import (
    BAR,
    SCORES,
    CompareConfig,
    ScoreSection,
    Tree,
    arm_trees,
    tree_of,
    yaml_of,
)
from megatron_sftrl.config.load import config_from_text
from megatron_sftrl.config.placement import with_engine
from megatron_sftrl.config.schema import GrpoConfig, ModelSection, RunConfig, TrainingConfig
from megatron_sftrl.data.formats import Columns, FormattedRow, Kind, read_formatted
from megatron_sftrl.data.sources import find_files
from megatron_sftrl.engine.checkpoint import checkpoint_at
from megatron_sftrl.engine.checkpoint.directory import step_name
from megatron_sftrl.errors import UserError, first_of
from megatron_sftrl.models import architecture_of
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_config import is_hugging_face
from megatron_sftrl.observability.run_directory import (
    RunDirectory,
    flat,
    open_run_directory,
    write_atomically,
)
from megatron_sftrl.rollout.build import engine_here
from megatron_sftrl.trainers.checked import checked_configuration
from megatron_sftrl.trainers.weights import check_sizes

RECORD = "compare.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command of a comparison.

    Args:
        name: its place below out_dir; NAME.yaml and NAME.log stand beside what it makes.
        arm: of several that need it, the first.
        seed: None where one result serves all seeds.
        kind: score, sft, eval_sft, grpo or eval_grpo.
        words: of the command line of `sftrl`.
        text: of NAME.yaml.
        done: a path that is there when the stage has done all of its work, and not before.
        needs: names of the stages whose results it reads.
    """

    name: str
    arm: str
    seed: int | None
    kind: str
    words: tuple[str, ...]
    text: str
    done: Path
    needs: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        return self.done.exists()


def stages_of(config: CompareConfig) -> list[Stage]:
    """Every stage in the order in which they are started: all arms under the first seed, then the next seed.

    Raises:
        UserError: a run whose YAML cannot be read, or an arm that changes what all arms share.
    """
    sft, grpo = tree_of(config.base.sft), tree_of(config.base.grpo)
    # What base.grpo does not say of the model is what base.sft says.
    grpo = {"model": sft.get("model"), "tokenizer": _tokenizer(sft), **grpo}
    arms = arm_trees(config, sft)
    for name, run, schema in (("sft", arms["sft"][0], RunConfig), ("grpo", grpo, GrpoConfig)):
        text = yaml_of(run, run_dir=str(config.out_dir), seed=0)
        if config_from_text(text, source=f"base.{name}", schema=schema).train.steps is None:
            raise UserError(f"base.{name}: expected train.steps, so that every arm is trained for as long")
    scores = {name: _score_stages(config, name, *arm) for name, arm in arms.items()}
    once: dict[str, Stage] = {}
    for stage in (stage for each in scores.values() for stage in each):
        once.setdefault(stage.name, stage)  # arms with one writer have the same scores
    stages = list(once.values())
    for seed in config.seeds:
        for name, (tree, _) in arms.items():
            stages += _run_stages(config, name, seed, tree, grpo, scores[name])
    return stages


def left_of(stages: Sequence[Stage]) -> list[Stage]:
    """What is yet to be run: evaluations that are not done, and what these need.

    The weights of a run whose evaluations are done may be gone, to save the disk.
    """
    left: list[Stage] = []
    wanted: set[str] = set()
    for stage in reversed(stages):
        if not stage.is_done and (stage.kind.startswith("eval_") or stage.name in wanted):
            left.append(stage)
            wanted.update(stage.needs)
    return left[::-1]


def _tokenizer(tree: Tree) -> Tree | None:
    model = tree.get("model") or {}
    return {**({"path": model["hf"]} if "hf" in model else {}), **(tree.get("tokenizer") or {})} or None


def _score_stages(config: CompareConfig, arm: str, tree: Tree, score: ScoreSection | None) -> list[Stage]:
    """One for each entry of data.train, then of data.valid: the loss reads the scores of both.

    They are named after the writer, whichever arm asks.
    """
    if score is None:
        return []
    writer = hashlib.sha256(json.dumps([str(score.checkpoint), score.model], sort_keys=True).encode())
    place = f"{SCORES}/{score.checkpoint.name}-{writer.hexdigest()[:6]}"
    changes: dict[str, Any] = {"run_dir": str(config.out_dir / place), "seed": 0, "lora": None}
    if score.model is not None:
        changes |= {"model": score.model, "tokenizer": _tokenizer(tree)}
    text = yaml_of(tree, **changes)
    stages = []
    data = config_from_text(text, source=f"arms.{arm}").data
    for number, path in enumerate([*data.train_paths, *data.valid]):
        name = f"{place}-{number}"
        out = config.out_dir / f"{name}.jsonl"
        words = ("score", str(config.out_dir / f"{name}.yaml"), "--checkpoint", str(score.checkpoint))
        words = (*words, "--data", str(path), "--out", str(out))
        stages.append(
            Stage(name=name, arm=arm, seed=None, kind="score", words=words, text=text, done=out, needs=())
        )
    return stages


def _run_stages(
    config: CompareConfig, arm: str, seed: int, sft: Tree, grpo: Tree, scores: Sequence[Stage]
) -> Iterator[Stage]:
    """SFT, its evaluation, GRPO from its weights, and the evaluation of that."""
    where = f"{arm}/seed-{seed}"
    folder = config.out_dir / where

    def stage(kind: str, words: Sequence[str], text: str, done: Path, needs: Sequence[str]) -> Stage:
        name = f"{where}/{kind}"
        return Stage(
            name=name,
            arm=arm,
            seed=seed,
            kind=kind,
            words=(words[0], str(config.out_dir / f"{name}.yaml"), *words[1:]),
            text=text,
            done=done,
            needs=tuple(needs),
        )

    changes: dict[str, Any] = {"run_dir": str(folder / "sft"), "seed": seed}
    if scores:
        old = config_from_text(yaml_of(sft, **changes), source=f"arms.{arm}").data
        new = [str(each.done) for each in scores]
        train: list[Any] = new[: len(old.train)]
        if (weights := old.train_weights) is not None:
            train = [{"path": p, "weight": weight} for p, weight in zip(train, weights, strict=True)]
        changes["data"] = {**sft["data"], "train": train, "valid": new[len(old.train) :]}
    last = _last_checkpoint(folder / "sft", sft)
    yield stage("sft", ["sft"], yaml_of(sft, **changes), last, [each.name for each in scores])
    model = _started_from(grpo["model"], folder / "sft")
    after = yaml_of(grpo, run_dir=str(folder / "grpo"), seed=seed, model=model)
    asked = {"temperature": config.base.eval.temperature, "max_new_tokens": config.base.eval.max_new_tokens}
    rollout = {**grpo["rollout"], **{key: value for key, value in asked.items() if value is not None}}
    evaluated = yaml_of(grpo, run_dir=str(folder / "grpo"), seed=seed, model=model, rollout=rollout)

    def evaluation(kind: str) -> Stage:
        out = folder / f"eval_{kind}"
        words = _eval_words(config, folder / kind, out, seed)
        return stage(f"eval_{kind}", words, evaluated, out / "results.json", [f"{where}/{kind}"])

    yield evaluation("sft")
    yield stage("grpo", ["grpo"], after, _last_checkpoint(folder / "grpo", grpo), [f"{where}/sft"])
    yield evaluation("grpo")


def _last_checkpoint(run_dir: Path, tree: Tree) -> Path:
    return run_dir / "checkpoints" / step_name(tree["train"]["steps"])


def _started_from(model: Tree, checkpoint: Path) -> Tree:
    """The same sizes, with the weights of a checkpoint."""
    sizes = {key: value for key, value in model.items() if key not in ("hf", "allow_pickle")}
    if model.get("hf") is not None:
        sizes["hf_config"] = model["hf"]
    return {**sizes, "init_checkpoint": str(checkpoint)}


def _eval_words(config: CompareConfig, checkpoint: Path, out: Path, seed: int) -> list[str]:
    asked = config.base.eval
    words = ["eval", "--checkpoint", str(checkpoint), "--out", str(out), "--seed", str(seed)]
    words += ["--samples", str(asked.samples), "--k", *map(str, asked.all_ks)]
    words += ["--prompts", *map(str, asked.prompts)]
    return words + (["--demonstrations", str(asked.demonstrations)] if asked.demonstrations else [])


# What would make runs fail after hours, or be compared that should not be.


def check(config: CompareConfig, stages: Sequence[Stage]) -> dict[str, str]:
    """Refuse what does not fit together, and what does not belong to the runs that are there already.

    Returns:
        What the runs do not say of themselves, for write_files().
    Raises:
        UserError: naming the arm, the run or the file.
    """
    loaded = {stage.name: _loaded(config, stage) for stage in stages}
    first = [stage for stage in stages if stage.seed == config.seeds[0]]
    runs = {stage.arm: loaded[stage.name] for stage in first if stage.kind == "sft"}
    architecture = architecture_of(runs[BAR].model)
    if runs[BAR].model.init_checkpoint is not None:
        _check_weights("model.init_checkpoint", runs[BAR].model.init_checkpoint, architecture)
    world_size = config.launch.nproc * config.launch.nodes
    tokenizer = ""
    for arm, (_, score) in arm_trees(config, tree_of(config.base.sft)).items():
        with _told_as(f"arm {arm}"):
            # Demonstrations with scores are yet to be made.
            run = runs[arm].model_copy(update={"data": runs[BAR].data})
            checked = checked_configuration(run, world_size=world_size)
            tokenizer = checked.tokenizer.fingerprint
            if score is not None and "behavior_logprobs" not in checked.loss.needs:
                raise UserError(f"score: the loss {run.loss.name} reads no behaviour log-probabilities")
            if score is not None:
                model = ModelSection.model_validate(score.model) if score.model else run.model
                _check_weights("score.checkpoint", score.checkpoint, architecture_of(model))
            if run.reference is not None and run.reference.checkpoint is not None:
                _check_weights("reference.checkpoint", run.reference.checkpoint, architecture)
    for stage in first:
        if stage.arm == BAR and stage.kind in ("grpo", "eval_grpo"):
            with _told_as("base.grpo" if stage.kind == "grpo" else "base.eval"):
                run = loaded[stage.name]
                if run.lora is not None:
                    raise UserError(
                        "lora: expected none: adapters are trained over a Hugging Face directory, and it "
                        "begins with an arm's checkpoint; remove it, and all weights are trained from there"
                    )
                if architecture_of(run.model) != architecture:
                    raise UserError("its model has other sizes than that of base.sft, whose weights it takes")
                # Its own first weights are yet to be made.
                run = run.model_copy(update={"model": runs[BAR].model})
                if checked_configuration(run, world_size=world_size).tokenizer.fingerprint != tokenizer:
                    raise UserError("its tokenizer is another one than that of base.sft")
    facts = {"tokenizer": tokenizer[:12], **_facts(config, stages, loaded)}
    _check_what_is_there(config, stages, loaded, facts)
    if config.base.eval.overlap == "refuse" and not _recorded(config):
        _check_overlap(config, runs[BAR], next(loaded[each.name] for each in first if each.kind == "grpo"))
    return facts


def _check_overlap(config: CompareConfig, sft: RunConfig, grpo: GrpoConfig) -> None:
    """Refuse held-out questions that are trained on; the first start of a comparison looks at all rows.

    Raises:
        UserError: how many of them, the first with its place in both files; a row that cannot be read.
    """
    trained: dict[bytes, str] = {}
    for path in sft.data.train_paths:
        for row in read_formatted(
            path, "demonstrations", columns=sft.data.columns, key="base.sft data.train"
        ):
            for asked in _questions(row):
                trained.setdefault(asked, row.source)
    for path in grpo.data.train_paths:
        for row in read_formatted(path, "prompts", columns=grpo.data.columns, key="base.grpo data.train"):
            trained.setdefault(_questions(row)[-1], row.source)
    held_out: list[tuple[str, list[Path], Kind, Columns | None]] = [
        ("prompts", config.base.eval.prompts, "prompts", grpo.data.columns)
    ]
    if config.base.eval.demonstrations is not None:
        held_out.append(("demonstrations", [config.base.eval.demonstrations], "demonstrations", None))
    for name, paths, kind, columns in held_out:
        key = f"base.eval.{name}"
        rows = [row for path in paths for row in read_formatted(path, kind, columns=columns, key=key)]
        common = [(row.source, trained[asked]) for row in rows if (asked := _questions(row)[0]) in trained]
        if common:
            raise UserError(
                f"{key}: {len(common)} of {len(rows)} are in the training files, too, the first: "
                f"{common[0][0]} asks what {common[0][1]} asks; remove them from one of the two, or set "
                "base.eval.overlap: allow"
            )


def _questions(row: FormattedRow) -> list[bytes]:
    """Hashes of the turns in front of each answer, and of all turns where the last is none."""
    try:
        messages = row.conversation().messages
    except UserError as error:
        raise UserError(f"{row.source}: {error}") from error
    found, whole = [], hashlib.sha256()
    for message in messages:
        if message["role"] == "assistant":
            found.append(whole.digest())
        if message["role"] != "system":
            whole.update(
                json.dumps([message["role"], " ".join(str(message.get("content")).split())]).encode()
            )
    return found if messages[-1]["role"] == "assistant" else [*found, whole.digest()]


def _loaded(config: CompareConfig, stage: Stage) -> Any:
    schema = RunConfig if stage.kind in ("score", "sft") else GrpoConfig
    source = f"{config.out_dir / stage.name}.yaml (to be written)"
    run = config_from_text(stage.text, source=source, schema=schema)
    return _with_engine(config, run.grpo) if run.grpo is not None else run


def _with_engine(config: CompareConfig, run: GrpoConfig) -> GrpoConfig:
    """The run with the engine that it has begun with, or will begin with: jobs of Slurm run on GPUs."""
    begun = RunDirectory(path=run.run_dir).resolved
    if run.rollout.engine == "auto" and begun.exists():
        engine = flat(begun.read_text(encoding="utf-8"))["rollout.engine"]
        return run.model_copy(update={"rollout": run.rollout.model_copy(update={"engine": engine})})
    if config.launch.kind == "slurm":
        return with_engine(run, is_cuda=True, has_vllm=True)[0]
    return engine_here(run)


class _told_as:
    """Puts whose fault it is in front of a UserError."""

    def __init__(self, who: str) -> None:
        self._who = who

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            raise UserError(f"{self._who}: {error}") from error


def _check_weights(key: str, path: Path, architecture: Architecture) -> None:
    """Refuse weights of another architecture, before a run has to."""
    with _told_as(key):
        check_sizes(path, architecture)


def _check_what_is_there(
    config: CompareConfig, stages: Sequence[Stage], loaded: dict[str, TrainingConfig], facts: dict[str, str]
) -> None:
    """Refuse to go on with other settings, data or weights than what is there was made with."""
    for stage in stages:
        settings = config.out_dir / stage.name / "settings.json"
        if stage.kind in ("sft", "grpo"):
            open_run_directory(loaded[stage.name], is_writer=False)
        elif stage.kind != "score" and settings.exists():
            _same_evaluation(config, loaded[stage.name], settings)
    before = _recorded(config)
    if changed := [
        f"{key}: {before[key]} there, {value} now"
        for key, value in facts.items()
        if before.get(key, value) != value
    ]:
        raise UserError(
            "\n  ".join(
                [
                    f"{config.out_dir} holds a comparison of something else: choose another out_dir, or set "
                    "these back",
                    *first_of(changed, 12),
                ]
            )
        )


def _recorded(config: CompareConfig) -> dict[str, str]:
    record = config.out_dir / RECORD
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}


def _same_evaluation(config: CompareConfig, run: TrainingConfig, settings: Path) -> None:
    assert run.grpo is not None
    there = json.loads(settings.read_text(encoding="utf-8"))
    rollout = run.grpo.rollout.model_dump(mode="json")
    asked = {
        key: rollout[key] for key in there["rollout"] if key != "engine"
    }  # which may be of another machine
    now = {"samples": config.base.eval.samples, **asked}
    before = {"samples": there["samples"], **there["rollout"]}
    for key, value in now.items():
        if before[key] != value:
            raise UserError(
                f"base.eval: {settings.parent} was evaluated with {key} {before[key]} and not {value}: "
                "choose another out_dir, or set it back"
            )


def _facts(
    config: CompareConfig, stages: Sequence[Stage], loaded: dict[str, TrainingConfig]
) -> dict[str, str]:
    """What the runs do not say of themselves: the content of files, and whose scores an arm has."""
    first = {stage.kind: loaded[stage.name] for stage in stages if stage.arm == BAR}
    # A constant learning rate lets a run be made longer, and its evaluation would be that of the shorter one.
    facts = {f"base.{kind} train.steps": str(first[kind].train.steps) for kind in ("sft", "grpo")}
    roles = {
        "base.sft data.train": first["sft"].data.train_paths,  # type: ignore[attr-defined]
        "base.grpo data.train": first["grpo"].data.train_paths,  # type: ignore[attr-defined]
        "base.eval prompts": config.base.eval.prompts,
        "base.eval demonstrations": [config.base.eval.demonstrations]
        if config.base.eval.demonstrations
        else [],
    }
    for role, paths in roles.items():
        facts[role] = f"{', '.join(map(str, paths))} ({_content(paths, role)[:12]})"
    for run in loaded.values():
        rewards = run.grpo.rewards if run.grpo is not None else []
        for module in [module for each in (run.loss, *rewards) for module in each.modules]:
            # One that is imported by its name is a package's, with a version.
            if module.endswith(".py"):
                facts[f"module {module}"] = hashlib.sha256(Path(module).read_bytes()).hexdigest()[:12]
    if first["sft"].model.init_checkpoint is not None:
        facts["base.sft model.init_checkpoint"] = str(checkpoint_at(first["sft"].model.init_checkpoint))
    for stage in stages:
        if stage.kind == "score":
            checkpoint = Path(stage.words[stage.words.index("--checkpoint") + 1])
            found = checkpoint if is_hugging_face(checkpoint) else checkpoint_at(checkpoint)
            facts[f"{stage.name} checkpoint"] = str(found)
    return facts


def _content(paths: Sequence[Path], key: str) -> str:
    """SHA-256 over the files that the paths stand for."""
    files = [file.path for path in paths for file in find_files(path, key)]
    whole = hashlib.sha256()
    for path in files:
        for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if each.is_file():
                with each.open("rb") as stream:
                    whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def write_files(config: CompareConfig, stages: Sequence[Stage], facts: dict[str, str]) -> None:
    """The YAML of every stage that is not done, and the record of what they all were made of."""
    for stage in stages:
        if not stage.is_done:
            path = config.out_dir / f"{stage.name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, stage.text)
    record = json.dumps({**_recorded(config), **facts}, indent=1) + "\n"
    write_atomically(config.out_dir / RECORD, record)
