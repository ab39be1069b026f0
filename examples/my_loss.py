"""A loss of your own, in a file outside the package: GIFT as Algorithm 1 of its paper has it.

In run.yaml:  loss: {name: my_gift, beta: 20.0, modules: [examples/my_loss.py]}
              reference: {kind: frozen}
It runs under every layout as it stands: a distribution knows how it is spread over the ranks.
"""

from pydantic import Field

from megatron_sftrl import LossInputs, LossOptions, LossOutput, register_loss


class MyGiftOptions(LossOptions):
    """Options of `my_gift`."""

    beta: float = Field(default=20.0, ge=0)
    """Log-odds added to the label under the reference; dimensionless."""


@register_loss("my_gift", config=MyGiftOptions, needs=("reference",))
def my_gift(inputs: LossInputs, config: MyGiftOptions) -> LossOutput:
    """-sum_v q(v) log p(v), q = softmax(log p_ref + beta 1[v = y])   (arXiv:2601.09233, Alg. 1)."""
    assert inputs.reference is not None
    target = inputs.reference.tilted(inputs.batch.labels, config.beta)  # [T, V]
    return LossOutput(token_loss=inputs.policy.cross_entropy(target))  # [T]
