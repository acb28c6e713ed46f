"""Reads sentence pairs, cleans them, and sets aside what training may not see.

    python -m training.translation.corpus --pairs es=tatoeba.en-es.train.tsv.xz --pairs de=tatoeba.en-de.train.tsv.xz \
        --pairs fr=tatoeba.en-fr.train.tsv.xz --dev tatoeba.dev.jsonl --test-sentences 2000 --out corpus

A file of pairs has a line ``English<tab>target`` each and may be compressed (xz, gzip). The test set is drawn from the
English sentences that have all the targets, every translation of a sentence being one of its references. A training
pair is left out if

1. its English or its target is, up to case, punctuation and contractions, a sentence of dev or test; or
2. its English is a near-duplicate of a test sentence: it consists of the same set of words, or the longer of the two
   has at least five words and they differ by one word that is replaced, added or left out.

``out`` then holds ``train.tsv`` (``language<tab>English<tab>target``), ``test.jsonl`` and ``dev.jsonl`` (``text`` and a
list of references for each language).
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import numpy as np
import typer

from streaming.errors import DragomanError

#: Shorter sentences that differ by one word are not near-duplicates: a fifth of what they say is different.
NEAR_DUPLICATE_WORDS = 5
#: A pair's longer side may have so many times the characters of the shorter, and so many more on top.
LENGTH_RATIO, LENGTH_SLACK = 2.2, 12
#: A sentence is taken for another language's if that one is so many nats more likely.
FOREIGN_NATS = 8.0

_TYPOGRAPHY = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "´": "'", "“": '"', "”": '"', "„": '"', "\u00ad": None})
_CONTRACTIONS = [
    (re.compile(r"\bcan't\b"), "can not"),
    (re.compile(r"\bcannot\b"), "can not"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"'m\b"), " am"),
    (re.compile(r"'re\b"), " are"),
    (re.compile(r"'ll\b"), " will"),
    (re.compile(r"'ve\b"), " have"),
]
_WORD = re.compile(r"[^\W_]+")
_LATIN = re.compile(r"[\u0000-\u024f\u1e00-\u1eff\u2010-\u2026\u20a0-\u20bf]+")


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation into ``language``."""

    language: str
    source: str
    target: str


def tidy(text: str) -> str:
    """NFC, straight quotes and single spaces; everything else as written."""
    return " ".join(unicodedata.normalize("NFC", text.translate(_TYPOGRAPHY)).split())


def sentence_key(text: str) -> str:
    """What two spellings of one sentence have in common: its words in lower case, contractions written out."""
    text = tidy(text).casefold()
    for pattern, full in _CONTRACTIONS:
        text = pattern.sub(full, text)
    return " ".join(_WORD.findall(text))


def read_pairs(file: Path, language: str) -> Iterator[Pair]:
    """The pairs of a file, tidied; further columns are ignored.

    Raises:
        DragomanError: ``bad_corpus`` naming the line that has no target.
    """
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            columns = line.rstrip("\n").split("\t")
            if len(columns) < 2:
                raise DragomanError(
                    "bad_corpus", f"{file}, line {number}: expected English and target with a tab between them"
                )
            yield Pair(language, tidy(columns[0]), tidy(columns[1]))


def _open(file: Path) -> TextIO:
    if file.suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8")
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def read_references(file: Path) -> list[dict[str, list[str]]]:
    """Sentences with their translations: ``{"en": [sentence], "es": [reference, …], …}`` for each line of a file.

    The sentence may stand under ``en`` or ``text``.
    """
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        row = {key: [tidy(text) for text in value] for key, value in item.items() if isinstance(value, list)}
        rows.append({"en": [tidy(item["en"] if "en" in item else item["text"])], **row})
    return rows


def write_references(file: Path, rows: Iterable[dict[str, list[str]]]) -> None:
    """The inverse of :func:`read_references`, the sentence under ``text``."""
    lines = ({"text": row["en"][0], **{k: v for k, v in row.items() if k != "en"}} for row in rows)
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- cleaning


def is_clean(pair: Pair) -> bool:
    """Whether both sides are Latin script with words in them, of comparable length, and not copies."""
    source, target = pair.source, pair.target
    if not (_WORD.search(source) and _WORD.search(target)):
        return False
    if not (_LATIN.fullmatch(source) and _LATIN.fullmatch(target)):
        return False
    short, long = sorted((len(source), len(target)))
    if long > LENGTH_RATIO * short + LENGTH_SLACK:
        return False
    return sentence_key(source) != sentence_key(target) or len(source.split()) == 1


class LanguageGuesser:
    """Tells languages apart by their trigrams of characters (a naive Bayes model, made from the corpus itself)."""

    _BUCKETS = 1 << 16

    def __init__(self, texts: dict[str, list[str]]) -> None:
        self.languages = sorted(texts)
        counts = np.full((len(self.languages), self._BUCKETS), 0.5)
        for row, language in enumerate(self.languages):
            for text in texts[language]:
                np.add.at(counts[row], self._trigrams(text), 1.0)
        self._log_p = np.log(counts / counts.sum(1, keepdims=True))

    def foreign(self, text: str, language: str) -> bool:
        """Whether another language is far more likely than the one that it should be."""
        score = self._log_p[:, self._trigrams(text)].sum(1)
        return bool(score.max() - score[self.languages.index(language)] > FOREIGN_NATS)

    def _trigrams(self, text: str) -> np.ndarray:
        codes = np.frombuffer(f"  {text.casefold()} ".encode("utf-32-le"), np.uint32).astype(np.uint64)
        return ((codes[:-2] * 961 + codes[1:-1] * 31 + codes[2:]) % self._BUCKETS).astype(np.int64)


