"""Packed speech to augmented, bucketed batches of log-mel features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from client.normalize import normalize_transcript
from models.config import FRAME_SAMPLES, SUBSAMPLING_FACTOR, FeatureConfig
from streaming.features import FrontEnd
from training.asr.augment import Augmenter
from training.asr.phones import PHONES
from training.asr.prepare import read_index
from training.asr.splice import Splicer, join
from training.asr.synthesize import compose

SAMPLE_RATE_HZ = 16000
_BUCKET_FRAMES = 12


@dataclass(frozen=True)
class Batch:
    """Utterances of similar length.

    Attributes:
        mel: ``[B, 8T, mel_bins]``, in slots (see :mod:`models.fastconformer`), zero-padded.
        slots: ``int64[B]``, real slots.
        targets: ``int64[B, U]``, piece ids, zero-padded.
        target_lengths: ``int64[B]``.
        phones: ``int64[B, V]``, numbers of the sounds (see :mod:`training.asr.phones`), zero-padded.
        phone_lengths: ``int64[B]``; 0 where nobody has noted them.
        audio_s: Seconds of audio in the batch.
    """

    mel: Tensor
    slots: Tensor
    targets: Tensor
    target_lengths: Tensor
    phones: Tensor
    phone_lengths: Tensor
    audio_s: float


@dataclass(frozen=True)
class Utterance:
    """One entry of a packed set; ``offset`` and ``length`` count samples in its file.

    ``cuts_samples`` are where its words begin and end (see :mod:`training.asr.splice`), ``phones`` how it sounds (see
    :mod:`training.asr.phones`); empty if unknown.
    """

    file: Path
    offset: int
    length: int
    text: str
    source: str
    weight: float
    speaker: str = ""
    cuts_samples: tuple[int, ...] = ()
    phones: str = ""


class Drawn(NamedTuple):
    """What training hears once: float32 samples at 16 kHz, what they say and how that sounds, if that is known."""

    samples: np.ndarray
    text: str
    phones: str = ""


def read_packed(folders: list[Path]) -> list[Utterance]:
    """The entries of packed sets (see :mod:`training.asr.prepare`)."""
    entries = []
    for folder in folders:
        for item in read_index(folder):
            entries.append(
                Utterance(
                    folder / "audio.i16",
                    item["offset_samples"],
                    item["n_samples"],
                    item["text"],
                    item["source"],
                    item.get("weight", 1.0),
                    item["speaker"],
                    tuple(item.get("cuts_samples", ())),
                    item.get("phones", ""),
                )
            )
    return entries


class AudioStore:
    """Packed speech, memory-mapped.

    Args:
        entries: What there is.
        spliced_share: Share of the entries with cuts that are spliced when they are drawn.
    """

    def __init__(self, entries: list[Utterance], spliced_share: float = 0.0) -> None:
        self._files = {file: np.memmap(file, np.int16, "r") for file in {entry.file for entry in entries}}
        self._entries, self._splicer, self._spliced_share = entries, Splicer(entries), spliced_share

    def __getitem__(self, entry: Utterance) -> np.ndarray:
        samples = self._files[entry.file][entry.offset : entry.offset + entry.length]
        return samples.astype(np.float32) / 32768

    def draw(self, number: int, rng: np.random.Generator) -> Drawn:
        """An entry, or a splice in its place."""
        entry = self._entries[number]
        if number not in self._splicer or rng.random() >= self._spliced_share:
            return Drawn(self[entry], entry.text, entry.phones)
        text, parts = self._splicer.draw(number, rng)
        return Drawn(join([self[self._entries[source]][part] for source, part in parts]), text)


class TrainingBatches(IterableDataset[Batch]):
    """An endless, seeded stream of batches.

    Utterances are drawn in proportion to their weight, augmented, and cut into batches of similar length.

    Args:
        entries: What to draw from.
        tokenizer: SentencePiece model that makes the targets.
        features: The front end.
        augmenter: Applied to every utterance, or None.
        batch_s: Padded seconds of audio in a batch, at most.
        seed: Start of the stream; another seed gives another order.
        altered_share: Share of the utterances that the augmenter sees.
        spliced_share: Share of the utterances with cuts in whose place other words of their speakers are heard.
        pool: Utterances that are drawn and sorted together.
    """

    def __init__(
        self,
        entries: list[Utterance],
        tokenizer: Path,
        features: FeatureConfig,
        augmenter: Augmenter | None,
        *,
        batch_s: float,
        seed: int,
        altered_share: float = 1.0,
        spliced_share: float = 0.0,
        pool: int = 400,
    ) -> None:
        self._entries, self._tokenizer, self._augmenter = entries, tokenizer, augmenter
        self._features, self._batch_s, self._seed, self._pool = features, batch_s, seed, pool
        self._altered_share, self._spliced_share = altered_share, spliced_share

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(self._seed)
        store, front_end = AudioStore(self._entries, self._spliced_share), FrontEnd(self._features)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(self._tokenizer))
        weights = np.array([entry.weight for entry in self._entries])
        weights /= weights.sum()
        while True:
            drawn = sorted(rng.choice(len(weights), self._pool, p=weights), key=lambda i: self._entries[i].length)
            cuts = list(self._cut(drawn))
            for k in rng.permutation(len(cuts)):
                yield self._batch(cuts[k], store, front_end, pieces, rng)

    def _cut(self, numbers: list[int]) -> Iterator[list[int]]:
        """Splits the numbers of entries, sorted by length, so that each part pads to about ``batch_s``.

        The number of utterances depends on the padded length alone, so that few distinct shapes occur: on a CPU
        every new shape costs the compilation of its kernels.
        """
        part: list[int] = []
        for number in reversed(numbers):
            part.append(number)
            longest = self._entries[part[0]].length
            if len(part) >= self._batch_s * SAMPLE_RATE_HZ / (_padded_frames(longest) * FRAME_SAMPLES):
                yield part
                part = []
        if part:
            yield part

    def _batch(
        self,
        numbers: list[int],
        store: AudioStore,
        front_end: FrontEnd,
        pieces: sentencepiece.SentencePieceProcessor,
        rng: np.random.Generator,
    ) -> Batch:
        drawn = [store.draw(number, rng) for number in numbers]
        if self._augmenter is not None:
            drawn = [
                x._replace(samples=self._augmenter(x.samples, rng)) if rng.random() < self._altered_share else x
                for x in drawn
            ]
        return collate(
            [x.samples for x in drawn],
            [pieces.encode(x.text) for x in drawn],
            front_end,
            [[PHONES.index(phone) for phone in x.phones] for x in drawn],
        )


def text_batches(sentences: list[str], tokenizer: Path, *, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless, seeded stream of text alone: piece ids ``int64[rows, U]``, zero-padded, and lengths ``int64[rows]``.

    Args:
        sentences: What to draw from, some of them joined (:func:`training.asr.synthesize.compose`).
        tokenizer: SentencePiece model.
        rows: Texts in a batch.
        seed: Start of the stream.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    texts = (text for text in map(normalize_transcript, compose(sentences, [seed])) if text)
    while True:
        yield _padded([pieces.encode(text) for text in islice(texts, rows)])


def _padded_frames(samples: int) -> int:
    """Encoder frames of so much audio, rounded up to a whole second or so."""
    return -(-(samples // FRAME_SAMPLES + 1) // _BUCKET_FRAMES) * _BUCKET_FRAMES


def collate(
    audio: Sequence[np.ndarray],
    targets: Sequence[Sequence[int]],
    front_end: FrontEnd,
    phones: Sequence[Sequence[int]] = (),
) -> Batch:
    """Pads utterances into one batch; without ``phones``, nobody has noted their sounds."""
    frames = _padded_frames(max(map(len, audio)))
    mels, slots = [torch.zeros(frames * SUBSAMPLING_FACTOR, front_end.config.mel_bins)], []
    for samples in audio:
        mel, real, _ = front_end.step(samples, front_end.init_state(), last=True)
        mels.append(mel.flatten(0, 1))
        slots.append(real)
    padded_targets, target_lengths = _padded(targets)
    padded_phones, phone_lengths = _padded(phones or [()] * len(audio))
    return Batch(
        mel=torch.nn.utils.rnn.pad_sequence(mels, batch_first=True)[1:],
        slots=torch.tensor(slots),
        targets=padded_targets,
        target_lengths=target_lengths,
        phones=padded_phones,
        phone_lengths=phone_lengths,
        audio_s=sum(map(len, audio)) / SAMPLE_RATE_HZ,
    )


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of numbers, zero-padded, and their lengths."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), torch.tensor([len(row) for row in rows])
