"""What a run says about its data, and what this has in common with every other section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_sftrl.config.paths import ExpandedPath
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

    @model_validator(mode="after")
    def _one_prompt(self) -> PromptColumns:
        if self.prompt is not None and self.messages is not None:
            raise UserError("data.columns: prompt and messages both say what is asked: give one of them")
        if self.prompt is None and self.messages is None and self.answer is None:
            raise UserError("data.columns: expected prompt, messages or answer, got none of them")
        return self


class DataSection(Section):
    """The demonstrations."""

    train: list[ExpandedPath] = Field(min_length=1)
    """JSONL or Parquet files, or directories written by datasets.save_to_disk; the formats of rows that are
    recognised are in docs/data.md."""
    valid: list[ExpandedPath] = Field(default=[])
    """Held-out data of the same kinds; no evaluation when empty."""
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


class PromptSection(Section):
    """The prompts, and the answers that rewards look at."""

    train: list[ExpandedPath] = Field(min_length=1)
    """JSONL or Parquet files, or directories written by datasets.save_to_disk, with a prompt in one of
    the formats of docs/data.md; every column reaches the rewards."""
    valid: list[ExpandedPath] = Field(default=[])
    """Held-out prompts of the same kinds; no evaluation when empty."""
    columns: PromptColumns | None = None
    """Where the rows of all these files hold what is read; not given: the format of each is recognised."""
    max_prompt_length: int = Field(ge=1)
    """Longest prompt, in tokens; a longer one is refused before the run begins."""
    shuffle: bool = True
    """A new order each epoch, derived from the run's seed and the epoch."""
