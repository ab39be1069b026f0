"""Which networks can be trained: their sizes, and the names of their tensors in both worlds."""

from __future__ import annotations

from megatron_sftrl.config.schema import ModelSection
from megatron_sftrl.models.architecture import Architecture, from_section
from megatron_sftrl.models.hf_config import from_hf_config, read_hf_config


def architecture_of(model: ModelSection) -> Architecture:
    """The architecture that the model section asks for, from config.json or from explicit sizes.

    Raises:
        UserError: a config.json that cannot be honoured, or sizes that do not fit together.
    """
    directory = model.hf if model.hf is not None else model.hf_config
    if directory is not None:
        return from_hf_config(directory, text_only=model.text_only)
    assert model.architecture is not None, "ModelSection holds exactly one source"
    return from_section(model.architecture)


def notes_on(model: ModelSection) -> tuple[str, ...]:
    """A line on each key of the model's config.json that asks for something and yet changes nothing."""
    directory = model.hf if model.hf is not None else model.hf_config
    return () if directory is None else read_hf_config(directory, text_only=model.text_only)[1]
