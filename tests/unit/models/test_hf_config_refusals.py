"""Everything in a config.json that is not supported: each refused by its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.models.hf_files import read, values

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
WINDOWS = ["sliding_attention"] * 4
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SUPPORTED = (
    "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, "
    "SmolLM3ForCausalLM, Olmo2ForCausalLM, Olmo3ForCausalLM, GraniteForCausalLM, Phi3ForCausalLM, "
    "Ministral3ForCausalLM, Glm4ForCausalLM, Gemma3ForCausalLM, Qwen3_5ForCausalLM, MixtralForCausalLM, "
    "Qwen3MoeForCausalLM, Qwen2MoeForCausalLM, Glm4MoeForCausalLM, DeepseekV3ForCausalLM, "
    "Mistral4ForCausalLM, MiniMaxM2ForCausalLM, GptOssForCausalLM"
)


def refusal(tmp_path: Path, content: dict[str, object]) -> str:
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        read(tmp_path, content)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, SUPPORTED),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, SUPPORTED),
        ({"architectures": ["LlamaForSequenceClassification"]}, SUPPORTED),
        ({"architectures": [None]}, SUPPORTED),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, SUPPORTED),
        ({"architectures": None, "model_type": "gemma2"}, "model_type 'gemma2'"),
        ({"model_type": "kimi_k2"}, "model_type 'deepseek_v3' contradicts architectures"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' contradicts architectures"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "remote code is never run"),
        ({"quantization_config": {"bits": 4}}, "quantization_config ({'bits': 4}): quantised weights cannot"),
        ({"quantization_config": {"quant_method": "fp8"}}, "only quant_method fp8 (e4m3) with weight_block"),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "only quant_method fp8 (e4m3) with weight_block"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only silu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0: a soft-cap on logits"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0: a soft-cap on logits"),
        ({"num_experts": 8}, "num_experts 8: only the experts of the supported mixtures"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 1}},
            "dual_chunk_attention_config {'chunk_size': 1}: it",
        ),
        ({"use_dual_chunk_attention": True}, "use_dual_chunk_attention True: it changes which positions"),
        ({"is_causal": False}, "is_causal False: it changes which positions are attended to"),
        ({"bias": True}, "bias True: vLLM builds another network with it"),
        ({"qkv_bias": True}, "qkv_bias True: vLLM builds another network with it"),
        ({"logit_scale": 0.5}, "logit_scale 0.5: vLLM builds another network with it"),
        ({"num_kv_heads": 4}, "num_kv_heads 4: vLLM builds another network with it"),
        ({"rotary_emb_base": 5e5}, "rotary_emb_base 500000.0: give the positions as rope_theta"),
        ({"text_config": {"hidden_size": 1}}, "text_config {'hidden_size': 1}: it holds the configuration"),
        ({"quantization": {"bits": 4}}, "quantization {'bits': 4}: quantised weights"),
        ({"compression_config": {"bits": 4}}, "compression_config {'bits': 4}: quantised weights"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "big"}, "hidden_size: expected a whole number >= 1, got 'big'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number >= 1, got 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: expected a number > 0, got -1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: expected a number > 0, got inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number > 0, got nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a number > 0, got 1000"),
        ({"rms_norm_eps": True}, "rms_norm_eps: expected a number > 0, got True"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"num_attention_heads": 31}, "hidden_size = 2048 is not a multiple of num_attention_heads = 31"),
        ({"num_attention_heads": 31, "head_dim": 64}, "transformers refuses such a llama"),
        ({"num_key_value_heads": 5}, "not a multiple of num_query_groups = 5"),
        ({"head_dim": 63}, "head_dim = 63: rotary positions need an even number"),
    ],
)
def test_what_a_llama_cannot_have_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    assert message in refusal(tmp_path, {**values(), **changes})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2}, "rope_type 'dynamic': only default, linear, llama3, yarn"),
        ({"rope_type": "longrope", "short_factor": [1], "long_factor": [2]}, "rope_type 'longrope'"),
        ({"rope_type": "proportional"}, "rope_type 'proportional'"),
        ({"type": "mrope", "mrope_section": [1]}, "rope_type 'mrope'"),
        ({"rope_type": None}, "rope_type None"),
        ({"rope_type": ["yarn"]}, "rope_type ['yarn']"),
        ({"rope_type": "yarn", "type": "linear"}, "rope_type 'yarn' and type 'linear' contradict"),
        ({"type": "linear"}, "rope factor is missing"),
        ({"type": "linear", "factor": 0.5}, "rope factor: expected a number >= 1, got 0.5"),
        ({"type": "linear", "factor": None}, "rope factor: expected a number >= 1, got None"),
        ({"rope_type": "default", "factor": 2.0}, "rope factor 2.0: not supported with rope_type 'default'"),
        ({**LLAMA3, "factor": None}, "rope factor: expected a number >= 1, got None"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope low_freq_factor is missing"),
        ({**LLAMA3, "high_freq_factor": 1}, "rope high_freq_factor 1 must be greater than low_freq_factor 1"),
        ({**LLAMA3, "beta_fast": 3}, "rope beta_fast 3: not supported with rope_type 'llama3'"),
        (
            {**LLAMA3, "original_max_position_embeddings": 1.5},
            "original_max_position_embeddings: expected a whole",
        ),
        ({"rope_type": "yarn"}, "rope factor is missing"),
        ({**YARN, "factor": 0.5}, "rope factor: expected a number >= 1, got 0.5"),
        (
            {**YARN, "factor": None, "original_max_position_embeddings": 4096},
            "rope factor null means max_position_embeddings / original_max_position_embeddings = 2048 / 4096",
        ),
        ({**YARN, "beta_fast": 0}, "rope beta_fast: expected a number > 0, got 0"),
        ({**YARN, "beta_fast": 1, "beta_slow": 2}, "rope beta_fast 1 must not be below beta_slow 2"),
        ({**YARN, "truncate": None}, "rope truncate: expected true or false, got None"),
        ({**YARN, "attention_factor": 0}, "rope attention_factor: expected a number > 0, got 0"),
        ({**YARN, "mscale": -1}, "rope mscale: expected a number >= 0, got -1"),
        ({**YARN, "short_factor": [1.0] * 64}, "1.0, 1...: not supported with rope_type 'yarn'"),
        ({**YARN, "mrope_section": [1, 2]}, "rope mrope_section [1, 2]: not supported with rope_type 'yarn'"),
        ({**LLAMA3, "rope_dim": 16}, "rope rope_dim 16: not supported with rope_type 'llama3'"),
        ({**YARN, "rope_theta": 1.0}, "rope_theta 1: yarn needs a base above 1"),
        ({"partial_rotary_factor": 0.5}, "rope partial_rotary_factor 0.5: only 1.0 is supported"),
        ({"rope_theta": None}, "rope rope_theta: expected a number > 0, got None"),
        ({"full_attention": {"rope_theta": 1.0}}, "expected one flat set of values for all layers"),
        (["yarn"], "expected one flat set of values for all layers"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_positions_that_cannot_be_computed_are_refused_by_name(
    tmp_path: Path, key: str, rope: object, message: str
) -> None:
    assert message in refusal(tmp_path, values(**{key: rope}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "rope_theta is given twice"),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}}, "contradict each other"),
        # transformers takes rope_scaling and with it the default base.
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 1e6}}, "contradict each other"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 1024},
            "original_max_position_embeddings is given twice with different values",
        ),
        ({"original_max_position_embeddings": 1024}, "rope_type 'default' does not use it"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: only 1.0 is supported"),
    ],
)
def test_contradictions_about_positions_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    assert message in refusal(tmp_path, values(**changes))


def test_the_same_positions_in_both_spellings_are_no_contradiction(tmp_path: Path) -> None:
    both = {"rope_theta": 7.0, "rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 7.0}}
    assert read(tmp_path, values(**both)) == read(tmp_path, values(rope_theta=7.0, rope_scaling=YARN))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1: not supported, set 0.0"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts: expected a whole number >= 1, got 0"),
        (
            "mixtral",
            {"num_experts_per_tok": 9},
            "experts_per_token = 9 must lie between 1 and num_experts = 8",
        ),
        ("mixtral", {"num_experts": 4, "num_local_experts": 8}, "contradict each other"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob: MixtralForCausalLM does not read it"),
        (
            "mixtral",
            {"moe_intermediate_size": 8},
            "moe_intermediate_size: MixtralForCausalLM does not read it",
        ),
        ("mixtral", {"rope_scaling": YARN}, "head_dim is missing: transformers fails on yarn in a Mixtral"),
        ("mixtral", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers [0]: only a mixture in every layer"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2: only 1"),
        ("qwen3_moe", {"norm_topk_prob": "no"}, "norm_topk_prob: expected true or false, got 'no'"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size 8: only the"),
        ("smollm3", {"attention_bias": True}, "attention_bias"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers: expected a list of 0 or 1 for each of 4"),
        ("smollm3", {"no_rope_layers": [0, 1, 2, 1]}, "no_rope_layers: expected a list of 0 or 1"),
        ("smollm3", {"use_sliding_window": True, "layer_types": WINDOWS}, "no sliding_window is in use"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("olmo2", {"sliding_window": 8}, "sliding_window: Olmo2ForCausalLM has none in transformers"),
        ("olmo3", {"sliding_window": None}, "sliding_window: expected a whole number >= 1, got None"),
        ("olmo3", {"rope_theta": 1e4}, "transformers gives layers with a window 500000 all the same"),
        ("olmo3", {"rope_scaling": {**YARN, "type": "yarn"} | {"rope_type": "linear"}}, "contradict"),
        ("olmo3", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is missing"),
        ("olmo3", {"rope_scaling": {**YARN, "truncate": False}}, "rope truncate False: transformers does"),
        ("olmo3", {"rope_parameters": YARN}, "rope_parameters: expected a set for each of"),
        ("olmo3", {"rope_parameters": {"full_attention": YARN}}, "rope_parameters: expected a set for each"),
        ("olmo3", {"original_max_position_embeddings": 9}, "transformers reads it inside rope_parameters"),
        ("granite", {"mlp_bias": True}, "mlp_bias"),
        ("granite", {"logits_scaling": 0}, "logits_scaling: expected a number > 0, got 0"),
        ("granite", {"embedding_multiplier": None}, "embedding_multiplier: expected a number > 0, got None"),
        ("granite", {"layer_types": ["full_attention"] * 4}, "layer_types: vLLM builds attention sinks"),
        ("granite", {"attention_sinks": True}, "attention_sinks True: vLLM builds another network"),
        (
            "phi3",
            {"rope_scaling": {**LONGROPE, "type": "longrope"}},
            "hold 1 and 1 numbers: expected 32",
        ),
        ("phi3", {"rope_scaling": {**LONGROPE, "factor": 4.0}}, "rope factor 4.0: vLLM takes 1, of max_posi"),
        ("phi3", {"rope_scaling": {**LONGROPE, "attention_factor": 1.2}}, "attention_factor 1.2: vLLM takes"),
        ("phi3", {"rope_scaling": {**LONGROPE, "short_mscale": 1.1}}, "rope short_mscale 1.1: not supported"),
        ("phi3", {"rope_scaling": {**LONGROPE, "long_factor": [0]}}, "rope long_factor: expected a list of"),
        ("phi3", {"rope_scaling": {**LONGROPE, "short_factor": None}}, "rope short_factor: expected a list"),
        (
            "phi3",
            {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 8}},
            "rope original_max_position_embeddings 8: transformers takes the one beside the set, 4096",
        ),
        (
            "phi3",
            {"rope_scaling": LONGROPE, "original_max_position_embeddings": 1},
            "original_max_position_embeddings 1: expected at least 2",
        ),
        ("phi3", {"rope_scaling": {"type": "su"}}, "rope_type 'su': only default, longrope are supported"),
        ("phi3", {"rope_scaling": {**LONGROPE, "type": "su"}}, "contradict each other"),
        ("phi3", {"rope_scaling": YARN}, "rope_type 'yarn': only default, longrope are supported"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop 0.1: dropout is not supported"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5: at most 1"),
        (
            "phi3",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.75}},
            "partial_rotary_factor is given twice with different values",
        ),
        ("phi3", {"partial_rotary_factor": 0.55}, "of which 0.55 turn: rotary positions need an even"),
        ("ministral3", {"rope_parameters": {"rope_theta": 1.0}}, "rope_type 'default': only yarn"),
        ("ministral3", {"rope_parameters": YARN}, "rope llama_4_scaling_beta is missing"),
        (
            "ministral3",
            {"rope_parameters": {**YARN, "llama_4_scaling_beta": -1}},
            "rope llama_4_scaling_beta: expected a number >= 0, got -1",
        ),
        (
            "ministral3",
            {
                "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1},
                "llama_4_scaling": {"original_max_position_embeddings": 512, "beta": 0.2},
            },
            "transformers reads {'original_max_position_embeddings': 512, 'beta': 0.1}",
        ),
        ("mistral", {"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling {'beta': 0.1}: vLLM builds another"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window: a window in Qwen2MoeForCausalLM"),
        ("qwen2_moe", {"num_local_experts": 8}, "num_local_experts: Qwen2MoeForCausalLM does not read it"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size: expected a"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "mlp_only_layers [0]: only a mixture in every layer"),
        (
            "glm4_moe",
            {"norm_topk_prob": False},
            "norm_topk_prob False: a sigmoid router's weights are always",
        ),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts 0: expected at least one"),
        ("glm4_moe", {"n_group": 3}, "128 experts do not divide into 3 groups"),
        (
            "glm4_moe",
            {"n_group": 4, "topk_group": 2},
            "8 experts of 2 of 4 groups: groups are only supported",
        ),
        ("glm4_moe", {"num_local_experts": 8}, "num_local_experts: give n_routed_experts"),
        ("minimax_m2", {"rotary_dim": 64, "head_dim": 32}, "partial_rotary_factor 2: at most 1"),
        ("minimax_m2", {"rotary_dim": 0}, "rotary_dim: expected a whole number >= 1, got 0"),
        ("minimax_m2", {"rotary_dim": 7}, "rotary positions need an even number"),
        (
            "minimax_m2",
            {"rotary_dim": 64, "partial_rotary_factor": 0.25},
            "rotary_dim 64 of head_dim 128 contradicts partial_rotary_factor 0.25",
        ),
        (
            "minimax_m2",
            {"rotary_dim": 64, "rope_parameters": {"partial_rotary_factor": 1.0}},
            "rotary_dim 64 of head_dim 128 contradicts partial_rotary_factor 1",
        ),
        ("minimax_m2", {"rope_scaling": YARN}, "rope_type 'yarn': only default are supported"),
        ("minimax_m2", {"head_dim": None}, "head_dim: expected a whole number >= 1, got None"),
        ("minimax_m2", {"num_key_value_heads": None}, "num_key_value_heads: expected a whole number"),
        ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias False: only True is supported"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func 'softmax': only 'sigmoid' is supported"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1, 1]}, "attn_type_list [1, 0, 1, 1]: it changes which"),
        ("minimax_m2", {"attention_bias": True}, "attention_bias: biases on all four projections"),
        ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1: not supported"),
        ("minimax_m2", {"norm_topk_prob": True}, "norm_topk_prob: MiniMaxM2ForCausalLM does not read it"),
        ("minimax_m2", {"sliding_window": 16}, "sliding_window: MiniMaxM2ForCausalLM has none"),
        (
            "gpt_oss",
            {"attention_bias": False},
            "attention_bias False: GptOssForCausalLM is only built with all",
        ),
        ("gpt_oss", {"rope_parameters": {"rope_theta": 1.0}}, "rope_type 'default': only yarn"),
        ("gpt_oss", {"norm_topk_prob": True}, "norm_topk_prob: GptOssForCausalLM does not read it"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit: expected a number > 0, got 0"),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config (gptq): quantised",
        ),
        ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "(awq): quantised weights cannot be"),
        ("gpt_oss", {"quantization_config": {"quant_method": "bitsandbytes"}}, "(bitsandbytes): quantised"),
        ("gpt_oss", {"quantization_config": {"quant_method": "modelopt"}}, "weight_block_size or mxfp4 is"),
        (
            "qwen3",
            {"quantization_config": {"quant_method": "mxfp4"}},
            "quantization_config (mxfp4): quantised",
        ),
        ("glm4_moe", {"rope_scaling": YARN}, "rope_type 'yarn': only default are supported"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads 8: only num_attention_heads = 32"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False: vLLM turns neighbours together"),
        (
            "deepseek_v3",
            {"head_dim": 128},
            "head_dim 128 contradicts qk_rope_head_dim and qk_nope_head_dim: 64",
        ),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "of which 7 turn: rotary positions need an even number"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax': only 'sigmoid' is supported"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy': only 'noaux_tc' is supported"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2: only 1 is supported"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"num_local_experts": 8}, "num_local_experts: give n_routed_experts"),
        (
            "deepseek_v3",
            {"rope_scaling": {**YARN, "attention_factor": 1.0}},
            "attention_factor 1.0: vLLM does",
        ),
        (
            "deepseek_v3",
            {"rope_scaling": {**YARN, "truncate": False}},
            "truncate False: vLLM does not read it",
        ),
        (
            "deepseek_v3",
            {"rope_scaling": {**YARN, "mscale": 0.7}},
            "rope mscale 0.7, mscale_all_dim 0.0: only",
        ),
        (
            "deepseek_v3",
            {"rope_scaling": {**YARN, "factor": None}},
            "rope factor is missing: latent attention",
        ),
        (
            "deepseek_v3",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "only default, yarn are supported",
        ),
        ("mistral4", {"n_group": 2, "topk_group": 1}, "n_group, topk_group [2, 1]: groups are only built"),
        ("mistral4", {"head_dim": 64}, "head_dim 64 contradicts qk_rope_head_dim and qk_nope_head_dim: 128"),
        ("mistral4", {"rope_interleave": False}, "rope_interleave False: vLLM turns neighbours together"),
        ("mistral4", {"num_key_value_heads": 8}, "num_key_value_heads 8: only num_attention_heads = 32"),
        ("mistral4", {"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25: only 0.5 is supported"),
        ("mistral4", {"rope_parameters": {"rope_theta": 1.0}}, "rope_type 'default': only yarn"),
        (
            "mistral4",
            {"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}},
            "rope_scaling has no partial_rotary_factor: transformers takes 1 then and fails, write 0.5",
        ),
        ("mistral4", {"num_local_experts": 8}, "num_local_experts: give n_routed_experts"),
        ("deepseek_v3", {"index_topk": 8}, "index_topk 8: it changes which positions are attended to"),
        ("glm4", {"rope_scaling": YARN}, "rope_type 'yarn': only default are supported"),
        ("glm4", {"attention_bias": None}, "attention_bias: expected true or false, got None"),
        ("qwen3", {"num_local_experts": 8}, "num_local_experts 8: only the experts of"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"qk_norm": False, "qkv_bias": True}, "qkv_bias True: vLLM builds another network"),
        ("qwen2", {"qk_norm": True}, "qk_norm True: vLLM builds another network"),
        ("llama", {"sliding_window": 16}, "sliding_window: LlamaForCausalLM has none in transformers"),
        ("llama", {"use_sliding_window": True}, "sliding_window: LlamaForCausalLM has none in transformers"),
        (
            "llama",
            {"layer_types": ["sliding_attention"] * 4},
            "transformers uses the window in no layers of Llama",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window: expected a whole number >= 1, got 0"),
        ("mistral", {"sliding_window": 2.5}, "sliding_window: expected a whole number >= 1, got 2.5"),
        (
            "mistral",
            {"layer_types": ["sliding_attention"] * 4},
            "layer_types: transformers builds a Ministral",
        ),
        (
            "mixtral",
            {"sliding_window": 16, "layer_types": ["full_attention"] * 4},
            "layer_types contradicts sliding_window: transformers uses the window in all layers of Mixtral",
        ),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types chunked_attention: only full"),
        (
            "qwen2",
            {"layer_types": ["full_attention"]},
            "layer_types: expected a list with one entry for each of 4",
        ),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window: expected true or false"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers: expected a whole",
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "but no sliding_window is in use"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "max_window_layers": 2},
            "max_window_layers 2: transformers uses the window in all layers of Qwen3MoeForCausalLM",
        ),
    ],
)
def test_what_a_family_cannot_have_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, object], message: str
) -> None:
    assert message in refusal(tmp_path, values(family, **changes))


def test_a_refusal_names_the_file_and_lists_one_problem_a_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, values(hidden_act="gelu", mlp_bias=True))
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/config\.json cannot be used:(\n  \S.*){{2}}", message)
