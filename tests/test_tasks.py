"""Long-context tasks: samples fit their length, scores count what they say, runs resume, files load."""

import json
import random
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from model_families import make

from rr_flex import RRConfig
from rr_flex.cli.tasks import check, import_suite
from rr_flex.registry import BUDGETS
from rr_flex.tasks import answers, helmet, recall, results, video_mme
from rr_flex.tasks.answers import Asked
from rr_flex.tasks.results import DENSE, Cell, Setting, describe
from rr_flex.tasks.run import Plan, run


class Letters:
    """A tokenizer of one token a character, for models that are none."""

    eos_token_id = pad_token_id = 0

    def __call__(self, text, return_tensors=None, **_):
        ids = [ord(character) % 250 + 1 for character in text]
        return type("Encoding", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def decode(self, ids, **_):
        return "".join(map(chr, ids.tolist()))


class Oracle:
    """A model that answers whatever it is told to."""

    device = torch.device("cpu")

    def __init__(self, says):
        self.says = says

    def generate(self, ids, **_):
        return torch.cat([ids, torch.tensor([[ord(character) for character in self.says]])], 1)


@pytest.mark.parametrize("task", recall.TASKS)
def test_recall_samples_fit_and_can_be_answered(task):
    tokenizer = Letters()
    sample, again, other = (recall.fit(task, 3000, seed, tokenizer) for seed in (7, 7, 8))
    size = len(sample.prompt) + sample.new_tokens
    assert 2000 < size <= 3000 and sample.prompt == again.prompt != other.prompt
    assert sample.score(sample.prompt) == 1 and sample.score("no idea") == 0
    asked = Asked(task, 3000, 2)
    recall.check(asked, tokenizer)
    message = f"length must hold a sample of {task}, here .* tokens at least, got 50"
    with pytest.raises(ValueError, match=message):
        recall.fit(task, 50, 7, tokenizer)
    with pytest.raises(ValueError, match=message):
        recall.check(replace(asked, length=50), tokenizer)


def test_scores():
    assert answers.recall("It is 12 and 34.", ["12", "34", "56"]) == pytest.approx(2 / 3)
    assert answers.substring_match("The Eiffel-Tower!", ["eiffeltower"]) == 1
    assert answers.token_f1("the red house", ["red"]) == pytest.approx(2 / 3)
    assert answers.ndcg(["b", "a"], {"a": 3, "b": 0}) == pytest.approx(1 / 1.584963, abs=1e-5)
    assert answers.ndcg(["a", "a", "b"], {"a": 3, "b": 1}) == 1
    assert helmet.order_of("Ranking: [ID: 3] > ID1 > 2") == ["3", "1", "2"]


def test_a_run_resumes(tmp_path):
    path, calls = tmp_path / "cells.jsonl", []

    def scores(model, tokenizer, asked):
        calls.append((asked.task, asked.length))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [1.0, 0.0], 100

    same = Setting(model="m", samples=2)
    plan = Plan(suite="s", scores=scores, tasks=["a", "b"], lengths=[8, 16], configs=[None], same=same)
    with pytest.raises(KeyboardInterrupt):
        list(run(None, None, plan, path))
    assert [cell.task for cell in results.read(path)] == ["a", "b"]
    again = list(run(None, None, plan, path))
    assert calls == [("a", 8), ("b", 8), ("a", 16), ("a", 16), ("b", 16)] and len(again) == 2
    assert again[0].score == 0.5 and again[0].attention == DENSE
    # Another device, dtype, chat template or data is another run; another batch size is not.
    for changed, runs in (("device", 4), ("dtype", 4), ("chat", 4), ("data", 4), ("batch_size", 0)):
        other = replace(plan, same=replace(same, **{changed: 2 if changed == "batch_size" else f"another {changed}"}))
        assert len(list(run(None, None, other, path))) == runs
    # Files from before device, dtype and chat were kept are still read.
    old = {name: value for name, value in asdict(again[-1]).items() if name not in ("device", "dtype", "chat")}
    path.write_text(json.dumps(old) + "\n")
    assert results.read(path) == [again[-1]]
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="fields"):
        results.read(path)


