"""Chunk pairs are monotone, as small as they can be, and as long as their level asks."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from training.translation.chunks import (
    LEVEL_WORDS,
    OFFLINE,
    ChunkPair,
    at_level,
    chunk_pairs,
    is_uncut,
    level_words,
    smallest_chunks,
)

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
cases = sizes.flatmap(
    lambda size: st.tuples(
        st.just(size[0]),
        st.lists(st.sampled_from(["uno", "?"]), min_size=size[1], max_size=size[1]),
        st.sets(st.tuples(st.integers(0, size[0] - 1), st.integers(0, size[1] - 1)), max_size=12),
    )
)


@settings(deadline=None)
@given(cases)
def test_no_link_crosses_a_cut_and_no_chunk_is_empty(case: tuple[int, list[str], set[tuple[int, int]]]) -> None:
    n, target, links = case
    chunks = smallest_chunks(["word"] * n, target, sorted(links))
    assert chunks[-1] == ChunkPair(n, len(target))
    for before, after in pairwise([ChunkPair(0, 0), *chunks]):
        assert before.source_end < after.source_end and before.target_end < after.target_end
    for cut in chunks[:-1]:
        assert all((i < cut.source_end) == (j < cut.target_end) for i, j in links)


@settings(deadline=None)
@given(cases)
def test_no_cut_is_missed(case: tuple[int, list[str], set[tuple[int, int]]]) -> None:
    """Wherever some target cut lets no link cross and something was said since the last cut, there is one."""
    n, target, links = case
    chunks = smallest_chunks(["word"] * n, target, sorted(links))
    for i in range(1, n):
        said = max((j + 1 for s, j in links if s < i), default=0)
        coming = min((j for s, j in links if s >= i), default=len(target))
        past = max((c.target_end for c in chunks if c.source_end < i), default=0)
        if past < said <= coming and said < len(target) and target[said] != "?":
            assert any(c.source_end == i for c in chunks)


def test_word_order_that_differs_is_not_cut() -> None:
    source, target = "I have never seen the red house".split(), "Ich habe das rote Haus nie gesehen".split()
    links = [(0, 0), (1, 1), (2, 5), (3, 6), (4, 2), (5, 3), (6, 4)]
    assert smallest_chunks(source, target, links) == [ChunkPair(1, 1), ChunkPair(2, 2), ChunkPair(7, 7)]


def test_no_cut_is_behind_a_word_that_belongs_to_the_next() -> None:
    source, target = "we go to the market now".split(), "vamos a el mercado ahora ya".split()
    links = [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]
    assert smallest_chunks(source, target, links) == [ChunkPair(2, 1), ChunkPair(5, 4), ChunkPair(6, 6)]


def test_unlinked_words_go_to_the_later_chunk_and_marks_stay() -> None:
    source, target = "well you know him do you not".split(), "bueno , lo conoces ¿ no ?".split()
    links = [(0, 0), (2, 3), (6, 5)]
    assert smallest_chunks(source, target, links) == [ChunkPair(1, 2), ChunkPair(3, 5), ChunkPair(7, 7)]


@settings(deadline=None)
@given(cases, st.sampled_from(sorted(LEVEL_WORDS)), st.sampled_from(["es", "de"]))
def test_levels_join_chunks_to_their_number_of_words(
    case: tuple[int, list[str], set[tuple[int, int]]], latency: str, language: str
) -> None:
    n, target, links = case
    smallest = smallest_chunks(["word"] * n, target, sorted(links))
    chunks, words = chunk_pairs(smallest, latency, language), level_words(latency, language)
    assert set(chunks) <= set(smallest) and chunks[-1] == smallest[-1]
    lengths = [b.source_end - a.source_end for a, b in pairwise([ChunkPair(0, 0), *chunks])]
    assert all(length >= words for length in lengths[:-1])
    cuts, ends = {c.source_end for c in smallest}, {c.source_end for c in chunks}
    starts = [0, *(c.source_end for c in chunks)]
    for start, end in pairwise(starts):
        assert not [cut for cut in cuts - ends if start + words <= cut < end], "a cut is taken as soon as it may be"
    assert at_level(smallest, 1) == smallest
    assert chunk_pairs(smallest, OFFLINE, language) == [smallest[-1]]


def test_uncut_is_what_its_level_would_have_cut() -> None:
    assert is_uncut([ChunkPair(8, 5)], "medium", "es")
    assert not is_uncut([ChunkPair(7, 5)], "medium", "es")
    assert is_uncut([ChunkPair(7, 5)], "medium", "de")
    assert not is_uncut([ChunkPair(4, 2), ChunkPair(8, 5)], "medium", "es")
    assert not is_uncut([ChunkPair(30, 5)], OFFLINE, "es")
