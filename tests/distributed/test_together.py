"""An error on one rank is raised on every rank, and says on all of them whose fault it is."""

from __future__ import annotations

import errno

from torch.distributed.checkpoint.api import CheckpointException

from megatron_sftrl.errors import UserError
from tests.ranks import run_ranks

CAUSES = {
    "user": UserError("a key is wrong"),
    "stale": OSError(errno.ESTALE, "Stale file handle"),
    "full": OSError(errno.ENOSPC, "No space left"),
    "library": ValueError("a library says"),
    "vllm": RuntimeError("EngineCore failed"),
}


def raised(cases: list[tuple[str | None, str | None]]) -> list[list[tuple[str, str]]]:
    """(type, text) of what on_every_rank and on_rank_zero raise here when each rank meets its cause."""
    import torch.distributed as dist

    from megatron_sftrl.engine.together import on_every_rank, on_rank_zero

    found = []
    for by_rank in cases:
        cause = by_rank[dist.get_rank()]

        def act(cause: str | None = cause) -> None:
            if cause is not None:
                raise CAUSES[cause]

        found.append([])
        for together in (on_every_rank, on_rank_zero):
            try:
                together(act)
                found[-1].append(("", ""))
            except Exception as error:
                found[-1].append((type(error).__name__, str(error)))
    return found


def test_an_error_is_told_as_the_users_only_where_it_is_that_on_every_rank_that_raised() -> None:
    stale = "OSError: [Errno 116] Stale file handle"
    users, full = ("UserError", "a key is wrong"), ("UserError", "OSError: [Errno 28] No space left")
    expected = {
        ("user", None): [users, users],
        ("user", "user"): [users, users],
        ("user", "stale"): [("RuntimeError", f"a key is wrong\n{stale}"), users],
        ("stale", "user"): [("RuntimeError", f"{stale}\na key is wrong"), ("RuntimeError", stale)],
        (None, "stale"): [("RuntimeError", stale), ("", "")],
        ("library", None): [("RuntimeError", "ValueError: a library says")] * 2,
        ("vllm", None): [("RuntimeError", "RuntimeError: EngineCore failed")] * 2,
        (None, "full"): [full, ("", "")],
    }
    for found in run_ranks(2, raised, list(expected)):
        assert found == list(expected.values())


def test_what_torch_collects_of_all_ranks_is_the_users_when_all_of_it_is() -> None:
    assert run_ranks(1, collected) == [["UserError", "RuntimeError"]]


def collected() -> list[str]:
    from megatron_sftrl.engine.together import on_every_rank

    kinds = []
    for second in ("full", "stale"):
        failures = {0: (CAUSES["full"], None), 1: (CAUSES[second], None)}

        def fail(failures: dict = failures) -> None:
            raise CheckpointException("a save failed", failures)

        try:
            on_every_rank(fail)
        except (UserError, RuntimeError) as error:
            kinds.append(type(error).__name__)
    return kinds
