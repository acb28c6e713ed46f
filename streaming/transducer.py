"""Encoder frames to pieces: batched greedy search whose past is a value, for the transducer and for CTC.

Greedy transducer search keeps one predictor output per row until a piece is emitted, so all frames of a step
that still see the same output are scored in one product (label looping, Bataev et al., arXiv 2406.06220). The
result is that of the plain loop over frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.recognizer import RecognizerNet
from models.rnnt import PredictorState


@dataclass(frozen=True)
class Token:
    """One emitted piece.

    Attributes:
        piece: Its id in the tokenizer.
        frame: Encoder frame at which it was emitted, counted from the start of the stream.
        probability: Posterior of the piece at that frame, blank counted in; (0, 1].
    """

    piece: int
    frame: int
    probability: float


@dataclass
class DecoderState:
    """The past of a batch of rows.

    Attributes:
        frames: Frames that each row has decoded.
        predictor: Transducer only.
        last: CTC only: each row's best id at its last frame, the blank at the start.
    """

    frames: list[int]
    predictor: PredictorState | None
    last: list[int]

    @staticmethod
    def cat(states: list[DecoderState]) -> DecoderState:
        """One batch of the rows of several states."""
        predictors = [state.predictor for state in states if state.predictor is not None]
        return DecoderState(
            frames=[n for state in states for n in state.frames],
            predictor=PredictorState.cat(predictors) if predictors else None,
            last=[n for state in states for n in state.last],
        )

    def row(self, index: int) -> DecoderState:
        """A copy of one row, as a state of batch 1."""
        predictor = None if self.predictor is None else self.predictor.row(index)
        return DecoderState([self.frames[index]], predictor, [self.last[index]])

    def rows(self) -> list[DecoderState]:
        """Every row as a state of its own."""
        if len(self.frames) == 1:
            return [self]
        predictors = [None] * len(self.frames) if self.predictor is None else self.predictor.rows()
        rows = zip(self.frames, predictors, self.last, strict=True)
        return [DecoderState([frames], predictor, [last]) for frames, predictor, last in rows]


class TransducerSearch:
    """Greedy search with the transducer.

    Args:
        net: A network with a transducer.
    """

    def __init__(self, net: RecognizerNet) -> None:
        if net.transducer is None:
            raise ValueError("the network has no transducer")
        self._net = net.transducer
        self._blank = net.config.vocab_size

    def init_state(self, batch: int) -> DecoderState:
        """The state of rows that have decoded nothing."""
        return DecoderState([0] * batch, self._net.init_state(batch), [self._blank] * batch)

    @torch.no_grad()
    def step(self, encoded: Tensor, lengths: list[int], state: DecoderState) -> tuple[list[list[Token]], DecoderState]:
        """Decodes the next frames of each row.

        Args:
            encoded: ``[B, T, d_model]``.
            lengths: Frames of each row to decode, at most T.
            state: The past of the rows.

        Returns:
            The pieces that each row emits, and the state.
        """
        predictor = state.predictor
        assert predictor is not None
        projected = self._net.project(encoded)
        B, T, _ = encoded.shape
        tokens: list[list[Token]] = [[] for _ in range(B)]
        at, symbols = [0] * B, [0] * B
        frame = torch.arange(T, device=encoded.device)
        rows = [b for b in range(B) if lengths[b]]
        while rows:
            # 1) Score every frame with the row's present predictor output; find the first that is not blank.
            index = torch.tensor(rows, device=frame.device)
            part = predictor if len(rows) == B else predictor.picked(index)
            logits = self._net.logits(projected if len(rows) == B else projected[index], part.output[:, None])
            bounds = torch.tensor([[at[b], lengths[b]] for b in rows], device=frame.device)
            open_ = (frame >= bounds[:, :1]) & (frame < bounds[:, 1:]) & (logits.argmax(-1) != self._blank)
            found = open_.any(1).nonzero()[:, 0]
            rows = index[found].tolist()  # the others have no piece left
            if not rows:
                break
            # 2) Emit those pieces.
            first = open_.int().argmax(1)[found]
            scores = logits[found, first].float()
            pieces = scores.argmax(-1)
            probabilities = scores.softmax(-1).gather(1, pieces[:, None])[:, 0].tolist()
            for b, t, piece, p in zip(rows, first.tolist(), pieces.tolist(), probabilities, strict=True):
                symbols[b] = symbols[b] + 1 if t == at[b] else 1
                tokens[b].append(Token(piece, state.frames[b] + t, p))
                full = symbols[b] == self._net.config.max_symbols_per_frame
                at[b], symbols[b] = (t + 1, 0) if full else (t, symbols[b])
            # 3) Advance the predictor of those rows.
            predictor = predictor.replaced(index[found], self._net.predict(pieces, part.picked(found)))
        frames = [n + length for n, length in zip(state.frames, lengths, strict=True)]
        return tokens, DecoderState(frames, predictor, state.last)


class CtcSearch:
    """Greedy search with the CTC head: the best id of each frame, repeats merged, blanks dropped.

    Args:
        net: A network with a CTC head.
    """

    def __init__(self, net: RecognizerNet) -> None:
        if net.ctc_decoder is None:
            raise ValueError("the network has no CTC head")
        self._head = net.ctc_decoder
        self._blank = net.config.vocab_size

    def init_state(self, batch: int) -> DecoderState:
        """The state of rows that have decoded nothing."""
        return DecoderState([0] * batch, None, [self._blank] * batch)

    @torch.no_grad()
    def step(self, encoded: Tensor, lengths: list[int], state: DecoderState) -> tuple[list[list[Token]], DecoderState]:
        """Decodes the next frames of each row; arguments and result as in :meth:`TransducerSearch.step`."""
        probabilities, best = self._head(encoded).float().softmax(-1).max(-1)
        tokens: list[list[Token]] = []
        last = list(state.last)
        for b, (ids, ps) in enumerate(zip(best.tolist(), probabilities.tolist(), strict=True)):
            row = []
            for t in range(lengths[b]):
                if ids[t] not in (last[b], self._blank):
                    row.append(Token(ids[t], state.frames[b] + t, ps[t]))
                last[b] = ids[t]
            tokens.append(row)
        frames = [n + length for n, length in zip(state.frames, lengths, strict=True)]
        return tokens, DecoderState(frames, None, last)


#: Either search; both map (encoder frames, lengths, state) to (tokens, state).
Search = TransducerSearch | CtcSearch
