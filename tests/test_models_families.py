"""Every family in every mode: dense tokens at tau = 1, bounded KL at .95; the README's table is what was found."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from model_families import FAMILIES, MODES, STEPS, assisted, make

from rr_flex.models import enable

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->"
KL_BOUND = 0.1  # nats
pytestmark = pytest.mark.usefixtures("one_graph_a_shape")
cells = {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_in_mode(family, mode):
    model = make(family)
    run = MODES[mode]
    before = model.config._attn_implementation
    tokens, logits = run(model)

    # Without dense last rows, so that the last token's logits have seen the selection.
    settings = {"block_size": 64, "dense_last_rows": 0}
    with enable(model, tau=1.0, **settings):
        whole_tokens, whole_logits = run(model)
    assert model.config._attn_implementation == before
    assert torch.equal(tokens, whole_tokens)
    torch.testing.assert_close(whole_logits, logits, atol=2e-3, rtol=1e-3)

    with enable(model, tau=0.95, **settings) as on:
        _, sparse_logits = run(model)
    log_p, log_q = logits.log_softmax(-1), sparse_logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).max().item()
    assert kl < KL_BOUND
    report = on.report()
    with enable(model, tau=0.4, **settings) as on:
        run(model)
    assert not report.sparse or on.report().density < 0.95
    print(f"{family} {mode} kl {kl:.2e} density {report.density} {report.sparse} {dict(report.dense)}")
    cells[family, mode] = cell(report)


def test_an_assistant_s_later_guesses_are_verified():
    """Each in a call of two tokens, which is sparse as any prefill."""
    model = make("llama")
    tokens, logits = assisted(model, max_new_tokens=STEPS)
    with enable(model, tau=1.0, block_size=64, dense_last_rows=0) as on:
        whole_tokens, whole_logits = assisted(model, max_new_tokens=STEPS)
    assert torch.equal(whole_tokens, tokens) and on.report().sparse == 4
    torch.testing.assert_close(whole_logits, logits, atol=2e-3, rtol=1e-3)


def cell(report):
    """ "sparse", or the reasons why prefill stayed dense in this mode; decoding and short calls are dense in all."""
    if report.sparse:
        return "sparse"
    return "dense: " + ", ".join(sorted(reason for reason in report.dense if reason != "decode"))


def test_the_readme_shows_what_was_found():
    """RR_FLEX_WRITE_README=1 writes it."""
    if len(cells) < len(FAMILIES) * len(MODES):
        pytest.skip("only some of the table's cells were run")
    lines = ["| | " + " | ".join(MODES) + " |", "|---" * (1 + len(MODES)) + "|"]
    lines += [f"| {family} | " + " | ".join(cells[family, mode] for mode in MODES) + " |" for family in FAMILIES]
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    found = before + BEGIN + "\n".join(lines) + "\n" + END + after
    if os.environ.get("RR_FLEX_WRITE_README"):
        README.write_text(found)
    assert README.read_text() == found
