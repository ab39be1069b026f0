"""The command line: `sftrl sft run.yaml key=value ...`. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from megatron_sftrl import __version__
from megatron_sftrl.apps.doctor import add_loss_arguments, add_reward_arguments
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.log import log_known_warnings, start_logging

if TYPE_CHECKING:
    from megatron_sftrl.registry import FunctionRegistry

# The options of `sftrl plan`; nothing heavy is imported here, since every command builds the parser.

_RATES = (
    ("peak-tflops", 989.0, "dense bf16, of one GPU"),
    ("fp8-tflops", 1979.0, "dense fp8, of one GPU"),
    ("hbm", 3350.0, "GB/s of a GPU's memory"),
    ("nvlink", 450.0, "GB/s of a GPU inside the node, in one direction"),
    ("network", 50.0, "GB/s of a GPU between nodes, in one direction"),
    ("host-link", 10.0, "GB/s between a GPU and its host"),
    ("host-memory", 75.0, "GB/s of the host's memory, for each GPU"),
    ("efficiency", 0.6, "share of peak and memory rate that kernels reach: an assumption"),
    ("link-efficiency", 0.8, "share of the links' rates that collectives reach: an assumption"),
)


def add_plan_arguments(plan: argparse.ArgumentParser) -> None:
    """What the command line of `sftrl plan` may hold."""
    plan.add_argument("config", help="YAML file of a run; of its model only config.json is read")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="for example parallel.tp=8")
    plan.add_argument("--gpus", type=_count, required=True, help="GPUs of the job")
    plan.add_argument("--gpu-memory", default="80GB", help="of one GPU; GB is 10^9 bytes, GiB 2^30 (80GB)")
    plan.add_argument("--search", action="store_true", help="list the fastest layouts that fit")
    plan.add_argument("--top", type=_count, default=8, help="layouts in that list (8)")
    plan.add_argument("--mean-length", type=_count, help="tokens of a sequence in estimates (the longest)")
    plan.add_argument("--json", type=Path, help="write everything to this file, too")
    plan.add_argument("--gpus-per-node", type=_count, default=8, help="GPUs joined by NVLink (8)")
    plan.add_argument("--reserve", default="6GB", help="of a GPU for CUDA, NCCL and the allocator (6GB)")
    for name, default, meaning in _RATES:
        plan.add_argument(f"--{name}", type=float, default=default, help=f"{meaning} ({default:g})")
    plan.add_argument(
        "--kernels",
        choices=("transformer_engine", "torch"),
        default="transformer_engine",
        help="whose layers: torch where Transformer Engine is not installed (transformer_engine)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)


_USER_ERROR = 2
_STOPPED = os.EX_TEMPFAIL  # 75: ended early on request, with a checkpoint
# torchrun ends the other ranks within about a second of rank 0's exit. A rank that still lives after this
# many seconds has met an error that rank 0 has not, and must be heard.
_SECONDS_FOR_RANK_0 = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for what the user can fix, 75 for a run that a signal stopped.

    `arguments` are sys.argv's, without the program's name, when not given.
    """
    parser = _parser()
    parsed, late = parser.parse_known_args(arguments)
    # argparse takes key=value only in front of the options; people write them behind, too.
    if late and not ("overrides" in parsed and all("=" in word and word[0] != "-" for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        parsed.overrides = [*parsed.overrides, *late]
    try:
        return run_command(lambda: parsed.command(parsed), with_traceback=parsed.traceback)
    except BrokenPipeError:
        # `sftrl keys | head`. In a run it may be the pipe to a process that died.
        if parsed.command not in (_keys, _losses, _plan, _report_runs, _rewards, _show_data):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def run_command(command: Callable[[], int | None], *, with_traceback: bool = False) -> int:
    """Run something that a user started; what the user can fix becomes one message, told once per job.

    The exit code is the command's (0 by None), or 2 for a UserError, which `with_traceback` lets through (as
    SFTRL_TRACEBACK=1 does). Any other exception is a failure and passes through: Python's traceback and exit
    code 1, with which torchrun and the job scripts start the run again.
    """
    log_known_warnings()
    try:
        start_logging()
        return command() or 0
    except (UserError, ValidationError) as error:
        if with_traceback or os.environ.get("SFTRL_TRACEBACK") == "1":
            raise
        _report(error)
        return _USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftrl", description="SFT that prepares for RL, on Megatron-Core.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"megatron-sftrl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    _add_run_command(
        commands,
        "sft",
        _sft,
        help="fine-tune on demonstrations",
        description="Fine-tune as run.yaml says; `sftrl keys` explains it. A run directory that holds "
        "this run's checkpoints is resumed. On several processes: "
        "torchrun --nproc-per-node N -m megatron_sftrl sft run.yaml key=value ...",
        example="parallel.tp=2 optim.lr=1e-5",
    )
    _add_run_command(
        commands,
        "grpo",
        _grpo,
        help="train with rewards on generated responses",
        description="Generate, reward and update as run.yaml says; `sftrl keys grpo` explains it. On several "
        "processes: torchrun --nproc-per-node N -m megatron_sftrl grpo run.yaml key=value ...",
        example="rollout.group_size=16",
    )
    _add_generate(commands)
    _add_eval(commands)
    _add_compare(commands)
    _add_coupling(commands)
    _add_score(commands)
    directions = _add_convert(commands)
    _add_show_data(commands)
    _add_preflight(commands)
    _add_plan(commands)

    examined = _add_doctor(commands)
    _add_report(commands)

    keys = commands.add_parser("keys", help="explain every key of run.yaml")
    keys.add_argument(
        "kind", nargs="?", choices=("sft", "grpo", "compare"), default="sft", help="of run (sft)"
    )
    keys.set_defaults(command=_keys)

    losses = commands.add_parser("losses", help="list the losses: equation, source, needs and options")
    losses.add_argument("modules", nargs="*", metavar="file.py", help="files of your own losses, listed too")
    losses.set_defaults(command=_losses)

    rewards = commands.add_parser("rewards", help="list the rewards: what they give, needs and options")
    rewards.add_argument(
        "modules", nargs="*", metavar="file.py", help="files of your own rewards, listed too"
    )
    rewards.set_defaults(command=_rewards)

    for name, command in {**commands.choices, **directions.choices, **examined.choices}.items():
        if name not in ("convert", "doctor"):  # what follows on them has it
            command.add_argument(
                "--traceback",
                action="store_true",
                help="show where an error was raised (or SFTRL_TRACEBACK=1)",
            )
    return parser


def _add_run_command(
    commands: argparse._SubParsersAction,
    name: str,
    command: Callable[[argparse.Namespace], int | None],
    *,
    help: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    """A command about one run: its YAML and overrides of single keys."""
    parser = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"for example {example}")
    parser.set_defaults(command=command)
    return parser


def _sft(parsed: argparse.Namespace) -> int:
    from megatron_sftrl.config.load import load_config

    config = load_config(parsed.config, parsed.overrides)
    from megatron_sftrl.trainers.sft import run_sft

    return 0 if run_sft(config) else _STOPPED


def _grpo(parsed: argparse.Namespace) -> int:
    from megatron_sftrl.config.load import load_config
    from megatron_sftrl.config.schema import GrpoConfig

    config = load_config(parsed.config, parsed.overrides, schema=GrpoConfig)
    from megatron_sftrl.trainers.grpo import run_grpo

    return 0 if run_grpo(config) else _STOPPED


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = _add_run_command(
        commands,
        "generate",
        _generate,
        help="responses of a checkpoint for a file of prompts",
        description="Every row comes back with `responses`, `num_tokens` and `is_finished` added. "
        "Model, tokenizer and layout are those of run.yaml; the checkpoint may come from any layout.",
        example="parallel.tp=2",
    )
    generate.add_argument("--prompts", type=Path, required=True, help="rows with `prompt` or `messages`")
    generate.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    generate.add_argument(
        "--checkpoint",
        type=Path,
        help="step, run or Hugging Face directory (the run's own latest)",
    )
    generate.add_argument("--num-samples", type=int, default=1, help="responses per prompt (1)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    generate.add_argument("--max-new-tokens", type=int, default=256, help="end token included (256)")
    generate.add_argument("--seed", type=int, default=0, help="of the random streams (0)")
    generate.add_argument(
        "--stop-id", type=int, action="append", default=[], metavar="ID", help="another end token; repeatable"
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text that ends a response; repeatable"
    )
    generate.add_argument(
        "--logprobs", action="store_true", help="add `logprobs`: of each response token, in nats"
    )


def _generate(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.config.load import load_any_config

    config = load_any_config(parsed.config, parsed.overrides)
    from megatron_sftrl.trainers.generate import GenerateRequest, run_generate
    from megatron_sftrl.types import SamplingParams

    sampling = SamplingParams(
        temperature=parsed.temperature,
        max_new_tokens=parsed.max_new_tokens,
        seed=parsed.seed,
        stop_ids=frozenset(parsed.stop_id),
        stop=tuple(parsed.stop),
    )
    run_generate(
        config,
        GenerateRequest(
            prompts=parsed.prompts,
            out=parsed.out,
            checkpoint=parsed.checkpoint,
            num_samples=parsed.num_samples,
            sampling=sampling,
            with_logprobs=parsed.logprobs,
        ),
    )


def _add_eval(commands: argparse._SubParsersAction) -> None:
    from megatron_sftrl.apps.evaluate import command

    command.add_eval_arguments(_add_run_command(commands, "eval", command.eval_command, **command.EVAL))
    command.add_handoff_arguments(
        _add_run_command(commands, "handoff", command.handoff_command, **command.HANDOFF)
    )


def _add_compare(commands: argparse._SubParsersAction) -> None:
    from megatron_sftrl.apps.compare import command

    command.add_compare_arguments(
        _add_run_command(commands, "compare", command.compare_command, **command.COMPARE)
    )


def _add_coupling(commands: argparse._SubParsersAction) -> None:
    from megatron_sftrl.apps.coupling import command

    command.add_coupling_arguments(
        _add_run_command(commands, "coupling", command.coupling_command, **command.COUPLING)
    )


def _add_score(commands: argparse._SubParsersAction) -> None:
    score = _add_run_command(
        commands,
        "score",
        _score,
        help="write behaviour log-probabilities into a copy of the data, for PEAR",
        description="Rows come back with behavior_logprobs, behavior_token_ids and behavior_scorer added. "
        "Score with the tokenizer, template, max_length and dtype of the run that trains: the scores are "
        "those of the tokens as it will see them. On several processes: "
        "torchrun --nproc-per-node N -m megatron_sftrl score run.yaml ...",
        example="parallel.tp=2",
    )
    score.add_argument("--checkpoint", type=Path, help="step, run or Hugging Face directory (model.hf)")
    score.add_argument("--data", type=Path, required=True, help="JSONL, Parquet or datasets directory")
    score.add_argument("--out", type=Path, required=True, help="JSONL to write")


def _score(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.config.load import load_any_config

    config = load_any_config(parsed.config, parsed.overrides)
    from megatron_sftrl.apps.score import score

    score(config, checkpoint=parsed.checkpoint, data=parsed.data, out=parsed.out)


def _add_convert(commands: argparse._SubParsersAction) -> argparse._SubParsersAction:
    """Both directions, each a command of its own."""
    convert = commands.add_parser(
        "convert",
        help="between Hugging Face directories and checkpoints",
        description="Any number of processes shares the work: torchrun --nproc-per-node N -m megatron_sftrl "
        "convert ...",
        allow_abbrev=False,
    )
    directions = convert.add_subparsers(required=True, metavar="direction")
    to_megatron = directions.add_parser(
        "to-megatron",
        help="a Hugging Face directory into a checkpoint that training starts from (model.init_checkpoint)",
        description="The checkpoint loads into any layout. --tp, --pp and --ep name the one to read it: "
        "tensors are stored in the pieces of its ranks; --verify builds the model in that layout and needs a "
        "multiple of tp * pp processes. A run can also start from the directory itself, without conversion: "
        "model.hf in its YAML.",
        allow_abbrev=False,
    )
    add = to_megatron.add_argument
    add("--hf", type=Path, required=True, help="directory with config.json and safetensors")
    add("--out", type=Path, required=True, help="checkpoint directory to make")
    add("--tp", type=int, default=1, help="tensor parallel size of the layout (1)")
    add("--pp", type=int, default=1, help="pipeline parallel size (1)")
    add("--ep", type=int, default=1, help="expert parallel size (1)")
    add("--allow-pickle", action="store_true", help="read pickled .bin weights")
    add("--text-only", action="store_true", help="of a multimodal model the language model alone")
    to_megatron.set_defaults(command=_to_megatron)
    to_hf = directions.add_parser(
        "to-hf",
        help="a checkpoint into a Hugging Face directory that transformers and vLLM load",
        description="--checkpoint takes a converted checkpoint, one of a training run (the policy is "
        "exported), or a run directory (its latest one), whatever layout wrote it. Tokenizer, chat template "
        "and generation config come along.",
        allow_abbrev=False,
    )
    add = to_hf.add_argument
    add("--checkpoint", type=Path, required=True, help="checkpoint or run directory")
    add("--out", type=Path, required=True, help="Hugging Face directory to make")
    add("--base", type=Path, metavar="DIR", help="of LoRA: the model under the adapters, where it is now")
    add("--adapters", action="store_true", help="of LoRA: the adapters alone, as a directory of PEFT's")
    add("--max-file-gb", type=float, default=5.0, help="size of a safetensors file (5)")
    add("--verify-pp", type=int, default=1, metavar="PP", help="processes that hold the model to verify (1)")
    to_hf.set_defaults(command=_to_hf)
    for direction in (to_megatron, to_hf):
        direction.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), help="of weights; else kept")
        direction.add_argument("--verify", action="store_true", help="compare logits of both sides")
    return directions


def _to_megatron(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.apps.convert.command import run_to_megatron
    from megatron_sftrl.apps.convert.from_hf import Layout

    run_to_megatron(
        parsed.hf,
        parsed.out,
        layout=Layout(tp=parsed.tp, pp=parsed.pp, ep=parsed.ep),
        dtype=parsed.dtype,
        allow_pickle=parsed.allow_pickle,
        text_only=parsed.text_only,
        with_verify=parsed.verify,
    )


def _to_hf(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.apps.convert.command import run_to_hf

    run_to_hf(
        parsed.checkpoint,
        parsed.out,
        dtype=parsed.dtype,
        max_file_gb=parsed.max_file_gb,
        with_verify=parsed.verify,
        verify_pp=parsed.verify_pp,
        base=parsed.base,
        adapters=parsed.adapters,
    )


def _add_show_data(commands: argparse._SubParsersAction) -> None:
    show = _add_run_command(
        commands,
        "show-data",
        _show_data,
        help="what is learned of each row, and which rows are refused, before a run",
        description="The first rows as text, what is learned of them marked, and counts over all rows: "
        "tokens, learned tokens, what is too long, what is there twice. run.yaml is one of sft or of grpo; "
        "no model is needed. Exit code 2 where training would refuse the data; every kind of problem is "
        "listed, with the first row that has it.",
        example="data.max_length=4096",
    )
    show.add_argument("--rows", type=_count, default=3, metavar="N", help="rows shown of each file (3)")
    show.add_argument("--row", metavar="FILE:NUMBER", help="this row alone, and all of it")
    show.add_argument("--ids", action="store_true", help="the token ids, too")
    show.add_argument("--html", type=Path, metavar="FILE", help="write the same as one page")
    show.add_argument("--valid", action="store_true", help="show rows of data.valid instead of data.train")


def _show_data(parsed: argparse.Namespace) -> int:
    from megatron_sftrl.apps.show_data.command import ShowRequest, run_show_data

    request = ShowRequest(
        num_rows=parsed.rows,
        row=parsed.row,
        with_ids=parsed.ids,
        html=parsed.html,
        is_valid=parsed.valid,
    )
    return run_show_data(parsed.config, parsed.overrides, request)


def _add_preflight(commands: argparse._SubParsersAction) -> None:
    preflight = _add_run_command(
        commands,
        "preflight",
        _preflight,
        help="check nodes, network, disks and a run's configuration",
        description="Run it as the run itself will be started: torchrun ... -m megatron_sftrl preflight "
        "run.yaml key=value ... A table, and exit code 2 with the names of bad nodes; 1 for what may pass, "
        "such as a process that did not answer.",
        example="parallel.tp=2",
    )
    preflight.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for a silent process (60)"
    )
    preflight.add_argument(
        "--min-bandwidth", type=float, metavar="GB/S", help="bus bandwidth that all-reduce must reach"
    )


def _preflight(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.config.load import load_any_config

    config = load_any_config(parsed.config, parsed.overrides)
    from megatron_sftrl.apps.preflight.run import run_preflight

    least = None if parsed.min_bandwidth is None else parsed.min_bandwidth * 1e9
    run_preflight(config, timeout_s=parsed.timeout, least_rate=least)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory, messages and time of a run on a cluster, before a GPU is asked for",
        description="Memory of each pipeline stage, bytes sent and an estimated step time; a run that cannot "
        "fit is refused with changes that were tried. The defaults of the rates are those of an H100 SXM.",
        allow_abbrev=False,
    )
    add_plan_arguments(plan)
    plan.set_defaults(command=_plan)


def _plan(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.apps.plan.command import request_of, run_plan

    run_plan(request_of(parsed))


def _add_doctor(commands: argparse._SubParsersAction) -> argparse._SubParsersAction:
    """What is examined, each a command of its own."""
    doctor = commands.add_parser(
        "doctor", help="prove a loss, or find what a reward pays for, on this machine", allow_abbrev=False
    )
    examined = doctor.add_subparsers(required=True, metavar="loss|reward")
    loss = examined.add_parser(
        "loss",
        help="prove a loss under every layout",
        description="Value and gradient of a loss over tensor, pipeline, context and data parallel ranks, "
        "micro-batches, packing, padding and precisions, against the same function in one process in "
        "float64. CPU only. Exit code 1 when a property fails, with the place and a command that shows it.",
        allow_abbrev=False,
    )
    add_loss_arguments(loss)
    loss.set_defaults(command=_doctor_loss)
    reward = examined.add_parser(
        "reward",
        help="what the best constant answer earns on your data",
        description="Rewards of a run, or one by name, on a sample of rows: what the row's own answer earns, "
        "another row's, a constant, the question and nothing at all, in the run's own workers, everything "
        "twice. Exit code 1 when a wrong answer earns what the right one does, when the right one earns "
        "nothing, when a score changes or a call fails.",
        allow_abbrev=False,
    )
    add_reward_arguments(reward)
    reward.set_defaults(command=_doctor_reward)
    return examined


def _doctor_loss(parsed: argparse.Namespace) -> int:
    from megatron_sftrl.apps.doctor.command import request_of, run_doctor

    return 0 if run_doctor(request_of(parsed)) else 1


def _doctor_reward(parsed: argparse.Namespace) -> int:
    from megatron_sftrl.apps.doctor.reward import request_of, run_reward_doctor

    return 0 if run_reward_doctor(request_of(parsed)) else 1


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser(
        "report",
        help="the numbers of one or several runs as one page of curves and tables",
        description="Reads metrics.jsonl and resolved.yaml of run directories, of runs that go on, too. The "
        "page has every number as a curve, the runs over each other, the last values, and the settings in "
        "which the runs differ. It needs matplotlib.",
        allow_abbrev=False,
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="page to write (report.html)"
    )
    report.set_defaults(command=_report_runs)


def _report_runs(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.apps.report.command import run_report

    run_report(parsed.runs, parsed.out)


def _keys(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.apps.compare.config import CompareConfig
    from megatron_sftrl.config.messages import document_schema
    from megatron_sftrl.config.schema import GrpoConfig, RunConfig

    schemas = {"sft": RunConfig, "grpo": GrpoConfig, "compare": CompareConfig}
    print(document_schema(schemas[parsed.kind]), end="")


def _losses(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.losses import registry

    _list(registry.DEFAULT_REGISTRY, parsed.modules, needs="needs {}")


def _rewards(parsed: argparse.Namespace) -> None:
    from megatron_sftrl.rl.rewards import registry

    _list(registry.DEFAULT_REGISTRY, parsed.modules, needs="needs {} in every row")


def _list(registry: FunctionRegistry, modules: Sequence[str], *, needs: str) -> None:
    """Print every function that a run can name, those of the files included, with its options."""
    from megatron_sftrl.config.messages import document_fields
    from megatron_sftrl.registry import load_module

    for module in modules:
        load_module(module)
    for name in registry.names():
        entry = registry.get(name)
        note = f" ({needs.format(', '.join(entry.needs))})" if entry.needs else ""
        text = inspect.getdoc(entry.function) or "No description."
        print(
            "\n".join([f"## {name}{note}", "", text, "", *document_fields(entry.config)]),
            end="\n\n",
            flush=True,
        )


def _report(error: UserError | ValidationError) -> None:
    """Print a user's error once per job, not once per process."""
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        time.sleep(_SECONDS_FOR_RANK_0)
    text = f"error{f' (rank {rank})' if rank else ''}: {error}\n(--traceback shows where it was raised)"
    print(text, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun prints a page of its own behind this, which ends with what it finds here.
        told = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")
