"""A short hunt for wrong answers; `python tests/hunt.py --calls 20000 --calls-each 500` is the long one, compiled."""

import hunt


def test_random_calls_are_right_or_refused_clearly():
    hunter = hunt.hunt(range(150), seed=0, until=20)
    assert not hunter.wrong, "\n".join(f"#{n}: {what}\n    {call}" for n, what, call in hunter.wrong)
    assert sum(count for name, count in hunter.counts.items() if name.startswith("right")) >= 20
