"""Sliding windows: the layers and the tokens that transformers' own forward masks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.models.hf_files import MIXTURES, read, values, window_layers_of

ALL = (0, 1, 2, 3)
MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("family", "changes", "window", "layers"),
    [
        ("llama", {}, None, ()),
        ("llama", {"sliding_window": 16, "use_sliding_window": False}, None, ()),
        ("mistral", {}, 4096, ALL),
        ("mistral", {"sliding_window": None}, None, ()),
        ("mistral", {"sliding_window": 16}, 16, ALL),
        ("mixtral", {}, None, ()),
        ("mixtral", {"sliding_window": 16}, 16, ALL),
        ("mixtral", {"sliding_window": 16, "layer_types": ["sliding_attention"] * 4}, 16, ALL),
        ("qwen2", {"sliding_window": 16}, None, ()),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, None, ()),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16, ALL),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, 16, (3,)),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None, ()),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, 4096, (1, 2, 3)),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": MIXED}, 16, (1, 3)),
        (
            "qwen3",
            {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention"] * 4},
            None,
            (),
        ),
        ("qwen3_moe", {"sliding_window": 16}, None, ()),
        ("qwen3_moe", {"sliding_window": 16, "use_sliding_window": True}, 16, ALL),
        ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 0}, 4096, ALL),
        ("smollm3", {}, None, ()),
        ("smollm3", {"sliding_window": 16, "use_sliding_window": True}, 16, (3,)),
        ("smollm3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": MIXED}, 16, (1, 3)),
        (
            "smollm3",
            {"sliding_window": 16, "use_sliding_window": True, "no_rope_layer_interval": 2},
            16,
            (1, 3),
        ),
        ("olmo2", {}, None, ()),
        ("olmo3", {"sliding_window": 16}, 16, (0, 1, 2)),
        ("olmo3", {"sliding_window": 16, "layer_types": MIXED}, 16, (1, 3)),
        ("granite", {}, None, ()),
        ("phi3", {}, None, ()),
        ("phi3", {"sliding_window": 16}, 16, ALL),
        ("ministral3", {"sliding_window": 16}, 16, ALL),
        ("qwen2_moe", {"sliding_window": 16}, None, ()),
        ("glm4", {}, None, ()),
    ],
)
def test_window_and_layers_are_those_of_transformers_model(
    tmp_path: Path, family: str, changes: dict[str, object], window: int | None, layers: tuple[int, ...]
) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 64, "intermediate_size": 8, "num_experts_per_tok": 1, "num_local_experts": 2}
    if family == "qwen2_moe":
        small = {"hidden_size": 64, "num_experts_per_tok": 1, "num_experts": 2}
    elif family not in MIXTURES:
        small = {"hidden_size": 64, "intermediate_size": 8}
    ours = read(tmp_path, values(family, **small, **changes))
    assert (ours.sliding_window, ours.window_layers) == (window, layers)
    assert window_layers_of(transformers.AutoConfig.from_pretrained(tmp_path)) == (window, layers)


@pytest.mark.parametrize(("longest", "expected"), [(15, None), (16, None), (17, 16)])
def test_a_window_that_excludes_no_token_of_the_longest_sequence_is_none(
    tmp_path: Path, longest: int, expected: int | None
) -> None:
    ours = read(tmp_path, values("mistral", sliding_window=16, max_position_embeddings=longest))
    assert ours.sliding_window == expected
    assert ours.window_layers == (() if expected is None else ALL)


@pytest.mark.parametrize(
    "family", ["mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo3", "phi3", "ministral3"]
)
def test_a_window_counts_the_token_itself(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    asked = values(family, sliding_window=3, head_dim=4, num_key_value_heads=2) | {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 16,
        **({"use_sliding_window": True} if family.startswith("qwen") else {}),
        **({"max_window_layers": 0} if family in ("qwen2", "qwen3") else {}),
        **({"num_experts_per_tok": 1, "num_local_experts": 2} if family in ("mixtral", "qwen3_moe") else {}),
    }
    window = read(tmp_path, asked).sliding_window
    assert window == 3
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(8)[None]
    other = tokens.clone()
    other[0, 2] = 15
    with torch.no_grad():
        differs = (model(tokens).logits != model(other).logits).any(dim=-1)[0]
    # One layer: only tokens that attend to position 2 see it, itself and the window - 1 after it.
    assert differs.nonzero().flatten().tolist() == list(range(2, 2 + window))
