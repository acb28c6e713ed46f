"""Where the terms of a glossary occur."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.glossary import MAX_TERM_WORDS, Term, occurring, terms, word_key
from tests import tiny

words_ = st.lists(st.sampled_from("abc"), max_size=14)
sources = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=MAX_TERM_WORDS), max_size=8)


@settings(deadline=None)
@given(source=sources, words=words_, start=st.integers(0, 14))
def test_terms_occur_where_a_naive_search_finds_them(source: list[list[str]], words: list[str], start: int) -> None:
    entries = terms({" ".join(one): {"es": f"t{i}"} for i, one in enumerate(source)}, "es", tiny.translator(0))
    spans = [
        (first, end)
        for first in range(len(words))
        for end in range(first + 1, len(words) + 1)
        if tuple(words[first:end]) in entries
    ]
    alone = [
        (first, end)
        for first, end in spans
        if not any(a <= first and end <= b and (a, b) != (first, end) for a, b in spans)
    ]
    expected: list[Term] = []
    for first, end in alone:
        term = entries[tuple(words[first:end])]
        if end > start and term not in expected:
            expected.append(term)
    assert list(occurring(entries, words, start)) == expected


def test_a_term_has_its_words_without_case_and_punctuation() -> None:
    entries = terms(
        {"«Graphics  Card»": {"es": " tarjeta   gráfica"}, "Rust": {"de": "Rust"}}, "es", tiny.translator(0)
    )
    assert list(entries) == [("graphics", "card")]
    keys = [word_key(word) for word in "my GRAPHICS card, again".split()]
    [term] = occurring(entries, keys, 0)
    assert term.stands_in("la Tarjeta gráfica.") and not term.stands_in("subtarjeta gráfica")
    assert occurring(entries, keys, 3) == ()


def test_where_words_have_no_spaces_a_term_stands_anywhere() -> None:
    [term] = terms({"firmware": {"zh": "固件"}}, "zh", tiny.translator(0)).values()
    assert term.stands_in("更新固件后")
