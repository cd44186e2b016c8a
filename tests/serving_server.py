"""A real `vllm serve` on loopback with and without RR_FLEX, and the openai client against both; run as a program.

    python tests/serving_server.py --model FOLDER --requests 20 --longest 1500 '{"tau": 1.0}' '{"tau": 0.95}'

Each server answers the same prompts: concurrent, of many lengths, with shared prefixes, half of them as streams, some
cancelled midway, in a cache so small that it preempts. With tau 1 every completion must be the plain server's; with
other settings the prompts' NLL must be within half a percent of the plain one's, and the agreement of tokens is told.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from serving_client import NAME, Answer, ask_all, prompts_of

NLL_BOUND = 0.005  # relative


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
        command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", str(arguments.sequences)]
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
    names = "rr_flex_|vllm:num_preemptions_total|vllm:prefix_cache_hits_total"
    pattern = re.compile(rf"^((?:{names})[^ ]*) ([0-9.e+]+)$", re.M)
    return {name: float(value) for name, value in pattern.findall(server.get("/metrics"))}


def run(settings: str | None, port: int, prompts: list[list[int]], arguments: argparse.Namespace, folder: Path) -> dict:
    server = Server(arguments.model, port, settings, arguments, folder)
    try:
        began = time.monotonic()
        answers = asyncio.run(ask_all(port, prompts, arguments))
        took = time.monotonic() - began
        # The counters follow at the log's interval.
        time.sleep(6 if settings is not None else 0)
        asyncio.run(ask_all(port, [prompts[0][:20]], arguments))
        metrics = metrics_of(server)
    finally:
        server.stop()
    lines = [line.split("rr_flex: ", 1)[1] for line in server.text().splitlines() if "rr_flex: " in line]
    return {"start": server.took, "took": took, "answers": answers, "metrics": metrics, "lines": lines}


def kill_worker(settings: str, port: int, prompt: list[int], arguments: argparse.Namespace, folder: Path) -> list[str]:
    """A worker is killed while it answers: every client gets an error, and the server ends; nothing hangs."""
    import psutil

    server = Server(arguments.model, port, settings, arguments, folder)
    family = psutil.Process(server.process.pid).children(recursive=True)
    workers = [child for child in family if "Worker" in child.name() or "Worker" in " ".join(child.cmdline())]
    if not workers:
        server.stop()
        return ["no worker was found to kill"]

    async def kill_soon() -> list[Answer]:
        asking = asyncio.ensure_future(ask_all(port, [prompt] * 4, arguments))
        await asyncio.sleep(1)
        workers[0].kill()
        return await asyncio.wait_for(asking, 120)

    try:
        answers = asyncio.run(kill_soon())
        server.process.wait(120)
    except (asyncio.TimeoutError, subprocess.TimeoutExpired) as error:
        return [f"something hung after a worker was killed: {error!r}"]
    finally:
        server.stop()
    return [f"an answer came from a dead worker: {answer}" for answer in answers if answer.finished]


def compare(settings: str, plain: dict, found: dict) -> list[str]:
    """What is wrong, and beside it a line of figures."""
    wrong = []
    pairs = list(zip(plain["answers"], found["answers"], strict=True))
    for number, (_, answer) in enumerate(pairs):
        if answer.error or not (answer.finished or answer.cancelled):
            wrong.append(f"request {number} was lost: {answer.error}")
    whole = [(a, b) for a, b in pairs if a.finished and b.finished]
    same = sum(a.tokens == b.tokens for a, b in whole)
    tokens = sum(x == y for a, b in whole for x, y in zip(a.tokens, b.tokens, strict=False))
    judged = [(a.nll, b.nll) for a, b in whole if a.nll is not None and b.nll is not None]
    mean = [sum(nll) / len(judged) for nll in zip(*judged, strict=True)]
    change = mean[1] / mean[0] - 1
    exact = json.loads(settings).get("tau") == 1 if settings.startswith("{") else False
    if exact and same < len(whole):
        wrong.append(f"{len(whole) - same} of {len(whole)} completions differ at tau 1")
    if abs(change) > (1e-4 if exact else NLL_BOUND):
        wrong.append(f"prompt NLL differs by {change:.3%}")
    if not found["metrics"].get('rr_flex_queries_total{way="sparse"}'):
        wrong.append("nothing was sparse")
    lengths = sum(len(a.tokens) for a, _ in whole)
    print(
        f"{settings}: {same} of {len(whole)} completions and {tokens / max(1, lengths):.1%} of their tokens are the "
        f"plain server's; prompt NLL {mean[0]:.4f} -> {mean[1]:.4f} ({change:+.3%}, {len(judged)} prompts); "
        f"{plain['took']:.0f} s -> {found['took']:.0f} s; start {plain['start']:.0f} s -> {found['start']:.0f} s"
    )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="values of RR_FLEX, a server each")
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--longest", type=int, default=1500, help="tokens of the longest prompt")
    parser.add_argument("--model-length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a completion")
    parser.add_argument("--budget", type=int, default=512, help="tokens of a step")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--cache", type=int, default=192 << 20, help="bytes")
    parser.add_argument("--patience", type=float, default=900, help="seconds for a start, and for a request")
    parser.add_argument("--kill", action="store_true", help="at the end kill a worker while it answers")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--logs", type=Path, help="folder of the servers' logs; a temporary one unless given")
    arguments = parser.parse_args()
    folder = arguments.logs or Path(tempfile.mkdtemp())
    most = arguments.model_length - arguments.tokens
    prompts = prompts_of(arguments.model, arguments.requests, arguments.longest, most)
    print(f"{len(prompts)} prompts of {sum(map(len, prompts))} tokens; logs in {folder}", flush=True)
    plain = run(None, arguments.port, prompts, arguments, folder)
    wrong = [f"plain request {n} was lost: {a.error}" for n, a in enumerate(plain["answers"]) if a.error]
    print(f"plain server: {plain['took']:.0f} s, {plain['metrics']}", flush=True)
    for number, settings in enumerate(arguments.settings, 1):
        found = run(settings, arguments.port + number, prompts, arguments, folder)
        wrong += [f"{settings}: {each}" for each in compare(settings, plain, found)]
        print("\n".join(found["lines"]), found["metrics"], sep="\n", flush=True)
    if arguments.kill:
        settings, port = arguments.settings[0], arguments.port + len(arguments.settings) + 1
        wrong += kill_worker(settings, port, prompts[0][:1] * most, arguments, folder)
    print("\n".join(wrong) or "all right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
