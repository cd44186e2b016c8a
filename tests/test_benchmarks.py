"""The benchmark program: its workload has structure, its rules reach their density, its rows say what they should."""

import json
import threading
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import dense_kernels as dense
from benchmarks import prefill_tables, rivals, server_tables, stages, task_tables, time_plot, together
from benchmarks import tables as report
from benchmarks import tuning as tune
from benchmarks.bench import Bench
from benchmarks.cases import COARSE_QUERIES, SUITES, Case
from benchmarks.runner import STAGES, run
from benchmarks.timing import OutOfTime, Progress, measure, measure_in_turns
from benchmarks.workloads import Shape, captured, structured
from rr_flex import RRConfig, select_blocks
from rr_flex.evaluation.true_mass import true_block_mass
from rr_flex.registry import BUDGETS
from rr_flex.tasks.results import Cell
from rr_flex.tasks.ruler import TASKS

CPU = torch.device("cpu")
SHAPE = Shape(2048, 4, 2, 64)
MADE = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def inputs():
    return structured(SHAPE, **MADE, seed=0)


def test_workload_is_decided_by_its_seed(inputs):
    again, other = structured(SHAPE, **MADE, seed=0), structured(SHAPE, **MADE, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(inputs, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(inputs, other, strict=True))
    assert all(torch.isfinite(x).all() for x in inputs)


def test_workload_has_a_sink_a_local_band_and_heavy_tails():
    q, k, _ = structured(SHAPE._replace(L=6144, D=128), **MADE, seed=3)
    mass = true_block_mass(q, k)
    share = (mass / mass.sum(-1, keepdim=True))[0, :, 8:]  # heads, rows, columns
    kept = rivals.at_density(share[None], share[None] > 0, torch.zeros_like(share[None], dtype=torch.bool), 0.3)
    assert (share * kept).sum() > 0.9 * share.sum()
    even = torch.stack([1 / (row > 0).sum() for row in share[0]]).mean()
    assert share[..., 0].mean() > 2 * even  # sink
    assert share.diagonal(8, 1, 2).mean() > 2 * even  # band
    assert share[..., 0].mean(-1).std() > 0.02  # heads differ


def test_captured_tensors_come_back(tmp_path, inputs):
    saved = {name: x[0].half() for name, x in zip("qkv", inputs, strict=True)}
    torch.save(saved, tmp_path / "layer.pt")
    loaded = captured(tmp_path / "layer.pt", "cpu", torch.float32)
    assert [tuple(x.shape) for x in loaded] == [(1, 4, 2048, 64), (1, 2, 2048, 64), (1, 2, 2048, 64)]
    assert torch.equal(loaded.q[0], saved["q"].float())
    torch.save({"q": saved["q"]}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match="must hold tensors q, k and v"):
        captured(tmp_path / "short.pt", "cpu", torch.float32)


def test_layers_of_a_model_are_captured_as_its_attention_gets_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    from benchmarks import capture

    config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": 128}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    text = "a text of bytes " * 20

    def tokens(text, **_):
        return SimpleNamespace(input_ids=torch.tensor([list(text.encode())]))

    capture.write(capture.capture(model, tokens, text, 96, [2, 0]), tmp_path / "layers.pt")
    q, k, v = captured(tmp_path / "layers.pt", "cpu", torch.float32)
    assert q.shape == (2, 4, 96, 16) and k.shape == v.shape == (2, 2, 96, 16)
    first = model.model.layers[0]
    states = first.input_layernorm(model.model.embed_tokens(tokens(text).input_ids[:, :96]))
    # The first layer is row 1; values are not rotated, and the first token's keys neither.
    expected = first.self_attn.v_proj(states).unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(v[1], expected[0], atol=1e-3, rtol=1e-3)
    expected = first.self_attn.k_proj(states[:, :1]).unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(k[1, :, :1], expected[0], atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"layers must be layers with full attention, got \[3\]"):
        capture.capture(model, tokens, text, 96, [0, 3])


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64)])
@pytest.mark.parametrize("rule", rivals.RULES)
def test_rivals_reach_the_density(inputs, rule, block_size):
    q, k = inputs.q[:, :, :1500], inputs.k[:, :, :1500]
    blocks = stages.causal_blocks(RRConfig(block_size=block_size), 1500, CPU)
    score = rivals.RULES[rule](q, k, block_size)
    kept = rivals.at_density(score, blocks.visible, blocks.mandatory, 0.6)
    assert kept.shape == (1, 4, 12, 1500 // block_size[1] + 1)
    assert (kept & ~blocks.visible).sum() == 0 and (blocks.mandatory & ~kept).sum() == 0
    assert 0.6 <= stages.density(kept, blocks.visible) < 0.63


def test_rules_that_look_keep_more_mass_than_chance(inputs):
    q, k, _ = inputs
    blocks = stages.causal_blocks(RRConfig(), 2048, CPU)
    mass = true_block_mass(q, k)

    def recalled(rule):
        kept = rivals.at_density(rivals.RULES[rule](q, k, (128, 128)), blocks.visible, blocks.mandatory, 0.5)
        return ((mass * kept).sum() / mass.sum()).item()

    chance, most = recalled("random"), recalled("oracle")
    for rule in ("antidiagonal", "block-mean-keys", "pooled-top-k"):
        assert chance + 0.02 < recalled(rule) <= most + 1e-6


@pytest.mark.parametrize("budget", ["top_tau", "threshold", "density"])
def test_level_gives_the_density(inputs, budget):
    config = RRConfig(budget=budget)
    mass = true_block_mass(inputs.q, inputs.k)
    for wanted in (0.5, 0.7):
        found = stages.config_for_density(mass, config, 2048, wanted)
        level = getattr(found, BUDGETS[budget].level)
        assert stages.without_level(found) == config
        assert abs(stages.density_at(mass, level, config, 2048) - wanted) < 0.02


def test_exact_rows_are_dense_attention(inputs):
    rows = dense.sampled_rows(2048, 100, CPU)
    assert len(rows.unique()) == 100 and rows.max() < 2048
    q, k, v = inputs
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert dense.relative_error(out, dense.exact_rows(q, k, v, rows), rows) < 1e-5


def test_a_kernel_that_cannot_run_says_why(inputs):
    with pytest.raises(dense.Absent, match=r"\w"):
        dense.prepare("cudnn", *inputs)


def test_measure_rotates_the_inputs():
    used = []
    timing = measure(used.append, sets=3, device=CPU, seconds=0, repeats=(6, 6))
    assert used[-6:] == [0, 1, 2, 0, 1, 2] and timing.repeats == 6
    assert timing.first_quartile <= timing.median <= timing.third_quartile


@pytest.fixture
def stages_only_traced(monkeypatch):
    """The stages before attention as one graph each, which isn't compiled further: only their times depend on that."""
    traced = partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    of_config = stages.estimate_of.__wrapped__
    monkeypatch.setattr(stages, "estimate_of", cache(lambda config: traced(of_config(config).__wrapped__)))
    monkeypatch.setattr(stages, "choose_compiled", traced(stages.choose))
    for name in ("lists", "_selection"):
        monkeypatch.setattr(stages, name, traced(getattr(stages, name).__wrapped__))


def test_a_cpu_case_gives_a_whole_row(tmp_path, stages_only_traced):
    bench = Bench(CPU, Progress(2), seconds=0.1, in_turns=True)
    cases = [replace(SUITES["cpu"][1], every_stage=True), SUITES["cpu"][2]]
    about = {
        "card": "CPU",
        "torch": torch.__version__,
        "triton": None,
        "flash_attn_4": None,
        "commit": "0",
        "date": "0",
    }
    ours, rival = run(cases, bench, out=tmp_path / "cpu.jsonl", suite="cpu", about=about)
    for row in (ours, rival):
        assert row["failed"] is None
        assert 0 < row["density"] <= 1 and abs(row["density"] - row["wanted_density"]) < 0.03
        assert 1e-6 < row["error"] < 0.2
        assert row["attention_ms"] > 0 and row["attention_tflops"] > 0
        assert row["dense"]["fa2"]["error"] < 1e-4 and row["fastest_dense_ms"] > 0
    stages_ms = [ours[f"{stage}_ms"] for stage in STAGES]
    assert all(ms > 0 for ms in stages_ms)
    assert ours["over_limit"] == pytest.approx(ours["total_ms"] / (ours["density"] * ours["fastest_dense_ms"]))
    assert ours["peak_gib"] > 0 and ours["settings"] == {
        "order": 2,
        "query_stride": 16,
        "key_stride": 8,
        "budget": "threshold",
    }
    assert rival["total_ms"] is None and rival["over_limit"] is None
    assert report.load(tmp_path) == [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert "query_stride=16" in report.text_table([ours, rival])


def test_a_case_that_fails_gives_a_row_and_the_budget_stops_the_run(tmp_path):
    out = tmp_path / "x.jsonl"
    bench = Bench(CPU, Progress(1))
    odd = Case(length=256, heads=3, kv_heads=2, dtype="float32")
    (row,) = run([odd], bench, out=out, suite="x", about={"date": "0", "card": "CPU"})
    assert row["failed"].startswith("ValueError") and "FAILED" in report.text_table([row])
    assert report.load(tmp_path) == []
    with pytest.raises(OutOfTime):
        list(run([odd], Bench(CPU, Progress(1, budget_seconds=-1)), out=out, suite="x", about={}))


def test_tuning_ranks_what_runs_and_logs_what_does_not():
    logged = []

    def make(options):
        if options["BLOCK_N"] == 64:
            raise RuntimeError("out of shared memory\nmore")
        return lambda index: time.sleep(options["num_warps"] / 200)

    tried = [{"BLOCK_N": n, "num_warps": w} for n, w in ((128, 8), (64, 4), (128, 1))]
    bench = Bench(CPU, Progress(1), seconds=0.05)
    bench.sets = [None]
    ranked = tune.best_options("attention", tried, make, bench, Case(length=1024), logged.append)
    assert ranked == [tried[2], tried[0]]
    assert [each["failed"] for each in logged] == [None, "RuntimeError: out of shared memory", None]
    assert len(tune.candidates(full=True)) == 32 and tune.candidates(False) == tune.candidates(True)[:16]


FIXTURE = {
    "suite": "128k", "case": "128K a", "label": "rr order=2", "length": 131072, "heads": 32, "kv_heads": 8,
    "head_dim": 128, "batch": 1, "dtype": "bfloat16", "workload": "structured", "method": "rr", "seed": 0,
    "density": 0.3011, "error": 0.0204, "estimate_ms": 5.5, "select_ms": 0.2, "lists_ms": 0.2, "selection_ms": 5.9,
    "attention_ms": 80.0,
    "total_ms": 86.0, "peak_gib": 3.2, "fastest_dense": "fa4", "fastest_dense_ms": 202.0, "speedup": 2.349,
    "over_limit": 1.414, "attention_tflops": 529.5, "wanted_density": 0.3, "wanted_error": None, "failed": None,
    "dense": {"fa4": {"ms": 202.0}, "cudnn": {"ms": 257.0}, "fa2": {"absent": "no kernel"}},
    "card": "Some Card", "torch": "2.11.0", "triton": "3.6.0", "flash_attn_4": None, "commit": "abc",
    "date": "2026-01-01T",
}  # fmt: skip


def test_report_puts_table_and_picture(tmp_path):
    later = FIXTURE | {"density": 0.5, "date": "2026-01-02T"}
    shorter = FIXTURE | {"case": "64K a", "length": 65536}
    rows = "".join(json.dumps(row) + "\n" for row in (FIXTURE, later, shorter, FIXTURE | {"case": "b", "failed": "x"}))
    (tmp_path / "128k.jsonl").write_text(rows)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["report", "--results", str(tmp_path), "--readme", str(readme), "--plot", str(tmp_path / "a.png")]
    assert program.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "131,072 tokens, 32/8 heads of 128, bfloat16" in text and "Some Card, torch 2.11.0" in text
    row = "| rr order=2 | alone | 0.500 | 0.0204 | 5.50 | 5.90 | 80.00 | 86.00 | 202.00 (fa4) | 2.35× | 1.41 | 530 |"
    assert row + " 3.2 |" in text
    assert "0.301" in text and text.count("131,072 tokens") == 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="must hold the lines"):
        program.main(arguments)


def test_each_way_of_timing_has_its_row_and_of_many_rows_few_are_on_the_page(tmp_path):
    chief = FIXTURE | {"label": f"{report.CHIEF} triton", "backend": "triton"}
    ways = [chief, chief | {"in_turns": True}, chief | {"in_turns": True, "rest_s": 0.25, "total_ms": 77.7}]
    others = [FIXTURE | {"case": f"64K {i}", "length": 65536, "density": i / 10} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*others, *ways)))
    rows = report.load(tmp_path)
    assert [report.timed(row) for row in rows[-3:]] == ["alone", "in turns", "rested"]
    shown = report.markdown(rows)
    assert shown.count("| alone |") == shown.count("| rested |") == 1 and "in turns" not in shown
    assert f"10 other rows of this card: [all rows](results/{report.ALL_ROWS})" in shown
    every = report.every_row(rows)
    assert [every.count(f"| {way} |") for way in ("alone", "in turns", "rested")] == [10, 1, 1]
    few = report.markdown(rows[-9:])
    assert few.count("| alone |") == 7 and few.count("| in turns |") == 1 and "other rows" not in few
    # A picture's line has no rested time, which others could not be compared with.
    lines = time_plot.lines_of(rows)
    assert 77.7 not in lines[f"{report.CHIEF} triton, density 0.30"].values()