DIFFERENT = {"stride": 16, "query_stride": 16, "key_stride": 4, "pool": "queries", "block_size": 64, "order": 2}
DIFFERENT |= {"budget": "density", "tau": 0.9, "mandatory": "add", "sink_blocks": 2, "local_blocks": 2}
DIFFERENT |= {"dense_last_rows": 0, "min_length": 0}


def test_settings_are_named(monkeypatch):
    assert describe(None) == DENSE and describe(RRConfig()) == "tau=0.95"
    assert describe(RRConfig(order=2, block_size=(128, 64))) == "tau=0.95 block_size=(128, 64) order=2"
    assert describe(RRConfig(budget="threshold", threshold=0.02)) == "threshold=0.02"
    assert describe(RRConfig(budget="density", target_density=0.3)) == "target_density=0.3"
    # Every field that can differ tells two settings apart.
    names = [describe(RRConfig(**{name: value})) for name, value in DIFFERENT.items()]
    names += [describe(RRConfig.from_preset(preset)) for preset in ("rr", "best", "fast")]
    monkeypatch.setitem(BUDGETS, "own", BUDGETS["top_tau"])  # that goes by a field of ours
    names += [describe(RRConfig(budget="own"))]
    assert len(set(names)) == len(names)


def cell(**changed):
    usual = {"suite": "s", "task": "t", "length": 2048, "attention": DENSE, "model": "m", "samples": 4, "score": 0.5}
    return Cell(**(usual | {"seconds": 8.0, "density": None, "dense_reasons": {}, "tokens": 9} | changed))


def test_table_and_heat_map():
    cells = [cell(), cell(attention="tau=0.9", density=0.4, score=0.25), cell(length=4096, score=1.0)]
    lines = results.table(cells).splitlines()
    assert lines[0].split(" | ")[-2:] == [DENSE, "tau=0.9 |"]
    assert lines[2] == "| 2,048 | t | 4 | 50 (2 s) | 25 (2 s, 0.40) |" and lines[3].endswith("| – |")
    chosen = results.table(cells, {"τ": "tau=0.9", "none": "x"}, seconds=False).splitlines()
    assert chosen[0].endswith("| τ | none |") and chosen[2] == "| 2,048 | t | 4 | 25 (0.40) | – |"
    pytest.importorskip("matplotlib")
    assert [axis.get_title() for axis in results.heat_map(cells).axes[:2]] == [DENSE, "tau=0.9"]


@pytest.mark.parametrize("fact", results.FACTS)
def test_a_table_hides_no_cell_behind_another(fact):
    """Two cells of one task, length and attention, from runs that differ by one fact, stand beside each other."""
    other = {"samples": 9, "chat": True}.get(fact, "other")
    cells = [cell(score=0.25), cell(score=0.75, **{fact: other})]
    lines = results.table(cells, seconds=False).splitlines()
    assert f"dense {fact}={other}" in lines[0] and "25" in lines[2] and "75" in lines[2]
    assert results.table(cells[:1]).splitlines()[0].endswith(" | dense |")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["niah_single_1", "niah_multivalue"])
