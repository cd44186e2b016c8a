"""A budget that finds itself: thresholds for every layer and head at first use, kept in a file by model."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from rr_flex.calibration.lengths import leaves_room, length_factors, own_factor
from rr_flex.calibration.measured_curves import Curves, measure_curves
from rr_flex.calibration.thresholds import meet, meet_kl, must_be_reachable, one_target, profile_of, thresholds
from rr_flex.config import RRConfig
from rr_flex.evaluation.texts import sample_text
from rr_flex.profiles import Profile, load_profile

CACHE = Path("~/.cache/rr_flex")
# Kinds of text that come with Python, and tokens of a prompt. On a CPU all of them make one prompt: half a minute.
KINDS = ("prose", "code", "key-value", "chat")
TOKENS = {"cpu": 4096, "cuda": 8192}
LARGE, TOKENS_OF_LARGE = 2 * 10**9, 4096  # parameters, from which on activations of 8,192 tokens need most of a card
LONGEST = 1 << 30
FORM = 2  # of how thresholds are found: files of another are not read
EVERY = 4  # errors are measured on one of so many strips of queries


def own_profile(
    model: PreTrainedModel,
    target_density: float | None = None,
    *,
    target_kl: float | None = None,
    calibrate_on: Callable | Sequence[Int[Tensor, "1 L"]] | None = None,
    cache: str | Path | None = None,
) -> Profile:
    """Thresholds of `best` that keep `target_density` of the blocks where the prediction gains most, for all lengths.

    Or, in its place, the density at which the texts diverge by `target_kl`, nats a token: seven more runs of each, and
    at other lengths it is that density which is kept. From the file of an earlier call, or found now and written there
    whole. `calibrate_on`: the model's tokenizer, for texts that come with Python (None: the one in the model's own
    folder), or token ids, equally long. The same model, texts and target give the same thresholds, and more is kept for
    a larger density. ValueError unless one target is given, for a density that mandatory blocks alone exceed, and where
    there is no tokenizer.
    """
    name, value = one_target(density=target_density, kl=target_kl)
    mark = fingerprint(model)
    folder = Path(CACHE if cache is None else cache).expanduser()
    target = f"{'kl-' if name == 'kl' else ''}{value:g}"
    path = folder / f"{mark[:16]}-{FORM}-{_name_of(calibrate_on, model)}-{target}.json"
    if path.exists():
        found = load_profile(path)
        if found.fingerprint != mark:
            raise ValueError(
                f"profile must be of this model, {mark[:16]}, got one of {found.fingerprint[:16]!r}: {path}"
            )
        return found
    profile = replace(calibrated(model, _ids(model, calibrate_on), target_density, target_kl), fingerprint=mark)
    folder.mkdir(parents=True, exist_ok=True)
    profile.save(path)
    return profile


def calibrated(
    model: PreTrainedModel,
    texts: Sequence[Int[Tensor, "1 L"]],
    target_density: float | None = None,
    target_kl: float | None = None,
) -> Profile:
    """The profile, found now: curves by prediction and thresholds of equal gain, of the texts and of their beginnings
    as long as mandatory blocks leave something to choose; factors for longer prompts.

    The block before the diagonal's is mandatory where the density leaves room for it. What the first queries of a block
    look at there is too small a share of the block's row to be chosen, and the prediction hangs on it.
    """
    lengths = {ids.shape[1] for ids in texts}
    if len(lengths) != 1:
        raise ValueError(f"calibrate_on must hold texts of one length, got {sorted(lengths)}")
    name, value = one_target(density=target_density, kl=target_kl)
    longest, by_kl = lengths.pop(), name == "kl"
    config = RRConfig.from_preset("best", local_blocks=2)
    if not (by_kl or leaves_room(longest, config, value)):
        config = RRConfig.from_preset("best")
    if not by_kl:
        must_be_reachable(value, config, [longest])
    texts = [ids.to(model.device) for ids in texts]

    def quiet(*_: object) -> None: ...

    def measured(length: int) -> Curves:
        beginnings = [ids[:, :length] for ids in texts]
        return measure_curves(model, beginnings, config, quiet, by_prediction=True, every=EVERY)

    curves = measured(longest)
    chosen = meet_kl(model, texts, config, curves, value, quiet) if by_kl else meet(curves, name, value)
    profile = profile_of(model, curves, chosen, config, {name: value}, [f"{longest} tokens"] * len(texts))
    density = profile.measured["density"] if by_kl else value
    shorter, length = {}, longest // 2
    while leaves_room(length, config, density) and density < 1:
        of_length = measured(length)
        levels = thresholds(of_length, meet(of_length, "density", density))
        factor = own_factor(of_length, levels, config, density, length)
        shorter[length] = {layer: [factor * level for level in row] for layer, row in levels.items()}
        length //= 2
    factors = length_factors(curves, profile.layers, config, density, longest)
    return replace(profile, factors=factors, shorter=shorter)


def fingerprint(model: PreTrainedModel) -> str:
    """Of the numbers in the text model's configuration, and of every parameter's first and last values in float32."""
    config = model.config.get_text_config().to_dict()
    said = {name: x for name, x in config.items() if isinstance(x, int | float) and not name.startswith("_")}
    found = hashlib.sha256(json.dumps([said, config.get("model_type")], sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        ends = parameter.detach().flatten()
        ends = torch.cat([ends[:32], ends[-32:]]).float().cpu()
        found.update(name.encode() + str(tuple(parameter.shape)).encode() + ends.numpy().tobytes())
    return found.hexdigest()


def _ids(model: PreTrainedModel, calibrate_on: Callable | Sequence[Tensor] | None) -> list[Tensor]:
    """Token ids, of the user's or of texts that come with Python, no longer than the model's context."""
    if calibrate_on is None:
        calibrate_on = _tokenizer(model)
    if not callable(calibrate_on):
        return list(calibrate_on)
    length = min(_tokens(model), getattr(model.config.get_text_config(), "max_position_embeddings", LONGEST))
    texts = [calibrate_on(sample_text(kind), return_tensors="pt", verbose=False).input_ids for kind in KINDS]
    if model.device.type == "cuda":
        return [ids[:, : min(length, *(each.shape[1] for each in texts))] for ids in texts]
    return [torch.cat([ids[:, : length // len(KINDS)] for ids in texts], 1)]


def _tokenizer(model: PreTrainedModel) -> Callable:
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calibrate_on must be the model's tokenizer or token ids, since none is found at {model.name_or_path!r}"
        ) from error


def _tokens(model: PreTrainedModel) -> int:
    if model.device.type != "cuda":
        return TOKENS["cpu"]
    return TOKENS_OF_LARGE if model.num_parameters() >= LARGE else TOKENS["cuda"]


def _name_of(calibrate_on: Callable | Sequence[Tensor] | None, model: PreTrainedModel) -> str:
    """Of the texts, in the file's name."""
    if calibrate_on is None or callable(calibrate_on):
        return f"python-texts-{_tokens(model)}"
    found = hashlib.sha256()
    for ids in calibrate_on:
        found.update(ids.cpu().long().numpy().tobytes())
    return f"texts-{found.hexdigest()[:12]}"
