"""What needs a model for each stage: the gradients of SFT and RL there, and KL from one stage to another.

Each number is kept in a file of its own, with what it was made of, and made once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sftrl.apps.coupling.stages import CouplingRequest, Stage
from megatron_sftrl.apps.evaluate.run import HeldOut, check_same_settings, logged_lines
from megatron_sftrl.apps.score import score_dataset
from megatron_sftrl.config.schema import GrpoConfig, ReferenceSection
from megatron_sftrl.data.loader import StepLoader
from megatron_sftrl.data.prompts import PromptSet
from megatron_sftrl.engine.optimizer import GradientProducts, gradient_products
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.registry import build_loss
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.rl.rewards.registry import Part, weighted
from megatron_sftrl.trainers.checked import CheckedRun, batch_layout
from megatron_sftrl.trainers.experience import (
    ExperienceBatches,
    Response,
    ask_kl_from,
    with_advantages,
)
from megatron_sftrl.trainers.weights import give_weights
from megatron_sftrl.types import Rollout, TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """The gradients of both losses at one stage, over all parameters.

    Args:
        sft, rl: L2 norms.
        cosine: below 0, a small step down one loss goes up the other; None where one gradient is 0.
        num_responses: that the gradient of RL is of.
    """

    sft: float
    rl: float
    cosine: float | None
    num_responses: int


class Measures:
    """A model with gradients and a second one without, which take the weights of stage after stage.

    They are built when the first number is missing. Every method is called by every rank.

    Args:
        checked: of the run whose loss, rewards and layout count.
        facts: by stage, what its evaluation was made of.
        prior: weights of the reference that the run's loss looks at; from start_of_reference.
    """

    def __init__(
        self,
        checked: CheckedRun[GrpoConfig],
        request: CouplingRequest,
        held_out: HeldOut,
        facts: Mapping[Stage, Mapping[str, Any]],
        prior: Path | None,
        parallel: ParallelContext,
    ) -> None:
        # What balances experts is no part of either loss.
        model = checked.config.model.model_copy(update={"moe_aux_loss_coeff": 0.0})
        self._config = checked.config.model_copy(update={"model": model})
        self._checked, self._request, self._parallel = checked, request, parallel
        assert held_out.shown is not None, "the command line asks for demonstrations"
        self._prompts, self._shown, self._facts = held_out.prompts, held_out.shown, facts
        self._prior = prior
        self._policy: PolicyEngine | None = None
        self._reference: ReferenceModel | None = None
        self._held: dict[str, Path] = {}

    def gradients(self, stage: Stage) -> Gradients:
        """Of the likelihood of all demonstrations, and of the run's loss on the responses that were drawn.

        Raises:
            FloatingPointError: on every rank: one of them is NaN or infinite.
        """
        config = self._config
        of = {
            **self._facts[stage],
            "loss": config.loss.model_dump(mode="json", include={"name", "options"}),
            "advantages": config.advantages.model_dump(mode="json"),
            "aggregation": config.batch.aggregation,
            "mask_truncated": config.filters.mask_truncated,
            "reference": None if self._prior is None else str(self._prior),
        }
        file = self._request.out / stage.name / "gradients.json"
        return Gradients(**self._kept(file, of, lambda: asdict(self._gradients(stage))))

    def divergences(self, before: Stage, after: Stage) -> list[list[float]]:
        """KL(before || after) at each learned token of each demonstration, in nats."""
        file = self._request.out / "kl" / before.name / f"{after.name}.json"
        of = {
            "before": self._facts[before]["weights"],
            "after": self._facts[after]["weights"],
            "demonstrations": self._shown.fingerprint,
            "dtype": self._config.model.dtype,
        }

        def measure() -> dict[str, Any]:
            policy, reference = self._policy_at(after.path), self._reference_at(before.path)
            pad_id = self._checked.tokenizer.pad_id
            found = score_dataset(
                policy, self._config, self._shown, ask_kl_from, pad_id=pad_id, reference=reference
            )
            return {"nats": [found[row][0] for row in sorted(found)]}

        return self._kept(file, of, measure)["nats"]

    def _kept(
        self, file: Path, of: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What the file has, or what is measured now and written there."""

        def read() -> dict[str, Any] | None:
            if not file.exists():
                return None
            found = json.loads(file.read_text(encoding="utf-8"))
            check_same_settings(found["of"], of, file)
            return found["found"]

        if (found := on_rank_zero(read)) is not None:
            return found
        measured = measure()

        def write() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps({"of": of, "found": measured}, indent=1) + "\n")

        on_rank_zero(write)
        return measured

    def close(self) -> None:
        """Give the models' memory back."""
        self._policy = self._reference = None
        self._held = {}

    def _policy_at(self, path: Path) -> PolicyEngine:
        if self._policy is None:
            self._policy = PolicyEngine(self._checked.architecture, self._config, self._parallel)
        self._fill("policy", path)
        return self._policy

    def _reference_at(self, path: Path) -> ReferenceModel:
        if self._reference is None:
            said = self._config.reference
            section = ReferenceSection(kind="frozen", placement=said.placement if said else "resident")
            self._reference = ReferenceModel(
                self._checked.architecture, self._config, section, self._parallel
            )
        self._fill("reference", path)
        return self._reference

    def _fill(self, which: str, path: Path) -> None:
        assert self._policy is not None
        if self._held.get(which) == path:
            return
        into = None if which == "policy" else self._reference.chunks if self._reference else None
        give_weights(self._policy, path, self._config, into=into)
        self._held[which] = path

    def _gradients(self, stage: Stage) -> Gradients:
        policy = self._policy_at(stage.path)
        policy.forward_backward(self._demonstrations(), build_loss("sft", {}))
        of_sft = policy.gradient()
        products, num_responses = self._against_rl(policy, of_sft, stage)
        sft, rl = products.aa**0.5, products.bb**0.5
        for name, norm in (("SFT", sft), ("RL", rl)):
            if not norm < float("inf"):
                raise FloatingPointError(f"the gradient of {name} at {stage.path} is NaN or infinite")
        return Gradients(sft=sft, rl=rl, cosine=products.cosine, num_responses=num_responses)

    def _demonstrations(self) -> Sequence[TokenBatch]:
        """All of them as one step of token_mean."""
        config, parallel = self._config, self._parallel
        whole = {"global_size": len(self._shown), "aggregation": "token_mean"}
        loader = StepLoader(
            self._shown,
            batch=config.batch.model_copy(update=whole),
            layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
            max_length=config.max_length,
            pad_id=self._checked.tokenizer.pad_id,
            seed=0,
            shuffle=False,
            mode="evaluate",
        )
        return loader.step(0).batches

    def _against_rl(
        self, policy: PolicyEngine, of_sft: Sequence[Tensor], stage: Stage
    ) -> tuple[GradientProducts, int]:
        """The products of SFT's gradient with RL's at the same weights, and the responses of the latter."""
        config, parallel = self._config, self._parallel
        batches = ExperienceBatches(
            batch=config.batch,
            layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
            max_length=config.rollout.max_new_tokens,
            pad_id=self._checked.tokenizer.pad_id,
            mask_truncated=config.filters.mask_truncated,
            needs_reward="advantages" in self._checked.loss.needs,
        )
        responses = drawn_responses(self._request.out / stage.name, config, self._prompts)
        data = batches.lay_out(responses) if batches.has_signal(responses) else None
        if data is None:  # all are equally good: nothing to learn
            policy.zero_gradients()
        else:
            reference = None if self._prior is None else self._reference_at(self._prior)
            # The responses are those of the very weights whose gradient is taken: the loss's ratio is 1.
            policy.forward_backward(
                data.batches, self._checked.loss, reference, sampled_at=config.rollout.temperature
            )
        count = sum(map(batches.carries_loss, responses)) if data else 0
        return gradient_products(of_sft, policy.gradient(), parallel), count


