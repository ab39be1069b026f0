"""The generated reference of every key."""

from __future__ import annotations

from megatron_sftrl.config.messages import document_schema, section_type, sections
from megatron_sftrl.config.schema import RunConfig


def test_every_key_is_explained_with_type_and_default() -> None:
    text = document_schema(RunConfig)
    for path, model in sections(RunConfig):
        for name, field in model.model_fields.items():
            line = next(li for li in text.splitlines() if li.startswith(f"- `{'.'.join((*path, name))}` ("))
            if section_type(field.annotation) is None:
                assert line.split("): ", 1)[1], f"{name} has no explanation"
    assert "- `optim.lr` (number > 0; required): Peak learning rate." in text
    assert "- `parallel.tp` (integer >= 1; default 1): Tensor parallel size." in text
    assert "- `data.shuffle` (true | false; default true)" in text
    assert "- `optim.betas` (list of number; default [0.9, 0.95])" in text
    assert "- `model.hf_config` (path; not given by default)" in text


def test_every_section_of_the_schema_is_found() -> None:
    names = {".".join(path) for path, _ in sections(RunConfig)}
    assert {"", "model", "model.architecture", "reference", "loss", "log"} <= names
