"""A step of decodes in vLLM with and without the plugin: two engines in one program, which take turns.

    python -m benchmarks.served_decode --model FOLDER --requests 8 --output decodes.jsonl

In an environment that holds vLLM and the plugin. Each engine decodes the same prompts, round by round; a step counts
once every request has its first token. One line for each engine, of the times of its steps.
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch

from benchmarks.environment import describe
from rr_flex.cli import flags
from rr_flex.serving.settings import parse_settings

LONGEST = 2048  # tokens of a prompt and its completion


def engine(settings: str | None, options: argparse.Namespace) -> Any:
    """An engine whose processes have RR_FLEX as given; None: without it."""
    os.environ.pop("RR_FLEX", None)
    if settings is not None:
        os.environ["RR_FLEX"] = settings
    from vllm import LLM

    sizes = {"max_model_len": LONGEST, "max_num_batched_tokens": 512, "max_num_seqs": options.requests}
    return LLM(options.model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=256 << 20, **sizes)


def decode_steps(llm: Any, prompts: list[list[int]], tokens: int, number: int) -> list[float]:
    """Milliseconds of each step in which all requests decode."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for place, prompt in enumerate(prompts):
        llm.llm_engine.add_request(f"{number}-{place}", {"prompt_token_ids": prompt}, sampling)
    times, begun = [], set()
    while llm.llm_engine.has_unfinished_requests():
        began, all_decode = time.perf_counter(), len(begun) == len(prompts)
        outputs = llm.llm_engine.step()
        if all_decode and len(outputs) == len(prompts):
            times.append(1000 * (time.perf_counter() - began))
        begun |= {output.request_id for output in outputs if output.outputs[0].token_ids}
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--settings", default='{"tau": 0.95}', help="what RR_FLEX says")
    parser.add_argument("--requests", type=flags.whole(1), default=8)
    parser.add_argument("--context", type=flags.whole(1), default=300, help="tokens of each prompt")
    parser.add_argument("--tokens", type=flags.whole(1), default=32, help="tokens of each completion")
    parser.add_argument("--rounds", type=flags.whole(1), default=8)
    parser.add_argument("--output", type=flags.new_file, help="file of JSON lines to add to; else they are printed")
    options = parser.parse_args()
    parse_settings(options.settings)
    if options.context + options.tokens > LONGEST:
        raise SystemExit(f"--context and --tokens must be {LONGEST} together at most, got {options.context} and more")
    engines = {"plain": engine(None, options), "plugin": engine(options.settings, options)}
    prompts = [[100 + (7 * place + 3 * at) % 900 for at in range(options.context)] for place in range(options.requests)]
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(options.rounds + 1):
        for name, llm in engines.items():
            steps = decode_steps(llm, prompts, options.tokens, number)
            times[name] += steps if number else []  # the first round warms up
    about = describe(torch.device("cpu")) | {"settings": options.settings, "requests": options.requests}
    for name, steps in times.items():
        low, median, high = statistics.quantiles(steps, n=4)
        figures = {"what": name, "ms": median, "first_quartile": low, "third_quartile": high, "steps": len(steps)}
        line = json.dumps(figures | {"context": options.context} | about)
        print(line, flush=True)
        if options.output:
            with options.output.open("a") as stream:
                stream.write(line + "\n")


if __name__ == "__main__":
    main()