def start_of_reference(checked: CheckedRun[GrpoConfig]) -> Path | None:
    """The weights of the run's frozen reference; None where its loss looks at none.

    Raises:
        UserError: nothing names them.
    """
    if "reference" not in checked.loss.needs:
        return None
    section, model = checked.config.reference, checked.config.model
    assert section is not None, "the configuration was checked"
    path = section.checkpoint or model.init_checkpoint or model.hf
    if section.kind != "frozen" or path is None:
        raise UserError(
            f"coupling: the loss {checked.loss.name} looks at a reference, whose weights are known where it "
            "is frozen and reference.checkpoint, model.init_checkpoint or model.hf names them; name them, or "
            "set the option of the loss that needs it to 0"
        )
    return path


def drawn_responses(folder: Path, config: GrpoConfig, prompts: PromptSet) -> list[Response]:
    """The responses that an evaluation has drawn, with their rewards and advantages, prompt by prompt."""
    weights = [each.weight for each in config.rewards]
    responses = [
        Response(
            group=line["prompt"],
            row=prompts.rows[line["prompt"]],
            rollout=Rollout(
                prompt_tokens=prompts.rows[line["prompt"]].tokens,
                response_tokens=tuple(each["tokens"]),
                logprobs=tuple(each["logprobs"]),
                is_finished=each["is_finished"],
            ),
            scored=weighted(weights, tuple(Part(**part) for part in each["rewards"])),
        )
        for line in logged_lines(folder, "sampled")
        for each in line["responses"]
    ]
    return with_advantages(responses, config.advantages.estimator)
