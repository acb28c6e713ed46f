"""The aligner finds known translations, and its parts say what they should."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.translation.align import (
    Settings,
    _Direction,
    align,
    grow_diag_final_and,
    read_aligned,
    word_stem,
    write_aligned,
)
from training.translation.corpus import Pair

NOUNS = {"dog": "perro", "cat": "gato", "house": "casa", "tree": "arbol", "car": "coche", "book": "libro"}
ADJECTIVES = {"red": "rojo", "big": "grande", "old": "viejo", "new": "nuevo", "black": "negro"}
VERBS = {"sees": "ve", "wants": "quiere", "buys": "compra", "hits": "golpea"}


def sentences(count: int, seed: int = 0) -> tuple[list[tuple[list[str], list[str]]], list[set[tuple[int, int]]]]:
    """English and Spanish of a kind whose adjectives follow their nouns, and the true links."""
    rng, pairs, truth = random.Random(seed), [], []
    for _ in range(count):
        a, b = rng.choice(list(ADJECTIVES)), rng.choice(list(ADJECTIVES))
        n, m, v = rng.choice(list(NOUNS)), rng.choice(list(NOUNS)), rng.choice(list(VERBS))
        pairs.append(
            (
                ["The", a, n, v, "the", b, f"{m}."],
                ["El", NOUNS[n], ADJECTIVES[a], VERBS[v], "el", NOUNS[m], f"{ADJECTIVES[b]}."],
            )
        )
        truth.append({(0, 0), (1, 2), (2, 1), (3, 3), (4, 4), (5, 6), (6, 5)})
    return pairs, truth


def test_known_translations_are_found() -> None:
    pairs, truth = sentences(200)
    found = align(pairs)
    right = sum(len(set(links) & true) for links, true in zip(found, truth, strict=True))
    assert right / sum(map(len, found)) > 0.98
    assert right / sum(map(len, truth)) > 0.98


def test_one_direction_is_the_textbook_loop() -> None:
    pairs, _ = sentences(12, seed=3)
    numbers: dict[str, int] = {}
    source = [[numbers.setdefault(w, len(numbers)) for w in s] for s, _ in pairs]
    other: dict[str, int] = {}
    target = [[other.setdefault(w, len(other)) for w in t] for _, t in pairs]
    plain = Settings(model1_iterations=4, diagonal_iterations=0, null=0.1, concentration=0.3)
    direction = _Direction(source, target)
    translation = np.ones(len(direction._source_of_pair))
    for _ in range(4):
        posterior = direction._posterior(translation, direction._prior(0.0, 0.1))
        counts = np.bincount(direction._pair, posterior, len(translation))
        translation = direction._translations(counts, plain.concentration)
    wanted = textbook(source, target, 4, 0.1, 0.3)
    joint = np.unique(
        [
            s * direction._n_targets + t
            for a, b in zip(source, target, strict=True)
            for t in b
            for s in (0, *(w + 1 for w in a))
        ]
    )
    for value, code in zip(translation, joint, strict=True):
        s, t = divmod(int(code), direction._n_targets)
        assert np.isclose(value, wanted[s - 1, t], rtol=1e-6)


def textbook(
    source: list[list[int]], target: list[list[int]], iterations: int, null: float, alpha: float
) -> dict[tuple[int, int], float]:
    """IBM Model 1 with a Dirichlet prior, in loops; source word -1 is none."""
    cells = {(s, t) for a, b in zip(source, target, strict=True) for t in b for s in (-1, *a)}
    p = dict.fromkeys(cells, 1.0)
    kinds = 1 + max(t for b in target for t in b)
    for _ in range(iterations):
        counts = dict.fromkeys(cells, 0.0)
        for a, b in zip(source, target, strict=True):
            for t in b:
                weights = [(-1, p[-1, t] * null), *((s, p[s, t] * (1 - null) / len(a)) for s in a)]
                total = sum(w for _, w in weights)
                for s, w in weights:
                    counts[s, t] += w / total
        totals: dict[int, float] = {}
        for (s, _), count in counts.items():
            totals[s] = totals.get(s, 0.0) + count
        p = {
            (s, t): max(1e-30, math.exp(digamma(c + alpha) - digamma(totals[s] + alpha * kinds)))
            for (s, t), c in counts.items()
        }
    return p


def digamma(x: float) -> float:
    return float(torch.special.digamma(torch.tensor(x, dtype=torch.float64)))


links = st.sets(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=12)


@settings(deadline=None)
@given(links, links)
def test_joined_links_lie_between_intersection_and_union(
    one: set[tuple[int, int]], other: set[tuple[int, int]]
) -> None:
    joined = set(grow_diag_final_and(one, other, 6, 7))
    assert one & other <= joined <= one | other
    linked = {i for i, _ in joined}, {j for _, j in joined}
    for i, j in one | other:  # "final and": no link between two words without any is left out
        assert i in linked[0] or j in linked[1]


def test_growing_takes_neighbours_and_leaves_the_rest() -> None:
    one, other = {(0, 0), (1, 1), (4, 0)}, {(0, 0), (2, 1)}
    # (1, 1) is a diagonal neighbour of (0, 0); then (2, 1) is one of (1, 1) whose source word has no link yet.
    assert grow_diag_final_and(one, other, 5, 2) == [(0, 0), (1, 1), (2, 1)]


def test_stems_drop_case_edges_and_elisions() -> None:
    assert word_stem("«L'homme,") == "homme"
    assert word_stem("Geschwindigkeit") == "geschw"
    assert word_stem("don't") == "don't"
    assert word_stem("?") == ""


def test_empty_and_long_sentences_have_no_links() -> None:
    pairs, _ = sentences(3)
    found = align([(["?"], ["x"]), *pairs, (["a"] * 81, ["b"] * 3)])
    assert found[0] == [] and found[-1] == [] and all(found[1:-1])
    assert align([]) == []


def test_words_without_letters_keep_their_places(tmp_path: Path) -> None:
    pairs, _ = sentences(50)
    spaced = [(s, [*t[:3], "-", *t[3:]]) for s, t in pairs]
    assert {(3, 4), (4, 5)} <= set(align(spaced)[0])
    file = tmp_path / "aligned.tsv"
    write_aligned(file, [(Pair("es", "a b", "c d"), [(0, 1), (1, 0)]), (Pair("de", "a", "b"), [])])
    assert list(read_aligned(file)) == [(Pair("es", "a b", "c d"), [(0, 1), (1, 0)]), (Pair("de", "a", "b"), [])]
