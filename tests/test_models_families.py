"""Families in ways of calling them: dense tokens at tau = 1, bounded KL at .95; the page's table is what was found."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from model_families import FAMILIES, SETTINGS, STEPS, WAYS, assisted, cells, make, met_by

from rr_flex.models import enable

PAGE = Path(__file__).parent.parent / "rr_flex" / "models" / "README.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->"
NOT_RUN = "·"
KL_BOUND = 0.1  # nats
CELLS = cells()
pytestmark = pytest.mark.usefixtures("one_graph_a_shape")
found = {}


def test_the_cells_meet_each_way_with_all_that_is_asked_of_an_attention_function():
    met = set().union(*(met_by(*cell) for cell in CELLS))
    assert met >= {(asked, way) for family in FAMILIES.values() for asked in family.asks for way in WAYS}
    assert {family for family, _ in CELLS} == set(FAMILIES) and {way for _, way in CELLS} == set(WAYS)
    assert len(FAMILIES) == 12 and len(CELLS) == len(set(CELLS)) <= len(FAMILIES) * len(WAYS) * 0.4


@pytest.mark.parametrize(("family", "way"), CELLS)
def test_family_in_a_way(family, way):
    model = make(family)
    run = WAYS[way]
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
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).max().item()
    assert kl < KL_BOUND
    report = on.report()
    with enable(model, tau=0.4, **SETTINGS) as on:
        run(model)
    assert not report.sparse or on.report().density < 0.95
    print(f"{family} {way} kl {kl:.2e} density {report.density} {report.sparse} {dict(report.dense)}")
    found[family, way] = cell(report)


def test_an_assistant_s_later_guesses_are_verified():
    """Each in a call of two tokens, which is sparse as any prefill."""
    model = make("llama")
    tokens, logits = assisted(model, max_new_tokens=STEPS)
    with enable(model, tau=1.0, **SETTINGS) as on:
        whole_tokens, whole_logits = assisted(model, max_new_tokens=STEPS)
    assert torch.equal(whole_tokens, tokens) and on.report().sparse == 4
    torch.testing.assert_close(whole_logits, logits, atol=2e-3, rtol=1e-3)


def cell(report):
    """ "sparse", or the reasons why prefill stayed dense in this way; decoding and short calls are dense in all."""
    if report.sparse:
        return "sparse"
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
