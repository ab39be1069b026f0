"""What a run says about its data, and what this has in common with every other section."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from megatron_sftrl.config.paths import ExpandedPath, expand
from megatron_sftrl.errors import UserError


class Section(BaseModel):
    """A part of the run's configuration: frozen, strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Thinking = Literal["keep", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """Which assistant turns of a row are learned, and whether with their thoughts."""

    turns: Literal["all_turns", "last_turn"] = "all_turns"
    thinking: Thinking = "keep"


ALL_TURNS = Learning()

Column = Annotated[str, Field(min_length=1)]


class DemonstrationColumns(Section):
    """Columns of demonstrations, whatever their names; a.b is the key b of the objects in column a."""

    prompt: Column | None = None
    """What is asked, a text or a list of turns; goes with response."""
    response: Column | None = None
    """What is learned, a text or a list of turns; goes with prompt."""
    messages: Column | None = None
    """Whole conversations, in place of prompt and response; turns of role and content (or from and value)."""

    @model_validator(mode="after")
    def _one_form(self) -> DemonstrationColumns:
        pair = (self.prompt is not None, self.response is not None)
        if pair not in ((True, True), (False, False)) or any(pair) == (self.messages is not None):
            raise UserError("data.columns: give prompt and response, or messages alone")
        return self


class PromptColumns(Section):
    """Columns of prompts and answers, whatever their names; a.b is the key b of the objects in column a."""

    prompt: Column | None = None
    """What is asked, a text or a list of turns. Without it and messages, the format of the rows says it."""
    messages: Column | None = None
    """Turns of role and content (or from and value), the last of them not the assistant's."""
    answer: Column | None = None
    """What rewards read as `answer`."""
    benchmark: Literal["gsm8k", "math", "mmlu", "mmlu_pro", "arc", "gpqa", "reasoning_gym"] | None = None
    """The rows are those of a benchmark, in its published columns (docs/data.md): the question, its options
    and the instruction are the prompt. In place of the three above."""
    instruction: str | None = None
    """What stands behind a benchmark's question, in place of its own instruction; empty for none."""
    response: Column | None = None
    """The demonstration that rollout.demonstrations put into the prompt's group, a text or one assistant
    turn; null where a row has none. Not given: response, completion or target, where a row has one."""

    @model_validator(mode="after")
    def _one_prompt(self) -> PromptColumns:
        if self.prompt is not None and self.messages is not None:
            raise UserError("data.columns: prompt and messages both say what is asked: give one of them")
        columns = [name for name in ("prompt", "messages", "answer") if getattr(self, name) is not None]
        own = [name for name in ("benchmark", "instruction") if getattr(self, name) is not None]
        if own and columns:
            raise UserError(
                f"data.columns: {own[0]} is for rows of a benchmark, whose columns are known: remove it, or "
                f"{columns[0]}"
            )
        if not own and not columns and self.response is None:
            raise UserError(
                "data.columns: expected prompt, messages, answer, response or benchmark, got none of them"
            )
        return self


class WeightedPath(Section):
    """A path with its share of each epoch."""

    path: Path
    weight: float


def _read_source(value: object) -> object:
    """An entry of data.train, a path or {path: ..., weight: ...}, with its path expanded."""
    if isinstance(value, str):
        return expand(value)
    if isinstance(value, Path | WeightedPath):
        return value
    if not isinstance(value, Mapping) or not {"path"} <= set(value) <= {"path", "weight"}:
        raise UserError(f"data.train: expected paths, or {{path: a.jsonl, weight: 0.5}}, got {value!r}")
    path, weight = value["path"], value.get("weight")
    if not isinstance(path, str):
        raise UserError(f"data.train: expected a path as text, got {path!r}")
    if weight is None:
        return expand(path)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1:
        raise UserError(f"data.train: expected a weight above 0 and at most 1 for {path}, got {weight!r}")
    return {"path": expand(path), "weight": weight}


TrainPath = Annotated[Path | WeightedPath, BeforeValidator(_read_source)]


_LARGEST_GAP = 1e-6
"""Weights that were rounded when they were written need not add up to 1 exactly."""


class _TrainSection(Section):
    """What demonstrations and prompts have in common: their sources, with weights or without."""

    train: list[TrainPath] = Field(min_length=1)

    @property
    def train_paths(self) -> list[Path]:
        """The paths of data.train."""
        return [each.path if isinstance(each, WeightedPath) else each for each in self.train]

    @property
    def train_weights(self) -> tuple[float, ...] | None:
        """Their weights, which add up to 1; None without any."""
        weights = tuple(each.weight for each in self.train if isinstance(each, WeightedPath))
        return weights or None

    @model_validator(mode="after")
    def _all_have_weights(self) -> Self:
        weights = self.train_weights
        if weights is None:
            return self
        bare = ", ".join(str(each) for each in self.train if not isinstance(each, WeightedPath))
        if bare:
            raise UserError(f"data.train: {bare} has no weight, but others do; give all of them one, or none")
        total = sum(weights)
        if abs(total - 1) > _LARGEST_GAP:
            added = " + ".join(f"{weight:g}" for weight in weights)
            raise UserError(f"data.train: expected weights that add up to 1, got {added} = {total:.7g}")
        return self


