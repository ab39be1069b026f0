"""New weights for a running vLLM engine, and the proof that it took all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError

if TYPE_CHECKING:
    from vllm import LLM


def load_weights(
    llm: LLM, model: torch.nn.Module, weights: Iterable[tuple[str, Tensor]], *, is_cuda: bool
) -> None:
    """Replace every weight of a running engine.

    This is vLLM's reload_weights, which keeps to itself what was loaded, with two repairs for the CPU:
    without them the engine goes on with the earlier weights there, silently.

    Args:
        llm: engine.
        model: of this rank in it.
        weights: (Hugging Face name, tensor of the whole shape).
        is_cuda: where the engine runs.
    Raises:
        UserError: a name that the engine does not have, or a parameter of it that lacks elements.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    config = llm.llm_engine.vllm_config
    expected = {name for name, _ in model.named_parameters()}
    if not is_cuda:
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if isinstance(method, FusedMoEMethodBase):
                # A kernel that is there keeps the experts' weights as it packed them first.
                method.moe_kernel = None
    with set_current_vllm_config(config), torch.no_grad():
        initialize_layerwise_reload(model)
        try:
            missing = expected - model.load_weights(weights)  # type: ignore[operator]
            for name, module in model.named_modules():
                loaded = get_layerwise_info(module).load_numel
                size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
                # Finished layers have been reset to 0. The vocabulary's padding is never loaded.
                if 0 < loaded < size and not isinstance(module, VocabParallelEmbedding):
                    missing.add(f"{name} ({loaded} of {size} elements)")
        finally:
            # Also after a failure: what was left half loaded would count in the next update.
            finalize_layerwise_reload(model, config.model_config)
        if not is_cuda:
            for module in model.modules():
                if isinstance(module, ParallelLMHead):
                    # A tied head is not among the loaded layers, and holds a packed copy of its own.
                    head: Any = module
                    head.quant_method.process_weights_after_loading(head)
    if missing:
        raise UserError(
            f"no weight of the policy reached these parameters of the rollout engine: {sorted(missing)}; use "
            "rollout.engine: in_process, and report this architecture"
        )
