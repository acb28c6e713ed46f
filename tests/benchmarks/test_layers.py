"""Leaving layers out: the search is run on what the model writes, and its best set is tried."""

from __future__ import annotations

from benchmarks.layers import deepened, measure, overhead, report
from tests import tiny

TEXTS = ["the speaker is still talking", "and nothing is taken back"] * 4


def test_the_figures_and_their_table() -> None:
    t = deepened(tiny.translator(0), 4)
    found = measure(t, TEXTS, target="es", words=15, tried_words=15)
    assert found["identical"] is True and found["tokens"] > 15
    assert [len(one["layers"]) for one in found["search"]] == [1, 2]
    assert all(0 <= one["matches"] <= 1 and 0 < one["cost"] < 1 for one in found["search"])
    assert found["forward_ratio"] >= 1 and found["draft_forwards"] > 0
    assert "left out, drafts of a fixed length" in report(found)
    assert 0 <= overhead(t.llm) < 1
