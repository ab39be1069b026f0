"""compare.yaml: what every arm shares, what each of them changes, and how its runs are started."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_sftrl.config.data import Section
from megatron_sftrl.config.load import dump_yaml, load_config, parse_yaml, read_config_text
from megatron_sftrl.config.paths import ExpandedPath
from megatron_sftrl.errors import UserError

BAR = "sft"
"""The arm that all others are measured against: the loss sft, token_mean."""

SCORES = "scores"
"""Folder of the behaviour log-probabilities in out_dir."""

Tree = dict[str, Any]
Run = ExpandedPath | Tree
"""A run's YAML: the path of a file, or what would stand in it."""

_OF_AN_ARM = ("loss", "reference", "lora", "optim", "batch", "parallel", "gates", "score")
_WHOLE = ("loss", "reference", "lora", "gates")
"""Sections that an arm replaces: the options of one loss mean nothing to another."""


class EvalSection(Section):
    """What `sftrl eval` does with each checkpoint, after SFT and after RL."""

    prompts: list[ExpandedPath] = Field(min_length=1)
    """Held-out prompts and their answers, in none of the training files."""
    demonstrations: ExpandedPath | None = None
    """Held-out demonstrations, whose likelihood is measured as well."""
    overlap: Literal["refuse", "allow"] = "refuse"
    """What happens when a question of the two above is also in data.train of sft or grpo: what is asked is
    compared, without system texts and whatever the spaces are."""
    samples: int = Field(default=8, ge=1)
    """Responses drawn for each prompt, beside the greedy one."""
    ks: list[Annotated[int, Field(ge=1)]] = Field(default=[])
    """Of pass@k, none above samples; the powers of two up to samples when empty."""
    temperature: float | None = Field(default=None, gt=0)
    """Of the drawn responses; rollout.temperature of the run `grpo` when not given."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest response; rollout.max_new_tokens of the run `grpo` when not given."""

    @model_validator(mode="after")
    def _ks_are_drawn(self) -> EvalSection:
        if wrong := [k for k in self.ks if k > self.samples]:
            raise UserError(f"base.eval.ks: expected 1 to samples = {self.samples}, got {wrong[0]}")
        return self

    @property
    def all_ks(self) -> tuple[int, ...]:
        """Rising, 1 among them."""
        powers = [2**power for power in range(self.samples.bit_length()) if 2**power <= self.samples]
        return tuple(sorted({1, *(self.ks or powers)}))


class BaseSection(Section):
    """What all arms share: data, first weights, length, and the RL that follows."""

    sft: Run
    """The run of SFT: path of its YAML, or its keys. train.steps is needed; run_dir and seed are set here."""
    grpo: Run
    """The run of GRPO that follows, likewise; it starts from the weights of the arm's SFT, adapters merged
    into them."""
    eval: EvalSection


class LaunchSection(Section):
    """How runs are started."""

    kind: Literal["local", "slurm"] = "local"
    """local: processes of this machine. slurm: a job for each run, which waits for those it needs."""
    at_once: int = Field(default=1, ge=1)
    """local: runs at the same time, each with its own GPUs where there are any."""
    nproc: int = Field(default=1, ge=1)
    """Processes of a run, on each node."""
    nodes: int = Field(default=1, ge=1)
    """slurm: nodes of a run."""
    sbatch: list[str] = Field(default=[])
    """slurm: options of sbatch, such as [--partition=gpu, --gpus-per-node=8, --time=24:00:00]."""

    @model_validator(mode="after")
    def _of_its_kind(self) -> LaunchSection:
        idle = {"local": ("nodes", "sbatch"), "slurm": ("at_once",)}[self.kind]
        if written := [name for name in idle if name in self.model_fields_set]:
            raise UserError(f"launch.{written[0]} has no effect on launch.kind: {self.kind}; remove it")
        return self


class ScoreSection(Section):
    """Behaviour log-probabilities for the arm's demonstrations, by `sftrl score`, once for each writer."""

    checkpoint: ExpandedPath
    """Of the model that wrote the demonstrations: a step, run or Hugging Face directory."""
    model: Tree | None = None
    """Its section model, where its sizes are not those of base.sft."""


