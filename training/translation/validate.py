"""Translates a sample while training, to see where a run stands: BLEU offline and while reading, and the lag.

What a model card says is measured by ``dragoman eval``; this is the same policy, greedy and in one batch, on weights
that are still changing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import sacrebleu
import torch

from client.latency import length_adaptive_average_lagging
from models.llm import Llm
from models.tokenizer import SentencePieceTokenizer, decode
from models.translator import write_masks
from training.translation.chunks import OFFLINE
from training.translation.data import Encoder

#: A chunk is ended when its ids are twice the source's and so many more.
_SPARE_IDS = 25


@dataclass(frozen=True)
class Task:
    """A source to be read word by word, and what its translation is compared with."""

    language: str
    source: list[str]
    references: list[str]


@dataclass
class Reader:
    """One row: what it has read and written.

    Attributes:
        words: Ids of the source words.
        read: Words that have been read.
        written: Ids.
        delays: Source words that had been read when each was written.
        upon: Words that had been read when the last chunk ended.
        begun: Ids that had been written then.
        writing: Whether the row is in the middle of a chunk.
        left: Ids that the chunk may still have.
        ended: Whether the endpoint has been read.
        done: Whether the whole source has been translated.
    """

    words: list[tuple[int, ...]]
    read: int = 0
    written: list[int] = field(default_factory=list)
    delays: list[int] = field(default_factory=list)
    upon: int = 0
    begun: int = 0
    writing: bool = False
    left: int = 0
    ended: bool = False
    done: bool = False

    @property
    def closing(self) -> bool:
        """Whether it writes upon the endpoint alone."""
        return self.writing and self.upon == self.read


@dataclass(frozen=True)
class Score:
    """Of one language at one latency; LAAL in source words."""

    language: str
    latency: str
    bleu: float
    laal: float

    def __str__(self) -> str:
        return f"{self.language} {self.latency} BLEU {self.bleu:.1f} LAAL {self.laal:.2f}"


@torch.no_grad()
def translate(
    net: Llm,
    encoder: Encoder,
    tasks: Sequence[Task],
    latency: str,
    thresholds: Mapping[str, float] = MappingProxyType({}),
) -> list[Reader]:
    """Translates all tasks at once, as they would be translated one by one.

    Args:
        net: The model.
        encoder: Of its tokenizer.
        tasks: What to translate.
        latency: Level.
        thresholds: For a language, the probability of the end of reading from which on it is written in; else 0.5.
    """
    rows = [Reader([encoder.word(word) for word in task.source]) for task in tasks]
    cache = net.init_state(len(rows))
    pending = [list(encoder.begin(task.language, latency).ids) for task in tasks]
    for row, ids in zip(rows, pending, strict=True):
        _read(row, ids, encoder, offline=latency == OFFLINE)
    limits = [thresholds.get(task.language, 0.5) for task in tasks]
    masks = write_masks(encoder.tokenizer, encoder.end_of_write, net.config.vocab_size).to(net.device)
    while any(pending):
        counts = torch.tensor([len(ids) for ids in pending])
        tokens = torch.zeros(len(rows), int(counts.max()), dtype=torch.int64)
        for k, ids in enumerate(pending):
            tokens[k, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        logits, after = net.step(tokens, counts, cache)
        assert after is not None
        cache = after
        logits = logits[:, -1].float()
        p_end = logits.softmax(-1)[:, encoder.end_of_read].tolist()
        begins = [int(len(row.written) == row.begun and not row.closing) for row in rows]
        best = logits.masked_fill(masks[begins], -torch.inf).argmax(-1).tolist()
        pending = [
            _advance(row, p_end[k] >= limits[k], best[k], encoder, offline=latency == OFFLINE)
            for k, row in enumerate(rows)
        ]
    return rows


def _read(row: Reader, ids: list[int], encoder: Encoder, *, offline: bool) -> None:
    """Appends the next word, or all of them; behind the last one, the endpoint, upon which a write follows."""
    if row.ended:
        row.done = True
        return
    start, row.read = row.read, len(row.words) if offline else min(row.read + 1, len(row.words))
    for word in row.words[start : row.read]:
        ids += word
    if offline or start == len(row.words):
        row.ended = True
        ids += encoder.endpoint
        _begin_write(row, ids, encoder)


def _begin_write(row: Reader, ids: list[int], encoder: Encoder) -> None:
    ids.append(encoder.end_of_read)
    row.writing, row.left = True, _SPARE_IDS + 2 * sum(map(len, row.words[: row.read])) - len(row.written)


def _advance(row: Reader, write: bool, token: int, encoder: Encoder, *, offline: bool) -> list[int]:
    """The ids that a row reads next, none if it is done."""
    ids: list[int] = []
    if row.done:
        return ids
    if not row.writing:
        if write:
            _begin_write(row, ids, encoder)
        else:
            _read(row, ids, encoder, offline=offline)
        return ids
    row.left -= 1
    if token == encoder.end_of_write or row.left <= 0 or (row.closing and token not in encoder.marks):
        ids.append(encoder.end_of_write)
        row.writing, row.upon, row.begun = False, row.read, len(row.written)
        _read(row, ids, encoder, offline=offline)
        return ids if not row.done else []
    row.written.append(token)
    row.delays.append(row.read)
    return [token]


def validate(
    net: Llm, tokenizer: SentencePieceTokenizer, tasks: Sequence[Task], latencies: Sequence[str]
) -> Iterator[Score]:
    """Scores each language at each latency."""
    encoder = Encoder(tokenizer)
    for latency in latencies:
        rows = translate(net, encoder, tasks, latency)
        for language in dict.fromkeys(task.language for task in tasks):
            some = [(task, row) for task, row in zip(tasks, rows, strict=True) if task.language == language]
            texts = [decode(tokenizer, row.written).strip() for _, row in some]
            most = max(len(task.references) for task, _ in some)
            references = [[t.references[k] if k < len(t.references) else None for t, _ in some] for k in range(most)]
            bleu = sacrebleu.corpus_bleu(texts, references).score  # type: ignore[arg-type]
            lags = [laal(task, row, tokenizer) for task, row in some]
            yield Score(language, latency, bleu, sum(lags) / len(lags))


def laal(task: Task, row: Reader, tokenizer: SentencePieceTokenizer) -> float:
    """Length-adaptive average lagging of a translation, in source words."""
    starts = tokenizer.word_starts or frozenset()
    # A word has been written when its last id has.
    ends = [k for k in range(len(row.written)) if k + 1 == len(row.written) or row.written[k + 1] in starts]
    delays = [float(row.delays[k]) for k in ends]
    return length_adaptive_average_lagging(delays, len(task.source), len(task.references[0].split())) or 0.0
