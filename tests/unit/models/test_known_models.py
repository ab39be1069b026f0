"""Published models: their config.json gives their published number of parameters and their own positions."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.models.rope import Rope
from tests.unit.models.published import (
    QWEN3,
    WHOLE_MATRICES,
    Content,
    architecture,
    assert_is_transformers,
    config,
    mistral_text,
    multimodal,
    yarn_of_ministral,
)

LLAMA3_2_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
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
QWEN3_8B = config(
    "qwen3",
    (4096, 12288, 36, 32, 8, 151936),
    max_window_layers=36,
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
GLM_4_32B = config(
    "glm4",
    (6144, 23040, 61, 48, 2, 151552),
    attention_bias=False,
    head_dim=128,
    max_position_embeddings=32768,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-05,
    rope_theta=10000.0,
)
LLAMA3_3_70B = {
    **LLAMA3_1_8B,
    "head_dim": 128,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
R1_DISTILL_QWEN_1_5B = {
    **config("qwen2", (1536, 8960, 28, 12, 2, 151936), max_position_embeddings=131072, rope_theta=10000),
    **{**QWEN2_5, "max_window_layers": 21, "sliding_window": 4096},
}
QWEN3_4B_2507 = {
    **QWEN3_8B,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "rope_theta": 5000000,
    "tie_word_embeddings": True,
}
OLMO_2_32B = {
    **OLMO_2_7B,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
}
OLMO_3_1_32B = {
    **OLMO_3_7B,
    **{key: OLMO_2_32B[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")},
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
}
GRANITE_3_3_2B = {
    **GRANITE_3_1_8B,
    "attention_multiplier": 0.015625,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "logits_scaling": 8.0,
    "vocab_size": 49159,
}
PHI_3_MEDIUM_4K = {
    **PHI_4,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "vocab_size": 32064,
}
MINISTRAL_3_8B = multimodal(
    "mistral3",
    mistral_text(
        "ministral3",
        (4096, 14336, 34, 32, 8, 131072),
        max_position_embeddings=262144,
        rope_parameters=yarn_of_ministral(),
        tie_word_embeddings=False,
    ),
    quantization_config=WHOLE_MATRICES,
)
MINISTRAL_3_3B = multimodal(
    "mistral3",
    mistral_text(
        "ministral3",
        (3072, 9216, 26, 32, 8, 131072),
        max_position_embeddings=262144,
        rope_parameters=yarn_of_ministral(),
        tie_word_embeddings=True,
    ),
)
DEVSTRAL_SMALL_2 = multimodal(
    "mistral3",
    mistral_text(
        "ministral3",
        (5120, 32768, 40, 32, 8, 131072),
        max_position_embeddings=393216,
        rope_parameters=yarn_of_ministral(
            factor=48.0, original_max_position_embeddings=8192, rope_theta=100000000.0
        ),
    ),
    quantization_config=WHOLE_MATRICES,
    tie_word_embeddings=False,
)
DEVSTRAL_2_123B = {
    **config("ministral3", (12288, 28672, 88, 96, 8, 131072), max_position_embeddings=262144),
    "head_dim": 128,
    "quantization_config": WHOLE_MATRICES,
    "rms_norm_eps": 1e-05,
    "rope_parameters": yarn_of_ministral(
        beta_fast=4.0,
        factor=64.0,
        llama_4_scaling_beta=0.0,
        mscale_all_dim=0.0,
        original_max_position_embeddings=4096,
    ),
    "sliding_window": None,
}
MISTRAL_SMALL_3_1 = multimodal(
    "mistral3",
    mistral_text(
        "mistral",
        (5120, 32768, 40, 32, 8, 131072),
        max_position_embeddings=131072,
        rope_theta=1000000000.0,
    ),
)
GEMMA_3_270M = {
    **config("gemma3_text", (640, 2048, 18, 4, 1, 262144), max_position_embeddings=32768),
    "_sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}
del GEMMA_3_270M["hidden_act"]
_GEMMA_3 = {
    "model_type": "gemma3_text",
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
GEMMA_3_12B = multimodal(
    "gemma3",
    {
        **_GEMMA_3,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
    },
)
GEMMA_3_27B = multimodal(
    "gemma3",
    {
        **_GEMMA_3,
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
    },
)


@pytest.mark.parametrize(
    ("content", "parameters"),
    [
        pytest.param(LLAMA2_7B, 6_738_415_616, id="Llama-2-7b"),
        pytest.param(LLAMA3_2_1B, 1_235_814_400, id="Llama-3.2-1B"),
        pytest.param(LLAMA3_1_8B, 8_030_261_248, id="Llama-3.1-8B"),
        pytest.param(LLAMA3_3_70B, 70_553_706_496, id="Llama-3.3-70B"),
        pytest.param(MISTRAL_7B_V01, 7_241_732_096, id="Mistral-7B-v0.1"),
        pytest.param(MISTRAL_7B_V03, 7_248_023_552, id="Mistral-7B-v0.3"),
        pytest.param(MISTRAL_SMALL_3_1, 23_572_403_200, id="Mistral-Small-3.1"),
        pytest.param(QWEN2_5_7B, 7_615_616_512, id="Qwen2.5-7B"),
        pytest.param(QWEN2_5_05B_YARN, 494_032_768, id="Qwen2.5-0.5B with yarn"),
        pytest.param(R1_DISTILL_QWEN_1_5B, 1_777_088_000, id="R1-Distill-Qwen-1.5B"),
        pytest.param(QWEN3_8B, 8_190_735_360, id="Qwen3-8B"),
        pytest.param(QWEN3_4B_2507, 4_022_468_096, id="Qwen3-4B-2507"),
        pytest.param(SMOLLM3_3B, 3_075_098_624, id="SmolLM3-3B"),
        pytest.param(OLMO_2_7B, 7_298_617_344, id="OLMo-2-7B"),
        pytest.param(OLMO_2_32B, 32_234_279_936, id="OLMo-2-32B"),
        pytest.param(OLMO_3_7B, 7_298_011_136, id="OLMo-3-7B"),
        pytest.param(OLMO_3_1_32B, 32_233_522_176, id="OLMo-3.1-32B"),
        pytest.param(GRANITE_3_1_8B, 8_170_848_256, id="granite-3.1-8b"),
        pytest.param(GRANITE_3_3_2B, 2_533_539_840, id="granite-3.3-2b"),
        pytest.param(PHI_3_MINI_128K, 3_821_079_552, id="Phi-3-mini-128k"),
        pytest.param(PHI_3_MEDIUM_4K, 13_960_238_080, id="Phi-3-medium-4k"),
        pytest.param(PHI_4, 14_659_507_200, id="phi-4"),
        pytest.param(PHI_4_MINI, 3_836_021_760, id="Phi-4-mini"),
        pytest.param(GLM_4_9B, 9_400_279_040, id="GLM-4-9B-0414"),
        pytest.param(GLM_4_32B, 32_566_081_536, id="GLM-4-32B-0414"),
        pytest.param(MINISTRAL_3_3B, 3_429_006_336, id="Ministral-3-3B"),
        pytest.param(MINISTRAL_3_8B, 8_489_553_920, id="Ministral-3-8B"),
        pytest.param(DEVSTRAL_SMALL_2, 23_572_403_200, id="Devstral-Small-2-24B"),
        pytest.param(DEVSTRAL_2_123B, 125_025_988_608, id="Devstral-2-123B"),
        pytest.param(GEMMA_3_270M, 268_098_176, id="gemma-3-270m"),
        pytest.param(GEMMA_3_12B, 11_766_034_176, id="gemma-3-12b"),
        pytest.param(GEMMA_3_27B, 27_009_346_304, id="gemma-3-27b"),
    ],
)
def test_a_published_model_is_that_of_transformers(tmp_path: Path, content: Content, parameters: int) -> None:
    assert_is_transformers(tmp_path, content, parameters)


def test_published_windows_are_honoured_where_they_are_in_use(tmp_path: Path) -> None:
    first = architecture(tmp_path, MISTRAL_7B_V01)
    assert (first.sliding_window, first.window_layers) == (4096, tuple(range(32)))
    for content in (MISTRAL_7B_V03, QWEN2_5_7B, QWEN3_8B):
        assert architecture(tmp_path, content).sliding_window is None


def test_published_positions_are_read_with_every_parameter(tmp_path: Path) -> None:
    assert architecture(tmp_path, LLAMA3_2_1B).rope == Rope(
        kind="llama3",
        theta=500000.0,
        factor=32.0,
        original_length=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    # 0.1 ln(4) + 1, YaRN eq. 22.
    assert architecture(tmp_path, QWEN2_5_05B_YARN).rope == Rope(
        kind="yarn", theta=1e6, factor=4.0, original_length=32768, attention_factor=1.1386294361119891
    )
    phi = architecture(tmp_path, PHI_4_MINI)
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
    olmo, plain = architecture(tmp_path, OLMO_3_7B), Rope(kind="default", theta=500000.0)
    assert (olmo.sliding_window, olmo.rope.kind, olmo.rope.factor) == (4096, "yarn", 8.0)
    assert (olmo.window_rope, olmo.rope_of(2), olmo.rope_of(3)) == (plain, plain, olmo.rope)
    assert architecture(tmp_path, SMOLLM3_3B).rope_of(3) is None
