"""-log pi(y) + c (log sum exp z)^2, whose log-sum-exp is taken wrongly in several ways."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from megatron_sftrl import LossInputs, LossOptions, LossOutput, register_loss
from tests.unit.doctor.planted.shard import columns_of


class ZLossOptions(LossOptions):
    """Options of `z_loss`."""

    defect: Literal["none", "local", "with_padding", "constant", "doubled", "own_dtype"]
    """local: no all-reduce. with_padding: padded columns are summed, too. constant: the sum has no gradient.
    doubled: the sum's gradient is summed over ranks, all of which have the whole of it. own_dtype: summed in
    the dtype of the logits."""


@register_loss("z_loss", config=ZLossOptions)
def z_loss(inputs: LossInputs, config: ZLossOptions) -> LossOutput:
    """-log pi(y) + 0.01 (log sum exp z)^2."""
    logits, num_real, group = columns_of(inputs.policy)
    real = logits if config.defect == "with_padding" else logits[:, :num_real]
    if config.defect != "own_dtype":
        real = real.double()
    if config.defect == "local":
        group = None
    maximum = _reduced(_maximum(real), dist.ReduceOp.MAX, group)
    total = (real - maximum[:, None]).exp().sum(1)
    everywhere = _reduced(total, dist.ReduceOp.SUM, group)
    if config.defect == "constant" and group is not None:
        total = everywhere
    elif config.defect == "doubled" and group is not None:
        total = all_reduce(total, group=group)
    else:
        total = total + (everywhere - total.detach())
    log_sum = maximum + total.log()
    token_loss = 0.01 * log_sum**2 - inputs.policy.logprobs(inputs.batch.labels)
    return LossOutput(token_loss=token_loss.to(torch.promote_types(logits.dtype, torch.float32)))


def _maximum(real: Tensor) -> Tensor:
    return real.detach().amax(1) if real.shape[1] else real.new_full((real.shape[0],), -1e30)


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    reduced = values.detach().clone()
    if group is not None:
        dist.all_reduce(reduced, operation, group)
    return reduced