class DemonstrationSection(_TrainSection):
    """Demonstrations to train on."""

    train: list[TrainPath] = Field(min_length=1)
    """Files (JSON lines or arrays, Parquet), folders, patterns, directories of datasets.save_to_disk, or one
    split of them (`path:train`); docs/data.md has these and the formats of rows that are recognised. With
    weights, such as {path: math.jsonl, weight: 0.7}, an epoch is a mixture."""
    mix_by: Literal["tokens", "rows"] = "tokens"
    """What the weights of data.train are shares of: the learned tokens of an epoch, or its rows."""
    columns: DemonstrationColumns | None = None
    """Where the rows of all these files hold what is read; not given: the format of each is recognised."""
    learn: Literal["all_turns", "last_turn"] = "all_turns"
    """Every assistant turn that does not say `weight: 0`, or the last of them alone."""
    thinking: Thinking = "keep"
    """The thoughts of a row's assistant turns are learned as the row has them, or left out. Where the chat
    template opens <think> for a generation, cut closes it at once; keep learns a row without thoughts as it
    stands."""
    max_length: int = Field(ge=2)
    """Longest sequence, prompt and response together, in tokens."""
    truncation: Literal["error", "drop", "right", "left_prompt"] = "error"
    """A sequence longer than max_length: stop the run, leave the row out (counted), cut the end, or cut the
    start of the prompt."""
    shuffle: bool = True
    """A new order each epoch, derived from the run's seed and the epoch."""

    @property
    def learning(self) -> Learning:
        """What of a row is learned."""
        return Learning(turns=self.learn, thinking=self.thinking)


class DataSection(DemonstrationSection):
    """The demonstrations."""

    valid: list[ExpandedPath] = Field(default=[])
    """Held-out data of the same kinds; no evaluation when empty."""


class PromptSection(_TrainSection):
    """The prompts, and the answers that rewards look at."""

    train: list[TrainPath] = Field(min_length=1)
    """Files (JSON lines or arrays, Parquet), folders, patterns, directories of datasets.save_to_disk, or one
    split of them (`path:train`), with a prompt in one of the formats of docs/data.md; every column reaches
    the rewards. With weights, such as {path: math.jsonl, weight: 0.7}, they are shares of the prompts."""
    valid: list[ExpandedPath] = Field(default=[])
    """Held-out prompts of the same kinds; no evaluation when empty."""
    columns: PromptColumns | None = None
    """Where the rows of all these files hold what is read; not given: the format of each is recognised."""
    max_prompt_length: int = Field(ge=1)
    """Longest prompt, in tokens; a longer one is refused before the run begins."""
    shuffle: bool = True
    """A new order each epoch, derived from the run's seed and the epoch."""


# Demonstrations beside the responses of a GRPO run.

Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]


class NamedLoss(BaseModel):
    """A loss by its name. Keys other than those of the section are the loss's own options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """A registered loss of demonstrations: sft, chord_phi, gift, ... or one of your own (loss.modules)."""

    @property
    def options(self) -> dict[str, object]:
        """The loss's own options, as written."""
        return dict(self.model_extra or {})


class MuSection(Section):
    """The share of the SFT term by steps, as in train.steps: a linear warm-up, then half a cosine."""

    peak: float = Field(gt=0, lt=1)
    """Largest share, after the warm-up."""
    valley: float = Field(ge=0, lt=1)
    """Share after decay_steps; equal to peak for a constant one. At 0 demonstrations are left out."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps until the peak is reached."""
    decay_steps: int = Field(default=0, ge=0)
    """Steps from the peak to the valley."""

    @model_validator(mode="after")
    def _the_way_down_has_steps(self) -> MuSection:
        if self.valley > self.peak:
            raise UserError(f"sft.mu: valley {self.valley} is above peak {self.peak}")
        if (self.valley < self.peak) != (self.decay_steps > 0):
            raise UserError("sft.mu: give decay_steps where valley is below peak, and only there")
        return self

    def at(self, step: int) -> float:
        """mu of a step, 0-based, as for the learning rate: a resumed run needs nothing but its step."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if step >= self.warmup_steps + self.decay_steps:
            return self.valley
        shape = 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup_steps) / self.decay_steps))
        return self.valley + (self.peak - self.valley) * shape


class SftTermSection(Section):
    """Demonstrations that every update learns beside the policy gradient:
    (1 - mu) * loss on responses + mu * loss on demonstrations (CHORD)."""

    data: DemonstrationSection
    global_size: int = Field(ge=1)
    """Demonstrations in each update, over all ranks, beside the responses of batch.global_size. They are cut
    into micro-batches of their own, as `batch` says."""
    aggregation: Aggregation = "token_mean"
    """As batch.aggregation, over the demonstrations of an update; constant_length divides by
    (demonstrations * sft.data.max_length)."""
    loss: NamedLoss = NamedLoss(name="sft")
    mu: MuSection
