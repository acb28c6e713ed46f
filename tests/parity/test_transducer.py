"""Greedy searches against NeMo's own, on the same encoder frames and from end to end."""

import pytest
import torch
from torch import Tensor

from benchmarks.nemo_reference import NemoReference
from models.fastconformer import LEADING_SLOTS
from models.recognizer import Recognizer
from streaming.transducer import CtcSearch, Search, TransducerSearch

pytestmark = pytest.mark.nemo
LENGTHS = (961, 505, 41)
Decoded = list[tuple[list[int], list[int]]]


def encoder_frames(reference: NemoReference) -> tuple[Tensor, Tensor, Tensor]:
    """Log-mel-like input ``[rows, bins, frames]``, and NeMo's encoder frames of it with their lengths."""
    random = torch.Generator().manual_seed(5)
    mel = 2 * torch.randn(len(LENGTHS), reference.shape.mel_bins, max(LENGTHS), generator=random) - 8
    encoded, frames = reference.encode_offline(mel, torch.tensor(LENGTHS), lookahead=13)
    return mel, encoded, frames


def search_in_steps(search: Search, encoded: Tensor, frames: Tensor, width: int) -> Decoded:
    """Pieces and their frames of each row, decoded ``width`` frames at a time."""
    state = search.init_state(len(frames))
    rows: Decoded = [([], []) for _ in frames]
    for start in range(0, encoded.shape[1], width):
        piece = encoded[:, start : start + width]
        lengths = (frames - start).clamp(0, piece.shape[1]).tolist()
        tokens, state = search.step(piece, lengths, state)
        for row, new in zip(rows, tokens, strict=True):
            row[0].extend(token.piece for token in new)
            row[1].extend(token.frame for token in new)
    return rows


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_transducer(models: tuple[NemoReference, Recognizer], width: int) -> None:
    reference, recognizer = models
    _, encoded, frames = encoder_frames(reference)
    expected = reference.rnnt_greedy(encoded, frames)
    emitted = [len(set(where)) for _, where in expected]
    pieces = [len(ids) for ids, _ in expected]
    # Not a vacuous comparison: blanks, frames with several pieces, and frames that reach the cap of ten.
    assert 0 < sum(emitted) < int(frames.sum()) and sum(pieces) > sum(emitted)
    assert any(where.count(frame) == 10 for _, where in expected for frame in where)

    assert search_in_steps(TransducerSearch(recognizer.net), encoded, frames, width) == expected


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_ctc(models: tuple[NemoReference, Recognizer], width: int) -> None:
    reference, recognizer = models
    _, encoded, frames = encoder_frames(reference)
    expected = reference.ctc_greedy(encoded, frames)
    assert all(expected) and sum(map(len, expected)) < int(frames.sum())

    ours = search_in_steps(CtcSearch(recognizer.net), encoded, frames, width)

    assert [ids for ids, _ in ours] == expected


def test_from_log_mel_to_pieces(models: tuple[NemoReference, Recognizer]) -> None:
    reference, recognizer = models
    mel, encoded, frames = encoder_frames(reference)
    slots = torch.tensor(LENGTHS) + LEADING_SLOTS
    tail = -(max(LENGTHS) + LEADING_SLOTS) % 8

    ours, _ = recognizer.net.encoder.step(
        torch.nn.functional.pad(mel, (LEADING_SLOTS, tail)).transpose(1, 2),
        None,
        slots=slots,
        chunk_frames=torch.full((len(LENGTHS),), 14),
    )

    decoded = search_in_steps(TransducerSearch(recognizer.net), ours, frames, 14)
    assert decoded == reference.rnnt_greedy(encoded, frames)
