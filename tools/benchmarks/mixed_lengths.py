"""Tokens per second of in_process on prompts and responses of many lengths, beside another commit's.

    git worktree add ../before COMMIT
    python -m tools.benchmarks.mixed_lengths --against ../before [--longest-prompt 512] [--out FILE]

Each commit lives in a process of its own and answers the same prompts in turns, with the same random weights.
Groups of --group responses to each of --prompts prompts, sampled, ending by themselves after a third of
--new-tokens on average; --places of them together. Counted are the tokens of responses; the seconds are those
of the processor, which other programs on the machine disturb less. Ratios are of one turn; the table shows
their median.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="a checkout of the other commit")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--places", type=int, default=96)
    parser.add_argument("--shortest-prompt", type=int, default=8)
    parser.add_argument("--longest-prompt", dest="prompt_tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=512, help="of a response at most (512)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of both (3)")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return _serve(arguments)
    facts = _benchmark(arguments)
    print(f"{'':8}{'tokens per processor second':>30}")
    for name, speed in facts["tokens_per_cpu_second"].items():
        print(f"{name:8}{statistics.median(speed):30.1f}")
    print(f"ratio {facts['ratio']:.2f} (turns: {', '.join(f'{each:.2f}' for each in facts['ratios'])})")
    if arguments.out is not None:
        temporary = arguments.out.with_name(arguments.out.name + ".tmp")
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
        temporary.replace(arguments.out)
    return None


def _benchmark(arguments: argparse.Namespace) -> dict:
    checkouts = {"before": arguments.against.resolve(), "after": HERE.parents[2]}
    contenders = {name: _started(checkout) for name, checkout in checkouts.items()}
    speed: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, process in contenders.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("turn\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            speed[name].append(answer["tokens"] / answer["cpu_seconds"])
    for process in contenders.values():
        process.communicate()
    ratios = [after / before for before, after in zip(speed["before"], speed["after"], strict=True)]
    return {
        **{name: value for name, value in vars(arguments).items() if name not in ("against", "out", "serve")},
        "tokens_per_cpu_second": speed,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def _started(checkout: Path) -> subprocess.Popen[str]:
    """A process with the package of a checkout, which answers each line of its input with a line."""
    return subprocess.Popen(
        [sys.executable, str(HERE), *sys.argv[1:], "--serve"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _serve(arguments: argparse.Namespace) -> None:
    import torch

    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.in_process import InProcessEngine
    from megatron_sftrl.types import Prompt, SamplingParams
    from tools.benchmarks.generation_contenders import architecture_of, config_of

    torch.set_num_threads(1)
    draw = random.Random(0)
    lengths = [
        draw.randint(arguments.shortest_prompt, arguments.prompt_tokens) for _ in range(arguments.prompts)
    ]
    prompts = [
        Prompt(id=i, tokens=tuple(draw.randrange(arguments.vocab) for _ in range(length)))
        for i, length in enumerate(lengths)
    ]
    # A random model draws each id about equally often.
    ends = draw.sample(range(arguments.vocab), 3 * arguments.vocab // arguments.new_tokens)
    sampling = SamplingParams(
        max_new_tokens=arguments.new_tokens, num_samples=arguments.group, stop_ids=frozenset(ends), seed=1
    )
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(Path(directory), arguments)
    with parallel_context(config.parallel) as parallel:
        policy = PolicyEngine(architecture_of(config), config, parallel, with_optimizer=False)
        engine = InProcessEngine(parallel, max_responses=arguments.places)
        engine.update(policy, version=0)
        for _ in sys.stdin:
            start = time.process_time()
            groups = engine.generate(prompts, sampling)
            cpu_seconds = time.process_time() - start
            tokens = sum(len(rollout.response_tokens) for group in groups for rollout in group.rollouts)
            print(json.dumps({"tokens": tokens, "cpu_seconds": cpu_seconds}), flush=True)


if __name__ == "__main__":
    main()
