"""A budget spent where it counts: thresholds for every layer and head from curves measured on a few texts.

For each head the squared error falls as its density grows: of the layer's output, or of what that does to the model's
prediction (`measured_curves`). The least total error at a total density lies where
one more block lowers the error by the same amount everywhere: for a price λ of density each head takes the threshold
with the least error + λ · density, and λ is moved until the target holds ("water-filling"). Layers count alike.
"""

import datetime
import math
import platform
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from rr_flex.calibration.measured_curves import THRESHOLDS, Curves, Progress, measure_curves
from rr_flex.config import RRConfig
from rr_flex.evaluation.equal_density import visible_and_mandatory
from rr_flex.evaluation.sparse_model import attend_densely, compare_selections, hidden_states
from rr_flex.mandatory import mandatory_blocks
from rr_flex.profiles import Profile, model_name

TARGETS = {"density": "in (0, 1]", "recall": "in (0, 1]", "error": "above 0", "kl": "above 0"}


def calibrate(
    model: PreTrainedModel,
    texts: Sequence[Int[Tensor, "1 L"]],
    *,
    target_density: float | None = None,
    target_recall: float | None = None,
    target_error: float | None = None,
    target_kl: float | None = None,
    config: RRConfig | None = None,
    names: Sequence[str] = (),
    progress: Progress = lambda stage, done=0, of=0: None,
) -> Profile:
    """A threshold for every layer and head that meets one target on `texts` (token ids) with the fewest blocks.

    Targets: mean density; mean recall of true mass; root mean squared relative output error of a layer; KL divergence
    from the dense model, nats a token. `config` (preset "best" unless given) is what the thresholds belong to. Each
    text is prefilled once, with a backward pass unless the target is an error, and for a KL a few times more.
    ValueError unless exactly one target is given and can be met.
    """
    name, value = one_target(density=target_density, recall=target_recall, error=target_error, kl=target_kl)
    if not texts:
        raise ValueError("texts must hold at least one prompt, got none")
    config = config or RRConfig.from_preset("best")
    if target_density is not None:
        must_be_reachable(target_density, config, [ids.shape[1] for ids in texts])
    # What a model predicts is what counts: only a target for the outputs is met by their own error.
    curves = measure_curves(model, texts, config, progress, by_prediction=name != "error")
    chosen = meet_kl(model, texts, config, curves, value, progress) if name == "kl" else meet(curves, name, value)
    names = list(names) or [f"{ids.shape[1]} tokens" for ids in texts]
    return profile_of(model, curves, chosen, config, {name: value}, names)


def one_target(**given: float | None) -> tuple[str, float]:
    """(name in TARGETS, value) of the one that is not None; ValueError unless it is one and lies in its range."""
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) != 1:
        raise ValueError(f"target must be one of {', '.join(f'target_{name}' for name in given)}, got {found}")
    ((name, value),) = found.items()
    if not 0 < value <= (1 if name in ("density", "recall") else math.inf):
        raise ValueError(f"target_{name} must lie {TARGETS[name]}, got {value}")
    return name, value


def must_be_reachable(target_density: float, config: RRConfig, lengths: Sequence[int]) -> None:
    """ValueError for a density that the mandatory blocks of prompts of these lengths exceed alone, in the mean."""
    shares = []
    for length in lengths:
        visible, _ = visible_and_mandatory(length, config.block_sizes, torch.device("cpu"))
        mandatory = mandatory_blocks(visible, config, Lq=length, q_offset=0)
        shares.append((mandatory.sum() / visible.sum()).item())
    least = sum(shares) / len(shares)
    if target_density < least - 1e-6:
        raise ValueError(f"target_density must be within reach, {least:.4g} by mandatory blocks, got {target_density}")


def profile_of(model, curves: Curves, chosen: Tensor, config: RRConfig, target: dict, names: Sequence[str]) -> Profile:
    """The chosen thresholds (indices into THRESHOLDS) with what they were found on."""
    return Profile(
        model=model_name(model),
        layers=thresholds(curves, chosen),
        settings=_plain_settings(config),
        target=target,
        measured=_at(curves, chosen),
        texts=list(names),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        date=datetime.date.today().isoformat(),
    )


