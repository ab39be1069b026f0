"""Keys that a model's own class does not read: a line each, unless another reader of the file obeys them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from megatron_sftrl.cli import start_logging
from megatron_sftrl.config.schema import ModelSection
from megatron_sftrl.models import notes_on
from megatron_sftrl.models.architecture import Family
from megatron_sftrl.models.hf_config import read_hf_config
from megatron_sftrl.models.hf_families import hf_family
from megatron_sftrl.models.hf_hybrids import DELTA_KEYS
from megatron_sftrl.models.hf_refusals import (
    _GROUPED_KEYS,
    _KEYS_WITHOUT_EFFECT,
    _LATENT_KEYS,
    _MIXTURE_KEYS,
    _OBEYED_ELSEWHERE,
    _READ_KEYS,
)
from megatron_sftrl.trainers.checked import say_notes
from tests.distributed.hf_models import auto_model
from tests.unit.models.hf_files import read, values
from tests.unit.models.random_architectures import FAMILIES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
IN_PUBLIC_FILES: dict[str, tuple[str, dict[str, object]]] = {
    "SmolLM2": (
        "llama",
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "transformers.js_config": {"dtype": {"q4": "f"}},
        },
    ),
    "Qwen3-Coder-30B-A3B": (
        "qwen3_moe",
        {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True},
    ),
    "the first Llama": ("llama", {"max_sequence_length": 2048}),
    "Qwen3 2507": ("qwen3_moe", {"sliding_window": None, "max_window_layers": 48, "rope_scaling": None}),
    "Llama 3.1 of unsloth": ("llama", {"unsloth_fixed": True, "mlp_bias": False, "_name_or_path": "x"}),
    "axolotl": (
        "mistral",
        {"axolotl_config": "run.yml", "hidden_dropout": 0.0, "use_flash_attention_2": True},
    ),
    "MiniMax-M2": (
        "minimax_m2",
        {
            "attn_type_list": [1] * 4,
            "mtp_transformer_layers": 1,
            "qk_norm_type": "per_layer",
            "shared_intermediate_size": 0,
            "use_mtp": True,
            "use_qk_norm": True,
        },
    ),
    "Mixtral": ("mixtral", {"output_router_logits": False, "router_aux_loss_coef": 0.02, "is_decoder": True}),
    "Qwen2": ("qwen2", {"use_mrope": False, "seq_length": 8192, "model_max_length": 32768}),
    "values that state what is built": (
        "qwen2",
        {"qkv_bias": True, "qk_norm": False, "is_causal": True, "logit_scale": 1.0, "rotary_pct": 1.0},
    ),
}


@pytest.mark.parametrize("name", IN_PUBLIC_FILES)
def test_the_keys_of_public_files_change_nothing_and_those_that_ask_for_something_get_a_line(
    tmp_path: Path, name: str
) -> None:
    family, more = IN_PUBLIC_FILES[name]
    plain = read(tmp_path, values(family))
    architecture, notes = read_hf_config(_written(tmp_path, values(family, **more)))
    assert architecture == plain
    known = _READ_KEYS | _MIXTURE_KEYS | _KEYS_WITHOUT_EFFECT
    named = [note.split("config.json: ")[1].split(": ")[0] for note in notes]
    assert named == sorted(key for key, value in more.items() if value and key not in known)


def test_a_factor_that_nobody_reads_is_no_obstacle_in_a_yarn(tmp_path: Path) -> None:
    plain = read(tmp_path, values("qwen3", rope_scaling=YARN))
    more = {**YARN, "attn_factor": 0.8782488562869419}
    architecture, notes = read_hf_config(_written(tmp_path, values("qwen3", rope_scaling=more)))
    assert architecture == plain
    (note,) = notes
    assert "rope attn_factor: neither transformers nor vLLM reads it" in note


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_same_logits_with_the_keys_that_get_a_line(family: Family) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 31, "head_dim": 8, "moe_intermediate_size": 8}
    sizes |= {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    more = {"use_qk_norm": family != "qwen3", "rope_interleaved": True, "is_llama_config": True}
    more |= {"max_sequence_length": 3, "axolotl_config": "run.yml", "embedding_multiplier": 12.0}
    more |= {"residual_multiplier": 0.2, "hidden_dropout": 0.5, "resid_pdrop": 0.5, "is_decoder": True}
    line = hf_family(family)
    more = {key: value for key, value in more.items() if key not in {*line.keys, line.qk_norm_key}}
    if line.has_latent:
        head_dim = 128 if line.latent_head_dim == "all" else 64
        sizes |= {"num_key_value_heads": 2, "head_dim": head_dim}
    if line.has_delta_net:
        sizes |= {"full_attention_interval": 2}
    sizes |= {"shared_expert_intermediate_size": 8, "pad_token_id": None, "bos_token_id": None}
    tokens = torch.arange(12)[None] * 5 % 31
    logits = []
    for extra, factor in (
        ({}, {}),
        (more, {"attn_factor": 0.5, "extrapolation_factor": 3.0, "finetuned": True}),
    ):
        rope = {**YARN, "original_max_position_embeddings": 8, "rope_theta": 1e4, **factor}
        if family == "phi3":
            rope = {"rope_type": "default", **factor}
        elif family == "gemma3_text":
            rope = {
                kind: {"rope_type": "default", **factor} for kind in ("full_attention", "sliding_attention")
            }
        elif family == "olmo3":
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", **factor}}
        elif family in ("ministral3", "mistral4"):
            rope["llama_4_scaling_beta"] = 0.1
        config = transformers.AutoConfig.for_model(family, **sizes, rope_parameters=rope, **extra)
        torch.manual_seed(0)
        logits.append(auto_model().from_config(config).train()(tokens).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("package", ["transformers", "vllm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_a_readers_model_code_reads_is_read_here_or_refused(
    family: Family, package: str
) -> None:
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        pytest.skip(f"{package} is not installed")
    root = Path(found.submodule_search_locations[0])
    if package == "transformers":
        name = family.removesuffix("_text")
        file = f"models/{name}/modeling_{name}.py"
    elif family in ("smollm3", "olmo2", "olmo3"):
        pytest.skip("vLLM runs transformers' own code for it")
    else:
        others = {"phi3": "llama", "ministral3": "mistral"}
        others |= dict.fromkeys(("deepseek_v3", "mistral4"), "deepseek_v2")
        others |= {"gemma3_text": "gemma3"}
        others |= {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5"}
        name = others.get(family, family)
        file = f"model_executor/models/{name}.py"
    line = hf_family(family)
    source = (root / file).read_text()
    if family.startswith(("qwen3_5", "gemma3")):
        # Not the towers for images, and what joins them with the language model.
        others = r"Vision|ConditionalGeneration|MultiModal|Qwen3_5(?:Moe)?Model\b"
        others += r"|Gemma3Model\b|SequenceClassification" if package == "transformers" else ""
        source = re.sub(rf"(?ms)^class \w*(?:{others}).*?(?=^class |\Z)", "", source)
    if line.has_delta_net and package == "vllm":
        parts = ("models/qwen3_next.py", "layers/mamba/gdn/qwen_gdn_linear_attn.py")
        source += "".join((root / "model_executor" / part).read_text() for part in parts)
    read_there = {*re.findall(r"\bconfig\.([a-z_]+)", source)}
    read_there |= {*re.findall(r"(?:get|has)attr\(\s*(?:self\.)?config, \"([a-z_]+)\"", source)}
    settings_of_vllm = {"get_text_config", "enable_eplb", "eplb_config", "num_redundant_experts"}
    settings_of_vllm |= {"use_sequence_parallel_moe", "ada_rms_norm_t_cond_dim", "max_model_len"}
    settings_of_vllm |= {f"{name}_config" for name in ("cache", "model", "quant", "parallel")} | {
        "quant_config"
    }
    if line.has_latent:  # read with index_topk alone, which is refused
        settings_of_vllm |= {"index_head_dim", "index_n_heads", "index_skip_topk_offset", "index_topk_freq"}
        settings_of_vllm |= {"index_topk_pattern", "indexer_rope_interleave", "attn_module_list_cfg"}
    known = _READ_KEYS | _MIXTURE_KEYS | _KEYS_WITHOUT_EFFECT | _OBEYED_ELSEWHERE.keys() | line.keys
    known |= {line.bias_key, line.qk_norm_key, "rope_parameters", *_GROUPED_KEYS, *line.draft_keys}
    known |= DELTA_KEYS | _LATENT_KEYS | line.for_vllm.keys() | line.refuses.keys() | {line.activation_key}
    assert len(read_there) > 5
    assert read_there - known - settings_of_vllm == set()


def test_a_run_says_the_lines_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _written(tmp_path, values(is_llama_config=True))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        start_logging()
        say_notes(notes_on(ModelSection(hf_config=tmp_path)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f" [rank 0] INFO: note: {tmp_path / 'config.json'}: is_llama_config: LlamaForCausalLM of "
        "transformers does not read it; it changes no number"
    )


def _written(tmp_path: Path, content: dict[str, object]) -> Path:
    read(tmp_path, content)
    return tmp_path / "config.json"