class CompareConfig(Section):
    """One comparison."""

    out_dir: ExpandedPath
    """Folder of all runs, ARM/seed-N/{sft,eval_sft,grpo,eval_grpo}, of scores/ and of the report."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    """Of first weights (where they are random), the order of data, and sampling; each arm runs under each."""
    base: BaseSection
    arms: dict[str, Tree]
    """By name, what an arm changes in base.sft: loss, reference, lora, optim, parallel, gates,
    batch.aggregation; and score: {checkpoint: DIR}. loss, reference, lora and gates are replaced, the others
    merged. The arm sft, token_mean, is there in any case."""
    launch: LaunchSection = LaunchSection()

    @model_validator(mode="after")
    def _arms_have_names(self) -> CompareConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: expected each once, got {self.seeds}")
        folders: dict[str, str] = {}
        for name in self.arms:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or name.lower() in _OURS:
                raise UserError(
                    f"arms: {name!r} names a directory: expected letters, digits, '_', '-' and '.', and none "
                    f"of {', '.join(_OURS)}"
                )
            if other := folders.get(name.lower()):
                raise UserError(
                    f"arms: {other!r} and {name!r} are the same directory where capitals do not count; "
                    "rename one"
                )
            folders[name.lower()] = name
        return self


_OURS = (SCORES, "plots", "report.html", "report.json", "compare.json", "run.lock", "run.guard")


def read_compare_config(path: Path, overrides: Sequence[str]) -> CompareConfig:
    """The comparison of a YAML file; UserError for everything that is wrong with it, arms aside."""
    return load_config(path, overrides, schema=CompareConfig)


def arm_trees(config: CompareConfig, sft: Tree) -> dict[str, tuple[Tree, ScoreSection | None]]:
    """The SFT run of every arm, the bar first, and what scores its demonstrations.

    Raises:
        UserError: an arm that changes what all of them share.
    """
    arms = {BAR: {"loss": {"name": "sft"}}, **config.arms}
    return {name: _arm_tree(name, arm, sft) for name, arm in arms.items()}


def _arm_tree(name: str, arm: Mapping[str, Any], sft: Tree) -> tuple[Tree, ScoreSection | None]:
    where = f"arms.{name}"
    for key, value in arm.items():
        if key not in _OF_AN_ARM:
            raise UserError(
                f"{where}.{key}: all arms share {key}; an arm changes {', '.join(_OF_AN_ARM)} alone"
            )
        if key not in _WHOLE and not isinstance(value, dict):
            raise UserError(f"{where}.{key}: expected a section of keys, got {value!r}")
    if other := sorted(set(arm.get("batch", {})) - {"aggregation"}):
        raise UserError(
            f"{where}.batch.{other[0]}: all arms share it, so that they see the same tokens; an arm changes "
            "batch.aggregation alone"
        )
    tree = dict(sft)
    for key, value in arm.items():
        if key != "score":
            tree[key] = value if key in _WHOLE else {**(sft.get(key) or {}), **value}
    if name == BAR:
        tree["batch"] = {**(sft.get("batch") or {}), "aggregation": "token_mean", **arm.get("batch", {})}
        tree["reference"] = arm.get("reference")
        is_plain = tree["loss"] == {"name": "sft"} and tree["batch"]["aggregation"] == "token_mean"
        if not is_plain or tree["reference"] is not None or "score" in arm:
            raise UserError(
                f"{where}: the name {BAR} is for the plain loss, token_mean, which all others are measured "
                "against; give a variant another name"
            )
    tree = {key: value for key, value in tree.items() if value is not None}
    if "score" not in arm:
        return tree, None
    try:
        return tree, ScoreSection.model_validate(arm["score"])
    except ValueError as error:
        raise UserError(f"{where}.score: {error}") from error


def tree_of(run: Run) -> Tree:
    """The keys of a run, read from its file where it names one."""
    if isinstance(run, dict):
        return run
    value = parse_yaml(read_config_text(run), source=str(run)).value
    if not isinstance(value, dict):
        raise UserError(f"{run}: expected sections such as model, data, loss at the top")
    return value


def yaml_of(tree: Tree, **changes: Any) -> str:
    """The YAML of a run with other values at the top; None takes a key out."""
    changed = {**tree, **changes}
    return dump_yaml({key: value for key, value in changed.items() if value is not None})
