"""Log-mel groups to encoder frames: which frames of which stream run in the next step.

A model that looks ahead in chunks runs a stream's frames in chunks of look-ahead + 1, each when all of it is there. A
stream may also try the sizes that the model was trained on, the smallest first: a chunk that leaves doubts is put
aside, and tried again when there is enough audio for the next size. An adaptive model takes every group as it comes,
and its layers decide when a frame leaves. Streams of all kinds, and streams that end, share one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, takewhile

import torch
from torch import Tensor

from models import adaptive
from models.adaptive import FrontierState
from models.config import SUBSAMPLING_FACTOR
from models.fastconformer import EncoderState, FastConformer
from streaming.features import FrontEnd

#: An adaptive model has no chunks. It takes one frame a step, so that the numbers do not depend on how the audio came,
#: or, where several chunks are allowed, so many frames for each.
ADAPTIVE_CHUNK_FRAMES = 8


@dataclass(frozen=True)
class EncoderStream:
    """One stream between front end and decoder.

    Attributes:
        state: The encoder's past, batch 1.
        groups: What is not encoded yet: log-mel ``[8, mel_bins]`` each, or the samples that a front end makes it of.
        slots: Real slots in ``groups``.
        lookaheads: The look-ahead that was in force when each group came.
        lookahead_frames: The look-ahead in force, of a chunk or at most; may be changed between steps.
        trial_sizes: Chunk sizes to try before the largest, ascending; none for chunks of one size.
        trial: How many of them have left doubts about the next chunk.
        ended: No further groups will come, so the last chunk may be short.
    """

    state: EncoderState | FrontierState
    groups: tuple[Tensor, ...]
    slots: int
    lookaheads: tuple[int, ...]
    lookahead_frames: int
    trial_sizes: tuple[int, ...] = ()
    trial: int = 0
    ended: bool = False

    @classmethod
    def begin(cls, encoder: FastConformer, lookahead_frames: int, trial_sizes: tuple[int, ...] = ()) -> EncoderStream:
        """A stream that has not begun."""
        init = adaptive.init_state(encoder, 1) if encoder.config.adaptive else encoder.init_state(1)
        return cls(init, (), 0, (), lookahead_frames, trial_sizes)

    def extended(self, groups: Tensor, slots: int, *, ended: bool) -> EncoderStream:
        """The stream with more groups at its end, ``[n, …]``."""
        return replace(
            self,
            groups=self.groups + groups.unbind(),
            slots=self.slots + slots,
            lookaheads=self.lookaheads + (self.lookahead_frames,) * len(groups),
            ended=self.ended or ended,
        )

    def ready_frames(self, max_chunks: int) -> int:
        """Groups that the next step may take: whole chunks, and at the end the rest."""
        if isinstance(self.state, FrontierState):
            return min(len(self.groups), 1 if max_chunks == 1 else max_chunks * ADAPTIVE_CHUNK_FRAMES)
        if not self.groups:
            return 0
        chunk, max_chunks = self.chunk_frames, 1 if self.trial_sizes else max_chunks
        available = min(len(self.groups), max_chunks * chunk)
        # Chunks of one size run together; one that began under another look-ahead than it ends is still one chunk.
        same = sum(1 for _ in takewhile(self.lookaheads[0].__eq__, islice(self.lookaheads, available)))
        available = max(same, min(available, chunk))
        return available if self.ended and available == len(self.groups) else available // chunk * chunk

    @property
    def chunk_frames(self) -> int:
        """Frames of the next chunk; there must be a group."""
        return next(iter(self._smaller_sizes()[self.trial :]), self.lookaheads[0] + 1)

    @property
    def may_wait(self) -> bool:
        """Whether the next chunk could be tried again with more look-ahead."""
        return self.trial < len(self._smaller_sizes()) and not (self.ended and len(self.groups) <= self.chunk_frames)

    def _smaller_sizes(self) -> list[int]:
        return [size for size in self.trial_sizes if size <= self.lookaheads[0]]

    def waiting(self) -> EncoderStream:
        """The stream when the chunk that was tried has left doubts."""
        return replace(self, trial=self.trial + 1)

    def after(self, state: EncoderState | FrontierState, groups: int, slots: int) -> EncoderStream:
        """The stream when a step has taken its first ``groups`` groups."""
        return replace(
            self,
            state=state,
            groups=self.groups[groups:],
            slots=self.slots - slots,
            lookaheads=self.lookaheads[groups:],
            trial=0,
        )


@dataclass(frozen=True)
class Encoded:
    """What a step made of one stream.

    Attributes:
        row: Its row in the batch.
        start_frame: Number of its first new frame.
        reach: For each new frame, the number of the last frame of audio that it had to wait for.
    """

    row: int
    start_frame: int
    reach: tuple[int, ...]

    @property
    def frames(self) -> int:
        """How many frames are new."""
        return len(self.reach)

    def moments(self) -> Iterator[tuple[int, int, int]]:
        """Frames that became known at the same moment of the audio: first, end, and the reach that they share."""
        start = self.start_frame
        for reach, frames in groupby(self.reach):
            stop = start + len(list(frames))
            yield start, stop, reach
            start = stop


@torch.inference_mode()
def encode(
    encoder: FastConformer,
    streams: Sequence[EncoderStream],
    *,
    max_chunks: int = 1,
    front_end: FrontEnd | None = None,
) -> tuple[Tensor, list[Encoded], list[EncoderStream]]:
    """Runs the next chunks of every stream as one batch.

    Args:
        encoder: Frozen weights.
        streams: Streams with at least one ready frame each.
        max_chunks: Chunks of a stream to run at most. The result does not depend on it; more at once cost
            less each, and a live stream has no second one to offer.
        front_end: Makes log-mel of the streams' groups, for all rows together; None if they are log-mel.

    Returns:
        Frames ``[B, T, d_model]``, what each row holds, and the streams after the step.
    """
    counts = [stream.ready_frames(max_chunks) for stream in streams]
    slots = [min(stream.slots, count * SUBSAMPLING_FACTOR) for stream, count in zip(streams, counts, strict=True)]
    groups = torch.stack([g for stream, count in zip(streams, counts, strict=True) for g in stream.groups[:count]])
    mel = _in_rows(groups if front_end is None else front_end.mel(groups), counts)
    mel = mel.to(encoder.pre_encode.out.weight)  # all rows in one transfer
    run = _adaptive if encoder.config.adaptive else _chunks
    encoded, reaches, states = run(encoder, streams, mel, counts, torch.tensor(slots))
    starts = [int(stream.state.frames[0]) for stream in streams]
    done = [Encoded(row, *found) for row, found in enumerate(zip(starts, reaches, strict=True))]
    after = [
        stream.after(state, count, real)
        for stream, state, count, real in zip(streams, states, counts, slots, strict=True)
    ]
    return encoded, done, after


def _in_rows(groups: Tensor, counts: list[int]) -> Tensor:
    """Log-mel of so many groups a row, ``[sum, 8, mel_bins]``, as ``[B, 8 * most, mel_bins]``."""
    if len(set(counts)) > 1:
        groups = torch.nn.utils.rnn.pad_sequence(list(torch.split(groups, counts)), batch_first=True)
    return groups.reshape(len(counts), -1, groups.shape[-1])


_Result = tuple[Tensor, list[tuple[int, ...]], Sequence[EncoderState | FrontierState]]


def _chunks(
    encoder: FastConformer, streams: Sequence[EncoderStream], mel: Tensor, counts: list[int], slots: Tensor
) -> _Result:
    chunks = [stream.chunk_frames for stream in streams]
    states = [stream.state for stream in streams if isinstance(stream.state, EncoderState)]
    past = EncoderState.cat(states, room_frames=max(counts))
    encoded, state = encoder.step(mel, past, slots=slots, chunk_frames=torch.tensor(chunks))
    assert state is not None
    starts = past.frames.tolist()
    reaches = [
        tuple(start + min(i // chunk * chunk + chunk, count) - 1 for i in range(count))
        for start, count, chunk in zip(starts, counts, chunks, strict=True)
    ]
    return encoded, reaches, state.rows()


def _adaptive(
    encoder: FastConformer, streams: Sequence[EncoderStream], mel: Tensor, counts: list[int], slots: Tensor
) -> _Result:
    caps = torch.zeros(len(streams), max(counts), dtype=torch.int64)
    for row, (stream, count) in enumerate(zip(streams, counts, strict=True)):
        caps[row, :count] = torch.tensor(stream.lookaheads[:count])
    ended = [stream.ended and count == len(stream.groups) for stream, count in zip(streams, counts, strict=True)]
    output, state = adaptive.step(
        encoder,
        mel,
        FrontierState.cat([stream.state for stream in streams if isinstance(stream.state, FrontierState)]),
        slots=slots,
        max_lookahead_frames=caps,
        ended=torch.tensor(ended),
        consume=len(streams) > 1,  # several states were copied into one batch
    )
    return output.encoded, output.reach, state.rows()
