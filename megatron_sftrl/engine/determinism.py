"""train.deterministic: what it sets in this process, and what it makes of an operator that cannot obey."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from megatron_sftrl.errors import UserError

_ENVIRONMENT = {
    # cuBLAS: a workspace of its own for each stream, so that it chooses the same algorithm every time.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # Transformer Engine: attention whose backward adds in a fixed order.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    # Sums in switches arrive in any order; the others are what Megatron's own training program accepts.
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
}
_REFUSALS = (
    re.compile(r"^(\S+) does not have a deterministic implementation"),
    re.compile(r"^(No dot product attention backend) is available"),
)


def choose_kernels(*, deterministic: bool) -> None:
    """Make torch, cuBLAS, NCCL and Transformer Engine keep one order of sums; call it before CUDA starts.

    Raises:
        UserError: the environment asks for the opposite.
    """
    # A process that runs several runs, one after the other, is asked by each. To ask torch for what it does
    # already would load its compilers, which takes a second.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    if not deterministic:
        return
    for name, allowed in _ENVIRONMENT.items():
        found = os.environ.setdefault(name, allowed[0])
        if found not in allowed:
            raise UserError(
                f"train.deterministic: expected the environment variable {name} to be "
                f"{' or '.join(allowed)}, got {found!r}: unset it, or set train.deterministic = false"
            )
    # Nothing here reads memory that it has not written; filling it would cost a pass over every result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def named_operator() -> Iterator[None]:
    """Around a step: an operator without a deterministic kernel is a UserError that names it."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        found = [match for each in _REFUSALS if (match := each.match(str(error)))]
        if not found or not torch.are_deterministic_algorithms_enabled():
            raise
        raise UserError(
            f"train.deterministic: expected operators that keep one order of sums, got {found[0][1]}, which "
            "has no such kernel on this device for these sizes: set train.deterministic = false"
        ) from error
