"""What RR_FLEX may say, and the one line that says what is wrong with it."""

import json

import pytest

from rr_flex import RRConfig
from rr_flex.serving.settings import described, parse_settings, settings_of_environment

PROFILE = "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"preset": "best"}', RRConfig.from_preset("best")),
        ('{"tau": 0.9}', RRConfig(tau=0.9)),
        ('{"preset": "best", "threshold": 0.01, "min_length": 4096}', None),
        ("{}", RRConfig()),
    ],
)
def test_a_json_object_is_one_setting_for_all_layers(text, expected):
    settings = parse_settings(text)
    expected = expected or RRConfig.from_preset("best", threshold=0.01, min_length=4096)
    assert settings.config == expected and not settings.layers
    assert settings.min_length == expected.min_length
    of_layer = settings.of_layer(7, 0, 4)
    assert of_layer.dense_last_rows == 0 and of_layer.min_length == 0 and of_layer.tau == expected.tau


def test_a_profile_gives_each_layer_and_head_its_own_threshold():
    settings = parse_settings(PROFILE)
    assert parse_settings(json.dumps({"profile": PROFILE})).layers == settings.layers
    layer, config = next(iter(settings.layers.items()))
    assert settings.of_layer(layer, 3, 3).threshold == config.threshold[3:6]
    assert settings.of_layer(10_000, 0, 3) is None
    changed = parse_settings(json.dumps({"profile": PROFILE, "min_length": 512}))
    assert changed.min_length == 512 and changed.layers[layer].threshold == config.threshold


def test_a_file_holds_settings_or_a_profile(tmp_path):
    (tmp_path / "settings.json").write_text('{"tau": 0.8}')
    assert parse_settings(str(tmp_path / "settings.json")).config == RRConfig(tau=0.8)
    from rr_flex.profiles import load_profile

    load_profile(PROFILE).save(tmp_path / "profile.json")
    assert parse_settings(str(tmp_path / "profile.json")).layers == parse_settings(PROFILE).layers


BAD = [
    ('{"tau": 2}', ValueError, r"tau must lie in \(0, 1\], got 2"),
    ('{"taw": 0.9}', TypeError, "settings must be preset or fields of RRConfig"),
    ('{"tau": 0.9', ValueError, "settings must be JSON"),
    ('{"preset": "bets"}', ValueError, "preset must be one of rr, best, fast, got 'bets'"),
    ('{"preset": "best", "profile": "smollm2-135m-instruct"}', ValueError, "must have a preset or a profile"),
    ("smollm3", FileNotFoundError, "profile must be a .json file or one of"),
    ("missing.json", FileNotFoundError, r"missing\.json"),
    ('{"budget": "density"}', ValueError, 'budget must be "top_tau" or a threshold in a server'),
    ('{"block_size": 64}', ValueError, "block_size must have 128 queries in a server"),
    ('{"dense_last_rows": 2}', ValueError, "dense_last_rows must be 1 in a server"),
]


@pytest.mark.parametrize(("text", "error", "message"), BAD)
def test_what_is_wrong_is_said(text, error, message, monkeypatch):
    with pytest.raises(error, match=message):
        parse_settings(text)
    monkeypatch.setenv("RR_FLEX", text)
    with pytest.raises(ValueError, match="RR_FLEX=") as raised:
        settings_of_environment()
    assert "\n" not in str(raised.value)


def test_a_profile_of_another_model_is_refused():
    class Config:
        model_type, num_attention_heads, num_hidden_layers, hidden_size, vocab_size = "llama", 32, 32, 4096, 32000

    with pytest.raises(ValueError, match="profile must have the model's 32 query heads"):
        parse_settings(PROFILE, Config())


def test_unset_is_off(monkeypatch):
    monkeypatch.delenv("RR_FLEX", raising=False)
    assert settings_of_environment() is None
    monkeypatch.setenv("RR_FLEX", " ")
    assert settings_of_environment() is None


def test_a_line_says_what_is_on():
    assert described(parse_settings('{"tau": 0.9}')) == "tau 0.9"
    assert described(parse_settings("{}")) == "tau 0.95"
    assert "threshold by layer and head" in described(parse_settings(PROFILE))