def clean(pairs: Iterable[Pair], guesser_texts: int = 30_000) -> list[Pair]:
    """The pairs that are clean, each once."""
    kept = list(dict.fromkeys(pair for pair in pairs if is_clean(pair)))
    texts: dict[str, list[str]] = defaultdict(list)
    for pair in random.Random(0).sample(kept, min(len(kept), 3 * guesser_texts)):
        texts[pair.language].append(pair.target)
        texts["en"].append(pair.source)
    smallest = min(map(len, texts.values()), default=0)  # so that no language's model is sharper than another's
    guesser = LanguageGuesser({language: some[:smallest] for language, some in texts.items()})
    return [p for p in kept if not guesser.foreign(p.source, "en") and not guesser.foreign(p.target, p.language)]


# ------------------------------------------------------------------------------------------------------- splitting


class NearDuplicates:
    """Finds the sentences that are nearly one of a set; the module's docstring says what that means.

    Args:
        keys: Sentences of the set, as :func:`sentence_key` writes them.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._sets: set[frozenset[str]] = set()
        self._whole: set[tuple[str, ...]] = set()
        self._shorter: set[tuple[str, ...]] = set()
        self._replaced: set[tuple[str, ...]] = set()
        for key in keys:
            words = tuple(key.split())
            self._sets.add(frozenset(words))
            self._whole.add(words)
            if len(words) >= NEAR_DUPLICATE_WORDS:
                self._shorter.update(_without_one(words))
                self._replaced.update(_with_a_gap(words))

    def __contains__(self, key: str) -> bool:
        words = tuple(key.split())
        if frozenset(words) in self._sets or words in self._shorter:
            return True
        if len(words) < NEAR_DUPLICATE_WORDS:
            return False
        return any(w in self._whole for w in _without_one(words)) or any(
            w in self._replaced for w in _with_a_gap(words)
        )


def _without_one(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (words[:i] + words[i + 1 :] for i in range(len(words)))


def _with_a_gap(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return ((*words[:i], "", *words[i + 1 :]) for i in range(len(words)))


def draw_test(pairs: list[Pair], sentences: int, seed: int) -> list[dict[str, list[str]]]:
    """English sentences that have a translation in every language, with all of them.

    Raises:
        DragomanError: ``bad_corpus``, if there are not so many.
    """
    languages = sorted({pair.language for pair in pairs})
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: {language: [] for language in languages})
    for pair in pairs:
        found[pair.source][pair.language].append(pair.target)
    complete = sorted(source for source, targets in found.items() if all(targets.values()))
    if len(complete) < sentences:
        raise DragomanError(
            "bad_corpus",
            f"{len(complete)} English sentences have translations in {', '.join(languages)}, and the test set asks for"
            f" {sentences}; ask for fewer with --test-sentences",
        )
    drawn = random.Random(seed).sample(complete, sentences)
    return [{"en": [source], **found[source]} for source in drawn]


def without_held_out(
    pairs: list[Pair], dev: list[dict[str, list[str]]], test: list[dict[str, list[str]]]
) -> tuple[list[Pair], Counter[str]]:
    """The pairs that training may see, and how many were left out by which rule."""
    held_out = {sentence_key(text) for row in (*dev, *test) for texts in row.values() for text in texts}
    near = NearDuplicates(sentence_key(row["en"][0]) for row in test)
    kept, dropped = [], Counter[str]()
    for pair in pairs:
        source = sentence_key(pair.source)
        if source in held_out or sentence_key(pair.target) in held_out:
            dropped["sentence of dev or test"] += 1
        elif source in near:
            dropped["near-duplicate of test"] += 1
        else:
            kept.append(pair)
    return kept, dropped


def run(
    pairs: Annotated[list[str], typer.Option(help="LANGUAGE=FILE of pairs; may be given several times.")],
    dev: Annotated[Path, typer.Option(help="JSON lines of sentences with references that training may not see.")],
    out: Annotated[Path, typer.Option(help="Folder for train.tsv, dev.jsonl and test.jsonl.")],
    extra: Annotated[
        list[str] | None, typer.Option(help="LANGUAGE=FILE of pairs for training alone, none of them for the test.")
    ] = None,
    test_sentences: Annotated[int, typer.Option(help="English sentences of the test set.")] = 2000,
    seed: int = 1,
) -> None:
    """Cleans, splits and says what was left out."""
    every = [pair for spec in pairs for pair in _read_spec(spec)]
    main = clean(every)
    known = set(main)
    more = [p for p in clean(pair for spec in extra or [] for pair in _read_spec(spec)) if p not in known]
    dev_rows, test_rows = read_references(dev), draw_test(main, test_sentences, seed)
    train, dropped = without_held_out(main + more, dev_rows, test_rows)
    out.mkdir(parents=True, exist_ok=True)
    lines = (f"{pair.language}\t{pair.source}\t{pair.target}\n" for pair in train)
    (out / "train.tsv").write_text("".join(lines), encoding="utf-8")
    write_references(out / "dev.jsonl", dev_rows)
    write_references(out / "test.jsonl", test_rows)
    print(f"{len(every):,} pairs, {len(main):,} clean ones, and {len(more):,} extra ones")
    print(", ".join(f"{count:,} dropped: {why}" for why, count in dropped.items()))
    print(", ".join(f"{language} {count:,}" for language, count in Counter(p.language for p in train).items()))


def _read_spec(spec: str) -> Iterator[Pair]:
    language, _, file = spec.partition("=")
    if not file:
        raise DragomanError("bad_corpus", f"{spec!r} does not say which language: write es=FILE")
    return read_pairs(Path(file), language)


if __name__ == "__main__":
    typer.run(run)
