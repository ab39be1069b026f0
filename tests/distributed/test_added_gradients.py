"""Layers that add their weight's gradient to main_grad, beside an output layer that does not."""

from __future__ import annotations

from typing import Any

from tests.distributed.test_layouts import make_config
from tests.ranks import run_ranks


def built(fused: bool) -> dict[str, Any]:
    """A chunk whose first MLP layer says what Transformer Engine's do, and what the parts were told."""
    from unittest import mock

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_sftrl.engine import model as engine_model
    from megatron_sftrl.engine.megatron_config import transformer_config
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.models.architecture import from_section

    class Adding(ColumnParallelLinear):
        """Transformer Engine's are told by its own name for the field, and read it in every forward."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.fuse_wgrad_accumulation = not fused

    make_block = engine_model._block_spec

    def block(*args: Any) -> TransformerBlockSubmodules:
        spec: Any = make_block(*args)
        for layer in spec.layer_specs:
            layer.submodules.mlp.submodules.linear_fc1 = Adding
        return spec

    run = make_config({})
    assert run.model.architecture is not None
    architecture, context = from_section(run.model.architecture), initialize_parallel(run.parallel)
    config = transformer_config(architecture, run.model, run.parallel, run.train, is_cuda=False)
    config.gradient_accumulation_fusion = fused
    layers = block(architecture, config, None, 0)
    config.transformer_impl = "transformer_engine"
    with mock.patch.object(engine_model, "_block_spec", return_value=layers):
        (chunk,) = engine_model.build_model_chunks(architecture, config, context)
    parallel_state.destroy_model_parallel()
    adding = [module for module in chunk.modules() if isinstance(module, Adding)]
    return {
        "layers": [module.fuse_wgrad_accumulation for module in adding],
        "head": chunk.output_layer.gradient_accumulation_fusion,
        "config": config.gradient_accumulation_fusion,
        "is_one": all(module.config is config for module in [*adding, chunk, chunk.output_layer]),
    }


def test_layers_add_and_the_head_is_built_without_apex() -> None:
    for fused in (True, False):
        (found,) = run_ranks(1, built, fused)
        assert found == {"layers": [fused] * 4, "head": False, "config": fused, "is_one": True}
