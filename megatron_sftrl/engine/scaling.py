"""The one place where Megatron's own multiplications and divisions of the loss are cancelled.

A TokenBatch's token_weight already sums to 1 over the step and all ranks, so gradients must simply be
added up. Megatron would otherwise
  - multiply a loss by cp and divide it by the number of micro-batches (schedules, 2-tuple losses);
  - divide it by num_tokens (schedules, 3-tuple losses without calculate_per_token_loss);
  - average gradients over dp x cp, those of experts too (DDP without calculate_per_token_loss);
  - divide gradients by the all-reduced num_tokens (finalize_model_grads);
  - multiply a router's load-balancing loss by the rank's tokens (engine/mixtures.py, BalancedRouter).
calculate_per_token_loss=True (engine/model.py) with a 3-tuple loss switches the first three off; the
functions here take care of the tuple and of the division.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from torch import Tensor


def as_megatron_loss(loss: Tensor, report: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, num_tokens, report): the form of a loss that the schedule leaves as it is.

    The schedule adds num_tokens up; finalize_gradients ignores the sum, so 0 says that it means nothing.
    """
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), report


def finalize_gradients(model_chunks: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's finalize_model_grads (sums over dp x cp, tied embeddings, norms) without its division."""
    finalize_model_grads(model_chunks, None, **kwargs)  # type: ignore[arg-type]
