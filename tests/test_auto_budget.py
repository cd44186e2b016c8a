"""A budget that finds itself: what it is found from, that it is kept, and for whom."""

import itertools

import pytest
import torch

pytest.importorskip("transformers")

from test_calibration import network, two_texts

from rr_flex import RRConfig
from rr_flex.calibration import auto, lengths
from rr_flex.calibration.sensitivity import output_gradients
from rr_flex.evaluation.equal_density import visible_and_mandatory
from rr_flex.evaluation.sparse_model import SparseAttention, attend_densely, compare_selections, hidden_states
from rr_flex.models import enable
from rr_flex.models.attention_by import attention_by
from rr_flex.profiles import Profile, load_profile

TARGETS = (0.5, 0.6, 0.7)


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def texts():
    return two_texts(2048)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def density_of(model, ids, plan):
    """What a plan's settings keep of a prompt."""
    attention = SparseAttention({layer: plan.of_heads(layer, None, ids.shape[1]) for layer in (0, 1)})
    hidden_states(model, ids, attention)
    return attention.density


def test_the_divergence_is_half_the_mean_square_of_gradient_times_error(model):
    """To second order, for a small change of one head's output at one position."""
    ids = torch.randint(50, (1, 48), generator=torch.Generator().manual_seed(2))
    change = 0.02 * torch.randn(16, generator=torch.Generator().manual_seed(3))

    def logits(changed):
        def attend(q, k, v, *, layer, scale, window):
            out = attend_densely(q, k, v, layer=layer, scale=scale, window=window)
            if layer == 1 and changed:
                out = out.clone()
                out[0, 2, 20] += change
            return out

        with torch.no_grad(), attention_by(model, attend):
            return model(ids, use_cache=False).logits[0].double().log_softmax(-1)

    dense, other = logits(False), logits(True)
    divergence = (dense.exp() * (dense - other)).sum()
    felt = [output_gradients(model, ids, seed)[1].gradient[0, 2, 20] for seed in range(300)]
    assert 0.5 * (torch.stack(felt) @ change).square().mean().item() == pytest.approx(divergence.item(), rel=0.3)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_one_profile_keeps_the_density_at_every_length(model, texts, cache):
    with enable(model, budget="auto", target_density=0.8, calibrate_on=texts, profile_cache=cache) as on:
        # Between two lengths a head's threshold is interpolated.
        for length, near in ((1024, 0.03), (1536, 0.07), (2048, 0.03)):
            assert density_of(model, texts[0][:, :length], on.plan) == pytest.approx(0.8, abs=near)
    (path,) = cache.glob("*-0.8.json")
    profile = load_profile(path)
    assert [*profile.shorter, *profile.factors] == [1024, *(2048 << n for n in range(10))]
    assert list(profile.factors.values()) == sorted(profile.factors.values(), reverse=True)


def test_the_block_before_the_diagonal_is_kept_where_the_density_leaves_room(model, texts, cache):
    """At 2,048 tokens .43 are mandatory with it, .33 without; .04 are left to choose."""
    for density, local_blocks in ((0.4, None), (0.5, 2)):
        profile = auto.own_profile(model, density, calibrate_on=texts, cache=cache)
        assert profile.settings.get("local_blocks") == local_blocks
        assert profile.measured["density"] == pytest.approx(density, abs=0.03)


def test_a_density_below_the_mandatory_blocks_is_told_before_anything_is_measured(model, texts, cache, monkeypatch):
    monkeypatch.setattr(auto, "measure_curves", lambda *_, **__: pytest.fail("begun"))
    with pytest.raises(
        ValueError, match=r"target_density must be within reach, 0\.33\d* by mandatory blocks, got 0\.2"
    ):
        auto.own_profile(model, 0.2, calibrate_on=texts, cache=cache)


def test_a_shorter_length_has_what_a_profile_of_it_has(model, texts, cache, tmp_path):
    one = auto.own_profile(model, 0.8, calibrate_on=texts, cache=cache)
    own = auto.own_profile(model, 0.8, calibrate_on=[ids[:, :1024] for ids in texts], cache=tmp_path)
    for layer in (0, 1):
        assert one.levels_at(layer, 1024) == pytest.approx(own.levels_at(layer, 1024)) != one.levels_at(layer, 2048)


@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("block_size", [128, (128, 64), (64, 128)])
def test_mandatory_blocks_are_counted_in_closed_form(block_size, local_blocks):
    config = RRConfig(block_size=block_size, local_blocks=local_blocks)
    for length in (1024, 1280, 4096):
        visible, mandatory = visible_and_mandatory(length, config.block_sizes, torch.device("cpu"), local_blocks)
        assert lengths._mandatory_share(length, config) == pytest.approx((mandatory.sum() / visible.sum()).item())


