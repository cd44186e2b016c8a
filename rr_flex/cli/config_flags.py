"""--preset, and a flag for every field of RRConfig: words here, checked by RRConfig, so that help imports no torch."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rr_flex.config import RRConfig

PRESETS = ("rr", "best", "fast")


def block_size(text: str) -> int | tuple[int, int]:
    """128, or 128x64: query tokens by key tokens."""
    sizes = tuple(int(size) for size in text.split("x"))
    return sizes[0] if len(sizes) == 1 else sizes


# field of RRConfig: (how its value is read, help, what is taken where it is not said)
SETTINGS = {
    "stride": (int, "tokens per sampled query and per pooled key", "8"),
    "query_stride": (int, "tokens per sampled query", "the stride"),
    "key_stride": (int, "tokens per pooled key", "the stride"),
    "pool": (str, "pooled before it is scored: keys of a stride, queries of a block, or both in turn", "keys"),
    "query_pool": (int, "tokens per pooled query", "the query block"),
    "block_size": (block_size, "64, 128 or QUERYxKEY tokens, as in 128x64", "128"),
    "order": (int, "1: mean of the pooled logits, 2: and their variance", "1"),
    "variance_weight": (float, "of the variance, order 2 only", "0.5"),
    "budget": (str, "turns mass into kept blocks: top_tau, threshold or density", "top_tau"),
    "tau": (float, "for top_tau: share of a row's estimated mass to keep, in (0, 1]", "0.95"),
    "threshold": (float, "for threshold: keep blocks with a larger share of their row's mass", "0.01"),
    "target_density": (float, "for density: kept / visible blocks, mean over heads", "0.4"),
    "mandatory": (str, "mandatory blocks count towards tau, or are added (add)", "count"),
    "sink_blocks": (int, "key blocks always kept at the start", "1"),
    "local_blocks": (int, "key blocks always kept up to the diagonal", "1"),
    "dense_last_rows": (int, "block rows at the end that keep every visible block", "1"),
    "min_length": (int, "keys under which attention is dense", "0; in tasks dense where that is faster"),
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    settings = parser.add_argument_group("settings of the selection (RRConfig)")
    settings.add_argument(
        "--preset", choices=PRESETS, default="rr", help="where unsaid settings come from [%(default)s]"
    )
    for field, (kind, text, unsaid) in SETTINGS.items():
        flag = "--" + field.replace("_", "-")
        settings.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"{text} [{unsaid}]")


def config_of(arguments: argparse.Namespace) -> "RRConfig":
    """The RRConfig that the flags describe; raises what RRConfig raises."""
    from rr_flex.config import RRConfig

    said = {field: getattr(arguments, field) for field in SETTINGS}
    return RRConfig.from_preset(
        arguments.preset, **{field: value for field, value in said.items() if value is not None}
    )
