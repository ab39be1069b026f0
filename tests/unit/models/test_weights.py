"""Reading whole tensors and parts of them, and holding them against what a model needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.hf_weights import open_weights
from tests.unit.models.directories import shapes_of, some_tensors, write_sharded, write_single

ROOT = Path(__file__).resolve().parents[3]
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def sharded(directory: Path) -> Path:
    tensors = some_tensors()
    names = list(tensors)
    shards = {"one.safetensors": names[:2], "two.safetensors": names[2:]}
    return write_sharded(directory, {file: {n: tensors[n] for n in part} for file, part in shards.items()})


def pickled(directory: Path) -> Path:
    directory.mkdir()
    tensors = some_tensors()
    # As a model saves them: parameters, some of them views into a common storage.
    both = torch.stack([tensors[EMBEDDING], tensors[OUTPUT]])
    state = tensors | {EMBEDDING: both[0], OUTPUT: torch.nn.Parameter(both[1])}
    torch.save(state, directory / "pytorch_model.bin")
    return directory


KINDS = {"single": lambda path: write_single(path, some_tensors()), "sharded": sharded, "pickled": pickled}


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return KINDS[request.param](tmp_path / "model")


def test_tensors_are_read_as_they_were_written(directory: Path) -> None:
    with open_weights(directory, allow_pickle=True) as weights:
        expected = some_tensors()
        assert weights.shapes == shapes_of(expected)
        assert weights.dtypes == {name: tensor.dtype for name, tensor in expected.items()}
        for name, tensor in expected.items():
            assert torch.equal(weights.read(name), tensor)


@pytest.mark.parametrize(
    "part",
    [
        (slice(2, 5), slice(1, 3)),
        (slice(0, 11), slice(0, 3)),
        (slice(None), slice(3, None)),
        (slice(4, 9),),
        (slice(10, 11), slice(5, 6)),
        (slice(3, 3), slice(0, 6)),
        (),
    ],
    ids=str,
)
def test_a_part_equals_the_slice_of_the_whole_tensor(directory: Path, part: tuple[slice, ...]) -> None:
    with open_weights(directory, allow_pickle=True) as weights:
        got, expected = weights.read(EMBEDDING, part), some_tensors()[EMBEDDING][part]
        assert torch.equal(got, expected)
        assert got.is_contiguous()
        assert got.untyped_storage().nbytes() == expected.numel() * 2


def test_parts_of_vectors_scalars_and_stacks_are_right(tmp_path: Path) -> None:
    stack, scalar, empty = torch.randn(4, 3, 5), torch.tensor(3.0), torch.zeros(0, 3)
    write_single(tmp_path, {"stack": stack, "scalar": scalar, "empty": empty, "vector": torch.arange(9)})
    with open_weights(tmp_path) as weights:
        for part in [
            (slice(1, 3), slice(0, 2), slice(2, 4)),
            (slice(0, 4), slice(1, 2)),
            (slice(2, 4), slice(0, 3), slice(0, 5)),
            (slice(0, 4), slice(0, 3), slice(4, 5)),
        ]:
            assert torch.equal(weights.read("stack", part), stack[part])
        assert torch.equal(weights.read("scalar"), scalar)
        assert weights.read("empty").shape == (0, 3)
        assert weights.read("vector", (slice(3, 5),)).tolist() == [3, 4]


def test_only_the_bytes_of_the_part_are_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(sum(len(buffer) for buffer in buffers))
        return original(descriptor, buffers, offset)

    with open_weights(directory, allow_pickle=True) as weights:
        monkeypatch.setattr(os, "preadv", counting)
        for part, num_calls in [((slice(2, 5),), 1), ((slice(2, 5), slice(1, 3)), 3)]:
            asked.clear()
            result = weights.read(EMBEDDING, part)
            assert sum(asked) == result.nbytes
            assert len(asked) == num_calls


def test_a_read_that_the_kernel_answers_in_pieces_is_completed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.preadv
    with open_weights(directory, allow_pickle=True) as weights:
        monkeypatch.setattr(os, "preadv", lambda d, buffers, offset: original(d, [buffers[0][:7]], offset))
        assert torch.equal(weights.read(EMBEDDING), some_tensors()[EMBEDDING])


def test_a_file_that_is_cut_short_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    with open_weights(write_single(tmp_path, some_tensors())) as weights:
        os.truncate(tmp_path / "model.safetensors", 400)
        with pytest.raises(ValueError, match=r"model\.safetensors ends at byte 400"):
            _ = [weights.read(name) for name in weights.shapes]


def test_a_pass_over_a_file_does_not_keep_it_in_memory(tmp_path: Path) -> None:
    tensor_bytes, num_tensors = 2 * 2**20, 32
    tensors = {f"w{i}": torch.zeros(1024, 1024, dtype=torch.bfloat16) for i in range(num_tensors)}
    write_single(tmp_path, tensors)
    code = (
        "import sys, resource\nfrom pathlib import Path\n"
        "from megatron_sftrl.models.hf_weights import open_weights\n"
        "weights = open_weights(Path(sys.argv[1]))\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "weights.read('w0'); before = peak()\n"
        "for name in weights.shapes: weights.read(name); weights.read(name, (slice(None), slice(0, 512)))\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # Two tensors may be alive at once; 16 MiB for the allocator's habits. The file has 64 MiB.
    assert int(done.stdout) < 2 * tensor_bytes + 16 * 2**20


def refusal(directory: Path, expected: dict[str, tuple[int, ...]], *, tied: bool = False) -> str:
    """What check() says against the weights; nothing where they fit."""
    with open_weights(directory, allow_pickle=True) as weights:
        try:
            weights.check(expected, tied=tied)
        except ValueError as error:
            return str(error)
    return ""


def test_weights_that_fit_pass(directory: Path) -> None:
    assert refusal(directory, shapes_of(some_tensors())) == ""


def test_a_few_problems_are_listed_one_by_one(tmp_path: Path) -> None:
    write_single(tmp_path, some_tensors() | {"extra.one": torch.zeros(2)})
    expected = shapes_of(some_tensors()) | {"new.one": (1,), "new.two": (2, 3)}
    expected["model.layers.0.mlp.up_proj.weight"] = (6, 8)
    first, *problems = refusal(tmp_path, expected).splitlines()
    assert "not those of its config.json (4 problem(s))" in first
    assert problems == [
        "  missing: new.one [1]",
        "  missing: new.two [2, 3]",
        "  not expected: extra.one [2]",
        "  wrong shape: model.layers.0.mlp.up_proj.weight: expected [6, 8], got [8, 6]",
    ]


def test_of_many_problems_each_kind_is_counted_and_its_first_ones_are_shown(tmp_path: Path) -> None:
    write_single(tmp_path, some_tensors() | {f"extra.{i}": torch.zeros(2) for i in range(50)})
    expected = shapes_of(some_tensors()) | {f"new.{i}": (i,) for i in range(9000)}
    expected["model.norm.weight"] = (7,)
    first, *problems = refusal(tmp_path, expected).splitlines()
    assert "(9051 problem(s))" in first
    assert problems == [
        "  9000 missing: new.0 [0]; new.1 [1]; ...",
        "  50 not expected: extra.0 [2]; extra.1 [2]; ...",
        "  1 of another shape or dtype: wrong shape: model.norm.weight: expected [7], got [6]",
    ]


BODY = {f"layers.{i}.mlp.{name}.weight": (2, 2) for i in range(30) for name in ("up_proj", "down_proj")}


@pytest.mark.parametrize(
    ("stored", "hint"),
    [
        (
            {f"model.language_model.{name}": shape for name, shape in BODY.items()},
            "every name not expected would fit with 'model.' in front instead of 'model.language_model.'",
        ),
        (
            {f"{name}": shape for name, shape in BODY.items()} | {"score.weight": (1, 2)},
            "60 of 61 names not expected would fit with 'model.' in front instead of ''",
        ),
        (
            {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (2, 2)},
            "these are adapters (base_model.model.model.layers.0.mlp.up_proj.lora_A.weight): merge them",
        ),
        (
            {f"model.{name}_scale_inv": (1, 1) for name in BODY},
            "these weights are quantised (model.layers.0.mlp.down_proj.weight_scale_inv): give the",
        ),
        ({"model.layers.0.self_attn.qkv_proj.weight": (6, 2)}, "projections are fused into one tensor here"),
    ],
)
def test_names_of_another_kind_of_file_get_five_lines_and_what_to_do(
    tmp_path: Path, stored: dict[str, tuple[int, ...]], hint: str
) -> None:
    write_single(tmp_path, {name: torch.zeros(shape) for name, shape in stored.items()})
    message = refusal(tmp_path, {f"model.{name}": shape for name, shape in BODY.items()})
    assert len(message.splitlines()) <= 5
    assert message.splitlines()[-1].startswith(f"  {hint}")
    assert f"{len(BODY)} missing: model.layers.0.mlp.up_proj.weight [2, 2]" in message


def test_an_expert_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts."
    stored = {f"{experts}down_proj": torch.zeros(2, 3, 4), f"{experts}1.down_proj.weight": torch.ones(3, 4)}
    with pytest.raises(UserError, match=r"experts\.1\.down_proj\.weight is there twice"):
        open_weights(write_single(tmp_path, stored))


def test_names_that_share_nothing_get_no_advice(tmp_path: Path) -> None:
    stored = {f"h.{i}.mlp.weight": torch.zeros(2, 2) for i in range(9)}
    message = refusal(
        write_single(tmp_path, stored), {f"model.{name}": shape for name, shape in BODY.items()}
    )
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32, torch.uint8]
)
def test_quantised_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = some_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros(8, 6).to(dtype)
    message = refusal(write_single(tmp_path, tensors), shapes_of(tensors))
    assert f"wrong dtype: {name}: expected a float of 16, 32 or 64 bits, got {str(dtype)[6:]}" in message


def test_a_dtype_that_torch_has_not_is_refused(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 3)
    with pytest.raises(ValueError, match=r"F6_E2M3 cannot be read.*dequantised"):
        open_weights(tmp_path)


def test_a_missing_output_layer_points_to_tied_embeddings(tmp_path: Path) -> None:
    tensors = some_tensors()
    expected = shapes_of(tensors)
    del tensors[OUTPUT]
    assert "tie_word_embeddings: true" in refusal(write_single(tmp_path, tensors), expected)


def test_rotary_frequencies_of_old_files_are_ignored(tmp_path: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(3) for i in range(2)}
    directory = write_single(tmp_path, some_tensors() | buffers)
    assert refusal(directory, shapes_of(some_tensors())) == ""


def tied_model(output: Tensor) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Tensors with that output layer, and the shapes that a model with tied embeddings expects."""
    tensors = some_tensors() | {OUTPUT: output}
    return tensors, {name: shape for name, shape in shapes_of(tensors).items() if name != OUTPUT}