def test_ruler_by_lm_eval(task, tmp_path, monkeypatch):
    """lm-eval's samples fit their length, go through rr_flex, and are scored by what is said of them."""
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from rr_flex.tasks import ruler

    letters = {letter: token for token, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    characters = Tokenizer(models.BPE(letters, []))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters.decoder = decoders.ByteLevel()
    characters.add_special_tokens(["<end>"])
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<end>", pad_token="<end>")
    model = make("llama", vocab_size=257, eos_token_id=256, pad_token_id=256, max_position_embeddings=4096)

    cells = {
        "tasks": [task],
        "lengths": [4096],
        "configs": [RRConfig(tau=0.4, min_length=0)],
        "same": Setting(model="m", samples=2),
    }
    plan = Plan(suite="ruler", scores=ruler.scores, **cells)
    (found,) = run(model, tokenizer, plan, tmp_path / "cells.jsonl")
    assert found.score == 0 and found.density < 1 and 4000 < found.tokens <= 2 * 4096

    def says_all_of_it(input_ids, **_):
        return torch.cat([input_ids, input_ids], 1)

    monkeypatch.setattr(model, "generate", says_all_of_it)
    scores, tokens = ruler.scores(model, tokenizer, Asked(task, 4096, 2))
    assert scores == [1.0, 1.0] and tokens == found.tokens
    with pytest.raises(ValueError):
        ruler.scores(model, tokenizer, Asked(task, 128, 2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["vt", "cwe", "fwe"])
def test_ruler_refuses_lengths_for_which_lm_eval_would_look_for_ever(task):
    pytest.importorskip("lm_eval")
    from rr_flex.tasks import ruler

    ruler.check(Asked(task, 8192, 1), Letters())
    with pytest.raises(ValueError, match=f"length must hold a sample of {task}, about .* tokens, got 150"):
        ruler.check(Asked(task, 150, 1), Letters())


@pytest.mark.filterwarnings("ignore")
def test_ruler_s_words_are_the_same_each_time():
    pytest.importorskip("lm_eval")
    from rr_flex.tasks import ruler

    found = []
    for _ in range(2):
        random.seed(0)
        with ruler._offline(1) as modules:
            found.append(modules["cwe_utils"].generate_input_output(20, 4096))
    assert found[0] == found[1]


def rows(path, *found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in found))


@pytest.fixture
def helmet_data(tmp_path):
    """A few rows of each of HELMET's files, in its format."""
    kv = {f"key{i}": f"value{i}" for i in range(5)}
    demos = [["key1", "value1"], ["key2", "value2"], ["key3", "value3"]]
    row = {"context": json.dumps(kv), "question": "key4", "answer": "value4", "demos": demos, "num_kvs": 5}
    rows(tmp_path / "json_kv/test_k105_dep6.jsonl", row)
    needle = {"context": "… magic …", "query": "owl", "type_needle_v": "numbers", "answer": ["12", "34"]}
    rows(tmp_path / "ruler/niah_multivalue/validation_8192.jsonl", needle)
    passages = [{"id": str(i), "title": f"t{i}", "text": f"text {i}", "has_answer": i == 1} for i in range(3)]
    asked = {"question": "who?", "answers": ["Ada", "Ada Lovelace"], "ctxs": passages}
    rows(tmp_path / "kilt/nq-dev-multikilt_1000_k50_dep6.jsonl", asked)
    shown = [{**asked, "question": f"who {i}?", "answers": [f"Bob {i}"]} for i in range(4)]
    rows(tmp_path / "kilt/nq-train-multikilt_1000_k3_dep6.jsonl", *shown)
    ranked = [{"id": str(i), "text": f"text {i}", "label": i} for i in range(3)]
    queries = [{"qid": f"q{i}", "query": f"what {i}", "ctxs": ranked} for i in range(4)]
    rows(tmp_path / "msmarco/test_reranking_data_k50_dep3.jsonl", queries[0])
    rows(tmp_path / "msmarco/test_reranking_data_k10_dep3.jsonl", *queries)
    rows(tmp_path / "exported/longqa_8192.jsonl", {"context": "story", "question": "why?", "answer": ["a red fox"]})
    rows(tmp_path / "exported/icl_8192.jsonl", {"context": "x\nlabel: 3", "question": "y", "answer": "7"})
    return tmp_path


@pytest.mark.parametrize(
    ("task", "right", "wrong", "holds"),
    [
        ("json_kv", " value4", "value3", "Key: key2\nCorresponding value: value2"),
        ("niah_mv", "12, 34", "none", "What are all the special magic numbers for owl"),
        ("kilt_nq", " ada lovelace\nmore", "Bob\nAda", "Document (Title: t1): text 1"),
        ("msmarco_rerank", " 2 > 1 > 0", "", "[ID: 2] Document: text 2"),
        ("longqa", "Red fox.", "blue", "Question: why?"),
        ("icl", " 7", "17", "label: 3"),
    ],
)
def test_helmet_rows(helmet_data, task, right, wrong, holds):
    asked = Asked(task, 8192, 10, data=helmet_data)
    helmet.check(asked, None)
    (question,) = helmet.questions(asked)
    assert holds in question.prompt
    if task in ("kilt_nq", "msmarco_rerank"):
        assert question.prompt.count("Answer: Bob" if task == "kilt_nq" else "Ranking: 2 > 1 > 0") == 2
    for says, score in ((right, 1.0), (wrong, 0.0)):
        assert helmet.scores(Oracle(says), Letters(), asked) == ([score], len(question.prompt))
    with pytest.raises(ValueError, match="HELMET's"):
        helmet.questions(replace(asked, length=1000))


def test_missing_data_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of the suite's data, which has no"):
        helmet.questions(Asked("json_kv", 8192, 1, data=tmp_path))


class Processor:
    """A vision-language processor that notes what it was given."""

    def apply_chat_template(self, messages, **_):
        self.messages = messages
        return "<video>" + messages[0]["content"][1]["text"]

    def __call__(self, text, videos, **options):
        self.videos, self.options = videos, options

        class Inputs(dict):
            def to(self, device):
                return self

        return Inputs(input_ids=torch.tensor([[ord(character) % 250 for character in text[0]]]))

    def batch_decode(self, ids, **_):
        return ["".join(map(chr, row.tolist())) for row in ids]


class VideoOracle(Oracle):
    def generate(self, input_ids, **options):
        return super().generate(input_ids)


def test_video_mme_rows(tmp_path):
    row = {"videoID": "v1", "question": "What moves?", "options": ["A. sun", "B. cat", "C. sea", "D. car"]}
    rows(tmp_path / "videomme.jsonl", row | {"answer": "B", "duration": "long"}, row | {"duration": "short"})
    asked = Asked("long", 0, 5, data=tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold the video v1"):
        video_mme.questions(asked)
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "v1.npy", np.zeros((9, 4, 6, 3), dtype=np.uint8))
    (question,) = video_mme.questions(asked)
    assert question.prompt.splitlines()[1:] == ["What moves?", *row["options"], "The best answer is:"]
    processor = Processor()
    assert video_mme.scores(VideoOracle(" B. cat"), processor, asked, frames=3)[0] == [1.0]
    assert processor.videos[0].shape == (3, 3, 4, 6) and processor.options["do_sample_frames"] is False
    assert video_mme.scores(VideoOracle("C"), processor, asked)[0] == [0.0]
    with pytest.raises(ValueError, match="--lengths must be 0"):
        video_mme.questions(replace(asked, length=8192))


def test_letters():
    assert [video_mme.letter(text) for text in (" B.", "The best answer is: C", "A cat", "Dog", "no", "")] == [
        *"BCAD",
        "",
        "",
    ]


def test_suites_check_their_arguments(tmp_path):
    usual = {"suite": "recall", "tasks": ["json_kv"], "data": None, "batch_size": 1, "output": None}
    arguments = SimpleNamespace(**usual, lengths=None, model=None)
    check(arguments)
    assert import_suite(arguments)[1] == ["json_kv"]
    arguments.tasks = ["poetry"]
    with pytest.raises(ValueError, match="--tasks must be among"):
        import_suite(arguments)
    helmet_arguments = SimpleNamespace(suite="helmet", tasks=None, data=tmp_path, lengths=(2048,), batch_size=1)
    with pytest.raises(ValueError, match="--lengths must be of helmet's"):
        import_suite(helmet_arguments)
    helmet_arguments.lengths = None
    assert import_suite(helmet_arguments)[2] == (8192,)
    for changed, message in (
        ({"suite": "helmet"}, "--data must be"),
        ({"data": tmp_path}, "--data must come with"),
        ({"batch_size": 2}, "--batch-size must be 1"),
        ({"suite": "video-mme", "data": tmp_path}, "--model must name"),
        ({"suite": "video-mme", "data": tmp_path, "model": "m", "lengths": (8,)}, "--lengths must not be given"),
    ):
        with pytest.raises(ValueError, match=message):
            check(SimpleNamespace(**(vars(arguments) | changed)))
