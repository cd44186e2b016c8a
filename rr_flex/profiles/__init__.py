"""Calibrated profiles: a threshold for every layer and head of one model, as a small JSON file."""

import itertools
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rr_flex.runtime.writing import write_atomically

FORMAT = 1
SHIPPED = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What calibration found, and what it was found on."""

    model: str  # name of the model, as its own config gives it
    layers: dict[int, list[float]]  # a threshold a query head
    settings: dict[str, Any]  # fields of RRConfig that the thresholds belong to
    target: dict[str, float]  # such as {"density": 0.3}
    measured: dict[str, float] = field(default_factory=dict)  # on the calibration texts
    texts: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    # Tokens of a prompt -> what its thresholds are multiplied by, two or more: a share of a row falls with its length.
    # None: the thresholds hold at every length.
    factors: dict[int, float] | None = None
    # Tokens of a prompt, fewer than `factors` has -> `layers` as found at that length itself.
    shorter: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    fingerprint: str = ""  # of the model's configuration and weights; "": not recorded
    format: int = FORMAT

    def save(self, path: str | Path) -> None:
        document = json.dumps(asdict(self), indent=1) + "\n"
        write_atomically(Path(path), lambda stream: stream.write(document.encode()))

    def settings_by_layer(self, model: Any = None) -> dict[int, dict[str, Any]]:
        """Layer -> fields of RRConfig. With a transformers model or config, ValueError where it is another's."""
        if model is not None:
            self.check(model)
        settings = {name: tuple(x) if isinstance(x, list) else x for name, x in self.settings.items()}
        settings["budget"] = "threshold"
        return {layer: settings | {"threshold": levels} for layer, levels in self.layers.items()}

    def levels_at(self, layer: int, length: int) -> tuple[float, ...]:
        """Each head's threshold in a prompt of so many tokens: on the line through the two nearest known lengths, both
        logarithmic."""
        if self.factors is None:
            return tuple(self.layers[layer])
        known = {tokens: [factor * level for level in self.layers[layer]] for tokens, factor in self.factors.items()}
        known |= {tokens: layers[layer] for tokens, layers in self.shorter.items()}
        ordered = sorted(known)
        low, high = next((pair for pair in itertools.pairwise(ordered) if length <= pair[1]), ordered[-2:])
        share = math.log(length / low) / math.log(high / low)
        return tuple(first * (second / first) ** share for first, second in zip(known[low], known[high], strict=True))

    def check(self, model: Any) -> None:
        """ValueError naming what differs between the profile's model and this one."""
        config = getattr(model, "config", model)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        own_heads = {len(levels) for levels in self.layers.values()}
        if own_heads != {heads}:
            raise ValueError(
                f"profile must have the model's {heads} query heads, got {sorted(own_heads)} ({self.model})"
            )
        if max(self.layers) >= layers:
            raise ValueError(
                f"profile must fit the model's {layers} layers, got layer {max(self.layers)} ({self.model})"
            )
        found = model_name(model)
        if found and found != self.model:
            raise ValueError(f"profile must be of model {found!r}, got one of {self.model!r}; calibrate this one")


def load_profile(source: str | Path) -> Profile:
    """A profile by path, or a shipped one by name. ValueError or FileNotFoundError say what is wrong with it."""
    path = Path(source)
    if path.suffix != ".json":
        path = SHIPPED / f"{source}.json"
        if not path.exists():
            shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json"))) or "none"
            raise FileNotFoundError(f"profile must be a .json file or one of {shipped}, got {str(source)!r}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"profile must be JSON, got {path}: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"profile must have format {FORMAT}, got {found!r} in {path}")
    document["layers"] = _by_number(document["layers"])
    if document.get("factors") is not None:
        document["factors"] = _by_number(document["factors"])
    shorter = _by_number(document.get("shorter", {}))
    document["shorter"] = {tokens: _by_number(layers) for tokens, layers in shorter.items()}
    return Profile(**document)


def _by_number(found: dict[str, Any]) -> dict[int, Any]:
    """JSON has names only."""
    return {int(name): value for name, value in found.items()}


def model_name(model: Any) -> str:
    """What identifies a transformers model: its type and sizes, since a path says nothing; "" without a config."""
    config = getattr(model, "config", model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(config, "model_type"):
        return ""
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size)
    return f"{config.model_type}-" + "-".join(map(str, sizes))
