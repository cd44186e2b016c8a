"""The study's file, its predictions read off at a density, and its page's tables, which come from that file."""

import json
from dataclasses import asdict

import pytest

from benchmarks.study import study_tables
from benchmarks.study.study_file import StudyFile, density_from, group_of, kl_gain, write_records
from rr_flex.evaluation.judging import Record
from rr_flex.evaluation.predictions import Prediction, curve, kl_at, value_at


def run(rule, text, density, kl):
    return Prediction(rule, text, None, density, kl, 1 - kl, 1 + kl)


def test_divergences_are_read_log_linearly_between_levels():
    points = curve([run("a", "t", 0.4, 0.01), run("b", "t", 0.3, 9.0), run("a", "t", 0.2, 0.1)], "a", "t", "kl")
    assert points == [(0.2, 0.1), (0.4, 0.01)]
    assert kl_at(points, 0.2) == pytest.approx(0.1) and kl_at(points, 0.4) == pytest.approx(0.01)
    assert kl_at(points, 0.3) == pytest.approx(0.1**1.5)
    assert kl_at(points, 0.41) is None and kl_at(points, 0.19) is None
    assert kl_at([(0.2, 0.1), (0.4, 0.0)], 0.3) == pytest.approx(0.05)


def test_the_density_from_which_a_measure_holds():
    points = [(0.1, 0.995), (0.2, 0.9), (0.4, 0.98), (0.6, 1.0)]  # a first point that holds by chance does not count
    assert density_from(points, 0.99) == pytest.approx(0.5)
    assert density_from(points, 0.98) == pytest.approx(0.4)
    assert density_from(points, 0.5) == pytest.approx(0.1)
    assert density_from(points, 1.1) is None


def test_nothing_is_read_off_inside_a_wide_gap():
    points = [(0.3, 0.5), (0.56, 0.9), (0.7, 1.0)]
    assert kl_at(points, 0.4) is value_at(points, 0.4) is density_from(points, 0.8) is None
    assert value_at(points, 0.3) == 0.5 and value_at(points, 0.63) == pytest.approx(0.95)
    assert density_from(points, 0.95) == pytest.approx(0.63) and density_from(points, 0.9) == 0.56


def test_gains_in_divergence_are_paired_by_text():
    runs = [run("a", text, d, kl * d) for text, kl in (("s", 0.1), ("t", 0.3)) for d in (0.2, 0.4)]
    runs += [run("b", text, d, 0.4 * d) for text in "st" for d in (0.2, 0.4)]
    gain = kl_gain(runs, "a", "b", 0.3, ["s", "t"])
    assert gain.mean == pytest.approx((0.75 + 0.25) / 2) and gain.low == pytest.approx(0.25)
    assert kl_gain(runs, "a", "b", 0.5, ["s", "t"]) is None


def test_a_study_s_file_round_trips(tmp_path):
    records = [Record("rr", "layer", 0.3, text, -1, 0.3, 0.1, 0.1, 0.9) for text in ("prose1", "code1")]
    study = StudyFile({"tokens": 8192}, records, {8192: [run("rr", "prose1", 0.3, 0.1)]})
    study.write(tmp_path / "study.json")
    assert StudyFile.read(tmp_path / "study.json") == study


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("prose0", "tuned on"),
        ("key-value2", "held out"),
        ("key-value1-2048", "2048"),
        ("flatter key-value1", "flatter"),
        ("ten layers code1", "ten layers"),
        ("structured1-16384", "structured"),
        ("structured0-16384", "structured, tuned on"),
    ],
)
def test_texts_are_grouped_by_what_they_are_for(text, group):
    assert group_of(text) == group


def test_the_page_s_tables_are_the_file_s():
    section = study_tables.section(StudyFile.read(study_tables.STUDY))
    text = study_tables.PAGE.read_text(encoding="utf-8")
    assert study_tables.replace_section(text, section) == text
    assert section in text


def study_of(device, texts, lengths):
    about = {"device": device, "torch": "2", "transformers": "5", "python": "3", "commit": "abc", "date": "today"}
    records = [Record("rr", "layer", 0.3, text, -1, 0.3, 0.1, 0.1, 0.9) for text in texts]
    runs = {length: [run("rr", "prose1", 0.3, 0.1), run("rr", "prose1", 0.5, 0.01)] for length in lengths}
    return StudyFile(about | {"predictions": {str(length): about for length in lengths}}, records, runs)


def test_runs_are_put_together_and_nothing_is_lost():
    old = study_of("CPU", ["prose1", "code1", "structured1-16384"], [2048, 4096])
    merged = study_tables.merge(old, study_of("GPU", ["prose1", "prose0"], [8192, 4096]))
    assert merged.records == old.records and merged.about["device"] == "CPU"
    assert sorted(merged.predictions) == [2048, 4096, 8192]
    devices = {length: run["device"] for length, run in merged.about["predictions"].items()}
    assert devices == {"2048": "CPU", "4096": "GPU", "8192": "GPU"}
    assert study_tables.merge(old, study_of("GPU", [], [8192])).records == old.records
    assert study_tables.merge(old, study_of("GPU", ["prose1", "code1"], [])).about["device"] == "CPU"
    more = study_tables.merge(old, study_of("GPU", ["code1", "prose1", "structured1-16384", "table1"], []))
    assert more.about["device"] == "GPU" and len(more.records) == 4
    assert more.predictions == old.predictions and more.about["predictions"] == old.about["predictions"]


def test_a_raw_folder_is_condensed(tmp_path):
    """Both definitions of equal density of a few rules, and divergences below a millionth, which are no zeros."""
    records = [
        Record(rule, scope, 0.3, text, layer, 0.3, 0.1 * layer, 0.1, 0.9)
        for rule in ("rr", "random")
        for scope in ("layer", "model")
        for text in ("prose2", "prose0")
        for layer in (1, 3)
    ]
    write_records(tmp_path / "records.json", records)
    row = {"length": 2048} | asdict(run("rr", "prose2", 0.3, 4.0886328e-07))
    (tmp_path / "predictions.json").write_text(json.dumps([row]))
    about = dict.fromkeys(study_tables.RUN, "x")
    (tmp_path / "about.json").write_text(json.dumps(about))
    study = study_tables.condense(tmp_path)
    found = {(record.rule, record.scope, record.text): record.error for record in study.records}
    assert set(found.values()) == {0.2} and len(found) == len(study.records)
    assert {label for label in found if label[1] == "model"} == {("rr", "model", "prose2")} and len(found) == 5
    assert study.predictions[2048][0].kl == pytest.approx(4.0886328e-07, rel=1e-5)
    assert study.about["predictions"] == {"2048": about}
