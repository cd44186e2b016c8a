"""`rr-flex plan`: which way to spread a long prompt's prefill over many GPUs, from measured rates."""

import argparse
import sys

from rr_flex.cli import flags
from rr_flex.cli.output import DONE, need, save_figure, show, told

EXAMPLES = """
examples:
  rr-flex plan --tokens 4M --heads 64/8 --gpus 8..1024 --density .1
  rr-flex plan --tokens 1M --heads 32/8 --gpus 2,4,8 --plot plan.png
"""
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_to(commands: argparse._SubParsersAction) -> None:
    about = "predict time and memory a rank of each way to prefill a long prompt on many GPUs, by a cost model"
    parser = flags.add_command(commands, run, about, EXAMPLES)
    parser.add_argument("--tokens", type=tokens, default="1M", metavar="N", help="such as 512K or 4M [1M]")
    parser.add_argument("--heads", type=heads, default="32/8", metavar="Hq/Hkv", help="query and key heads [32/8]")
    parser.add_argument("--head-dim", type=flags.whole(1), default=128, help="[%(default)s]")
    parser.add_argument("--layers", type=flags.whole(1), default=1, help="how many such layers [%(default)s]")
    parser.add_argument("--gpus", type=gpus, default="1..8", metavar="A..B", help="doubling, or a list 2,4,8 [1..8]")
    parser.add_argument("--density", type=flags.share, default=0.1, help="share of blocks that are kept [%(default)s]")
    parser.add_argument(
        "--rates", type=flags.old_file, metavar="JSON", help="measured rates of another machine [the shipped ones]"
    )
    parser.add_argument("--plot", type=flags.picture, metavar="PNG", help="draws times against GPUs")
    flags.add_json(parser)


def tokens(text: str) -> int:
    unit = UNITS.get(text[-1:].upper())
    try:
        count = int(float(text[:-1]) * unit) if unit else int(text)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be a number of tokens of at least 1, such as 512K, got {text!r}")
    return count


def heads(text: str) -> tuple[int, int]:
    Hq, _, Hkv = text.partition("/")
    pair = int(Hq), int(Hkv or Hq)
    if min(pair) < 1 or pair[0] % pair[1]:
        raise argparse.ArgumentTypeError(f"must be Hq/Hkv with Hq a multiple of Hkv, got {text}")
    return pair


def gpus(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    counts = [int(first)] if dots else [int(count) for count in text.split(",")]
    if min(counts) < 1 or (dots and int(last) < counts[0]):
        raise argparse.ArgumentTypeError(f"must be A..B or a list of positive numbers, got {text}")
    while dots and 2 * counts[-1] <= int(last):
        counts.append(2 * counts[-1])
    return counts


def run(arguments: argparse.Namespace) -> int:
    with told("viz"):
        need("matplotlib", arguments.plot)
        from rr_flex.distributed import cost

        rates = cost.Rates.read(arguments.rates or cost.RATES)
    Hq, Hkv = arguments.heads
    shape = {"tokens": arguments.tokens, "heads": Hq, "kv_heads": Hkv, "head_dim": arguments.head_dim}
    prompt = cost.Prompt(**shape, density=arguments.density)
    rows = []
    for count in arguments.gpus:
        for place, each in enumerate(cost.costs(prompt, count, rates)):
            of_way = {"ranks": count, "way": each.way, "seconds": each.seconds * arguments.layers, "best": place == 0}
            rows.append(of_way | {"memory_bytes": each.memory, "moved_bytes": each.moved})
    show(arguments, {"rates": rates.source, "rows": rows}, table(rows))
    if not arguments.quiet:
        print(f"rates: {rates.source}", file=sys.stderr)
    if arguments.plot is not None:
        from rr_flex.distributed.plot import draw

        save_figure(arguments.plot, draw(rows))
    return DONE


def table(rows: list[dict]) -> str:
    lines = [f"{'GPUs':>5}  {'way':<24}{'time':>12}{'memory a rank':>16}{'moved a rank':>15}"]
    for row in rows:
        mark = "*" if row["best"] else " "
        sizes = f"{row['memory_bytes'] / 2**30:>12.1f} GiB{row['moved_bytes'] / 2**30:>11.2f} GiB"
        lines.append(f"{row['ranks']:>5} {mark}{row['way']:<24}{1000 * row['seconds']:>9.1f} ms{sizes}")
    return "\n".join([*lines, "* fastest of its number of GPUs"])
