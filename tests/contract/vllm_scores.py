"""What vLLM makes of model directories, as JSON on a file; a program of its own, without anything of ours.

    python vllm_scores.py REQUEST.json ANSWER.json

REQUEST: {"directories": [...], "prompts": [[id, ...], ...], "num_new": n}. ANSWER: for each directory and
prompt the greedy tokens and the log-probability of every token but the first, prompt and response, in nats.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    answer = {
        directory: scores(directory, request["prompts"], request["num_new"])
        for directory in request["directories"]
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


def choose_by_sigmoids(model: Any) -> None:
    """Routers of the CPU build know sigmoids in groups alone; one group of all experts is the same."""
    for module in model.modules():
        router = getattr(module, "router", None)
        if getattr(router, "scoring_func", "") == "sigmoid" and not router.use_grouped_topk:
            router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1


def scores(directory: str, prompts: list[list[int]], num_new: int) -> list[dict]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    longest = max(map(len, prompts)) + num_new
    llm = LLM(
        model=directory,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        max_num_seqs=4,
        seed=0,
        disable_log_stats=True,
    )
    llm.apply_model(choose_by_sigmoids)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=num_new, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    found = []
    for output in llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
    ):
        response = output.outputs[0]
        prompt_part = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        new_part = zip(response.token_ids, response.logprobs, strict=True)
        found.append(
            {
                "tokens": list(response.token_ids),
                "logprobs": [table[token].logprob for token, table in [*prompt_part, *new_part]],
            }
        )
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    main()
