"""Packed speech to augmented, bucketed batches of log-mel features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from client.normalize import normalize_transcript
from models.config import FRAME_SAMPLES, SUBSAMPLING_FACTOR, FeatureConfig
from streaming.features import FrontEnd
from training.asr.augment import Augmenter
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
        audio_s: Seconds of audio in the batch.
    """

    mel: Tensor
    slots: Tensor
    targets: Tensor
    target_lengths: Tensor
    audio_s: float


@dataclass(frozen=True)
class Utterance:
    """One entry of a packed set; ``offset`` and ``length`` count samples in its file."""

    file: Path
    offset: int
    length: int
    text: str
    source: str
    weight: float


def read_packed(folders: list[Path]) -> list[Utterance]:
    """The entries of packed sets (see :mod:`training.asr.prepare`)."""
    entries = []
    for folder in folders:
        for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            entries.append(
                Utterance(
                    folder / "audio.i16",
                    item["offset_samples"],
                    item["n_samples"],
                    item["text"],
                    item["source"],
                    item.get("weight", 1.0),
                )
            )
    return entries


class AudioStore:
    """The samples of packed sets, memory-mapped."""

    def __init__(self, entries: list[Utterance]) -> None:
        self._files = {file: np.memmap(file, np.int16, "r") for file in {entry.file for entry in entries}}

    def __getitem__(self, entry: Utterance) -> np.ndarray:
        samples = self._files[entry.file][entry.offset : entry.offset + entry.length]
        return samples.astype(np.float32) / 32768


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
        pool: int = 400,
    ) -> None:
        self._entries, self._tokenizer, self._augmenter = entries, tokenizer, augmenter
        self._features, self._batch_s, self._seed, self._pool = features, batch_s, seed, pool
        self._altered_share = altered_share

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(self._seed)
        store, front_end = AudioStore(self._entries), FrontEnd(self._features)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(self._tokenizer))
        weights = np.array([entry.weight for entry in self._entries])
        weights /= weights.sum()
        while True:
            drawn = sorted(rng.choice(len(weights), self._pool, p=weights), key=lambda i: self._entries[i].length)
            cuts = list(self._cut([self._entries[i] for i in drawn]))
            for k in rng.permutation(len(cuts)):
                yield self._batch(cuts[k], store, front_end, pieces, rng)

    def _cut(self, entries: list[Utterance]) -> Iterator[list[Utterance]]:
        """Splits entries, sorted by length, so that each part pads to about ``batch_s``.

        The number of utterances depends on the padded length alone, so that few distinct shapes occur: on a CPU
        every new shape costs the compilation of its kernels.
        """
        part: list[Utterance] = []
        for entry in reversed(entries):
            part.append(entry)
            if len(part) >= self._batch_s * SAMPLE_RATE_HZ / (_padded_frames(part[0].length) * FRAME_SAMPLES):
                yield part
                part = []
        if part:
            yield part

    def _batch(
        self,
        entries: list[Utterance],
        store: AudioStore,
        front_end: FrontEnd,
        pieces: sentencepiece.SentencePieceProcessor,
        rng: np.random.Generator,
    ) -> Batch:
        audio = [store[entry] for entry in entries]
        if self._augmenter is not None:
            audio = [self._augmenter(x, rng) if rng.random() < self._altered_share else x for x in audio]
        targets = [pieces.encode(entry.text) for entry in entries]
        return collate(audio, targets, front_end)


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
        ids = [torch.tensor(pieces.encode(text)) for text in islice(texts, rows)]
        yield torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in ids])


def _padded_frames(samples: int) -> int:
    """Encoder frames of so much audio, rounded up to a whole second or so."""
    return -(-(samples // FRAME_SAMPLES + 1) // _BUCKET_FRAMES) * _BUCKET_FRAMES


def collate(audio: list[np.ndarray], targets: list[list[int]], front_end: FrontEnd) -> Batch:
    """Pads utterances into one batch."""
    frames = _padded_frames(max(map(len, audio)))
    mels, slots = [torch.zeros(frames * SUBSAMPLING_FACTOR, front_end.config.mel_bins)], []
    for samples in audio:
        mel, real, _ = front_end.step(samples, front_end.init_state(), last=True)
        mels.append(mel.flatten(0, 1))
        slots.append(real)
    return Batch(
        mel=torch.nn.utils.rnn.pad_sequence(mels, batch_first=True)[1:],
        slots=torch.tensor(slots),
        targets=torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], batch_first=True),
        target_lengths=torch.tensor([len(t) for t in targets]),
        audio_s=sum(map(len, audio)) / SAMPLE_RATE_HZ,
    )
