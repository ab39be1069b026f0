"""config.json: read as transformers reads it, or refused by the name of what is not supported."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_sftrl.models.hf_config import from_hf_config
from megatron_sftrl.models.hf_families import hf_family
from tests.unit.models.hf_files import CLASSES, MIXTURES, read, values, window_layers_of
from tests.unit.models.random_architectures import FAMILIES

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MINISTRAL = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
    "llama_4_scaling_beta": 0.3,
}
LONGROPE = {"type": "longrope", "short_factor": [1] * 32, "long_factor": [2.5] * 32}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 16, "head_dim": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-4},
        {"rope_theta": 500000.0, "max_position_embeddings": 777, "initializer_range": 0.01},
        {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}, "rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}},
        {"num_experts_per_tok": 3, "num_local_experts": 7, "moe_intermediate_size": 99},
        {"num_experts_per_tok": 3, "num_experts": 7, "norm_topk_prob": True},
    ],
)
def test_every_size_is_what_transformers_reads(
    tmp_path: Path, family: str, changes: dict[str, object]
) -> None:
    transformers = pytest.importorskip("transformers")
    not_read = {
        "qwen3_moe": (),
        "qwen2_moe": ("num_local_experts",),
        "mixtral": ("moe_intermediate_size", "norm_topk_prob"),
        "glm4_moe": ("num_experts", "num_local_experts"),
        "deepseek_v3": ("num_experts", "num_local_experts", "num_key_value_heads", "head_dim"),
        "mistral4": ("num_experts", "num_local_experts", "num_key_value_heads", "head_dim"),
        "gpt_oss": ("moe_intermediate_size", "norm_topk_prob"),
        "minimax_m2": ("moe_intermediate_size", "norm_topk_prob"),
    }.get(family, tuple(changes) if "num_experts_per_tok" in changes else ())
    if family in ("olmo3", "ministral3", "mistral4", "gpt_oss"):
        not_read = (*not_read, "rope_theta", "rope_parameters", "rope_scaling")
    if family == "gemma3_text" and "rope_parameters" in changes:
        not_read = (*not_read, "rope_theta", "rope_parameters")
    changes = {key: value for key, value in changes.items() if key not in not_read}
    if family == "deepseek_v3":
        changes |= {"n_group": 1, "topk_group": 1}
    ours = read(tmp_path, values(family, **changes))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_layers, ours.hidden_size) == (theirs.num_hidden_layers, theirs.hidden_size)
    width = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert (ours.ffn_hidden_size, ours.num_query_groups) == (width, theirs.num_key_value_heads)
    is_whole = hf_family(ours.family).latent_head_dim == "all"
    assert (ours.head_dim if is_whole else ours.rope_head_dim) == head_dim
    assert ours.vocab_size == theirs.vocab_size
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    rope = theirs.rope_parameters
    assert ours.rope.theta == rope.get("full_attention", rope)["rope_theta"]
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.init_std == theirs.initializer_range
    assert ours.family == theirs.model_type
    window = (ours.sliding_window, ours.window_layers)
    size, layers = window_layers_of(theirs)
    # A window as long as the longest sequence is none for us, but for the positions that come with it.
    is_none = size is None or (size >= theirs.max_position_embeddings and ours.window_rope is None)
    assert window == ((None, ()) if is_none else (size, layers))
    if ours.mixture is None:
        assert family not in MIXTURES
    else:
        num_experts = theirs.num_experts if hasattr(theirs, "num_experts") else theirs.num_local_experts
        shared = width * getattr(theirs, "n_shared_experts", 0)
        assert ours.mixture.num_experts == num_experts
        assert ours.mixture.shared_width == getattr(theirs, "shared_expert_intermediate_size", shared)
        assert ours.mixture.experts_per_token == theirs.num_experts_per_tok
        assert ours.mixture.normalizes_weights == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_diff", [False, True])
def test_what_transformers_itself_writes_is_accepted(tmp_path: Path, family: str, use_diff: bool) -> None:
    transformers = pytest.importorskip("transformers")
    # transformers' own default of hidden_size is no multiple of its number of heads.
    head_dim = {"head_dim": 128} if family == "glm4_moe" else {}
    names = [f"{CLASSES[family]}ForCausalLM"]
    config = transformers.AutoConfig.for_model(family, architectures=names, **head_dim)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=use_diff))
    assert from_hf_config(tmp_path).num_layers == config.num_hidden_layers


@pytest.mark.parametrize(
    ("family", "key", "groups_or_head_dim"),
    [
        ("llama", "num_key_value_heads", 16),
        ("qwen2", "num_key_value_heads", 16),
        ("qwen3", "num_key_value_heads", 16),
        ("llama", "head_dim", 128),
        ("mistral", "head_dim", 128),
        ("mixtral", "head_dim", 128),
    ],
)
def test_a_null_means_what_transformers_makes_of_it(
    tmp_path: Path, family: str, key: str, groups_or_head_dim: int
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = read(tmp_path, values(family, num_attention_heads=16, num_key_value_heads=4) | {key: None})
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (ours.num_query_groups if key != "head_dim" else ours.head_dim) == groups_or_head_dim
    assert ours.num_query_groups == theirs.num_key_value_heads


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("mistral", "num_key_value_heads"),
        ("mixtral", "num_key_value_heads"),
        ("qwen3_moe", "num_key_value_heads"),
        ("qwen2", "head_dim"),
        ("qwen3", "head_dim"),
        ("qwen3_moe", "head_dim"),
        ("llama", "rms_norm_eps"),
        ("llama", "tie_word_embeddings"),
        ("llama", "hidden_act"),
        ("llama", "max_position_embeddings"),
        ("llama", "rope_theta"),
        ("mixtral", "num_experts_per_tok"),
    ],
)
def test_a_null_on_which_transformers_fails_is_refused(tmp_path: Path, family: str, key: str) -> None:
    transformers = pytest.importorskip("transformers")
    import torch
    from huggingface_hub.errors import StrictDataclassError

    asked = values(family) | {key: None}
    with pytest.raises(ValueError, match=f"{key}.*None"):
        read(tmp_path, asked)
    with torch.device("meta"), pytest.raises((StrictDataclassError, TypeError)):
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"num_hidden_layers": 3}, {"num_layers": 3}),
        ("llama", {"hidden_size": 1024}, {"hidden_size": 1024, "head_dim": 32}),
        ("llama", {"intermediate_size": 77}, {"ffn_hidden_size": 77}),
        ("llama", {"num_key_value_heads": 2}, {"num_query_groups": 2}),
        ("mistral", {"head_dim": 10}, {"head_dim": 10}),
        ("llama", {"vocab_size": 9}, {"vocab_size": 9}),
        ("llama", {"max_position_embeddings": 9}, {"max_position_embeddings": 9}),
        ("llama", {"rms_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ("llama", {"initializer_range": 0.5}, {"init_std": 0.5}),
        ("llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ("llama", {"rope_theta": 7.0}, {"rope.theta": 7.0}),
        ("llama", {"rope_parameters": {"rope_theta": 7.0}}, {"rope.theta": 7.0}),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope.kind": "linear", "rope.factor": 2.0},
        ),
        ("llama", {"rope_scaling": LLAMA3}, {"rope.kind": "llama3", "rope.original_length": 8192}),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 2}}, {"rope.low_freq_factor": 2.0}),
        ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 5}}, {"rope.high_freq_factor": 5.0}),
        ("qwen2", {"rope_scaling": YARN}, {"rope.kind": "yarn", "rope.factor": 4.0}),
        ("qwen2", {"rope_scaling": {**YARN, "beta_fast": 9}}, {"rope.beta_fast": 9.0}),
        ("qwen2", {"rope_scaling": {**YARN, "beta_slow": 2}}, {"rope.beta_slow": 2.0}),
        ("qwen2", {"rope_scaling": {**YARN, "truncate": False}}, {"rope.truncate": False}),
        ("qwen2", {"rope_scaling": {**YARN, "attention_factor": 0.5}}, {"rope.attention_factor": 0.5}),
        ("qwen2", {"rope_scaling": {**YARN, "factor": None}}, {"rope.factor": 8.0}),
        ("smollm3", {"no_rope_layer_interval": 3}, {"no_rope_layers": (2,)}),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}, {"no_rope_layers": (0, 3)}),
        ("smollm3", {"tie_word_embeddings": False}, {"tie_embeddings": False}),
        ("olmo3", {"sliding_window": 99}, {"sliding_window": 99}),
        ("olmo3", {"rope_scaling": YARN}, {"rope.kind": "yarn", "window_rope.kind": "default"}),
        ("granite", {"embedding_multiplier": 12}, {"embedding_multiplier": 12.0}),
        ("granite", {"attention_multiplier": 0.5}, {"attention_multiplier": 0.5}),
        ("granite", {"residual_multiplier": 0.22}, {"residual_multiplier": 0.22}),
        ("granite", {"logits_scaling": 8.0}, {"logits_divisor": 8.0}),
        ("phi3", {"partial_rotary_factor": 0.75}, {"rope.fraction": 0.75}),
        ("phi3", {"auto_map": {"AutoModel": "x.Y"}}, {}),
        (
            "phi3",
            {
                "rope_scaling": LONGROPE,
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 2048,
            },
            {"rope.short_factors": (1,) * 32, "rope.factor": 64.0, "max_position_embeddings": 2048},
        ),
        (
            "phi3",
            {"rope_scaling": LONGROPE, "max_position_embeddings": 64},
            {"rope.original_length": 4096, "max_position_embeddings": 64},
        ),
        ("mistral4", {"kv_lora_rank": 8}, {"latent.rank": 8}),
        ("mistral4", {"qk_nope_head_dim": 8}, {"head_dim": 72}),
        ("mistral4", {"rope_parameters": {**MINISTRAL, "partial_rotary_factor": 0.5}}, {"rope.factor": 4.0}),
        ("mistral4", {"norm_topk_prob": False}, {"mixture.normalizes_weights": False}),
        ("mistral4", {"first_k_dense_replace": 2}, {"mixture.num_dense_layers": 2}),
        ("glm4", {"partial_rotary_factor": 0.75}, {"rope.fraction": 0.75}),
        ("glm4", {"attention_bias": False}, {"qkv_bias": False}),
        ("ministral3", {"rope_parameters": MINISTRAL}, {"rope.query_beta": 0.3, "rope.factor": 4.0}),
        ("qwen2_moe", {"qkv_bias": False}, {"qkv_bias": False}),
        ("minimax_m2", {"rotary_dim": 64}, {"rope.fraction": 0.5}),
        ("minimax_m2", {"rotary_dim": 64, "head_dim": 80}, {"rope.fraction": 0.8, "head_dim": 80}),
        ("minimax_m2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, {"rope.fraction": 0.5}),
        ("minimax_m2", {"partial_rotary_factor": 0.5, "rotary_dim": 64}, {"rope.fraction": 0.5}),
        ("minimax_m2", {"num_local_experts": 3, "num_experts_per_tok": 2}, {"mixture.num_experts": 3}),
        ("minimax_m2", {"intermediate_size": 5}, {"ffn_hidden_size": 5}),
        ("gpt_oss", {"swiglu_alpha": 1.5}, {"gate_slope": 1.5}),
        ("gpt_oss", {"swiglu_limit": 5.0}, {"gate_limit": 5.0}),
        ("gpt_oss", {"sliding_window": 64}, {"sliding_window": 64}),
        ("glm4_moe", {"attention_bias": True}, {"qkv_bias": True}),
        ("glm4_moe", {"use_qk_norm": True}, {"qk_norm": True}),
        ("glm4_moe", {"n_routed_experts": 16}, {"mixture.num_experts": 16}),
        ("glm4_moe", {"n_shared_experts": 2}, {"mixture.shared_width": 2816}),
        ("glm4_moe", {"routed_scaling_factor": 2.5}, {"mixture.weights_factor": 2.5}),
        ("glm4_moe", {"first_k_dense_replace": 0}, {"mixture.num_dense_layers": 0}),
        ("glm4_moe", {"intermediate_size": 5}, {"mixture.dense_width": 5}),
        (
            "glm4_moe",
            {"n_group": 8, "topk_group": 4},
            {"mixture.num_groups": 8, "mixture.groups_per_token": 4},
        ),
        ("deepseek_v3", {"q_lora_rank": None}, {"latent.query_rank": None}),
        ("deepseek_v3", {"q_lora_rank": 8}, {"latent.query_rank": 8}),
        ("deepseek_v3", {"kv_lora_rank": 8}, {"latent.rank": 8}),
        ("deepseek_v3", {"v_head_dim": 8}, {"latent.value_dim": 8}),
        ("deepseek_v3", {"qk_nope_head_dim": 8}, {"head_dim": 72}),
        ("deepseek_v3", {"qk_rope_head_dim": 8}, {"latent.rope_dim": 8, "head_dim": 136}),
        ("deepseek_v3", {"routed_scaling_factor": 1.0}, {"mixture.weights_factor": 1.0}),
        ("deepseek_v3", {"num_nextn_predict_layers": 1, "auto_map": {"AutoModel": "x.Y"}}, {}),
        ("deepseek_v3", {"quantization_config": FP8, "topk_method": "noaux_tc"}, {}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 7}, {"mixture.shared_width": 7}),
        ("mixtral", {"num_local_experts": 3}, {"mixture.num_experts": 3}),
        ("mixtral", {"num_experts_per_tok": 5}, {"mixture.experts_per_token": 5}),
        ("qwen3_moe", {"num_experts": 9}, {"mixture.num_experts": 9}),
        ("qwen3_moe", {"norm_topk_prob": True}, {"mixture.normalizes_weights": True}),
        ("qwen3_moe", {"moe_intermediate_size": 5}, {"ffn_hidden_size": 5}),
    ],
)
def test_every_key_that_is_honoured_changes_the_architecture(
    tmp_path: Path, family: str, changes: dict[str, object], expected: dict[str, object]
) -> None:
    def field(record: Any, path: str) -> object:
        for name in path.split("."):
            record = (record or {}).get(name)
        return record

    plain, changed = (asdict(read(tmp_path, values(family, **more))) for more in ({}, changes))
    for path, value in expected.items():
        assert field(changed, path) == value
        assert field(plain, path) != value


def test_settings_without_effect_do_not_stop_a_run_and_change_nothing(tmp_path: Path) -> None:
    harmless = {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "pretraining_tp": 1,
        "layer_types": ["full_attention"] * 4,
        "attention_dropout": 0.0,
        "temperature": 0.6,
        "attention_bias": True,
        "partial_rotary_factor": 1.0,
        "final_logit_softcapping": None,
    }
    assert read(tmp_path, values("qwen2", **harmless)) == read(tmp_path, values("qwen2"))
    training = {"output_router_logits": True, "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.0}
    assert read(tmp_path, values("mixtral", **training)) == read(tmp_path, values("mixtral"))


def test_model_type_alone_names_the_architecture(tmp_path: Path) -> None:
    for family in FAMILIES:
        assert read(tmp_path, values(family) | {"architectures": None}).family == family


@pytest.mark.parametrize(("content", "message"), [("{", "cannot read"), ("[]", "expected a JSON object")])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        from_hf_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file: .*config\.json"):
        from_hf_config(tmp_path)


def test_all_problems_of_a_file_are_listed_at_once_and_each_once(tmp_path: Path) -> None:
    twice: dict[str, Any] = {
        "rope_scaling": {"rope_type": "dynamic"},
        "rope_parameters": {"rope_type": "dynamic"},
    }
    with pytest.raises(ValueError, match="cannot be used") as raised:
        read(tmp_path, values(hidden_act="gelu", mlp_bias=True, **twice) | {"vocab_size": None})
    lines = str(raised.value).split("\n  ")[1:]
    assert [line.split(" ")[0] for line in lines] == ["hidden_act", "mlp_bias:", "vocab_size", "rope_type"]
