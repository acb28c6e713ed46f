"""Makes the sequences that the translator is trained on, and reads them in batches.

    python -m training.translation.data --aligned corpus/aligned.tsv --tokenizer tokenizer.model --out packed

A sequence is a prompt and one to six sentences, chunk pair after chunk pair, at one latency level::

    <s> <|en|> <|es|> <|medium|>  source chunk <|end-of-read|> target chunk <|end-of-write|>  source chunk …

Half of them have their sources as the recogniser writes (lower case, no punctuation, numbers in words), and of those
some with its errors: words put for similar ones, left out and put in, or what it really made of the sentence. The other
half, and all targets, are as written. Each of several passes over the pairs draws joins, levels and errors anew. A pair
that its level cannot cut goes, but for a share, into an offline sequence of that pass, lest the model learn to wait for
everything. Sentences of a sequence follow each other with a pause between them, or without. At a pause the model reads
a symbol, the endpoint, and a write is forced. The symbol may come late, when the last words have been translated: then
the marks that end the sentence are written upon the symbol alone.

What a position has to learn is the *kind* of the id that follows it:

=============  =====================================================================================================
``PROMPT``     nothing: what the model is given, an endpoint and the ``<|end-of-read|>`` behind it among it
``SOURCE``     the next piece of the source, with a small weight: inside a word, and for a chunk's first word
``READ_ON``    that the reader goes on (not ``<|end-of-read|>``) in full, and which word comes with the small weight
``WRITE``      the next id of the target, ``<|end-of-read|>`` and ``<|end-of-write|>``, in full
=============  =====================================================================================================

``out`` holds all sequences one after another: ``ids.u16``, ``kinds.u8``, ``starts.npy`` (int64, one more than there are
sequences), ``passes.npy`` (first sequence of each pass, and their number), ``meta.json``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from client.normalize import normalize_transcript
from models.tokenizer import SentencePieceTokenizer, Tokenizer
from models.translator import (
    END_OF_READ,
    END_OF_WRITE,
    OWN_ENDPOINT,
    TranslationConfig,
    closing_marks,
    prompt_ids,
    source_ids,
)
from streaming.errors import DragomanError
from training.translation.align import Links, read_aligned, word_stem
from training.translation.chunks import (
    LEVEL_WORDS,
    OFFLINE,
    ChunkPair,
    chunk_pairs,
    is_uncut,
    level_words,
    smallest_chunks,
)
from training.translation.corpus import Pair

PROMPT, SOURCE, READ_ON, WRITE = range(4)
_MAX_SENTENCES = 6
#: Batches are padded to multiples of this many ids, so that few distinct shapes occur.
_LENGTH_STEP = 8


@dataclass(frozen=True)
class Mix:
    """What the sequences are made of.

    Attributes:
        passes: Over all pairs.
        offline_share: Of the sequences; the rest is shared evenly by the latency levels.
        written_share: Share of the sequences with sources as written.
        error_share: Share of the other ones with simulated errors.
        word_error: Errors per word in those.
        recognised_share: Of the sentences of which real recogniser output is there, if not as written.
        uncut_share: Share of the pairs that their level cannot cut that stay at it.
        joined: Probability that a further sentence follows in a sequence.
        continuous_share: Of the sequences of several sentences those without a pause between them, which are cut as if
            they were one.
        late_share: Of the last chunks that are long enough for their level, those whose endpoint comes late.
        max_ids: Sequences are not joined beyond so many ids, and longer pairs are left out.
    """

    passes: int = 4
    offline_share: float = 0.3
    written_share: float = 0.5
    error_share: float = 0.2
    word_error: float = 0.1
    recognised_share: float = 0.5
    uncut_share: float = 0.3
    joined: float = 0.5
    continuous_share: float = 0.5
    late_share: float = 0.5
    max_ids: int = 240
    seed: int = 1


# --------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Chunks:
    """The words of one or more sentence pairs, chunk by chunk; source and target have as many chunks."""

    source: list[list[str]]
    target: list[list[str]]

    def joined(self) -> Chunks:
        """All of it in one chunk."""
        return Chunks([sum(self.source, [])], [sum(self.target, [])])


@dataclass(frozen=True)
class Sentence:
    """A sentence pair with its smallest chunk pairs.

    Attributes:
        language: Of the target.
        source: Words as written.
        target: Words as written.
        smallest: Where it may be cut.
        spoken: For each of the smallest chunks, its source words as the recogniser writes them; None if the sentence
            has no such form.
    """

    language: str
    source: list[str]
    target: list[str]
    smallest: list[ChunkPair]
    spoken: list[list[str]] | None

    @classmethod
    def of(cls, pair: Pair, links: Links) -> Sentence:
        """Cuts a pair."""
        source, target = pair.source.split(), pair.target.split()
        smallest = smallest_chunks(source, target, links)
        starts = [0, *(chunk.source_end for chunk in smallest)]
        spoken = [normalize_transcript(" ".join(source[a:b])) for a, b in zip(starts, starts[1:], strict=False)]
        words = [text.split() for text in spoken if text is not None]
        return cls(pair.language, source, target, smallest, words if len(words) == len(smallest) else None)

    @classmethod
    def joined(cls, sentences: Sequence[Sentence]) -> Sentence:
        """Sentences of one language that follow each other without a pause, as one that may be cut between them too."""
        source, target, smallest = list[str](), list[str](), list[ChunkPair]()
        spoken: list[list[str]] | None = []
        for one in sentences:
            smallest += [ChunkPair(len(source) + c.source_end, len(target) + c.target_end) for c in one.smallest]
            source, target = source + one.source, target + one.target
            spoken = None if spoken is None or one.spoken is None else spoken + one.spoken
        return cls(sentences[0].language, source, target, smallest, spoken)

    def is_uncut(self, latency: str) -> bool:
        """Whether its word order does not allow what a latency level asks for."""
        return is_uncut(chunk_pairs(self.smallest, latency, self.language), latency, self.language)

    def chunks(self, latency: str, *, spoken: bool) -> Chunks:
        """The words at a latency level; with ``spoken``, which must exist, in spoken form."""
        ends = chunk_pairs(self.smallest, latency, self.language)
        starts = [ChunkPair(0, 0), *ends]
        source = [self.source[a.source_end : b.source_end] for a, b in zip(starts, ends, strict=False)]
        target = [self.target[a.target_end : b.target_end] for a, b in zip(starts, ends, strict=False)]
        if spoken:
            assert self.spoken is not None
            source, parts = [], iter(zip(self.smallest, self.spoken, strict=True))
            for end in ends:
                words: list[str] = []
                for small, more in parts:
                    words += more
                    if small == end:
                        break
                source.append(words)
        return Chunks(source, target)


def as_recognised(chunks: Chunks, recognised: str) -> Chunks:
    """The same with what the recogniser made of the sentence.

    Words are matched, and a chunk ends with the recognised word that matches its end. Chunks that are left without a
    word are joined with the next one, or the last.

    Args:
        chunks: In spoken form.
        recognised: Words; at least one.
    """
    reference, heard = [word for words in chunks.source for word in words], recognised.split()
    place = [0] * (len(reference) + 1)
    for _, a, b, c, d in SequenceMatcher(a=reference, b=heard, autojunk=False).get_opcodes():
        for i in range(a + 1, b + 1):
            place[i] = c + (d - c) * (i - a) // (b - a)
    ends = np.cumsum([len(words) for words in chunks.source]).tolist()
    places = [*(place[end] for end in ends[:-1]), len(heard)]
    source: list[list[str]] = []
    target: list[list[str]] = []
    start, waiting = 0, list[str]()
    for end, words in zip(places, chunks.target, strict=True):
        waiting = waiting + words
        if end > start:
            source.append(heard[start:end])
            target.append(waiting)
            start, waiting = end, []
    target[-1] += waiting
    return Chunks(source, target)


class RecogniserErrors:
    """Puts words for similar ones, leaves some out and puts some in, as a recogniser does.

    Words are similar that have the same consonants, or that become the same by leaving out a letter of each.

    Args:
        words: How often each word occurs; rare ones are put for nothing.
        at_least: What is rare.
    """

    _SHARES = (0.7, 0.85)  # replaced, then left out; the rest is put in

    def __init__(self, words: Mapping[str, int], at_least: int = 5) -> None:
        groups: dict[str, list[str]] = defaultdict(list)
        self._common = [word for word, count in words.items() if count >= at_least]
        for word in self._common:
            for sign in self._signs(word):
                groups[sign].append(word)
        self._groups = {sign: some for sign, some in groups.items() if len(some) > 1}
        short = sorted((word for word in self._common if len(word) <= 4), key=lambda word: -words[word])
        self._fillers = short[:50]

    def __call__(self, words: list[str], rate: float, rng: random.Random) -> list[str]:
        """The words with so many errors per word; at least one word is left."""
        heard: list[str] = []
        for word in words:
            if rng.random() >= rate:
                heard.append(word)
                continue
            kind = rng.random()
            if kind < self._SHARES[0]:
                heard.append(self._similar(word, rng))
            elif kind >= self._SHARES[1]:
                heard += [word, rng.choice(self._fillers)] if self._fillers else [word]
        return heard or words[:1]

    def _similar(self, word: str, rng: random.Random) -> str:
        found = [w for sign in self._signs(word) for w in self._groups.get(sign, ()) if w != word]
        return rng.choice(found) if found else word

    @staticmethod
    def _signs(word: str) -> Iterator[str]:
        consonants = "".join(c for c in word if c not in "aeiouy'h")
        if len(consonants) > 1:
            yield "~" + consonants
        if len(word) > 2:
            yield word
            yield from {word[:i] + word[i + 1 :] for i in range(len(word))}


# ------------------------------------------------------------------------------------------------------- sequences


@dataclass
class Interleaved:
    """A sequence: its ids, and the kind of each."""

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], kind: int) -> None:
        """Appends ids of one kind."""
        self.ids += ids
        self.kinds += [kind] * len(ids)


class Encoder:
    """Writes sequences as ids, as inference does (:mod:`streaming.translation`).

    Args:
        tokenizer: With the symbols of the format.
        config: Says what a sequence begins with, and which symbol is the endpoint; None for those of our own family.

    Raises:
        DragomanError: ``bad_tokenizer`` if a symbol is missing.
    """

    def __init__(self, tokenizer: Tokenizer, config: TranslationConfig | None = None) -> None:
        self.word: Callable[[str], tuple[int, ...]] = functools.cache(functools.partial(source_ids, tokenizer))
        self.target_word: Callable[[str], tuple[int, ...]] = functools.cache(tokenizer.encode_word)
        self.tokenizer, self._config = tokenizer, config or TranslationConfig(endpoint=OWN_ENDPOINT)
        self.end_of_read, self.end_of_write = self._symbol(END_OF_READ), self._symbol(END_OF_WRITE)
        self.endpoint = () if self._config.endpoint is None else (self._symbol(self._config.endpoint),)
        self.marks = closing_marks(tokenizer, self.end_of_write)

    def _symbol(self, symbol: str) -> int:
        found = self.tokenizer.id_of(symbol)
        if found is None:
            raise DragomanError(
                "bad_tokenizer", f"the tokenizer has no symbol {symbol}; train it with training.translation.tokenizer"
            )
        return found

    def begin(self, language: str, latency: str) -> Interleaved:
        """The prompt."""
        sequence = Interleaved()
        prompt, _ = prompt_ids(self.tokenizer, self._config, "en", language, latency)
        sequence.add(prompt, PROMPT)
        return sequence

    def add_segment(self, sequence: Interleaved, chunks: Chunks, *, late: bool = False) -> None:
        """Appends the chunk pairs of a segment, which ends with a pause.

        Args:
            sequence: Grows.
            chunks: At least one word on both sides of each.
            late: Whether the endpoint comes after the last words have been translated, if they can do without it.
        """
        for source, target in zip(chunks.source[:-1], chunks.target[:-1], strict=True):
            self._add(sequence, source, self._ids(target))
        parts = self._before_marks(chunks.target[-1]) if late and self.endpoint else None
        if parts is None:
            self._add(sequence, chunks.source[-1], self._ids(chunks.target[-1]), ends=True)
        else:
            self._add(sequence, chunks.source[-1], parts[0])
            self._add(sequence, [], parts[1], ends=True)

    def _ids(self, words: Iterable[str]) -> tuple[int, ...]:
        return tuple(token for word in words for token in self.target_word(word))

    def _add(self, sequence: Interleaved, source: list[str], target: Sequence[int], *, ends: bool = False) -> None:
        """Appends one chunk pair; the write after an endpoint is forced, and not learnt."""
        for k, ids in enumerate(filter(None, map(self.word, source))):
            sequence.add(ids[:1], READ_ON if k else SOURCE)
            sequence.add(ids[1:], SOURCE)
        sequence.add(self.endpoint if ends else (), PROMPT)
        sequence.add([self.end_of_read], PROMPT if ends else WRITE)
        sequence.add([*target, self.end_of_write], WRITE)

    def _before_marks(self, words: list[str]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Ids of the words, and of the marks behind them; None if they cannot be told apart."""
        said = next((n for n in range(len(words), 0, -1) if word_stem(words[n - 1])), 0)
        if not said:
            return None
        last = words[said - 1]
        stem = last.rstrip("".join(c for c in last if not c.isalnum()))
        ids, bare = self.target_word(last), self.target_word(stem)
        if ids[: len(bare)] != bare:
            return None
        return self._ids(words[: said - 1]) + bare, ids[len(bare) :] + self._ids(words[said:])


