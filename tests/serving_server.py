"""A real `vllm serve` on loopback with and without RR_FLEX, and the openai client against both; run as a program.

    python tests/serving_server.py --model FOLDER --requests 20 --longest 1500 '{"tau": 1.0, "min_length": 0}'

Each server answers the same prompts: concurrent, of many lengths, with shared prefixes, half of them as streams, some
cancelled midway and a client killed, in a cache so small that it preempts. With tau 1 every completion must be the
plain server's; with other settings the prompts' NLL must be within half a percent of the plain one's, and the agreement
of tokens is told.
"""

import argparse
import asyncio
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from serving_client import NAME, Answer, ask_all, killed_midway, prompts_of

NLL_BOUND = 0.005  # relative
TIE = 1e-3  # nats


class Server:
    """`vllm serve` with RR_FLEX as given, None for the plain one; its log is a file."""

    def __init__(self, model: str, port: int, settings: str | None, arguments: argparse.Namespace, folder: Path):
        self.port, self.settings = port, settings
        self.log_path = folder / f"{port}.log"
        environment = {name: value for name, value in os.environ.items() if name != "RR_FLEX"}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_LOG_STATS_INTERVAL": "5", "VLLM_NO_USAGE_STATS": "1"}
        if settings is not None:
            environment["RR_FLEX"] = settings
        command = ["vllm", "serve", model, "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
        command += [*shlex.split(arguments.options), "--max-num-seqs", str(arguments.sequences)]
        command += ["--max-model-len", str(arguments.model_length), "--max-num-batched-tokens", str(arguments.budget)]
        command += ["--kv-cache-memory-bytes", str(arguments.cache)]
        self.log = self.log_path.open("w")
        began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() - began > arguments.patience:
                self.stop()
                sys.exit(f"the server did not start:\n{self.text()[-4000:]}")
            time.sleep(1)
        self.took = time.monotonic() - began

    def is_up(self) -> bool:
        try:
            return self.get("/health") is not None
        except OSError:
            return False

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read().decode()

    def text(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()


def metrics_of(server: Server) -> dict[str, float]:
    names = "rr_flex_|vllm:num_preemptions_total|vllm:prefix_cache_hits_total|vllm:num_requests_"
    pattern = re.compile(rf"^((?:{names})[^ ]*) ([0-9.e+]+)$", re.M)
    found = {name.split("{engine")[0]: float(value) for name, value in pattern.findall(server.get("/metrics"))}
    return {name: value for name, value in found.items() if not name.endswith("_created")}


def run(settings: str | None, port: int, prompts: list[list[int]], arguments: argparse.Namespace, folder: Path) -> dict:
    """What a server answered; a client beside the others is killed midway, and with `--kill` a worker at the end."""
    server, wrong = Server(arguments.model, port, settings, arguments, folder), []

    async def ask_beside_a_killed_client() -> list[Answer]:
        answers, _ = await asyncio.gather(ask_all(port, prompts, arguments), killed_midway(port, prompts[:4]))
        return answers

    try:
        began = time.monotonic()
        answers = asyncio.run(ask_beside_a_killed_client())
        took = time.monotonic() - began
        # The counters follow at the log's interval.
        time.sleep(6)
        asyncio.run(ask_all(port, [prompts[0][:20]], arguments))
        metrics = metrics_of(server)
        hung = {name: value for name, value in metrics.items() if name.startswith("vllm:num_requests_") and value}
        if hung:
            wrong.append(f"the server still works at {hung}")
        wrong += [f"request {number} was lost: {a.error}" for number, a in enumerate(answers) if a.error]
        if settings == arguments.settings[-1] and arguments.kill:
            wrong += kill_worker(server, max(prompts, key=len), arguments)
    finally:
        server.stop()
    lines = [line.split("rr_flex: ", 1)[1] for line in server.text().splitlines() if "rr_flex: " in line]
    started = {"start": server.took, "took": took, "lines": lines}
    return started | {"answers": answers, "metrics": metrics, "wrong": wrong}


def kill_worker(server: Server, prompt: list[int], arguments: argparse.Namespace) -> list[str]:
    """A worker is killed while it answers: every client gets an error, and the server ends; nothing hangs."""
    import psutil

    family = psutil.Process(server.process.pid).children(recursive=True)
    workers = [child for child in family if "Worker" in child.name() or "Worker" in " ".join(child.cmdline())]
    if not workers:
        return ["no worker was found to kill"]

    async def kill_soon() -> list[Answer]:
        asking = asyncio.ensure_future(ask_all(server.port, [prompt[::-1]] * 4, arguments))
        await asyncio.sleep(1)
        workers[0].kill()
        return await asyncio.wait_for(asking, 120)

    try:
        answers = asyncio.run(kill_soon())
        server.process.wait(120)
    except (asyncio.TimeoutError, subprocess.TimeoutExpired) as error:
        return [f"something hung after a worker was killed: {error!r}"]
    return [f"an answer came from a dead worker: {answer}" for answer in answers if answer.finished]


def compare(settings: str, plain: dict, found: dict) -> list[str]:
    """What is wrong, and beside it a line of figures."""
    wrong = list(found["wrong"])
    whole = [(a, b) for a, b in zip(plain["answers"], found["answers"], strict=True) if a.finished and b.finished]
    differing = [(a, b) for a, b in whole if a.tokens != b.tokens]
    # Where the plain server's two best tokens are as near as this, a sum in another order decides between them.
    ties = sum(lead_where_they_part(a, b) < TIE for a, b in differing)
    tokens = sum(x == y for a, b in whole for x, y in zip(a.tokens, b.tokens, strict=False))
    judged = [(a.nll, b.nll) for a, b in whole if a.nll is not None and b.nll is not None]
    nll = [sum(each) for each in zip(*judged, strict=True)]
    change = nll[1] / nll[0] - 1
    exact = json.loads(settings).get("tau") == 1 if settings.startswith("{") else False
    if exact and len(differing) > ties:
        wrong.append(f"{len(differing) - ties} of {len(whole)} completions differ at tau 1")
    if abs(change) > (1e-4 if exact else NLL_BOUND):
        wrong.append(f"prompt NLL differs by {change:.3%}")
    if not found["metrics"].get('rr_flex_queries_total{way="sparse"}'):
        wrong.append("nothing was sparse")
    lengths = sum(len(a.tokens) for a, _ in whole)
    print(
        f"{settings}: {len(whole) - len(differing)} of {len(whole)} completions and {tokens / max(1, lengths):.1%} of "
        f"their tokens are the plain server's, {ties} part at a tie; prompt NLL {nll[0]:.1f} -> {nll[1]:.1f} nats "
        f"({change:+.3%}, {len(judged)} prompts); {plain['took']:.0f} s -> {found['took']:.0f} s; "
        f"start {plain['start']:.0f} s -> {found['start']:.0f} s"
    )
    return wrong


def lead_where_they_part(a: Answer, b: Answer) -> float:
    """Nats by which the plain server's token is ahead of its second, at the first token that differs."""
    place = next((n for n, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), None)
    return math.inf if place is None else a.leads[place]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="values of RR_FLEX, a server each")
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--longest", type=int, default=1500, help="tokens of the longest prompt but one")
    parser.add_argument("--usual", type=int, help="tokens up to which most prompts have; as the longest unless given")
    parser.add_argument("--long", type=int, default=0, help="prompts of two thirds to all of the longest")
    parser.add_argument("--model-length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a completion")
    parser.add_argument("--budget", type=int, default=512, help="tokens of a step")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--options", default="--dtype float32 --enforce-eager", help="of `vllm serve`, beside these")
    parser.add_argument("--cache", type=int, default=192 << 20, help="bytes")
    parser.add_argument("--patience", type=float, default=900, help="seconds for a start, and for a request")
    parser.add_argument("--kill", action="store_true", help="kill a worker of the last server while it answers")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--logs", type=Path, help="folder of the servers' logs; a temporary one unless given")
    arguments = parser.parse_args()
    arguments.usual = arguments.usual or arguments.longest
    folder = arguments.logs or Path(tempfile.mkdtemp())
    prompts = prompts_of(arguments)
    print(f"{len(prompts)} prompts of {sum(map(len, prompts))} tokens; logs in {folder}", flush=True)
    plain = run(None, arguments.port, prompts, arguments, folder)
    wrong = [f"plain: {each}" for each in plain["wrong"]]
    print(f"plain server: {plain['took']:.0f} s, {plain['metrics']}", flush=True)
    for number, settings in enumerate(arguments.settings, 1):
        found = run(settings, arguments.port + number, prompts, arguments, folder)
        wrong += [f"{settings}: {each}" for each in compare(settings, plain, found)]
        print("\n".join(found["lines"]), found["metrics"], sep="\n", flush=True)
    print("\n".join(wrong) or "all right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
