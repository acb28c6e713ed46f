"""Log-mel groups to encoder frames: which frames of which stream run in the next step.

A stream's frames run in chunks of look-ahead + 1, and a chunk runs when all of it is there. Streams with
different look-aheads, and streams that end, share one batch: each row has its own number of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.config import SUBSAMPLING_FACTOR
from models.fastconformer import EncoderState, FastConformer


@dataclass(frozen=True)
class EncoderStream:
    """One stream between front end and decoder.

    Attributes:
        state: The encoder's past, batch 1.
        groups: ``[n, 8, mel_bins]``, log-mel that is not encoded yet.
        slots: Real slots in ``groups``.
        lookahead_frames: Of the next chunk; may be changed between steps.
        ended: No further groups will come, so the last chunk may be short.
    """

    state: EncoderState
    groups: Tensor
    slots: int
    lookahead_frames: int
    ended: bool = False

    def extended(self, groups: Tensor, slots: int, *, ended: bool) -> EncoderStream:
        """The stream with more log-mel at its end."""
        return replace(
            self, groups=torch.cat([self.groups, groups]), slots=self.slots + slots, ended=self.ended or ended
        )

    def ready_frames(self, max_chunks: int) -> int:
        """Frames that the next step may encode: whole chunks, and at the end the rest."""
        chunk = self.lookahead_frames + 1
        available = min(len(self.groups), max_chunks * chunk)
        return available if self.ended and available == len(self.groups) else available // chunk * chunk


@dataclass(frozen=True)
class Encoded:
    """What a step made of one stream.

    Attributes:
        row: Its row in the batch.
        start_frame: Number of its first new frame.
        frames: How many are new.
        chunk_frames: Look-ahead + 1 of the step.
    """

    row: int
    start_frame: int
    frames: int
    chunk_frames: int


@torch.no_grad()
def encode(
    encoder: FastConformer, streams: Sequence[EncoderStream], *, max_chunks: int = 1
) -> tuple[Tensor, list[Encoded], list[EncoderStream]]:
    """Runs the next chunks of every stream as one batch.

    Args:
        encoder: Frozen weights.
        streams: Streams with at least one ready frame each.
        max_chunks: Chunks of a stream to run at most. The result does not depend on it; more at once cost
            less each, and a live stream has no second one to offer.

    Returns:
        Frames ``[B, T, d_model]``, what each row holds, and the streams after the step.
    """
    frames = [stream.ready_frames(max_chunks) for stream in streams]
    like = encoder.pre_encode.out.weight
    mel = like.new_zeros(len(streams), max(frames) * SUBSAMPLING_FACTOR, encoder.mel_bins)
    slots, done = [], []
    for row, (stream, count) in enumerate(zip(streams, frames, strict=True)):
        mel[row, : count * SUBSAMPLING_FACTOR] = stream.groups[:count].flatten(0, 1)
        slots.append(min(stream.slots, count * SUBSAMPLING_FACTOR))
        done.append(Encoded(row, int(stream.state.frames[0]), count, stream.lookahead_frames + 1))
    encoded, state = encoder.step(
        mel,
        EncoderState.cat([stream.state for stream in streams]),
        slots=torch.tensor(slots),
        chunk_frames=torch.tensor([item.chunk_frames for item in done]),
    )
    assert state is not None
    after = [
        replace(stream, state=part, groups=stream.groups[count:], slots=stream.slots - real)
        for stream, part, count, real in zip(streams, state.rows(), frames, slots, strict=True)
    ]
    return encoded, done, after
