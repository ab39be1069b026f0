"""Published mixtures of experts and hybrids: their numbers of parameters, their positions, both spellings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.models.hf_config import read_hf_config
from megatron_sftrl.models.rope import Rope
from tests.unit.models.published import (
    EIGHT_BITS,
    QWEN3,
    WHOLE_MATRICES,
    Content,
    architecture,
    assert_is_transformers,
    config,
    hybrid,
    mistral_text,
    multimodal,
    qwen3_5,
    yarn_of_ministral,
)

MIXTRAL_8X7B = config(
    "mixtral",
    (4096, 14336, 32, 32, 8, 32000),
    max_position_embeddings=32768,
    num_experts_per_tok=2,
    num_local_experts=8,
    output_router_logits=False,
    router_aux_loss_coef=0.02,
    rope_theta=1000000.0,
    sliding_window=None,
)
MIXTRAL_8X22B = {
    **config("mixtral", (6144, 16384, 56, 48, 8, 32000), max_position_embeddings=65536, rope_theta=1000000),
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
}
QWEN3_30B_A3B = config(
    "qwen3_moe",
    (2048, 6144, 48, 32, 4, 151936),
    decoder_sparse_step=1,
    max_window_layers=48,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_experts=128,
    num_experts_per_tok=8,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
    sliding_window=None,
    use_sliding_window=False,
    **QWEN3,
)
QWEN3_235B_A22B = {
    **QWEN3_30B_A3B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 94,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
QWEN3_CODER_480B = {
    **QWEN3_30B_A3B,
    "head_dim": 128,
    "hidden_size": 6144,
    "intermediate_size": 8192,
    "max_position_embeddings": 262144,
    "max_window_layers": 62,
    "moe_intermediate_size": 2560,
    "num_attention_heads": 96,
    "num_experts": 160,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
QWEN1_5_MOE = config(
    "qwen2_moe",
    (2048, 5632, 24, 16, 16, 151936),
    decoder_sparse_step=1,
    max_position_embeddings=8192,
    max_window_layers=21,
    moe_intermediate_size=1408,
    norm_topk_prob=False,
    num_experts=60,
    num_experts_per_tok=4,
    rope_theta=1000000.0,
    shared_expert_intermediate_size=5632,
    sliding_window=32768,
    use_sliding_window=False,
)
QWEN2_57B_A14B = {
    **QWEN1_5_MOE,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 131072,
}
GPT_OSS_20B = config(
    "gpt_oss",
    (2880, 2880, 24, 64, 8, 201088),
    attention_bias=True,
    experts_per_token=4,
    head_dim=64,
    initial_context_length=4096,
    layer_types=["sliding_attention", "full_attention"] * 12,
    max_position_embeddings=131072,
    num_experts_per_tok=4,
    num_local_experts=32,
    quantization_config={"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    rms_norm_eps=1e-05,
    rope_scaling={
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    rope_theta=150000,
    router_aux_loss_coef=0.9,
    sliding_window=128,
    swiglu_limit=7.0,
)
GPT_OSS_120B = {
    **GPT_OSS_20B,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
}
MINIMAX_M2 = config(
    "minimax_m2",
    (3072, 1536, 62, 48, 8, 200064),
    attn_type_list=[1] * 62,
    auto_map={"A": "B"},
    head_dim=128,
    max_position_embeddings=196608,
    mtp_transformer_layers=1,
    num_experts_per_tok=8,
    num_local_experts=256,
    num_mtp_modules=3,
    qk_norm_type="per_layer",
    quantization_config={
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    rms_norm_eps=1e-06,
    rope_theta=5000000,
    rotary_dim=64,
    scoring_func="sigmoid",
    shared_intermediate_size=0,
    use_mtp=True,
    use_qk_norm=True,
    use_routing_bias=True,
)
GLM_4_5_AIR = config(
    "glm4_moe",
    (4096, 10944, 46, 96, 8, 151552),
    attention_bias=True,
    first_k_dense_replace=1,
    head_dim=128,
    max_position_embeddings=131072,
    moe_intermediate_size=1408,
    n_group=1,
    n_routed_experts=128,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_experts_per_tok=8,
    num_nextn_predict_layers=1,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=1000000,
    routed_scaling_factor=1.0,
    topk_group=1,
    use_qk_norm=False,
)
GLM_4_5 = {
    **GLM_4_5_AIR,
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
GLM_4_6 = {**GLM_4_5, "max_position_embeddings": 202752}  # GLM-4.7's, too
DEEPSEEK = {
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "auto_map": {"A": "B"},
}
DEEPSEEK_V3 = config(
    "deepseek_v3",
    (7168, 18432, 61, 128, 128, 129280),
    **DEEPSEEK,
    attention_bias=False,
    ep_size=1,
    first_k_dense_replace=3,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    moe_intermediate_size=2048,
    moe_layer_freq=1,
    n_group=8,
    n_routed_experts=256,
    norm_topk_prob=True,
    num_nextn_predict_layers=1,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    quantization_config=EIGHT_BITS,
    rms_norm_eps=1e-06,
    rope_scaling={
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    rope_theta=10000,
    routed_scaling_factor=2.5,
    topk_group=4,
    topk_method="noaux_tc",
    v_head_dim=128,
)
MOONLIGHT = config(
    "deepseek_v3",
    (2048, 11264, 27, 16, 16, 163840),
    **{**DEEPSEEK, "num_experts_per_tok": 6, "n_shared_experts": 2},
    aux_loss_alpha=0.001,
    first_k_dense_replace=1,
    kv_lora_rank=512,
    max_position_embeddings=8192,
    moe_intermediate_size=1408,
    n_group=1,
    n_routed_experts=64,
    num_nextn_predict_layers=0,
    q_lora_rank=None,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=50000.0,
    routed_scaling_factor=2.446,
    seq_aux=True,
    topk_group=1,
    topk_method="noaux_tc",
)
KIMI_K2 = {
    **DEEPSEEK_V3,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "vocab_size": 163840,
}
MISTRAL_SMALL_4 = multimodal(
    "mistral3",
    {
        **mistral_text("mistral4", (4096, 12288, 36, 32, 32, 131072), max_position_embeddings=1048576),
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 256,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 4,
        "q_lora_rank": 1024,
        "qk_head_dim": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_interleave": True,
        "rope_parameters": yarn_of_ministral(
            factor=128.0,
            max_position_embeddings=1048576,
            original_max_position_embeddings=8192,
            partial_rotary_factor=0.5,
            rope_theta=10000.0,
        ),
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "v_head_dim": 128,
    },
    quantization_config=WHOLE_MATRICES,
    tie_word_embeddings=False,
)
EXPERTS_OF_A_HYBRID = {
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
}
QWEN3_NEXT_80B_A3B = {
    **hybrid((2048, 5120, 48, 16, 2, 151936), **EXPERTS_OF_A_HYBRID),
    "architectures": ["Qwen3NextForCausalLM"],
    "decoder_sparse_step": 1,
    "model_type": "qwen3_next",
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "use_sliding_window": False,
}
QWEN3_5_35B_A3B = qwen3_5(
    "qwen3_5_moe",
    (2048, 512, 40, 16, 2, 248320),
    **{**EXPERTS_OF_A_HYBRID, "num_experts": 256, "num_experts_per_tok": 8},
)
QWEN3_5_397B_A17B = qwen3_5(
    "qwen3_5_moe",
    (4096, 1024, 60, 32, 2, 248320),
    **{**EXPERTS_OF_A_HYBRID, "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024},
    linear_num_value_heads=64,
)
DENSE_HYBRIDS = {
    "Qwen3.5-0.8B": (
        qwen3_5("qwen3_5", (1024, 3584, 24, 8, 2, 248320), is_tied=True, linear_num_value_heads=16),
        752_393_024,
    ),
    "Qwen3.5-4B": (qwen3_5("qwen3_5", (2560, 9216, 32, 16, 4, 248320), is_tied=True), 4_205_751_296),
    "Qwen3.5-9B": (qwen3_5("qwen3_5", (4096, 12288, 32, 16, 4, 248320)), 8_953_803_264),
    "Qwen3.5-27B": (
        qwen3_5("qwen3_5", (5120, 17408, 64, 24, 4, 248320), linear_num_value_heads=48),
        26_895_998_464,
    ),
}


@pytest.mark.parametrize(
    ("content", "parameters"),
    [
        pytest.param(MIXTRAL_8X7B, 46_702_792_704, id="Mixtral-8x7B"),
        pytest.param(MIXTRAL_8X22B, 140_620_634_112, id="Mixtral-8x22B"),
        pytest.param(QWEN3_30B_A3B, 30_532_122_624, id="Qwen3-30B-A3B"),
        pytest.param(QWEN3_235B_A22B, 235_093_634_560, id="Qwen3-235B-A22B"),
        pytest.param(QWEN3_CODER_480B, 480_154_875_392, id="Qwen3-Coder-480B-A35B"),
        pytest.param(QWEN1_5_MOE, 14_315_784_192, id="Qwen1.5-MoE-A2.7B"),
        pytest.param(QWEN2_57B_A14B, 57_408_658_944, id="Qwen2-57B-A14B"),
        pytest.param(GPT_OSS_20B, 20_914_757_184, id="gpt-oss-20b"),
        pytest.param(GPT_OSS_120B, 116_829_156_672, id="gpt-oss-120b"),
        pytest.param(MINIMAX_M2, 228_689_748_992 + 62 * 256, id="MiniMax-M2"),
        pytest.param(GLM_4_5_AIR, 106_852_245_504 + 45 * 128, id="GLM-4.5-Air"),
        pytest.param(GLM_4_5, 352_797_814_784 + 89 * 160, id="GLM-4.5"),
        pytest.param(GLM_4_6, 352_797_814_784 + 89 * 160, id="GLM-4.6"),
        pytest.param(DEEPSEEK_V3, 671_026_404_352 + 58 * 256, id="DeepSeek-V3"),
        pytest.param(KIMI_K2, 1_026_408_209_408 + 60 * 384, id="Kimi-K2"),
        pytest.param(MOONLIGHT, 15_960_108_544 + 26 * 64, id="Moonlight-16B-A3B"),
        pytest.param(MISTRAL_SMALL_4, 118_972_826_624, id="Mistral-Small-4"),
        pytest.param(QWEN3_NEXT_80B_A3B, 79_674_391_296, id="Qwen3-Next-80B-A3B"),
        pytest.param(QWEN3_5_35B_A3B, 34_660_610_688, id="Qwen3.5-35B-A3B"),
        pytest.param(QWEN3_5_397B_A17B, 396_346_350_336, id="Qwen3.5-397B-A17B"),
        *(pytest.param(*each, id=name) for name, each in DENSE_HYBRIDS.items()),
    ],
)
def test_a_published_model_is_that_of_transformers(tmp_path: Path, content: Content, parameters: int) -> None:
    assert_is_transformers(tmp_path, content, parameters)


def test_published_positions_are_read_with_every_parameter(tmp_path: Path) -> None:
    assert architecture(tmp_path, MIXTRAL_8X7B).rope == Rope(kind="default", theta=1e6)
    assert architecture(tmp_path, MINIMAX_M2).rope == Rope(kind="default", theta=5e6, fraction=0.5)
    assert architecture(tmp_path, QWEN3_5_35B_A3B).rope == Rope(kind="default", theta=1e7, fraction=0.25)
    kimi = architecture(tmp_path, KIMI_K2).rope
    assert (kimi.kind, kimi.factor, kimi.beta_fast, kimi.beta_slow) == ("yarn", 32.0, 1.0, 1.0)


def test_a_kimi_k2_is_a_deepseek_v3_and_a_line_says_so(tmp_path: Path) -> None:
    a = architecture(tmp_path, KIMI_K2)
    assert a.family == "deepseek_v3"
    assert any(
        "model_type 'kimi_k2': the network of a deepseek_v3" in note for note in read_hf_config(tmp_path)[1]
    )


def test_a_mixture_that_does_not_ask_for_normalised_weights_gets_none(tmp_path: Path) -> None:
    def normalizes(content: Content) -> bool:
        mixture = architecture(tmp_path, content).mixture
        assert mixture is not None
        return mixture.normalizes_weights

    assert normalizes(QWEN3_30B_A3B)
    assert not normalizes({key: value for key, value in QWEN3_30B_A3B.items() if key != "norm_topk_prob"})
    assert normalizes(MIXTRAL_8X7B)


def test_published_windows_that_are_not_in_use_are_none(tmp_path: Path) -> None:
    for content in (MIXTRAL_8X7B, QWEN3_30B_A3B, QWEN2_57B_A14B):
        assert architecture(tmp_path, content).sliding_window is None