def meet(curves: Curves, name: str, value: float) -> Int[Tensor, "layers Hq"]:
    """The threshold of each head, as an index into THRESHOLDS, with which the target holds at the highest price.

    Monotone in the target: a lower price keeps no head at fewer blocks.
    """
    holds = {
        "density": lambda chosen: _at(curves, chosen)["density"] <= value,
        "recall": lambda chosen: _at(curves, chosen)["recall"] >= value,
        "error": lambda chosen: _at(curves, chosen)["error"] <= value,
    }[name]
    wants_less = name == "density"  # a density holds at high prices, a quality at low ones
    low, high = -60.0, 20.0  # natural logarithm of the price
    extreme = at_price(curves, high if wants_less else low)
    if not holds(extreme):
        raise ValueError(f"target_{name} must be within reach, {_at(curves, extreme)[name]:.4g} at best, got {value}")
    for _ in range(50):
        middle = (low + high) / 2
        raise_price = holds(at_price(curves, middle)) != wants_less
        low, high = (middle, high) if raise_price else (low, middle)
    return at_price(curves, high if wants_less else low)


def at_price(curves: Curves, log_price: float) -> Int[Tensor, "layers Hq"]:
    """Each head's threshold of least error + price · density; of equal ones the denser."""
    cost = curves.error + torch.tensor(log_price).double().exp() * curves.density
    return cost.shape[2] - 1 - cost.flip(2).argmin(2)


def meet_kl(model, texts, config, curves, value, progress) -> Int[Tensor, "layers Hq"]:
    """The sparsest thresholds along the price whose KL on the texts is at most `value`, by bisection."""
    low, high = 0.0, 1.0  # density
    dense = [hidden_states(model, ids, attend_densely) for ids in texts]
    floor = _at(curves, at_price(curves, 20.0))["density"]
    best = at_price(curves, -60.0)
    for step in range(7):
        middle = max((low + high) / 2, floor + 1e-9)
        chosen = meet(curves, "density", middle)
        configs = {
            layer: config.with_settings({"budget": "threshold", "threshold": levels})
            for layer, levels in thresholds(curves, chosen).items()
        }
        runs = [
            compare_selections(model, ids, [configs], dense=own)[0][1].kl for ids, own in zip(texts, dense, strict=True)
        ]
        progress("meeting the divergence", step + 1, 7)
        if sum(runs) / len(runs) <= value:
            high, best = middle, chosen
        else:
            low = middle
    return best


def thresholds(curves: Curves, chosen: Int[Tensor, "layers Hq"]) -> dict[int, list[float]]:
    return {
        layer: [THRESHOLDS[index] for index in row] for layer, row in zip(curves.layers, chosen.tolist(), strict=True)
    }


def _at(curves: Curves, chosen: Int[Tensor, "layers Hq"]) -> dict[str, float]:
    """Density, recall and error of these thresholds on the calibration texts; by prediction the divergence that the
    errors add up to, to second order."""
    pick = [x.gather(2, chosen[..., None])[..., 0] for x in (curves.density, curves.recall, curves.error)]
    return {
        "density": pick[0].mean().item(),
        "recall": pick[1].mean().item(),
    } | ({"kl": pick[2].sum().item()} if curves.by_prediction else {"error": pick[2].sum(1).mean().sqrt().item()})


def _plain_settings(config: RRConfig) -> dict[str, object]:
    """The config's fields that differ from the defaults and are not the threshold's own."""
    default = RRConfig()
    names = [name for name in config.__dataclass_fields__ if name not in ("threshold", "budget", "tau")]
    found = {
        name: getattr(config, name) for name in names if getattr(config, name) not in (None, getattr(default, name))
    }
    return {name: list(x) if isinstance(x, tuple) else x for name, x in found.items()}