def test_the_readme_is_what_the_files_say(tmp_path):
    """`python -m benchmarks report` writes it; the study's part has a test of its own."""
    copy = tmp_path / "README.md"
    copy.write_text(program.README.read_text())
    folder = program.RESULTS
    for part in (report, prefill_tables):
        part.write_page(copy, part.load(folder))
    assert copy.read_text() == program.README.read_text()
    written = report.every_row(report.load(folder)) + server_tables.every_row(server_tables.load(folder))
    assert (folder / "rows.md").read_text() == written


def test_the_tasks_page_is_what_the_file_says(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(task_tables.PAGE.read_text())
    task_tables.write_page(task_tables.load(program.RESULTS), page)
    assert page.read_text() == task_tables.PAGE.read_text()


def test_a_length_is_not_measured_only_if_no_run_of_it_has_rr_flex():
    about = {"dtype": "bfloat16", "ms": 2.0, "attention_total_ms": 1.0, "rest_ms": 1.0, "date": "2026-01-01"}
    about |= {"card": "card", "torch": "2", "triton": None, "flash_attn_4": None, "model": "model", "length": 8192}
    rows = [about | {"attention": "sdpa", "commit": "a"}, about | {"attention": "rr_flex", "commit": "b"}]
    assert "not measured" not in prefill_tables.markdown(rows)
    assert "not measured" in prefill_tables.markdown(rows[:1])


def test_task_cells_tell_what_was_not_run():
    usual = {"suite": "ruler", "task": "vt", "length": 2048, "attention": "dense", "model": "m", "samples": 4}
    usual |= {"score": 0.5, "seconds": 8.0, "density": None, "dense_reasons": {}, "tokens": 9}
    sparse = {"attention": task_tables.COLUMNS["own budget"], "density": 0.4}
    cells = [{}, sparse | {"score": 0.25}, {"task": "cwe"}, {"task": "cwe"} | sparse, {"task": "fwe"}]
    cells += [{"device": "CPU", "dtype": "float32", "length": 4096}]
    gpu, cpu = task_tables.markdown([Cell(**(usual | changed)) for changed in cells]).split("**m, CPU, float32, ")
    assert "device not recorded" in gpu and "| 2,048 | vt | 4 | 50 | 25 (0.40) |" in gpu
    assert "2,048 tokens, 2 tasks: dense 50.0, own budget 37.5 (0.40)." in gpu  # vt, cwe
    assert "| 4,096 | vt | 4 | 50 |\n" in cpu and "Means" not in cpu
    missing = [task for task in TASKS if task not in ("vt", "cwe", "fwe")]
    assert f"at 2,048 tokens {', '.join(missing)}; at 4,096 tokens" in cpu


def test_cases_have_names_of_their_own():
    for suite, cases in SUITES.items():
        assert len({case.name for case in cases}) == len(cases), suite
    assert Case(config=COARSE_QUERIES).settings["query_stride"] == 16
    with pytest.raises(ValueError, match="must not both"):
        Case(density=0.3, error=0.1)


def test_the_program_lists_its_cases(capsys):
    assert program.main(["run", "--suite", "quick", "--lengths", "8192", "--only", "antidiagonal", "--list"]) == 0
    assert capsys.readouterr().out == "quick: 8K 1x32/8x128 bfloat16 antidiagonal density 0.30\n"


def test_nothing_in_the_packages_imports_the_benchmarks():
    root = Path(__file__).parent.parent
    files = [path for package in ("rr_flex", "mask_mods") for path in (root / package).rglob("*.py")]
    assert files and not [
        path for path in files if "import benchmarks" in (text := path.read_text()) or "from benchmarks" in text
    ]


@pytest.mark.parametrize("budget", ["top_tau", "threshold"])
def test_a_level_is_found_for_a_density(budget):
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(1, heads, 1280, 32, generator=generator) for heads in (4, 2))
    config = RRConfig(budget=budget, block_size=64)
    found = stages.config_for_density(select_blocks(q, k, config=config).mass, config, 1280, 0.5)
    assert abs(select_blocks(q, k, config=found).density - 0.5) < 0.03