def test_it_is_found_once_and_the_same_again(model, texts, cache, tmp_path, monkeypatch):
    first = auto.own_profile(model, 0.5, calibrate_on=texts, cache=cache)
    again = auto.own_profile(model, 0.5, calibrate_on=texts, cache=tmp_path)
    assert first == again
    monkeypatch.setattr(auto, "measure_curves", None)  # a second calibration would fail
    assert auto.own_profile(model, 0.5, calibrate_on=texts, cache=tmp_path) == again


def test_a_larger_target_keeps_more(model, texts, cache):
    found = [auto.own_profile(model, target, calibrate_on=texts, cache=cache) for target in TARGETS]
    for fewer, more in itertools.pairwise(found):
        assert all(a >= b for layer in (0, 1) for a, b in zip(fewer.layers[layer], more.layers[layer], strict=True))
    densities = []
    for target in TARGETS:
        with enable(model, budget="auto", target_density=target, calibrate_on=texts, profile_cache=cache) as on:
            densities.append(density_of(model, texts[1], on.plan))
    assert densities == sorted(densities)


def test_a_divergence_is_met_at_the_length_of_its_texts(model, texts, tmp_path):
    with enable(model, budget="auto", target_kl=1e-3, calibrate_on=texts, profile_cache=tmp_path) as on:
        plan = {layer: on.plan.of_heads(layer, None, texts[0].shape[1]) for layer in (0, 1)}
    found = [compare_selections(model, ids, [plan])[0] for ids in texts]
    assert 3e-4 < sum(compared.kl for _, compared in found) / len(texts) <= 1.1e-3
    (path,) = tmp_path.glob("*-kl-0.001.json")
    density = load_profile(path).measured["density"]
    assert sum(kept for kept, _ in found) / len(texts) == pytest.approx(density, abs=0.03)


def test_another_model_s_file_is_refused(model, texts, cache):
    other = network(seed=5)
    assert auto.fingerprint(other) != auto.fingerprint(model) == auto.fingerprint(network())
    own = auto.own_profile(model, 0.5, calibrate_on=texts, cache=cache)
    auto.own_profile(other, 0.5, calibrate_on=texts, cache=cache)
    (path,) = cache.glob(f"{auto.fingerprint(other)[:16]}*")
    own.save(path)
    with pytest.raises(ValueError, match="profile must be of this model"):
        auto.own_profile(other, 0.5, calibrate_on=texts, cache=cache)
    path.unlink()


def test_a_killed_calibration_leaves_no_file(model, texts, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for name in ("rr_flex.calibration.auto.meet", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(name, killed)
            auto.own_profile(model, 0.5, calibrate_on=texts, cache=tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "auto", "tau": 0.9}, "tau must be left out beside budget='auto'"),
        ({"budget": "auto", "preset": "best"}, "preset must be left out beside budget='auto'"),
        ({"budget": "auto", "target_density": 2.0}, "target_density must lie in"),
        ({"budget": "auto", "target_density": 0.5, "target_kl": 0.01}, "target must be one of target_density"),
        ({"budget": "auto"}, "calibrate_on must be the model's tokenizer or token ids"),
        ({"budget": "auto", "calibrate_on": [torch.zeros(1, n).long() for n in (8, 9)]}, "texts of one length"),
        ({"profile_cache": "x"}, "profile_cache must be left out without budget='auto'"),
        ({"calibrate_on": []}, "calibrate_on must be left out without budget='auto'"),
    ],
)
def test_what_it_does_not_take(model, tmp_path, arguments, message):
    cache = {"profile_cache": tmp_path} if "budget" in arguments else {}
    with pytest.raises(ValueError, match=message):
        enable(model, **cache, **arguments)


def test_thresholds_lie_on_lines_between_lengths(tmp_path):
    same = {"model": "", "layers": {0: [0.1, 0.2]}, "settings": {}, "target": {}}
    whole = Profile(**same, factors={4096: 1.0, 8192: 0.5}, shorter={1024: {0: [0.4, 0.1]}})
    whole.save(tmp_path / "own.json")
    profile = load_profile(tmp_path / "own.json")
    assert profile == whole
    at = {
        512: (0.8, 0.1 * 0.5**0.5),
        1024: (0.4, 0.1),
        2048: (0.2, 0.02**0.5),
        4096: (0.1, 0.2),
        16384: (0.025, 0.05),
    }
    for length, levels in at.items():
        assert profile.levels_at(0, length) == pytest.approx(levels)
    assert Profile(**same).levels_at(0, 7) == (0.1, 0.2)
