"""Terms whose translation a session's owner has fixed.

A glossary is ``{source term: {language: target term}}``. A term of one or more words occurs where its words stand side
by side in the source, whatever their case and the punctuation around them; of terms within each other, the longest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.tokenizer import UNSPACED, encode_words
from models.translator import Translator
from streaming.errors import DragomanError

Glossary = Mapping[str, Mapping[str, str]]
MAX_TERMS = 1_000
MAX_TERM_WORDS = 8


@dataclass(frozen=True)
class Term:
    """The translation of a term into one language.

    Attributes:
        ids: As the model writes it.
        pattern: Finds it where it begins at the beginning of a word.
    """

    ids: tuple[int, ...]
    pattern: re.Pattern[str]

    def stands_in(self, text: str) -> bool:
        """Whether a text has it."""
        return self.pattern.search(text) is not None


#: The entries for one language, by the source term's words as :func:`word_key` makes them.
Terms = Mapping[tuple[str, ...], Term]


def word_key(word: str) -> str:
    """A word without case and without punctuation around it; a word of nothing else stays as it is."""
    folded = word.casefold()
    return re.sub(r"^[\W_]+|[\W_]+$", "", folded) or folded


def check_glossary(glossary: Any) -> None:
    """Makes sure that something is a glossary.

    Raises:
        DragomanError: ``bad_glossary``, saying which entry and why.
    """
    if not isinstance(glossary, Mapping):
        raise _bad(f"the glossary is a {type(glossary).__name__}; it is an object of terms")
    if len(glossary) > MAX_TERMS:
        raise _bad(f"the glossary has {len(glossary)} terms; at most {MAX_TERMS} are possible")
    for term, targets in glossary.items():
        if not isinstance(targets, Mapping):
            raise _bad(f"the glossary's {term!r} has to be an object of languages, such as {{'es': 'término'}}")
        for side in (term, *targets.values()):
            if not isinstance(side, str) or not 1 <= len(side.split()) <= MAX_TERM_WORDS:
                raise _bad(f"the glossary's {term!r} needs terms of 1 to {MAX_TERM_WORDS} words, not {side!r}")


def terms(glossary: Glossary, target: str, translator: Translator) -> Terms:
    """The entries of a glossary that :func:`check_glossary` has passed for one target language."""
    entries = {}
    for source, targets in glossary.items():
        if target in targets:
            text = " ".join(targets[target].split())
            pattern = re.compile(("" if target in UNSPACED else r"(?<!\w)") + re.escape(text), re.IGNORECASE)
            if ids := encode_words(translator.tokenizer, text):
                entries[tuple(map(word_key, source.split()))] = Term(ids, pattern)
    return entries


def occurring(terms: Terms, words: Sequence[str], start: int) -> tuple[Term, ...]:
    """Terms that occur in a text and end with its word ``start`` or later, each once, in their order.

    What occurs within a longer term is not meant by itself.

    Args:
        terms: The entries.
        words: As :func:`word_key` makes them.
        start: Index of a word.
    """
    if not terms:
        return ()
    found: dict[Term, None] = {}
    covered = 0  # where the longest term so far has ended: one that ends before, or there, is within it
    for first in range(len(words)):
        for end in range(min(len(words), first + MAX_TERM_WORDS), covered, -1):
            if end > first and (term := terms.get(tuple(words[first:end]))):
                covered = end
                if end > start:
                    found[term] = None
                break
    return tuple(found)


def _bad(sentence: str) -> DragomanError:
    return DragomanError("bad_glossary", sentence)