class Writer:
    """Draws sequences from sentence pairs.

    Args:
        encoder: Writes them as ids.
        mix: What they are made of.
        errors: Makes a recogniser's errors.
        recognised: Real recogniser output by the spoken form of the sentence.
    """

    def __init__(
        self, encoder: Encoder, mix: Mix, errors: RecogniserErrors, recognised: Mapping[str, list[str]]
    ) -> None:
        self._encoder, self._mix, self._errors, self._recognised = encoder, mix, errors, recognised

    def one_pass(self, sentences: Iterable[Sentence], rng: random.Random) -> Iterator[Interleaved]:
        """Sequences that together hold each sentence once, those of one target language only."""
        drawn = list(sentences)
        rng.shuffle(drawn)
        waiting, uncut = deque(drawn), deque[Sentence]()
        while waiting:
            latency = OFFLINE if rng.random() < self._mix.offline_share else rng.choice(list(LEVEL_WORDS))
            yield from self._paragraph(waiting, latency, uncut, rng)
        while uncut:
            yield from self._paragraph(uncut, OFFLINE, uncut, rng)

    def _paragraph(
        self, waiting: deque[Sentence], latency: str, uncut: deque[Sentence], rng: random.Random
    ) -> Iterator[Interleaved]:
        """Takes sentences from ``waiting`` until a sequence is full; those that cannot be cut go to ``uncut``."""
        mix = self._mix
        spoken, count = rng.random() >= mix.written_share, 1
        while count < _MAX_SENTENCES and rng.random() < mix.joined:
            count += 1
        sentences, words = list[Sentence](), 0
        while waiting and len(sentences) < count:
            words += len(waiting[0].source) + len(waiting[0].target)
            if sentences and words > mix.max_ids / 2:
                break
            sentence = waiting.popleft()
            if sentence.is_uncut(latency) and rng.random() >= mix.uncut_share:
                uncut.append(sentence)
            else:
                sentences.append(sentence)
        if not sentences:
            return
        if len(sentences) > 1 and rng.random() < (0.5 if latency == OFFLINE else mix.continuous_share):
            sentences = [Sentence.joined(sentences)]
        erroneous = rng.random() < mix.error_share
        language = sentences[0].language
        sequence = self._encoder.begin(language, latency)
        for sentence in sentences:
            chunks = self._chunks(sentence, latency, spoken, erroneous, rng)
            late = latency != OFFLINE and len(chunks.source[-1]) >= level_words(latency, language)
            self._encoder.add_segment(sequence, chunks, late=late and rng.random() < mix.late_share)
        if len(sequence.ids) <= mix.max_ids:
            yield sequence

    def _chunks(self, sentence: Sentence, latency: str, spoken: bool, erroneous: bool, rng: random.Random) -> Chunks:
        if not spoken or sentence.spoken is None:
            return sentence.chunks(latency, spoken=False)
        chunks = sentence.chunks(latency, spoken=True)
        heard = self._recognised.get(" ".join(word for words in chunks.source for word in words))
        if heard and rng.random() < self._mix.recognised_share:
            return as_recognised(chunks, rng.choice(heard))
        if not erroneous:
            return chunks
        return Chunks([self._errors(words, self._mix.word_error, rng) for words in chunks.source], chunks.target)


