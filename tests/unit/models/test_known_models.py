"""Published models: their config.json gives their published number of parameters and their own positions."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.models.architecture import num_parameters
from megatron_sftrl.models.rope import Rope
from tests.unit.models.hf_files import CLASSES, read

LLAMA3_2_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def config(model_type: str, sizes: tuple[int, int, int, int, int, int], **more: object) -> dict[str, object]:
    """The usual keys of a config.json, and more."""
    hidden, width, layers, heads, groups, vocab = sizes
    return {
        "architectures": [f"{CLASSES[model_type]}ForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **more,
    }


LLAMA2_7B = config(
    "llama",
    (4096, 11008, 32, 32, 32, 32000),
    max_position_embeddings=4096,
    pretraining_tp=1,
    rope_scaling=None,
)
LLAMA3_2_1B = config(
    "llama",
    (2048, 8192, 16, 32, 8, 128256),
    attention_bias=False,
    head_dim=64,
    max_position_embeddings=131072,
    mlp_bias=False,
    rope_scaling=LLAMA3_2_ROPE,
    rope_theta=500000.0,
    tie_word_embeddings=True,
)
LLAMA3_1_8B = config(
    "llama",
    (4096, 14336, 32, 32, 8, 128256),
    max_position_embeddings=131072,
    rope_scaling={**LLAMA3_2_ROPE, "factor": 8.0},
    rope_theta=500000.0,
)
MISTRAL_7B_V01 = config(
    "mistral", (4096, 14336, 32, 32, 8, 32000), max_position_embeddings=32768, sliding_window=4096
)
MISTRAL_7B_V03 = config(
    "mistral",
    (4096, 14336, 32, 32, 8, 32768),
    max_position_embeddings=32768,
    rope_theta=1000000.0,
    sliding_window=None,
)
QWEN2_5 = {"max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "use_mrope": False}
QWEN2_5_7B = config(
    "qwen2", (3584, 18944, 28, 28, 4, 152064), max_position_embeddings=131072, rope_theta=1000000.0, **QWEN2_5
)
QWEN2_5_05B_YARN = config(
    "qwen2",
    (896, 4864, 24, 14, 2, 151936),
    max_position_embeddings=32768,
    rope_theta=1000000.0,
    tie_word_embeddings=True,
    rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    **QWEN2_5,
)
QWEN3 = {"attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1000000}
QWEN3_8B = config(
    "qwen3",
    (4096, 12288, 36, 32, 8, 151936),
    max_window_layers=36,
    sliding_window=None,
    use_sliding_window=False,
    **QWEN3,
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
SMOLLM3_3B = config(
    "smollm3",
    (2048, 11008, 36, 16, 4, 128256),
    max_position_embeddings=65536,
    no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0] * 9,
    rope_scaling=None,
    rope_theta=5000000.0,
    sliding_window=None,
    tie_word_embeddings=True,
    use_sliding_window=False,
)
OLMO_2_7B = config(
    "olmo2", (4096, 11008, 32, 32, 32, 100352), max_position_embeddings=4096, rope_theta=500000
)
OLMO_3_7B = config(
    "olmo3",
    (4096, 11008, 32, 32, 32, 100278),
    layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
    max_position_embeddings=65536,
    rope_scaling={
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    rope_theta=500000,
    sliding_window=4096,
)
GRANITE_3_1_8B = config(
    "granite",
    (4096, 12800, 40, 32, 8, 49155),
    attention_bias=False,
    attention_multiplier=0.0078125,
    embedding_multiplier=12.0,
    logits_scaling=16.0,
    max_position_embeddings=131072,
    residual_multiplier=0.22,
    rope_theta=10000000.0,
    tie_word_embeddings=True,
)
PHI_4 = config(
    "phi3",
    (5120, 17920, 40, 40, 10, 100352),
    embd_pdrop=0.0,
    max_position_embeddings=16384,
    original_max_position_embeddings=16384,
    resid_pdrop=0.0,
    rope_scaling=None,
    rope_theta=250000,
    sliding_window=None,
)
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1] * 24, "long_factor": [1, 60.5] * 24}
PHI_3_MINI_128K = config(
    "phi3",
    (3072, 8192, 32, 32, 32, 32064),
    auto_map={"A": "B"},
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    rope_scaling=LONGROPE,
    sliding_window=262144,
)
PHI_4_MINI = config(
    "phi3",
    (3072, 8192, 32, 24, 8, 200064),
    attention_bias=False,
    auto_map={"A": "B"},
    full_attn_mod=1,
    interpolate_factor=1,
    lm_head_bias=False,
    max_position_embeddings=131072,
    mlp_bias=False,
    original_max_position_embeddings=4096,
    partial_rotary_factor=0.75,
    rope_scaling=LONGROPE,
    sliding_window=262144,
    tie_word_embeddings=True,
)
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
GLM_4_9B = config(
    "glm4",
    (4096, 13696, 40, 32, 2, 151552),
    attention_bias=True,
    head_dim=128,
    max_position_embeddings=32768,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-05,
    rope_theta=10000.0,
)
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
    quantization_config={
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
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


@pytest.mark.parametrize(
    ("content", "parameters"),
    [
        (LLAMA2_7B, 6_738_415_616),
        (LLAMA3_2_1B, 1_235_814_400),
        (LLAMA3_1_8B, 8_030_261_248),
        (MISTRAL_7B_V01, 7_241_732_096),
        (MISTRAL_7B_V03, 7_248_023_552),
        (QWEN2_5_7B, 7_615_616_512),
        (QWEN2_5_05B_YARN, 494_032_768),
        (QWEN3_8B, 8_190_735_360),
        (MIXTRAL_8X7B, 46_702_792_704),
        (QWEN3_30B_A3B, 30_532_122_624),
        (SMOLLM3_3B, 3_075_098_624),
        (OLMO_2_7B, 7_298_617_344),
        (OLMO_3_7B, 7_298_011_136),
        (GRANITE_3_1_8B, 8_170_848_256),
        (PHI_3_MINI_128K, 3_821_079_552),
        (PHI_4, 14_659_507_200),
        (PHI_4_MINI, 3_836_021_760),
        (QWEN1_5_MOE, 14_315_784_192),
        (GLM_4_9B, 9_400_279_040),
        (DEEPSEEK_V3, 671_026_404_352 + 58 * 256),
        (MOONLIGHT, 15_960_108_544 + 26 * 64),
        (GPT_OSS_20B, 20_914_757_184),
        (MINIMAX_M2, 228_689_748_992 + 62 * 256),
        (GLM_4_5_AIR, 106_852_245_504 + 45 * 128),  # transformers does not count the routers' biases
    ],
)
def test_a_published_model_has_its_published_number_of_parameters(
    tmp_path: Path, content: dict[str, object], parameters: int
) -> None:
    assert num_parameters(read(tmp_path, content)) == parameters


def test_published_windows_are_honoured_where_they_are_in_use(tmp_path: Path) -> None:
    first = read(tmp_path, MISTRAL_7B_V01)
    assert (first.sliding_window, first.window_layers) == (4096, tuple(range(32)))
    for content in (MISTRAL_7B_V03, QWEN2_5_7B, QWEN3_8B, MIXTRAL_8X7B, QWEN3_30B_A3B):
        assert read(tmp_path, content).sliding_window is None


def test_published_positions_are_read_with_every_parameter(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA3_2_1B).rope == Rope(
        kind="llama3",
        theta=500000.0,
        factor=32.0,
        original_length=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    # 0.1 ln(4) + 1, YaRN eq. 22.
    assert read(tmp_path, QWEN2_5_05B_YARN).rope == Rope(
        kind="yarn", theta=1e6, factor=4.0, original_length=32768, attention_factor=1.1386294361119891
    )
    phi = read(tmp_path, PHI_4_MINI)
    # sqrt(1 + ln(131072 / 4096) / ln(4096)), as in transformers and vLLM.
    assert phi.rope == Rope(
        kind="longrope",
        theta=10000.0,
        factor=32.0,
        original_length=4096,
        attention_factor=1.1902380714238083,
        fraction=0.75,
        short_factors=(1.0, 1.1) * 24,
        long_factors=(1, 60.5) * 24,
    )
    assert phi.max_position_embeddings == 4096
    olmo, plain = read(tmp_path, OLMO_3_7B), Rope(kind="default", theta=500000.0)
    assert (olmo.sliding_window, olmo.rope.kind, olmo.rope.factor) == (4096, "yarn", 8.0)
    assert (olmo.window_rope, olmo.rope_of(2), olmo.rope_of(3)) == (plain, plain, olmo.rope)
    assert read(tmp_path, SMOLLM3_3B).rope_of(3) is None
    assert read(tmp_path, MIXTRAL_8X7B).rope == Rope(kind="default", theta=1e6)
    assert read(tmp_path, MINIMAX_M2).rope == Rope(kind="default", theta=5e6, fraction=0.5)


def test_a_mixture_that_does_not_ask_for_normalised_weights_gets_none(tmp_path: Path) -> None:
    def normalizes(content: dict[str, object]) -> bool:
        mixture = read(tmp_path, content).mixture
        assert mixture is not None
        return mixture.normalizes_weights

    assert normalizes(QWEN3_30B_A3B)
    assert not normalizes({key: value for key, value in QWEN3_30B_A3B.items() if key != "norm_topk_prob"})
    assert normalizes(MIXTRAL_8X7B)