def test_turns_alternate_and_a_case_without_dense_kernels_keeps_to_it():
    used = []
    calls = [lambda index, name=name: used.append((name, index)) for name in "ab"]
    start = time.perf_counter()
    measure_in_turns(calls, sets=2, device=CPU, seconds=0, repeats=(4, 4), rest=0.02)
    assert time.perf_counter() - start > 2 * 4 * 0.02
    with pytest.raises(SystemExit, match="--rest needs --in-turns"):
        program.main(["run", "--suite", "cpu", "--rest", "0.1", "--device", "cpu"])
    first, second = measure_in_turns(calls, sets=2, device=CPU, seconds=0, repeats=(4, 4))
    assert used[-8:] == [(name, index) for index in (0, 1, 0, 1) for name in "ab"]
    assert first.repeats == second.repeats == 4
    options = program.parser().parse_args(["run", "--suite", "million", "--dense", "fa4"])
    assert {case.dense for case in program.chosen_cases("million", options)} == {()}


def test_cases_that_share_code_share_a_process_which_waits_for_its_turn(tmp_path, monkeypatch):
    cases = SUITES["128k"]
    grouped = together.groups([("128k", case) for case in cases])
    assert {case for group in grouped for _, case in group} == set(cases) and len(grouped) < len(cases)
    assert all(len({(stages.shape_of(c), stages.compiled_for(c)) for _, c in group}) == 1 for group in grouped)

    ran, ready, go = [], threading.Event(), threading.Event()

    def run(cases, bench, *, suite, **_):
        ran.append((suite, cases[0].density, bench.seconds, ready.is_set()))
        return iter(())

    monkeypatch.setattr(together, "run", run)
    options = {
        "device": "cpu",
        "in_turns": False,
        "rest": 0.0,
        "seconds": 2.0,
        "deadline": None,
        "about": {},
        "profile": False,
    }
    named = grouped[0]
    worker = threading.Thread(target=together.work, args=(named, ready, go, options | {"out": tmp_path}))
    worker.start()
    assert ready.wait(10) and ran == [("warm", named[0][1].density, together.WARM_SECONDS, False)]
    go.set()
    worker.join()
    assert ran[1:] == [("128k", case.density, 2.0, True) for _, case in named]


def test_a_decode_step_is_compared_in_turns(tmp_path):
    pytest.importorskip("transformers")
    from benchmarks.decode_step import main

    out = tmp_path / "decode.jsonl"
    small = ["--model", "tiny-shape", "--length", "40", "--steps", "3", "--calls", "20", "--device", "cpu"]
    assert main([*small, "--dtype", "float32", "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    for kind in ("calls", "steps"):
        assert all(row[kind][way]["median"] > 0 for way in ("sdpa", "rr_flex"))
        assert row[kind]["difference"]["first_quartile"] <= row[kind]["difference"]["third_quartile"]
