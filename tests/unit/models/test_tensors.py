"""The table of names: whole against transformers, and its regions against tensors put together by hand."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sftrl.models.architecture import Architecture, DeltaNet, Family, num_parameters
from megatron_sftrl.models.hf_config import hf_config_values
from megatron_sftrl.models.tensors import (
    HfRegion,
    MegatronTensor,
    Region,
    file_tensors,
    hf_regions,
    hf_shapes,
    megatron_tensors,
)
from tests.distributed.hf_models import auto_model
from tests.unit.models.hf_files import MIXTURES
from tests.unit.models.random_architectures import FAMILIES, random_architecture

NUM_CASES = 70


def cases(num_cases: int = NUM_CASES) -> Iterator[Architecture]:
    """Every family in turn."""
    rng = random.Random(20)
    for number in range(num_cases):
        yield random_architecture(rng, FAMILIES[number % len(FAMILIES)])


def numbered_hf_tensors(architecture: Architecture) -> dict[str, Tensor]:
    """Tensors of the shapes in the table in which no value occurs twice (exact in fp32 below 2^24)."""
    first, tensors = 0, {}
    for name, shape in hf_shapes(architecture).items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + size, dtype=torch.float32).view(shape)
        first += size
    assert first < 2**24
    return tensors


def by_hand(tensor: MegatronTensor, a: Architecture, hf: dict[str, Tensor]) -> Tensor:
    """The Megatron tensor, written from Megatron's own layout and not from the rows of the table."""
    if tensor.key == "embedding.word_embeddings.weight":
        return hf["model.embed_tokens.weight"]
    if tensor.key == "output_layer.weight":
        return hf["lm_head.weight"]
    if tensor.key == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    block = f"model.layers.{tensor.layer}."
    name = tensor.key.removeprefix("decoder.layers.").removeprefix(f"{tensor.layer}.")
    if name.startswith("self_attention.linear_qkv.") and "layer_norm" not in name:
        kind = name.rsplit(".", 1)[1]
        if a.family == "phi3":
            keys = a.num_query_groups * a.head_dim
            heads = hf[f"{block}self_attn.qkv_proj.{kind}"].split(
                [a.num_attention_heads * a.head_dim, keys, keys]
            )
        else:
            heads = [hf[f"{block}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
        if a.has_output_gate:
            # In the file each query head is followed by its gate, in Megatron the group's gates by its keys.
            pairs = heads[0].view(a.num_attention_heads, 2, a.head_dim, -1)
            heads = [*(pairs[:, is_gate].flatten(0, 1) for is_gate in (0, 1)), *heads[1:]]
        # [groups, heads of the group * head_dim, ...] each: Attention.get_query_key_value_tensors splits
        # dimension 1 into queries, key and value of the group.
        per_group = [part.view(a.num_query_groups, -1, *part.shape[1:]) for part in heads]
        return torch.cat(per_group, dim=1).flatten(0, 1)
    if (net := a.delta_net) and name.startswith("self_attention.") and not a.attends(tensor.layer or 0):
        return by_hand_delta_net(hf, f"{block}linear_attn.", name.removeprefix("self_attention."), a, net)
    simple = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
        "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
        "self_attention.core_attention.softmax_offset": "self_attn.sinks",
        "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
        "post_self_attn_layernorm.weight": (
            "post_self_attn_layernorm.weight" if a.family == "glm4" else "post_attention_layernorm.weight"
        ),
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
        "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
        "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
        "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
        "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
        "post_mlp_layernorm.weight": (
            "post_mlp_layernorm.weight" if a.family == "glm4" else "post_feedforward_layernorm.weight"
        ),
    }
    if a.family == "gemma3_text":
        simple["mlp.linear_fc1.layer_norm_weight"] = "pre_feedforward_layernorm.weight"
    if a.latent:
        simple["self_attention.q_layernorm.weight"] = "self_attn.q_a_layernorm.weight"
    if a.family == "minimax_m2":
        simple["mlp.router.expert_bias"] = "block_sparse_moe.e_score_correction_bias"
    if a.family in ("phi3", "glm4"):
        simple["mlp.linear_fc1.weight"] = "mlp.gate_up_proj.weight"
    if name in simple:
        return hf[block + simple[name]]
    if a.family == "gpt_oss":
        return by_hand_fused(hf, f"{block}mlp.", name.removeprefix("mlp."), tensor.expert)
    if a.family in ("mixtral", "minimax_m2"):
        mlp, gate, up, down = f"{block}block_sparse_moe.", "w1", "w3", "w2"
    else:
        mlp, gate, up, down = f"{block}mlp.", "gate_proj", "up_proj", "down_proj"
    if name == "mlp.router.weight":
        return hf[f"{mlp}gate.weight"]
    if name.startswith("mlp.shared_experts."):
        mlp = f"{mlp}shared_expert{'s' * (a.family in ('glm4_moe', 'deepseek_v3', 'mistral4'))}."
    if tensor.is_expert:
        mlp = f"{mlp}experts.{tensor.expert}."
    if name.endswith("linear_fc2.weight"):
        return hf[f"{mlp}{down}.weight"]
    assert name.endswith("linear_fc1.weight")
    return torch.cat([hf[f"{mlp}{gate}.weight"], hf[f"{mlp}{up}.weight"]])


def by_hand_delta_net(
    hf: dict[str, Tensor], prefix: str, name: str, a: Architecture, net: DeltaNet
) -> Tensor:
    plain = {"linear_proj.weight": "out_proj.weight", "out_norm.weight": "norm.weight"}
    plain |= {"A_log": "A_log", "dt_bias": "dt_bias"}
    if name in plain:
        return hf[prefix + plain[name]]
    is_convolution = name == "conv_weight"
    if a.family == "qwen3_next" and not is_convolution:
        parts = [hf[f"{prefix}in_proj_{part}.weight"] for part in ("qkvz", "ba")]
    else:
        keys = net.num_key_heads * net.key_dim
        mixed = hf[f"{prefix}conv1d.weight" if is_convolution else f"{prefix}in_proj_qkv.weight"]
        parts = list(mixed.split([keys, keys, len(mixed) - 2 * keys]))
        parts += [] if is_convolution else [hf[f"{prefix}in_proj_{part}.weight"] for part in "zba"]
    # Of each key head the rows that belong to it.
    by_head = [part.unflatten(0, (net.num_key_heads, -1)) for part in parts]
    return torch.cat(by_head, dim=1).flatten(0, 1)


def by_hand_fused(hf: dict[str, Tensor], mlp: str, name: str, expert: int | None) -> Tensor:
    if expert is None:
        return hf[mlp + name]
    if name.endswith("linear_fc2.weight"):
        return hf[f"{mlp}experts.down_proj"][expert].T
    if name.endswith("linear_fc2.bias"):
        return hf[f"{mlp}experts.down_proj_bias"][expert]
    both = hf[f"{mlp}experts.gate_up_proj{'_bias' * name.endswith('bias')}"][expert]
    return torch.cat((both[..., ::2], both[..., 1::2]), dim=-1).T.contiguous()


def random_tiling(rng: random.Random, shape: tuple[int, ...]) -> list[Region]:
    """Regions that cover `shape` once."""
    cuts = []
    for size in shape:
        inner = sorted(rng.sample(range(1, size), min(size - 1, rng.randint(0, 3))))
        cuts.append(list(itertools.pairwise([0, *inner, size])))
    return [
        Region(tuple(start for start, _ in spans), tuple(stop for _, stop in spans))
        for spans in itertools.product(*cuts)
    ]


def test_regions_share_the_elements_that_both_index() -> None:
    rng, shape = random.Random(23), (5, 4)
    numbered = torch.arange(20).view(shape)
    for _ in range(200):
        one, other = rng.choice(random_tiling(rng, shape)), rng.choice(random_tiling(rng, shape))
        shared = one.intersect(other)
        inside = set(numbered[one.slices].flatten().tolist()) & set(numbered[other.slices].flatten().tolist())
        assert set(numbered[shared.slices].flatten().tolist()) == inside
        assert shared.numel == len(inside)
        values = numbered[one.slices][shared.relative_to(one.start).slices]
        assert torch.equal(values, numbered[shared.slices])
        rows = range(*sorted(rng.choices(range(9), k=2)))
        cut = one.along(0, rows.start, rows.stop)
        kept = [row for row in range(one.start[0], one.stop[0]) if row in rows]
        assert torch.equal(numbered[cut.slices], numbered[kept, one.start[1] : one.stop[1]])


def test_every_row_of_every_hugging_face_tensor_is_covered_exactly_once() -> None:
    for architecture in cases():
        counts = {name: torch.zeros(shape[0]) for name, shape in hf_shapes(architecture).items()}
        for tensor in megatron_tensors(architecture):
            assert tensor.shape[0] == sum(run.num_rows for run in tensor.rows)
            for run in tensor.rows:
                if run.expert is not None:  # of a tensor of all experts: counted below, element by element
                    counts[run.name][:] = 1
                    continue
                counts[run.name][run.start : run.start + run.num_rows] += 1
        assert all(bool((count == 1).all()) for count in counts.values()), architecture


def test_blocks_in_turns_are_the_rows_of_the_table() -> None:
    """What adapters go by."""
    for architecture in cases():
        for tensor in megatron_tensors(architecture):
            if tensor.rows[0].expert is not None:  # of a tensor of all experts, which has no adapter
                continue
            found: list[tuple[str, int]] = []
            for turn, block in itertools.product(range(tensor.num_turns), tensor.blocks):
                num = block.num_rows // tensor.num_turns
                rows, each = (
                    range(block.start + turn * num, block.start + (turn + 1) * num),
                    num // len(block.order),
                )
                parts = [rows[number * each :][:each] for number in block.order]
                found += [(block.name, row) for part in parts for row in part]
            runs = [(run.name, range(run.start, run.start + run.num_rows)) for run in tensor.rows]
            assert found == [(name, row) for name, rows in runs for row in rows], tensor.key


def test_key_and_index_name_a_tensor_and_the_stack_holds_every_index() -> None:
    for architecture in cases():
        tensors = list(megatron_tensors(architecture))
        assert len({(tensor.key, tensor.index) for tensor in tensors}) == len(tensors)
        for key, same in itertools.groupby(sorted(tensors, key=lambda t: t.key), key=lambda t: t.key):
            members = list(same)
            assert len({(t.stack, t.shape, t.shard, t.num_parts) for t in members}) == 1, key
            grid = itertools.product(*(range(size) for size in members[0].stack))
            assert sorted(t.index for t in members) == list(grid), key


def test_random_regions_put_the_megatron_tensors_together_and_take_them_apart_again() -> None:
    rng = random.Random(21)
    for architecture in cases():
        hf = numbered_hf_tensors(architecture)
        back = {name: torch.full_like(tensor, torch.nan) for name, tensor in hf.items()}
        for tensor in megatron_tensors(architecture):
            whole = by_hand(tensor, architecture, hf)
            assert tuple(whole.shape) == tensor.shape, tensor.key
            for region in random_tiling(rng, tensor.shape):
                values, expected = torch.full(region.shape, torch.nan), whole[region.slices]
                for part in hf_regions(tensor, region):
                    place = part.as_in_file(values[part.target.slices])
                    assert torch.isnan(place).all(), "regions overlap"
                    place.copy_(boxed(hf[part.name], part)[part.source.slices])
                    stored = boxed(back[part.name], part)[part.source.slices]
                    assert torch.isnan(stored).all(), "a value is written twice"
                    part.as_in_megatron(stored).copy_(expected[part.target.slices])
                assert torch.equal(values, expected), (tensor.key, tensor.index, region)
        assert all(torch.equal(back[name], hf[name]) for name in hf)


def boxed(tensor: Tensor, part: HfRegion) -> Tensor:
    """A view in the dimensions of a region."""
    return tensor if len(part.source.shape) == tensor.dim() else tensor.unflatten(-1, (-1, 2))


@pytest.mark.parametrize("first", [0, 3, 11])
def test_rows_of_padding_are_made_of_nothing(first: int) -> None:
    architecture = next(cases())
    tensor = next(megatron_tensors(architecture))
    assert tensor.has_padding
    rows = architecture.vocab_size
    inside = max(0, rows - first)
    parts = list(hf_regions(tensor, Region.of((rows + 5, tensor.shape[1]), (first, 0))))
    assert [part.target.slices[0] for part in parts] == ([slice(0, inside)] if inside else [])
    assert not list(hf_regions(tensor, Region.of((5, tensor.shape[1]), (rows, 0))))


def test_only_the_vocabulary_has_padding() -> None:
    for architecture in cases(6):
        padded = {tensor.key for tensor in megatron_tensors(architecture) if tensor.has_padding}
        ends = {"embedding.word_embeddings.weight", "output_layer.weight"}
        assert padded == (ends - {"output_layer.weight"} if architecture.tie_embeddings else ends)


def test_a_group_is_its_query_heads_its_key_head_and_its_value_head() -> None:
    rng = random.Random(22)
    architecture = random_architecture(rng, "qwen2")
    while (
        architecture.num_query_groups == 1
        or architecture.num_query_groups == architecture.num_attention_heads
    ):
        architecture = random_architecture(rng, "qwen2")
    a, d = architecture, architecture.head_dim
    per_group = a.num_attention_heads // a.num_query_groups
    expected = []
    for group in range(a.num_query_groups):
        expected += [("q", head * d) for head in range(group * per_group, (group + 1) * per_group)]
        expected += [("k", group * d), ("v", group * d)]
    for kind in ("weight", "bias"):
        tensor = next(t for t in megatron_tensors(a) if t.key.endswith(f"linear_qkv.{kind}"))
        rows = [
            (run.name.removeprefix("model.layers.0.self_attn.")[0], run.start + first)
            for run in tensor.rows
            for first in range(0, run.num_rows, d)
        ]
        assert rows == expected


def test_parameters_are_the_sum_of_the_shapes() -> None:
    for architecture in cases():
        total = sum(torch.Size(shape).numel() for shape in hf_shapes(architecture).values())
        assert num_parameters(architecture) == total, architecture


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])
def test_names_and_shapes_are_those_of_transformers_model(tmp_path: Path, family: Family) -> None:
    transformers = pytest.importorskip("transformers")
    rng = random.Random(23)
    for _ in range(13):
        architecture = random_architecture(rng, family)
        (tmp_path / "config.json").write_text(json.dumps(hf_config_values(architecture, dtype=None)))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if architecture.tie_embeddings:
            del theirs["lm_head.weight"]
        assert hf_shapes(architecture) == theirs


@pytest.mark.parametrize("family", MIXTURES)
def test_names_and_shapes_are_those_that_transformers_saves_a_mixture_with(
    tmp_path: Path, family: Family
) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors import safe_open

    rng = random.Random(24)
    for number in range(4):
        directory = tmp_path / str(number)
        directory.mkdir()
        architecture = random_architecture(rng, family)
        (directory / "config.json").write_text(json.dumps(hf_config_values(architecture, dtype=None)))
        config = transformers.AutoConfig.from_pretrained(directory)
        auto_model().from_config(config).save_pretrained(directory)
        with safe_open(directory / "model.safetensors", "pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {name: each.shape for name, each in file_tensors(architecture).items()} == theirs
