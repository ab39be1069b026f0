"""rollouts.jsonl: what the policy answered, for people to read; in step with metrics.jsonl after a resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.trainers.experience import Response, grouped


class SampleLog:
    """Appends one line for each response of a step's first groups.

    Args:
        path: the file; created, or continued.
        tokenizer: to show token ids as text.
        num_groups: written of each step, left-out groups included.
        resume_step: last step that the resumed checkpoint holds; lines of later steps, which will be taken
            again, are removed.
    Raises:
        UserError: a line that is not a JSON object with a step, or a file that cannot be read or written.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, *, num_groups: int, resume_step: int) -> None:
        self._path, self._tokenizer, self._num_groups = path, tokenizer, num_groups
        try:
            if path.exists():
                _keep_steps_up_to(path, resume_step)
            path.open("a").close()  # what cannot be written shall not come out after the first step
        except (OSError, UnicodeDecodeError) as error:
            raise error_of(f"the samples cannot be written to {path}: {error}", error) from error

    def write(self, step: int, responses: Sequence[Response]) -> None:
        """One step's responses, group by group.

        Raises:
            UserError: they cannot be written, and would not be after a restart; a disk is full, say.
            RuntimeError: the file system fails.
        """
        groups = list(grouped(responses).values())[: self._num_groups]
        lines = [
            json.dumps(self._sample(response, step), ensure_ascii=False) + "\n"
            for group in groups
            for response in group
        ]
        try:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(lines)
        except OSError as error:
            raise error_of(
                f"the samples of step {step} cannot be written to {self._path}: {error}; start the run again "
                "(a full disk: after freeing space), it goes on from its last checkpoint",
                error,
            ) from error

    def _sample(self, response: Response, step: int) -> dict[str, object]:
        rollout = response.rollout
        return {
            "step": step,
            "group": response.group,
            "source": response.row.source,
            "prompt": self._tokenizer.decode(rollout.prompt_tokens),
            "response": self._tokenizer.decode(rollout.response_tokens),
            "reward": response.scored.reward,
            "rewards": {
                part.name: part.reward if part.outcome == "ok" else None for part in response.scored.parts
            },
            "outcomes": {part.name: part.outcome for part in response.scored.parts},
            "advantage": response.advantage,
            "is_finished": rollout.is_finished,
            "prompt_tokens": rollout.prompt_tokens,
            "response_tokens": rollout.response_tokens,
        }


def _keep_steps_up_to(path: Path, last_step: int) -> None:
    """Remove lines of later steps, and a last line that a crash has torn."""
    # Not splitlines(): a response may hold characters that it takes for the end of a line.
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise UserError(
                f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}; repair or "
                "remove the file"
            ) from None
        if step <= last_step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))
