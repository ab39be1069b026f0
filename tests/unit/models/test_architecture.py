"""Sizes of a network, by hand."""

from __future__ import annotations

import json
import random

import pytest

from megatron_sftrl.config.schema import ArchitectureSection
from megatron_sftrl.models.architecture import (
    from_record,
    from_section,
    num_parameters,
    padded_vocab_size,
    to_record,
)
from tests.unit.models.random_architectures import FAMILIES, random_architecture


def section(**changes: object) -> ArchitectureSection:
    values = {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "vocab_size": 101,
        **changes,
    }
    return ArchitectureSection.model_validate(values)


def test_what_is_not_given_follows_from_the_heads() -> None:
    architecture = from_section(section())
    assert (architecture.head_dim, architecture.num_query_groups) == (16, 4)
    assert from_section(section(head_dim=32, num_query_groups=2)).head_dim == 32


@pytest.mark.parametrize(
    ("family", "bias", "norm"), [("llama", False, False), ("qwen2", True, False), ("qwen3", False, True)]
)
def test_the_family_decides_biases_and_norms(family: str, bias: bool, norm: bool) -> None:
    architecture = from_section(section(family=family))
    assert (architecture.qkv_bias, architecture.qk_norm) == (bias, norm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size = 64 is not a multiple of num_attention_heads = 5"),
        ({"num_query_groups": 3}, "num_attention_heads = 4 is not a multiple of num_query_groups = 3"),
        ({"head_dim": 15}, "head_dim = 15: rotary positions need an even number"),
        (
            {"hidden_size": 66, "head_dim": 16},
            "hidden_size = 66 is not a multiple of num_attention_heads = 4: transformers refuses",
        ),
    ],
)
def test_sizes_that_form_no_network_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_section(section(**changes))


@pytest.mark.parametrize(
    ("vocab", "tp", "multiple", "expected"),
    [(101, 1, 1, 101), (101, 2, 1, 102), (102, 2, 1, 102), (101, 3, 1, 102), (101, 2, 64, 128), (7, 8, 1, 8)],
)
def test_the_vocabulary_is_padded_to_the_next_multiple(
    vocab: int, tp: int, multiple: int, expected: int
) -> None:
    assert padded_vocab_size(vocab, tp, multiple=multiple) == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_parameters_are_counted_as_transformers_counts_them(family: str, is_tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    architecture = from_section(
        section(family=family, num_query_groups=2, head_dim=32, tie_embeddings=is_tied, num_layers=3)
    )
    config = transformers.AutoConfig.for_model(
        family,
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=101,
        tie_word_embeddings=is_tied,
        layer_types=None,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert num_parameters(architecture) == sum(p.numel() for p in model.parameters())


def test_a_record_of_json_values_gives_the_same_architecture_back() -> None:
    rng = random.Random(50)
    for number in range(60):
        architecture = random_architecture(rng, FAMILIES[number % len(FAMILIES)])
        assert from_record(json.loads(json.dumps(to_record(architecture)))) == architecture


@pytest.mark.parametrize("damage", ["missing", "unknown", "unknown inside rope"])
def test_a_record_that_does_not_hold_the_fields_is_refused(damage: str) -> None:
    record = to_record(random_architecture(random.Random(51), "qwen3"))
    if damage == "missing":
        del record["rope"]
    elif damage == "unknown":
        record["depth"] = 3
    else:
        record["rope"]["depth"] = 3
    with pytest.raises(ValueError, match="the record of an architecture is damaged"):
        from_record(record)
