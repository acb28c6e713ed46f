"""Terms whose translation a session's owner has fixed.

A glossary is ``{source term: {language: target term}}``. A term of one or more words occurs where its words stand side
by side in the source, whatever their case and the punctuation around them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.tokenizer import encode_words
from models.translator import Translator
from streaming.errors import DragomanError

Glossary = Mapping[str, Mapping[str, str]]
MAX_TERMS = 1_000
MAX_TERM_WORDS = 8


@dataclass(frozen=True)
class Term:
    """One entry, for one target language.

    Attributes:
        words: The source term's words, as :func:`word_key` makes them.
        text: The target term.
        ids: Its ids, as the model writes it.
    """

    words: tuple[str, ...]
    text: str
    ids: tuple[int, ...]

    def ends(self, words: Sequence[str]) -> bool:
        """Whether the last of these words complete the term."""
        return tuple(words[-len(self.words) :]) == self.words

    def stands_in(self, text: str) -> bool:
        """Whether the target term begins at the beginning of a word of the text."""
        return re.search(rf"(?<!\w){re.escape(self.text)}", text, re.IGNORECASE) is not None


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


def terms(glossary: Glossary, target: str, translator: Translator) -> tuple[Term, ...]:
    """The entries of a glossary that :func:`check_glossary` has passed for one target language."""
    entries = []
    for source, targets in glossary.items():
        if target in targets:
            text = " ".join(targets[target].split())
            entries.append(Term(tuple(map(word_key, source.split())), text, encode_words(translator.tokenizer, text)))
    return tuple(entry for entry in entries if entry.ids)


def _bad(sentence: str) -> DragomanError:
    return DragomanError("bad_glossary", sentence)
