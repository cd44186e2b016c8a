"""What the openai client asks a server under test, and what it got: lengths, shared heads, streams, cancellations.

As a program, which is there to be killed: `serving_client.py PORT`, with prompts as JSON on its input, asks for streams
and says when the first token is there.
"""

import argparse
import asyncio
import json
import math
import pydoc_data.topics
import random
import sys
from dataclasses import dataclass, field

NAME = "smollm2"
EDGES = (1, 127, 128, 129, 256, 257)  # tokens of prompts where a row or a page just ends


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)  # nats by which each token was ahead of the second
    nll: float | None = None  # nats, the prompt's tokens together
    finished: bool = False
    cancelled: bool = False
    error: str | None = None


def prompts_of(arguments: argparse.Namespace) -> list[list[int]]:
    """Token ids from Python's own manual: lengths spread evenly in their logarithm, two in three with a shared head.

    Most have up to `usual` tokens, one in twenty up to a third of `longest`. Among them the lengths of EDGES, the most
    that the server takes, and `long` prompts of two thirds to all of `longest`, which share half of it.
    """
    from transformers import AutoTokenizer

    most = arguments.model_length - arguments.tokens
    draw = random.Random(0)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = AutoTokenizer.from_pretrained(arguments.model).encode(text[:400_000])
    heads = [ids[:most], ids[30_000 : 30_000 + most]]

    def prompt(length: int, shared: int, head: list[int] | None = None) -> list[int]:
        at = draw.randrange(0, len(ids) - most)
        return (head or draw.choice(heads))[:shared] + ids[at : at + length - shared]

    longest = arguments.longest
    prompts = [prompt(length, draw.randint(0, length)) for length in (*EDGES, longest, most)]
    for _ in range(arguments.long):
        prompts.append(prompt(draw.randint(longest * 2 // 3, longest), longest // 2, heads[0]))
    while len(prompts) < arguments.requests:
        limit = arguments.usual if draw.random() < 0.95 else max(arguments.usual, longest // 3)
        length = round(math.exp(draw.uniform(math.log(20), math.log(limit))))
        prompts.append(prompt(length, draw.randint(0, length) if draw.random() < 2 / 3 else 0))
    # Prompts twice: every position but the last past a prefix hit, and a whole row past it.
    prompts += [heads[0][:513]] * 2 + [heads[0][:512]] * 2
    draw.shuffle(prompts)
    return prompts


async def ask(client, number: int, prompt: list[int], arguments: argparse.Namespace) -> Answer:
    """One request: a third with the prompt's log-probabilities, of the others half as streams, some cancelled."""
    answer = Answer()
    options = {"model": NAME, "prompt": prompt, "max_tokens": arguments.tokens, "temperature": 0, "logprobs": 2}
    extra = {"return_token_ids": True} | ({"prompt_logprobs": 0} if number % 3 == 0 else {})

    def read(choice) -> None:
        answer.tokens += choice.token_ids or []
        for best in (choice.logprobs and choice.logprobs.top_logprobs) or []:
            first, second = (*sorted(best.values(), reverse=True), -math.inf)[:2]
            answer.leads.append(first - second)

    try:
        if number % 3 < 2:
            reply = await client.completions.create(**options, extra_body=extra)
            read(reply.choices[0])
            if number % 3 == 0:
                held = [next(iter(each.values())) for each in reply.choices[0].prompt_logprobs[1:]]
                answer.nll = -sum(each["logprob"] for each in held)
        else:
            stream = await client.completions.create(**options, stream=True, extra_body=extra)
            async for part in stream:
                read(part.choices[0])
                if number % 9 == 2 and len(answer.tokens) >= 2:
                    answer.cancelled = True
                    await stream.close()
                    break
        answer.finished = not answer.cancelled
    except Exception as error:  # whatever it is, the others must be right
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def ask_all(port: int, prompts: list[list[int]], arguments: argparse.Namespace) -> list[Answer]:
    from openai import AsyncOpenAI

    where = f"http://127.0.0.1:{port}/v1"
    async with AsyncOpenAI(base_url=where, api_key="none", timeout=arguments.patience, max_retries=0) as client:
        return await asyncio.gather(*(ask(client, *numbered, arguments) for numbered in enumerate(prompts)))


async def killed_midway(port: int, prompts: list[list[int]]) -> None:
    """A client in a process of its own, killed when the first token of its streams is there."""
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, str(port), **pipes)
    process.stdin.write(json.dumps(prompts).encode() + b"\n")
    await process.stdin.drain()
    await process.stdout.readline()
    process.kill()
    await process.wait()


async def stream_until_killed(port: int, prompts: list[list[int]]) -> None:
    from openai import AsyncOpenAI

    async def listen(prompt: list[int]) -> None:
        options = {"model": NAME, "prompt": prompt, "max_tokens": 256, "stream": True}
        async for _ in await client.completions.create(**options, extra_body={"ignore_eos": True}):
            print("a token", flush=True)

    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=3600) as client:
        await asyncio.gather(*map(listen, prompts))


if __name__ == "__main__":
    asyncio.run(stream_until_killed(int(sys.argv[1]), json.loads(sys.stdin.readline())))
