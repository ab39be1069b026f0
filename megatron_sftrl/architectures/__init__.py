"""Which networks can be trained: their sizes, wherever they are written down."""

from __future__ import annotations

from megatron_sftrl.architectures.architecture import Architecture, from_section
from megatron_sftrl.architectures.hf_config import from_hf_config
from megatron_sftrl.config.schema import ModelSection


def architecture_of(model: ModelSection) -> Architecture:
    """The architecture that the model section asks for, from config.json or from explicit sizes.

    Raises:
        ValueError: a config.json that cannot be honoured, or sizes that do not fit together.
    """
    if model.hf_config is not None:
        return from_hf_config(model.hf_config)
    assert model.architecture is not None, "ModelSection holds exactly one of the two"
    return from_section(model.architecture)