def test_an_output_layer_that_equals_the_tied_embedding_is_ignored(tmp_path: Path) -> None:
    embedding = some_tensors()[EMBEDDING]
    embedding[3, 2] = float("nan")  # equal bits, although no number equals nan
    tensors, expected = tied_model(embedding.clone())
    tensors[EMBEDDING] = embedding
    assert refusal(write_single(tmp_path, tensors), expected, tied=True) == ""
    assert f"not expected: {OUTPUT} [11, 6]" in refusal(tmp_path, expected, tied=False)


@pytest.mark.parametrize("difference", ["last value", "dtype", "shape", "sign of zero"])
def test_an_output_layer_that_differs_from_the_tied_embedding_is_refused(
    tmp_path: Path, difference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compared in several pieces: two rows of 12 bytes at a time.
    monkeypatch.setattr("megatron_sftrl.models.hf_weights._COMPARED_BYTES", 24)
    embedding = some_tensors()[EMBEDDING]
    embedding[0, 0] = 0.0
    output = embedding.clone()
    if difference == "last value":
        output[10, 5] += 1
    elif difference == "dtype":
        output = output.half()
    elif difference == "shape":
        output = output[:10].clone()
    else:
        output[0, 0] = -0.0
    tensors, expected = tied_model(output)
    tensors[EMBEDDING] = embedding
    message = refusal(write_single(tmp_path, tensors), expected, tied=True)
    assert "config.json ties it to model.embed_tokens.weight, but they differ" in message


def test_a_closed_reader_holds_no_file(tmp_path: Path) -> None:
    def num_open() -> int:
        return sum(1 for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(link))

    save_file(some_tensors(), tmp_path / "model.safetensors")
    with open_weights(tmp_path):
        assert num_open() == 1
    assert num_open() == 0


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def write_scaled(directory: Path, shape: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A weight of 8 bits and its scales, each in a file of its own."""
    generator = torch.Generator().manual_seed(7)
    values = (100 * torch.randn(shape, generator=generator)).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=generator) * 1e-3
    write_sharded(
        directory, {"a.safetensors": {WEIGHT: values}, "b.safetensors": {f"{WEIGHT}_scale_inv": scales}}
    )
    (directory / "config.json").write_text(json.dumps(FP8))
    return values, scales


PARTS = [(), (slice(3, 9), slice(0, 24)), (slice(4, 5),), (slice(11, 12), slice(7, 17)), (slice(2, 2),)]


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_8_bits_are_what_transformers_dequantises_them_to(
    tmp_path: Path, part: tuple[slice, ...]
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    values, scales = write_scaled(tmp_path, (12, 24), (3, 3))
    with open_weights(tmp_path) as weights:
        weights.check({WEIGHT: (12, 24)}, tied=False)
        assert weights.dtypes == {WEIGHT: torch.bfloat16}
        for dtype in (torch.bfloat16, torch.float32):
            expected = Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=dtype)[part]
            target = torch.empty(expected.shape, dtype=dtype)
            weights.read_into(target, WEIGHT, part)
            assert torch.equal(target, expected)
        assert torch.equal(weights.read(WEIGHT, part), expected.bfloat16())


@pytest.mark.parametrize("part", PARTS)
def test_the_last_blocks_of_a_weight_of_8_bits_may_be_smaller(
    tmp_path: Path, part: tuple[slice, ...]
) -> None:
    """As in DeepSeek-V3's kv_a_proj_with_mqa, 576 rows in blocks of 128, which transformers 5.19 refuses."""
    values, scales = write_scaled(tmp_path, (14, 27), (4, 4))
    rows, columns = torch.arange(14) // 4, torch.arange(27) // 8
    expected = (values.float() * scales[rows][:, columns])[part]
    with open_weights(tmp_path) as weights:
        target = torch.empty(expected.shape)
        weights.read_into(target, WEIGHT, part)
    assert torch.equal(target, expected)


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_scaled(tmp_path, (12, 24), (2, 3))
    with pytest.raises(
        UserError, match=r"a float for each block of 4 x 8 .*, \[3, 3\], got \[2, 3\] of float32"
    ):
        open_weights(tmp_path)


def test_weights_of_8_bits_without_the_key_that_explains_them_are_refused(tmp_path: Path) -> None:
    write_scaled(tmp_path, (12, 24), (3, 3))
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path, {WEIGHT: (12, 24)})
    assert f"wrong dtype: {WEIGHT}" in message
    assert f"these weights are quantised ({WEIGHT}_scale_inv): give the unquantised model" in message
