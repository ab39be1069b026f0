"""What `sftrl handoff` holds the numbers of a checkpoint to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_sftrl.config.gates import MAX_EQUAL_GROUPS, MAX_FORMAT_LOSS, MIN_ENTROPY, MIN_FINISHED


def _limit(default: float | None, meaning: str, source: str) -> Any:
    return field(default=default, metadata={"meaning": meaning, "source": source})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a number says that RL would start badly, what the number is, and whose limit that is.

    Below min_entropy the policy has collapsed before RL begins. With more equal groups than max_equal_groups,
    the four rounds of dynamic sampling do not fill a step. RL raises what is drawn now and then already: the
    head-room's interval must lie above min_headroom. Rewards of responses that were cut are those of other
    texts (min_finished). Beyond max_format_loss, RL would first teach the format. How far SFT may go from its
    base is not known: max_kl is a number to compare by, without a limit unless one is given.
    """

    min_entropy: float = _limit(MIN_ENTROPY, "nats per drawn token at temperature 1", "arXiv:2606.18487")
    max_equal_groups: float = _limit(
        MAX_EQUAL_GROUPS, "share of prompts whose responses are all right or all wrong", "filters.max_rounds"
    )
    min_headroom: float = _limit(
        0.0, "pass@n less pass@1, n being --samples; the low end of its interval counts", "arXiv:2510.01624"
    )
    min_finished: float = _limit(MIN_FINISHED, "share of responses that reach their end", "arXiv:2503.14476")
    max_format_loss: float = _limit(
        MAX_FORMAT_LOSS,
        "lenient less strict accuracy: right answers, wrong format",
        "the run's rewards",
    )
    max_kl: float | None = _limit(
        None, "nats per learned token of --demonstrations, KL(checkpoint || --base)", "no limit known"
    )
