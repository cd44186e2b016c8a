"""Water-filling on curves made by hand, calibration of a small random model, and its profile."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from rr_flex import RRConfig
from rr_flex.calibration.thresholds import THRESHOLDS, Curves, at_price, calibrate, measure_curves, meet
from rr_flex.evaluation.sparse_model import SparseAttention, attend_densely, compare_selections, hidden_states
from rr_flex.models import enable
from rr_flex.profiles import Profile, load_profile, model_name

SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def network(seed=0):
    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, max_position_embeddings=2048, **SHAPE))
    for layer in made.model.layers:  # logits large enough that attention has something to select
        layer.self_attn.q_proj.weight.data *= 12
        layer.self_attn.k_proj.weight.data *= 12
    return made.eval()


def two_texts(length):
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(50, (1, length), generator=drawn) for _ in range(2)]


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def texts():
    return two_texts(640)


def random_curves(seed, layers=2, heads=2, levels=5):
    """Falling errors and rising densities, each convex or not."""
    generator = torch.Generator().manual_seed(seed)
    rising = torch.rand(layers, heads, levels, generator=generator).double().cumsum(2) / levels
    falling = torch.rand(layers, heads, levels, generator=generator).double().cumsum(2).flip(2)
    return Curves(list(range(layers)), rising, falling, rising / 2 + 0.5)


@given(seed=st.integers(0, 10_000), log_price=st.floats(-4, 4))
def test_no_other_choice_of_that_density_has_less_error(seed, log_price):
    curves = random_curves(seed)
    chosen = at_price(curves, log_price)

    def at(indices):
        """Density and error of choices [n, layers, heads]."""
        n = len(indices)
        of_density, of_error = (
            x.expand(n, -1, -1, -1).gather(3, indices[..., None])[..., 0] for x in (curves.density, curves.error)
        )
        return of_density.sum((1, 2)), of_error.sum((1, 2))

    density, error = at(chosen[None])
    others = torch.tensor(list(itertools.product(range(5), repeat=4))).view(-1, 2, 2)
    other_density, other_error = at(others)
    assert ((other_density > density - 1e-12) | (other_error > error - 1e-12)).all()


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_thresholds_are_monotone_in_the_target(seed):
    curves = random_curves(seed, levels=8)
    lowest = curves.density[..., 0].mean().item()
    before = None
    for density in (lowest + 0.01, lowest + 0.1, 0.5 + lowest, 2.0):
        chosen = meet(curves, "density", density)
        assert curves.density.gather(2, chosen[..., None]).mean() <= density
        assert before is None or (chosen >= before).all()
        before = chosen
    assert (before == 7).all()


def test_a_target_out_of_reach_is_refused():
    curves = random_curves(0)
    for name, value in (("density", 0.01), ("recall", 1.5), ("error", 1e-9)):
        with pytest.raises(ValueError, match=f"target_{name} must be within reach.*got {value}"):
            meet(curves, name, value)


def test_exactly_one_target(model, texts):
    for targets in ({}, {"target_density": 0.5, "target_kl": 0.1}):
        with pytest.raises(ValueError, match="target must be one of"):
            calibrate(model, texts, **targets)
    for name, value in (("density", math.nan), ("density", 3), ("recall", -1), ("error", 0), ("kl", -0.1)):
        with pytest.raises(ValueError, match=f"target_{name} must lie"):
            calibrate(model, texts, **{f"target_{name}": value})
    with pytest.raises(ValueError, match="texts must hold at least one prompt, got none"):
        calibrate(model, [], target_density=0.5)


def test_curves_are_what_a_run_measures(model, texts):
    config = RRConfig.from_preset("best", dense_last_rows=0)
    curves = measure_curves(model, texts[:1], config, lambda *a: None)
    assert curves.layers == [0, 1] and curves.density.shape == (2, 4, len(THRESHOLDS))
    assert (curves.density.diff(dim=2) >= 0).all() and (curves.recall.diff(dim=2) >= -1e-9).all()
    level = 10
    attention = SparseAttention({0: config.with_settings({"threshold": THRESHOLDS[level]})})
    hidden_states(model, texts[0], attention)
    assert attention.densities[0] == pytest.approx(curves.density[0, :, level].mean().item(), abs=1e-6)
    assert attention.densities[1] == 1.0


@pytest.fixture(scope="module")
def profile(model, texts):
    return calibrate(model, texts, target_density=0.85, names=["one", "two"])


def test_a_calibrated_profile_meets_its_target(model, texts, profile):
    assert profile.measured["density"] <= 0.85
    assert profile.texts == ["one", "two"] and profile.target == {"density": 0.85}
    ((density, _),) = compare_selections(model, texts[0], [RRConfig.from_profile(profile, model)])
    assert density == pytest.approx(profile.measured["density"], abs=0.05)


def test_a_divergence_is_met_on_the_texts(model, texts):
    found = calibrate(model, texts, target_kl=1e-3)
    runs = [compare_selections(model, ids, [RRConfig.from_profile(found, model)])[0][1].kl for ids in texts]
    assert sum(runs) / 2 <= 1e-3


def test_everything_kept_changes_nothing(model, texts):
    configs = RRConfig(budget="threshold", threshold=0.0)
    ((density, comparison),) = compare_selections(model, texts[0], [configs])
    assert density == 1 and comparison.kl < 1e-9 and comparison.agreement == 1


def test_the_dense_run_is_the_model_s_own(model, texts):
    own = model.model(texts[0]).last_hidden_state[0]
    torch.testing.assert_close(hidden_states(model, texts[0], attend_densely), own, rtol=1e-4, atol=1e-4)


def test_a_profile_round_trips(profile, model, tmp_path):
    path = tmp_path / "profile.json"
    profile.save(path)
    assert load_profile(path) == profile
    configs = RRConfig.from_profile(path, model)
    assert sorted(configs) == [0, 1]
    for layer, config in configs.items():
        assert config.budget == "threshold" and config.threshold == tuple(profile.layers[layer])
        best = RRConfig.from_preset("best")
        assert (config.pool, config.stride, config.order, config.block_size) == ("both", 8, best.order, 128)
    for named in (path, str(path)):
        with enable(model, profile=named) as on:
            assert on.plan.layers == configs


def test_another_model_s_profile_is_refused(profile, tmp_path):
    path = tmp_path / "profile.json"
    profile.save(path)
    for changed, message in (
        ({"num_attention_heads": 2}, "profile must have the model's 2 query heads, got"),
        ({"num_hidden_layers": 1}, "profile must fit the model's 1 layers, got"),
        ({"vocab_size": 51}, "profile must be of model 'llama-2-64-4-51', got one of 'llama-2-64-4-50'"),
    ):
        other = LlamaConfig(**{"vocab_size": 50, "num_hidden_layers": 2, **SHAPE, **changed})
        with pytest.raises(ValueError, match=message):
            RRConfig.from_profile(path, other)


def test_a_file_that_is_no_profile_is_refused(tmp_path):
    path = tmp_path / "other.json"
    for text, message in (("{}", "format 1, got None"), ("[]", "format 1, got 'list'"), ("{", "JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"profile must (have|be) {message}"):
            load_profile(path)
    with pytest.raises(FileNotFoundError, match=r"profile must be a \.json file or one of .*, got 'nothing'"):
        load_profile("nothing")


def test_a_profile_names_what_it_is_of(profile, model):
    assert profile.model == model_name(model) == "llama-2-64-4-50"
    assert profile.versions["torch"] == torch.__version__ and profile.date
    assert json.loads(json.dumps(profile.settings)) == {
        "key_stride": 32,
        "pool": "both",
        "order": 2,
        "variance_weight": 0.125,
    }
    assert isinstance(profile, Profile)
