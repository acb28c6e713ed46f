"""Cuts aligned sentence pairs into chunk pairs that an interpreter could say one after another.

    python -m training.translation.chunks --aligned corpus/aligned.tsv

A pair may be cut where no link crosses the cut: what is said before it translates what was heard before it. There is
no cut behind a word that belongs to the next one, such as an article, whose form the next one decides. The cuts
that a pair allows make its smallest chunk pairs; a latency level joins neighbours until the source side of each has
that level's number of words. How much of the sentence is still to come does not matter, since who hears it cannot know.
Unlinked words go to the later chunk, where more has been heard; a target word without letters, such as a French
question mark, stays with the word before it.

The command prints how the levels cut, and some examples.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from training.translation.align import Links, read_aligned, word_stem

#: Source words of a chunk, at least; the last one of a sentence may have fewer.
LEVEL_WORDS = {"low": 2, "low-medium": 3, "medium": 4, "medium-high": 5, "high": 7}
#: The same for languages with fewer places to cut, so that a level's lag is about that of the other languages.
_LEVEL_WORDS_IN = {"de": {"low": 1, "low-medium": 2, "medium": 3, "medium-high": 4, "high": 6}}
OFFLINE = "offline"
#: A pair that allows no cut, though it has this many times its level's words, teaches to wait for everything.
UNCUT_RATIO = 2.0


@dataclass(frozen=True)
class ChunkPair:
    """How many source and target words of a sentence pair have passed when the chunk pair ends."""

    source_end: int
    target_end: int


#: English words that belong to what follows them.
_LEANS_ON_NEXT = frozenset(
    "a an the this that these those my your his her its our their some any no every each another both all many much"
    " few several more most very too so as than to of in on at by for from with without into onto about around over"
    " under above below between among through during before after since until within against toward towards and or"
    " but nor if because while whether when where who whom whose which what why how not mr mrs ms dr mister".split()
)


def smallest_chunks(source: list[str], target: list[str], links: Links) -> list[ChunkPair]:
    """The finest monotone chunk pairs, each with words on both sides; the last one ends the pair.

    Args:
        source: Words; at least one.
        target: Words; at least one.
        links: ``(source word, target word)``.
    """
    n, m = len(source), len(target)
    first_after = [m] * (n + 1)  # the first target word that is linked to source word i or later
    for i, j in links:
        first_after[i] = min(first_after[i], j)
    for i in reversed(range(n)):
        first_after[i] = min(first_after[i], first_after[i + 1])
    linked_to: list[list[int]] = [[] for _ in range(n)]
    for i, j in links:
        linked_to[i].append(j)
    cuts, reached, last = [], -1, 0
    for i in range(n - 1):
        reached = max([reached, *linked_to[i]])
        if source[i].lower() in _LEANS_ON_NEXT:
            continue
        end = reached + 1
        while end < m and end < first_after[i + 1] and not word_stem(target[end]):
            end += 1
        if last < end < m and end <= first_after[i + 1]:
            cuts.append(ChunkPair(i + 1, end))
            last = end
    return [*cuts, ChunkPair(n, m)]


def level_words(latency: str, language: str) -> int:
    """Source words of a chunk at a latency level into a language, at least."""
    return _LEVEL_WORDS_IN.get(language, LEVEL_WORDS)[latency]


def at_level(smallest: list[ChunkPair], words: int) -> list[ChunkPair]:
    """Joins chunk pairs so that each has ``words`` source words, or ends the pair."""
    chunks, last = [], 0
    for chunk in smallest[:-1]:
        if chunk.source_end - last >= words:
            chunks.append(chunk)
            last = chunk.source_end
    return [*chunks, smallest[-1]]


def chunk_pairs(smallest: list[ChunkPair], latency: str, language: str) -> list[ChunkPair]:
    """The chunk pairs of a latency level into a language; all of the sentence at once for ``offline``."""
    return smallest[-1:] if latency == OFFLINE else at_level(smallest, level_words(latency, language))


def is_uncut(chunks: list[ChunkPair], latency: str, language: str) -> bool:
    """Whether a pair is one chunk though its level would cut it in several, if its word order allowed."""
    if len(chunks) > 1 or latency == OFFLINE:
        return False
    return chunks[0].source_end >= UNCUT_RATIO * level_words(latency, language)


def run(
    aligned: Annotated[Path, typer.Option(help="aligned.tsv of training.translation.align.")],
    examples: Annotated[int, typer.Option(help="Pairs to print for each language.")] = 5,
    seed: int = 1,
) -> None:
    """Prints words per source chunk and the share of uncut pairs for each language and level, and examples."""
    drawn: dict[str, list[str]] = {}
    sums: dict[str, Counter[str]] = {}
    rng = random.Random(seed)
    for pair, links in read_aligned(aligned):
        source, target = pair.source.split(), pair.target.split()
        smallest = smallest_chunks(source, target, links)
        counts = sums.setdefault(pair.language, Counter())
        counts["pairs"] += 1
        counts["words"] += len(source)
        counts["smallest"] += len(smallest)
        for latency in LEVEL_WORDS:
            chunks = chunk_pairs(smallest, latency, pair.language)
            counts[latency] += len(chunks)
            counts[f"{latency} uncut"] += is_uncut(chunks, latency, pair.language)
        if rng.random() < 0.001:
            drawn.setdefault(pair.language, []).append(_shown(source, target, smallest))
    for language, c in sums.items():
        levels = ", ".join(f"{x} {c['words'] / c[x]:.2f} ({c[f'{x} uncut'] / c['pairs']:.1%})" for x in LEVEL_WORDS)
        print(f"{language}: words per chunk: smallest {c['words'] / c['smallest']:.2f}; by level (uncut): {levels}")
        print("\n".join(f"  {line}" for line in drawn.get(language, [])[:examples]))


def _shown(source: list[str], target: list[str], chunks: list[ChunkPair]) -> str:
    parts, i, j = [], 0, 0
    for chunk in chunks:
        parts.append(f"{' '.join(source[i : chunk.source_end])} → {' '.join(target[j : chunk.target_end])}")
        i, j = chunk.source_end, chunk.target_end
    return " | ".join(parts)


if __name__ == "__main__":
    typer.run(run)
