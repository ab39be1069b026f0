"""The share of each tensor that an engine rank reads, against vLLM's own rule on numbered elements."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, Family, padded_vocab_size
from megatron_sftrl.models.engine_shards import EngineLayout, engine_regions
from megatron_sftrl.models.tensors import hf_boxes, hf_shapes
from tests.unit.models.hf_files import HYBRIDS
from tests.unit.models.random_architectures import FAMILIES, random_architecture
from tests.vllm_loaders import loaded_by_vllm


def cuttable(rng: random.Random, family, tp: int) -> Architecture:
    """A random architecture that an engine of this tp can hold."""
    architecture = random_architecture(rng, family)
    groups = rng.choice([size for size in (1, 2, 4, 8) if size % tp == 0 or tp % size == 0])
    heads = groups * tp * rng.randint(1, 2)
    if architecture.latent:
        groups = heads
    if (mixture := architecture.mixture) and mixture.shared_width:
        mixture = replace(mixture, shared_width=tp * rng.randint(1, 5))
    if net := architecture.delta_net:
        key_heads = tp * rng.randint(1, 2)
        net = replace(net, num_key_heads=key_heads, num_value_heads=key_heads * rng.randint(1, 3))
    if mixture and mixture.dense_width:
        mixture = replace(mixture, dense_width=tp * rng.randint(1, 5))
    return replace(
        architecture,
        mixture=mixture,
        delta_net=net,
        num_attention_heads=heads,
        num_query_groups=groups,
        hidden_size=heads * rng.randint(1, 2),
        ffn_hidden_size=tp * rng.randint(1, 5),
        vocab_size=rng.choice([3, 63, 64, 65, 101, 130]),
    )


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_engine_rank_is_given_exactly_the_elements_that_vllm_s_loaders_copy(family, tp: int) -> None:
    rng = random.Random(f"{family} {tp}")
    for _ in range(5):
        architecture = cuttable(rng, family, tp)
        for tp_rank in range(tp):
            regions = engine_regions(architecture, tp=tp, tp_rank=tp_rank)
            shapes, boxes = hf_shapes(architecture), hf_boxes(architecture)
            assert list(regions) == list(shapes)
            for name, shape in shapes.items():
                numbered = torch.arange(torch.Size(shape).numel()).view(shape)
                ours = numbered.view(boxes[name])[regions[name].slices]
                ours = ours.flatten(-2) if boxes[name] != shape else ours
                theirs = loaded_by_vllm(name, numbered, architecture, tp=tp, tp_rank=tp_rank)
                assert ours.shape == theirs.shape, name
                assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_of_an_engine_together_read_every_element(family) -> None:
    rng = random.Random(family)
    architecture = cuttable(rng, family, 4)
    shares = [engine_regions(architecture, tp=4, tp_rank=rank) for rank in range(4)]
    for name, shape in hf_boxes(architecture).items():
        read = torch.zeros(shape, dtype=torch.bool)
        for share in shares:
            read[share[name].slices] = True
        assert read.all(), name


def test_an_engine_that_cannot_cut_the_model_is_refused_with_every_reason() -> None:
    architecture = replace(
        random_architecture(random.Random(0), "qwen2"),
        num_attention_heads=6,
        num_query_groups=2,
        ffn_hidden_size=10,
        vocab_size=100,
    )
    assert padded_vocab_size(100, 1, multiple=64) == 128
    with pytest.raises(ValueError, match="tp 3 cannot hold this model") as caught:
        engine_regions(architecture, tp=3, tp_rank=0)
    for reason in ("num_query_groups = 2", "ffn_hidden_size = 10", "padded to 128"):
        assert reason in str(caught.value)
    assert "num_attention_heads" not in str(caught.value)
    with pytest.raises(ValueError, match="num_attention_heads = 6"):
        engine_regions(architecture, tp=4, tp_rank=0)


def test_consecutive_ranks_form_an_engine() -> None:
    layout = EngineLayout(tp=2, world_size=6)
    assert layout.num_replicas == 3
    assert [layout.replica(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [layout.tp_rank(rank) for rank in range(6)] == [0, 1, 0, 1, 0, 1]
    assert layout.replica_ranks(1) == (2, 3)
    with pytest.raises(ValueError, match="6 processes cannot form rollout engines of tp 4"):
        EngineLayout(tp=4, world_size=6)


@pytest.mark.parametrize("family", HYBRIDS)
def test_an_engine_that_cannot_cut_the_key_heads_of_gated_delta_nets_is_refused(family: Family) -> None:
    """More value heads than that do not help."""
    architecture = cuttable(random.Random(3), family, 2)
    assert architecture.delta_net is not None
    net = replace(architecture.delta_net, num_key_heads=3, num_value_heads=6)
    with pytest.raises(UserError, match=r"tp 2 cannot .* linear_num_key_heads = 3 is not a multiple of it"):
        engine_regions(replace(architecture, delta_net=net), tp=2, tp_rank=0)
