"""A rollout engine that cannot run here is refused before any model is built, with what to do."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sftrl.config.checks import check_run, idle_settings
from megatron_sftrl.config.load import config_from_text, parse_yaml, resolved_yaml
from megatron_sftrl.config.placement import with_engine
from megatron_sftrl.config.schema import GrpoConfig, RolloutSection
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.errors import UserError
from megatron_sftrl.models import architecture_of
from megatron_sftrl.models.architecture import Family, from_section
from megatron_sftrl.models.hf_config import from_hf_config
from megatron_sftrl.rollout import vllm_settings
from megatron_sftrl.rollout.vllm_settings import VllmSettings
from megatron_sftrl.trainers.weights import only_read

SIZES = {
    "family": "qwen3",
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}


def config_of(rollout: dict[str, Any], **sizes: object) -> GrpoConfig:
    """A run of 32 + 32 tokens, with the embedded engine where `rollout` names no other."""
    return GrpoConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"architecture": {**SIZES, **sizes}},
            "tokenizer": {"path": "unused"},
            "data": {"train": ["unused"], "max_prompt_length": 32},
            "rollout": {"engine": "in_process", "prompts_per_step": 2, "max_new_tokens": 32, **rollout},
            "rewards": [{"name": "format", "pattern": "x"}],
            "batch": {"global_size": 16},
            "loss": {"name": "grpo"},
            "optim": {"lr": 0.01},
            "train": {"steps": 1},
        }
    )


def refusal(
    rollout: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    installed: dict[str, str] | None = None,
    device: str = "cpu",
    world_size: int = 2,
    **sizes: object,
) -> str:
    """What check_engine says; empty if nothing."""
    from megatron_sftrl.rollout.build import check_engine

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    found = {"vllm": "0.32.0"} if installed is None else installed
    monkeypatch.setattr(importlib.metadata, "version", version)
    config = config_of(rollout, **sizes)
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    try:
        check_engine(config, architecture, torch.device(device), world_size=world_size)
    except ValueError as error:
        return str(error)
    return ""


VLLM = {"engine": "vllm"}
REPLAY = {**VLLM, "router_replay": True}
AUTO = {"engine": "auto"}


@pytest.mark.parametrize(
    ("is_cuda", "has_vllm", "engine", "why"),
    [
        (True, True, "vllm", "CUDA and vLLM are there"),
        (True, False, "in_process", "vLLM is not installed"),
        (False, True, "in_process", "there is no CUDA device"),
        (False, False, "in_process", "there is no CUDA device"),
    ],
)
def test_auto_is_vllm_where_cuda_and_vllm_are_there_and_the_run_says_which(
    is_cuda: bool,
    has_vllm: bool,
    engine: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from megatron_sftrl.rollout.build import engine_here

    found = importlib.machinery.ModuleSpec("vllm", None) if has_vllm else None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "vllm" else None)
    caplog.set_level(logging.INFO, "megatron_sftrl")
    assert RolloutSection(prompts_per_step=1, max_new_tokens=1).engine == "auto"
    chosen = engine_here(config_of(AUTO))
    assert chosen.rollout.engine == engine
    assert caplog.messages == [f"rollout.engine: {engine}, which auto is here: {why}"]
    # resolved.yaml says it, without the other engine's settings; it is read as the same run on any machine.
    text = resolved_yaml(chosen)
    values = parse_yaml(text, source="resolved.yaml").value["rollout"]
    assert values["engine"] == engine
    assert ("vllm" in values, "max_concurrent" in values) == (engine == "vllm", engine == "in_process")
    again = config_from_text(text, source="resolved.yaml", schema=GrpoConfig)
    assert engine_here(again) is again
    assert caplog.messages[1:] == [f"rollout.engine: {engine}"]


@pytest.mark.parametrize(
    ("written", "is_cuda", "said"),
    [
        (
            {"vllm": {"tp": 1}},
            False,
            "rollout.vllm has no effect: rollout.engine is auto, and that is in_process",
        ),
        (
            {"max_concurrent": 8},
            True,
            "rollout.max_concurrent has no effect: rollout.engine is auto, and that",
        ),
    ],
)
def test_settings_of_the_engine_that_auto_is_not_are_refused_with_the_reason(
    written: dict[str, Any], is_cuda: bool, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        with_engine(config_of({**AUTO, **written}), is_cuda=is_cuda, has_vllm=True)
    assert said in str(caught.value)
    assert ("there is no CUDA device", "CUDA and vLLM are there")[is_cuda] in str(caught.value)
    # On the other machine they are settings like any other, and nothing calls them idle while it is open.
    config = config_of({**AUTO, **written})
    assert with_engine(config, is_cuda=not is_cuda, has_vllm=True)[0].rollout.engine != "auto"
    idle = idle_settings(config)
    assert not [each.key for each in idle if each.key.startswith("rollout.") and each.is_written]


DEVICES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no trainer": ({"devices": 4}, {}, "rollout.devices = 4 leaves none of the 4 process(es) to train"),
    "trainers' sizes": (
        {"devices": 1},
        {"parallel": {"tp": 2}},
        "3 process(es) are not a multiple of parallel.tp * pp * cp = 2 * 1 * 1 = 2: start 2 (dp = 1) or 4",
    ),
    "generators' tp": (
        {"devices": 3, "tp": 2},
        {},
        "rollout.devices = 3 do not form generators of rollout.tp",
    ),
    "vLLM's tp": (
        {"devices": 3, "engine": "vllm", "vllm": {"tp": 2}},
        {},
        "rollout.devices = 3 do not form generators of rollout.vllm.tp = 2",
    ),
    "heads": (
        {"devices": 3, "tp": 3},
        {},
        "the generators of rollout.devices: the model's 4 attention heads do not divide by rollout.tp = 3",
    ),
    "tp without devices": ({"tp": 2}, {}, "rollout.tp has no effect: rollout.devices is 0"),
    "tp of in_process": (
        {"devices": 1, "tp": 1, "engine": "vllm"},
        {},
        "rollout.tp has no effect: rollout.engine is vllm",
    ),
    "offload": ({"devices": 1, "offload": True}, {}, "rollout.offload has no effect: rollout.devices have"),
}


@pytest.mark.parametrize("name", DEVICES)
def test_devices_that_do_not_fit_are_refused_by_name(name: str) -> None:
    rollout, sections, said = DEVICES[name]
    config = config_of(rollout)
    config = type(config).model_validate({**config.model_dump(exclude_unset=True), **sections})
    with pytest.raises(UserError) as caught:
        check_run(config, architecture_of(config.model), 4, loss_needs=())
    assert said in str(caught.value)


def test_trainers_and_generators_share_a_job_in_layouts_of_their_own() -> None:
    config = config_of({"devices": 2, "tp": 2})
    check_run(config, architecture_of(config.model), 3, loss_needs=())


def test_what_can_run_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(VLLM, monkeypatch) == ""
    assert refusal({**VLLM, "vllm": {"tp": 2}}, monkeypatch) == ""
    assert refusal({**VLLM, "offload": True}, monkeypatch, device="cuda") == ""
    # The embedded engine needs nothing to be installed.
    assert refusal({}, monkeypatch, installed={}) == ""


@pytest.mark.parametrize("engine", ["in_process", "vllm"])
def test_offload_without_a_gpu_is_refused_and_not_ignored(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal({"engine": engine, "offload": True}, monkeypatch)
    assert "rollout.offload takes gradients and optimizer state off the GPU" in said
    assert "this run has no GPU: remove it, or rollout.offload=null" in said


@pytest.mark.parametrize(("installed", "said"), [({}, "not installed"), ({"vllm": "0.31.2"}, "too old")])
def test_a_vllm_that_is_missing_or_too_old_is_refused(
    installed: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said in refusal(VLLM, monkeypatch, installed=installed)


def test_ranks_and_models_that_vllm_cannot_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    three: dict[str, Any] = {**VLLM, "vllm": {"tp": 3}}
    assert "2 processes cannot form rollout engines of tp 3" in refusal(three, monkeypatch)
    assert "num_attention_heads = 4 is not a multiple of it" in refusal(three, monkeypatch, world_size=3)
    said = refusal({**VLLM, "max_new_tokens": 33}, monkeypatch)
    assert "max_model_len = 65 passes the model's 64 positions" in said


def test_a_qwen2_whose_heads_vllm_would_take_for_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(VLLM, monkeypatch, family="qwen2", head_dim=32)
    assert "vLLM takes hidden_size / num_attention_heads = 64 / 4 for the width of a qwen2's heads" in said
    assert "which is 32 here: use rollout.engine: in_process" in said
    assert refusal(VLLM, monkeypatch, family="qwen2", head_dim=16) == ""
    assert refusal(VLLM, monkeypatch, family="qwen3", head_dim=32) == ""


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "mistral4", "minimax_m2"])
def test_a_tied_output_layer_that_vllm_would_not_tie_is_refused(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = config_of(VLLM).model.architecture
    assert section is not None
    architecture = replace(from_section(section), family=family, tie_embeddings=False)
    monkeypatch.setattr(vllm_settings, "check_version", lambda: None)
    settings = VllmSettings(tp=1, max_model_len=64)
    vllm_settings.check_vllm(settings, architecture, world_size=1)
    with pytest.raises(UserError, match=rf"vLLM gives a {family} an output layer of its own all the same"):
        vllm_settings.check_vllm(settings, replace(architecture, tie_embeddings=True), world_size=1)


GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 101,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}
FULL_FIRST = ["full_attention", "sliding_attention"] * 2
OTHER_GPT_OSS: dict[str, tuple[dict[str, Any], str]] = {
    "slope": ({"swiglu_alpha": 1.5}, "swiglu_alpha 1.5, not 1.702"),
    "limit": ({"swiglu_limit": 5.0}, "swiglu_limit 5.0, not 7.0"),
    "eps": ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06, not 1e-05"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings True, not False"),
    "windows": ({"layer_types": FULL_FIRST}, "layers with a sliding window (1, 3), not (0, 2)"),
    "factor": (
        {"rope_scaling": {**GPT_OSS["rope_scaling"], "attention_factor": 1.25}},
        "attention_factor 1.25, not 1.3465735902799727",
    ),
}


def said_of_gpt_oss(changes: dict[str, Any], tmp_path: Path, *, world_size: int = 1) -> str:
    """What check_vllm says; empty if nothing."""
    (tmp_path / "config.json").write_text(json.dumps({**GPT_OSS, **changes}))
    settings = VllmSettings(tp=1, max_model_len=64)
    try:
        vllm_settings.check_vllm(settings, from_hf_config(tmp_path), world_size=world_size)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", OTHER_GPT_OSS)
def test_a_gpt_oss_that_vllm_would_take_for_the_published_ones_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm_settings, "check_version", lambda: None)
    changes, said = OTHER_GPT_OSS[name]
    assert said_of_gpt_oss(changes, tmp_path) == (
        f"vLLM runs every gpt_oss as the published ones, and this has {said}: use rollout.engine: in_process"
    )


def test_a_gpt_oss_like_the_published_ones_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm_settings, "check_version", lambda: None)
    assert said_of_gpt_oss({}, tmp_path) == ""
    # vLLM then has a window of every position.
    assert said_of_gpt_oss({"layer_types": ["full_attention"] * 4}, tmp_path) == ""
    said = said_of_gpt_oss({}, tmp_path, world_size=5)
    assert "width, 96, is not a multiple of the number of processes that form engines, 5, whatever" in said


@pytest.mark.parametrize("family", ["smollm3", "olmo2", "olmo3"])
def test_a_family_that_vllm_has_no_code_for_is_not_cut(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = config_of(VLLM).model.architecture
    assert section is not None
    architecture = replace(from_section(section), family=family)
    monkeypatch.setattr(vllm_settings, "check_version", lambda: None)
    one, two = (VllmSettings(tp=tp, max_model_len=64) for tp in (1, 2))
    vllm_settings.check_vllm(one, architecture, world_size=2)
    with pytest.raises(UserError, match=rf"vllm\.tp = 2: vLLM runs a {family} with transformers' code"):
        vllm_settings.check_vllm(two, architecture, world_size=2)


def test_every_setting_of_an_engine_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sftrl.rollout import build
    from megatron_sftrl.rollout.vllm_settings import VllmSettings

    policy: Any = object.__new__(PolicyEngine)
    policy.parallel = SimpleNamespace(dp_size=2)
    monkeypatch.setattr(
        build, "beside_trainer", lambda _policy, settings, decode, _progress: (settings, decode)
    )
    monkeypatch.setattr(build, "InProcessEngine", lambda _parallel, **most: tuple(most.values()))
    vllm: dict[str, Any] = {
        "tp": 2,
        "max_num_seqs": 7,
        "gpu_memory_utilization": 0.25,
        "enforce_eager": True,
        "bucket_mb": 3,
        "checksums": True,
    }
    assert build.build_engine(config_of({**VLLM, "vllm": vllm}), policy, str) == (
        VllmSettings(
            tp=2,
            max_model_len=64,
            max_num_seqs=7,
            gpu_memory_utilization=0.25,
            enforce_eager=True,
            bucket_bytes=3 * 2**20,
            has_checksums=True,
        ),
        str,
    )
    # One prompt of the two a step is a replica's; (responses at once, prompts in a forward).
    assert build.build_engine(config_of({"group_size": 4}), policy, str) == (4, 1, str, None)
    assert build.build_engine(config_of({"group_size": 4, "max_concurrent": 3}), policy, str) == (
        3,
        2,
        str,
        None,
    )


@pytest.mark.parametrize(("offload", "around"), [(True, ["leave", "come_back"]), (False, [])])
def test_what_will_leave_is_not_in_the_way_when_vllm_measures_the_memory(
    offload: bool, around: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_sftrl.rollout import build

    calls: list[str] = []
    policy: Any = object.__new__(PolicyEngine)
    policy.training_state = SimpleNamespace(
        leave=lambda: calls.append("leave"), come_back=lambda: calls.append("come_back")
    )
    monkeypatch.setattr(build, "beside_trainer", lambda *_: calls.append("build"))
    build.build_engine(config_of({**VLLM, "offload": offload}), policy, str)
    assert calls == [*around[:1], "build", *around[1:]]


def test_auto_is_not_vllm_where_the_same_bits_are_asked_for() -> None:
    config = config_of(AUTO)
    config = config.model_copy(update={"train": config.train.model_copy(update={"deterministic": True})})
    chosen, why = with_engine(config, is_cuda=True, has_vllm=True)
    assert (chosen.rollout.engine, why) == ("in_process", "train.deterministic does not cover vLLM")


def test_vllm_is_refused_where_the_same_bits_are_asked_for() -> None:
    config = config_of({"engine": "vllm"})
    config = config.model_copy(update={"train": config.train.model_copy(update={"deterministic": True})})
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    with pytest.raises(UserError, match="deterministic covers this package's steps"):
        check_run(config, architecture, 1, loss_needs=())


@pytest.mark.parametrize(
    ("rollout", "device", "said"),
    [
        (REPLAY, "cpu", "vLLM 0.32 returns the experts of its tokens on GPUs alone"),
        ({**REPLAY, "stop": ["</answer>"]}, "cuda", "not where a text of rollout.stop ends it"),
        (REPLAY, "cuda", ""),
        ({"router_replay": True, "stop": ["</answer>"]}, "cpu", ""),
    ],
)
def test_experts_that_vllm_does_not_tell_are_not_asked_for(
    rollout: dict[str, Any], device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = {"family": "qwen3_moe", "num_experts": 4, "experts_per_token": 2}
    found = refusal(rollout, monkeypatch, device=device, **mixture)
    assert said in found if said else not found


def test_a_command_that_only_reads_generates_on_every_process_and_records_no_experts() -> None:
    rollout = {"devices": 2, "tp": 2, "router_replay": True, "group_size": 4}
    config = config_of(rollout, family="qwen3_moe", num_experts=4, experts_per_token=2)
    found = only_read(config).rollout
    assert (found.devices, found.tp, found.router_replay, found.group_size) == (0, 1, False, 4)
    assert "tp" not in found.model_fields_set, "it would be refused as without effect"
