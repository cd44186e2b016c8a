"""Lengths apart and changing, in one process: the second compiles for any length, the third compiles nothing."""

import contextlib

import oracle
from cases import FREE, Shape, assert_attends, no_compile, tensors

from rr_flex import rr_attention, select_blocks


def test_the_third_length_compiles_nothing():
    for number, (Lq, Lk) in enumerate([(300, 300), (257, 384), (130, 700), (513, 513)]):
        shape = Shape(Lq=Lq, Lk=Lk)
        q, k, v = tensors(shape)
        with no_compile() if number > 1 else contextlib.nullcontext():
            out = rr_attention(q, k, v, tau=0.5, **FREE)
        shown = oracle.pairs(oracle.causal_element(Lk - Lq), *shape[:2], Lq, Lk)
        kept = oracle.expand(select_blocks(q, k, tau=0.5, **FREE).kept, (Lq, Lk), (128, 128))
        assert_attends(out, q, k, v, shown & kept)
