"""Families in ways of calling them: dense tokens at tau = 1, bounded KL at .95; the page's table is what was found."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from model_families import FAMILIES, SETTINGS, STEPS, WAYS, assisted, cells, cells_to_compile, make

from rr_flex.models import enable

PAGE = Path(__file__).parent.parent / "rr_flex" / "models" / "README.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->"
NOT_RUN = "·"
KL_BOUND = 0.1  # nats
CELLS, COMPILED = cells(), cells_to_compile()
pytestmark = [
    pytest.mark.usefixtures("one_graph_a_shape"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
found = {}


def test_the_cells_meet_each_way_with_all_that_is_asked_of_an_attention_function():
    asked = {(asked, way) for family in FAMILIES.values() for asked in family.asks for way in WAYS}
    assert {(asked, way) for family, way in CELLS for asked in FAMILIES[family].asks} == asked
    assert len(FAMILIES) == 12 and len(CELLS) == len(set(CELLS)) <= len(FAMILIES) * len(WAYS) * 0.4
    for chosen in (CELLS, COMPILED):
        assert {family for family, _ in chosen} == set(FAMILIES) and {way for _, way in chosen} == set(WAYS)
    assert set(COMPILED) <= set(CELLS) and len(COMPILED) <= 15


@pytest.mark.parametrize(("family", "way"), CELLS)
def test_family_in_a_way(family, way):
    stance = contextlib.nullcontext() if (family, way) in COMPILED else torch.compiler.set_stance("force_eager")
    with stance:
        report = keeps_its_promises(make(family), WAYS[way])
    found[family, way] = cell(report, compiled=(family, way) in COMPILED)


def keeps_its_promises(model, run):
    before = model.config._attn_implementation
    tokens, logits = run(model)

    with enable(model, tau=1.0, **SETTINGS):
        whole_tokens, whole_logits = run(model)
    assert model.config._attn_implementation == before
    assert torch.equal(tokens, whole_tokens)
    torch.testing.assert_close(whole_logits, logits, atol=2e-3, rtol=1e-3)

    with enable(model, tau=0.95, **SETTINGS) as on:
        _, sparse_logits = run(model)
    log_p, log_q = logits.log_softmax(-1), sparse_logits.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).max() < KL_BOUND
    report = on.report()
    with enable(model, tau=0.4, **SETTINGS) as on:
        run(model)
    assert not report.sparse or on.report().density < 0.95
    return report


def test_an_assistant_s_later_guesses_are_verified():
    """Each in a call of two tokens, which is sparse as any prefill."""
    model = make("llama")
    tokens, logits = assisted(model, max_new_tokens=STEPS)
    with enable(model, tau=1.0, **SETTINGS) as on:
        whole_tokens, whole_logits = assisted(model, max_new_tokens=STEPS)
    assert torch.equal(whole_tokens, tokens) and on.report().sparse == 4
    torch.testing.assert_close(whole_logits, logits, atol=2e-3, rtol=1e-3)


def cell(report, compiled):
    """ "sparse", or the reasons why prefill stayed dense in this way; decoding and short calls are dense in all."""
    if report.sparse:
        return "sparse, compiled" if compiled else "sparse"
    return "dense: " + ", ".join(sorted(reason for reason in report.dense if reason != "decode"))


def test_the_page_shows_what_was_found():
    """RR_FLEX_WRITE_README=1 writes it."""
    if len(found) < len(CELLS):
        pytest.skip("only some of the table's cells were run")
    lines = ["| family | its layers ask for | " + " | ".join(WAYS) + " |", "|---" * (2 + len(WAYS)) + "|"]
    for name, family in FAMILIES.items():
        row = [name, ", ".join(family.asks), *(found.get((name, way), NOT_RUN) for way in WAYS)]
        lines.append("| " + " | ".join(row) + " |")
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    shown = before + BEGIN + "\n".join(lines) + "\n" + END + after
    if os.environ.get("RR_FLEX_WRITE_README"):
        PAGE.write_text(shown)
    assert PAGE.read_text() == shown
