"""A Hugging Face directory that was written again is not what a run began with."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.ranks import run_ranks


def start(run_dir: Path, hf: Path, is_resumed: bool) -> str:
    """What a start of the run says of model.hf, the refusal included."""
    from megatron_sftrl.cli import start_logging
    from megatron_sftrl.errors import UserError
    from megatron_sftrl.models.hf_weights import open_weights
    from megatron_sftrl.observability.run_directory import RunDirectory
    from megatron_sftrl.trainers.origins import Origins

    start_logging()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), open_weights(hf) as weights:
        origins = Origins(RunDirectory(path=run_dir), is_resumed=is_resumed)
        try:
            origins.take_hf("model.hf", hf, weights)
        except UserError as error:
            return str(error)
        if torch.distributed.get_rank() == 0:
            origins.write()
    torch.distributed.barrier()
    return said.getvalue()


def test_a_hugging_face_directory_that_was_written_again_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_dir, hf = tmp_path / "run", tmp_path / "hf"
    run_dir.mkdir()
    hf.mkdir()

    def write(value: float) -> None:
        weight = torch.zeros(1000)
        weight[777] = value
        save_file({"weight": weight}, hf / "model.safetensors")

    def starts(*, is_resumed: bool) -> list[str]:
        return run_ranks(2, start, run_dir, hf, is_resumed)

    write(1.0)
    assert starts(is_resumed=False) == ["", ""]
    write(2.0)
    # No resolved.yaml: no run has begun here, other weights may be named.
    assert starts(is_resumed=False) == ["", ""]
    (run_dir / "resolved.yaml").touch()
    write(2.0)  # the same bytes, newer
    assert starts(is_resumed=True) == ["", ""]
    write(1.0)
    for text in starts(is_resumed=True):
        assert text.startswith("model.hf: ")
        assert "holds other weights than this run began with: expected weights " in text
        assert "begin again in another run_dir" in text
    (run_dir / "origins.json").unlink()
    first, second = starts(is_resumed=True)
    assert "an older version began this run and did not record which weights it took" in first
    assert second == ""