def read_sentences(aligned: Path, limit: int | None = None) -> tuple[dict[str, list[Sentence]], Counter[str]]:
    """The pairs of a file of ``training.translation.align``, cut, by language, and how often each spoken word occurs.

    Args:
        aligned: The file.
        limit: Only so many pairs; None for all.
    """
    by_language: dict[str, list[Sentence]] = defaultdict(list)
    words: Counter[str] = Counter()
    for pair, links in itertools.islice(read_aligned(aligned), limit):
        sentence = Sentence.of(pair, links)
        by_language[pair.language].append(sentence)
        words.update(word for part in sentence.spoken or [] for word in part)
    return dict(by_language), words


def read_recognised(file: Path) -> dict[str, list[str]]:
    """What a recogniser made of sentences, from JSON lines with ``text`` and ``recognised``, by their spoken form."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        text, heard = normalize_transcript(item["text"]), item["recognised"].strip()
        if text and heard:
            found[text].append(heard)
    return dict(found)


# --------------------------------------------------------------------------------------------------------- packing


def pack(passes: Iterable[Iterable[Interleaved]], out: Path, meta: Mapping[str, object]) -> None:
    """Writes sequences one after another; the module's docstring says how."""
    out.mkdir(parents=True, exist_ok=True)
    lengths: list[int] = []
    firsts = []
    with (out / "ids.u16").open("wb") as ids, (out / "kinds.u8").open("wb") as kinds:
        for some in passes:
            firsts.append(len(lengths))
            for sequence in some:
                ids.write(np.array(sequence.ids, np.uint16).tobytes())
                kinds.write(bytes(sequence.kinds))
                lengths.append(len(sequence.ids))
    np.save(out / "starts.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    np.save(out / "passes.npy", np.array([*firsts, len(lengths)]))
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Batch:
    """Sequences of similar length.

    Attributes:
        ids: ``int64[B, T]``; 0 behind a sequence's end.
        kinds: ``uint8[B, T]``, of each id; ``PROMPT`` behind a sequence's end.
    """

    ids: Tensor
    kinds: Tensor


class Packed:
    """A folder that :func:`pack` wrote, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.meta: dict[str, object] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self._ids = np.memmap(folder / "ids.u16", np.uint16, "r")
        self._kinds = np.memmap(folder / "kinds.u8", np.uint8, "r")
        self._starts, self._passes = np.load(folder / "starts.npy"), np.load(folder / "passes.npy")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def require_tokenizer(self, file: Path) -> None:
        """Makes sure that the ids were made with a tokenizer.

        Raises:
            DragomanError: ``bad_tokenizer``.
        """
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != self.meta["tokenizer_sha256"]:
            raise DragomanError(
                "bad_tokenizer",
                f"{file} has the SHA-256 {found[:12]}…, and the sequences were made with"
                f" {str(self.meta['tokenizer_sha256'])[:12]}…; pack them anew with training.translation.data",
            )

    @property
    def n_ids(self) -> int:
        """Ids of all sequences together."""
        return len(self._ids)

    def batches(self, ids_per_batch: int, seed: int, *, skip: int = 0) -> Iterator[Batch]:
        """An endless, seeded stream: pass after pass, each in an order of its own, in batches of similar length.

        Args:
            ids_per_batch: Padded ids of a batch, at most, and of one sequence.
            seed: Decides the order.
            skip: So many batches are left out, as if they had been read.
        """
        full = self._full(ids_per_batch, seed)
        for _ in range(skip):
            next(full)
        for length, rows in full:
            yield self._batch(length, rows)

    def _full(self, ids_per_batch: int, seed: int) -> Iterator[tuple[int, list[int]]]:
        """Padded length and sequences of each batch; how many they are depends on the length alone."""
        buckets: dict[int, list[int]] = defaultdict(list)
        epoch = 0
        while True:
            k = epoch % (len(self._passes) - 1)
            order = np.random.default_rng([seed, epoch]).permutation(np.arange(self._passes[k], self._passes[k + 1]))
            lengths = self._starts[order + 1] - self._starts[order]
            for i, padded in zip(order.tolist(), (-(-lengths // _LENGTH_STEP) * _LENGTH_STEP).tolist(), strict=True):
                bucket = buckets[padded]
                bucket.append(i)
                if len(bucket) == max(1, ids_per_batch // padded):
                    yield padded, buckets.pop(padded)
            epoch += 1

    def _batch(self, length: int, rows: list[int]) -> Batch:
        ids, kinds = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.uint8)
        for row, i in enumerate(rows):
            a, b = self._starts[i], self._starts[i + 1]
            ids[row, : b - a], kinds[row, : b - a] = self._ids[a:b], self._kinds[a:b]
        return Batch(torch.from_numpy(ids), torch.from_numpy(kinds))


def run(
    aligned: Annotated[Path, typer.Option(help="aligned.tsv of training.translation.align.")],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model of training.translation.tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder of the packed sequences.")],
    passes: Annotated[int, typer.Option(help="Over all pairs, each drawn anew.")] = Mix.passes,
    recognised: Annotated[Path | None, typer.Option(help="Recogniser output, JSON lines: text, recognised.")] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs to read, to try things out.")] = None,
    seed: int = 1,
) -> None:
    """Draws and packs the sequences of all passes."""
    mix = Mix(passes=passes, seed=seed)
    model = tokenizer.read_bytes()
    encoder = Encoder(SentencePieceTokenizer(model))
    by_language, words = read_sentences(aligned, limit)
    writer = Writer(encoder, mix, RecogniserErrors(words), read_recognised(recognised) if recognised else {})
    kinds: Counter[int] = Counter()

    def one_pass(k: int) -> Iterator[Interleaved]:
        for language, sentences in sorted(by_language.items()):
            for sequence in writer.one_pass(sentences, random.Random(f"{seed} {k} {language}")):
                kinds.update(sequence.kinds)
                yield sequence

    meta = {"tokenizer_sha256": hashlib.sha256(model).hexdigest(), **asdict(mix)}
    pack((one_pass(k) for k in range(passes)), out, meta)
    packed = Packed(out)
    print(f"{len(packed):,} sequences, {packed.n_ids:,} ids, {packed.n_ids / len(packed):.1f} a sequence")
    names = {PROMPT: "prompt", SOURCE: "source", READ_ON: "read on", WRITE: "write"}
    print(", ".join(f"{name} {kinds[kind]:,}" for kind, name in names.items()))


if __name__ == "__main__":
    typer.run(run)
