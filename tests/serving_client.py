"""What the openai client asks a server under test, and what it got: lengths, shared heads, streams, cancellations."""

import argparse
import asyncio
import math
import pydoc_data.topics
import random
from dataclasses import dataclass, field

NAME = "smollm2"
EDGES = (1, 127, 128, 129, 256, 257)  # tokens of prompts where a row or a page just ends


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    nll: float | None = None  # nats a prompt token
    finished: bool = False
    cancelled: bool = False
    error: str | None = None


def prompts_of(model: str, count: int, longest: int, most: int) -> list[list[int]]:
    """Token ids from Python's own manual: lengths spread evenly in their logarithm, two in three with a shared head.

    Among them the lengths of EDGES and the most that the server takes.
    """
    from transformers import AutoTokenizer

    draw = random.Random(0)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = AutoTokenizer.from_pretrained(model).encode(text[:400_000])
    heads = [ids[:most], ids[30_000 : 30_000 + most]]
    lengths = [*EDGES, longest, most]
    lengths += [round(math.exp(draw.uniform(math.log(20), math.log(longest)))) for _ in range(count - len(lengths))]
    prompts = []
    for length in lengths[:count]:
        shared = draw.randint(0, length) if draw.random() < 2 / 3 else 0
        at = draw.randrange(0, len(ids) - most)
        prompts.append(draw.choice(heads)[:shared] + ids[at : at + length - shared])
    # Every position but the last past a prefix hit, and a prompt twice.
    prompts += [heads[0][:513], heads[0][:513]]
    draw.shuffle(prompts)
    return prompts


async def ask(client, number: int, prompt: list[int], arguments: argparse.Namespace) -> Answer:
    """One request: a third with the prompt's log-probabilities, of the others half as streams, some cancelled."""
    answer = Answer()
    options = {"model": NAME, "prompt": prompt, "max_tokens": arguments.tokens, "temperature": 0}
    try:
        if number % 3 == 0:
            extra = {"prompt_logprobs": 0, "return_token_ids": True}
            reply = await client.completions.create(**options, extra_body=extra)
            held = [next(iter(each.values())) for each in reply.choices[0].prompt_logprobs[1:]]
            answer.tokens = list(reply.choices[0].token_ids)
            answer.nll = -sum(each["logprob"] for each in held) / max(1, len(held))
        elif number % 3 == 1:
            reply = await client.completions.create(**options, extra_body={"return_token_ids": True})
            answer.tokens = list(reply.choices[0].token_ids)
        else:
            stream = await client.completions.create(**options, stream=True, extra_body={"return_token_ids": True})
            async for part in stream:
                answer.tokens += part.choices[0].token_ids or []
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
    async with AsyncOpenAI(base_url=where, api_key="none", timeout=arguments.patience) as client:
        return await asyncio.gather(*(ask(client, *numbered, arguments) for numbered in enumerate(prompts)))
