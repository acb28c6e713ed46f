"""Adaptive look-ahead: each layer decides for each frame how many of the next frames it waits for.

The idea is that of the adaptive non-causal attention transducer (Strimel et al., "Lookahead When It Matters",
arXiv 2305.04159), whose abstract claims that look-ahead chosen per frame and layer, trained together with a loss on
the latency that it causes, costs fewer errors at the same latency than fixed look-ahead. The definition below is ours:

*Gates.* A scheduler reads the frame's input to the layer and scores the next R frames. Gate ``j`` is the product of
the first ``j`` scores' sigmoids, so gates never rise with distance; a frame waits for as many as there are leading
positive scores. Training disturbs the scores with less and less noise and decides by them in the same way, and sends
gradients back as if the logarithms of the gates had been added to the attention's scores. (Soft gates in the forward
pass, as one would try first, are leant on without being paid for: attention overcomes the logarithm of a gate of 0.2,
whose expected delay is a fifth of a frame, and at inference that gate is closed.)

*Reach.* A frame's reach is the number of the last audio frame that has to be there before it can run. A layer
adds what it asks for; frames run in order, and a frame that attends to its past has to wait for what the past waited
for, so reach is a running maximum.

*Deadline.* A session's cap bounds the reach of frame ``i`` by ``i`` + cap. Whatever has not come by then is
done without.

A frame's place in the audio, its reach and its deadline are counted in encoder frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Reach of a frame that never comes.
NOT_YET = 1 << 40
#: Logarithm of a gate that is closed.
CLOSED_LOG_GATE = -30.0


class Scheduler(nn.Module):
    """Scores of the next frames from a frame's own input to a layer.

    Args:
        d_model: Width of the input.
        hidden: Width of the one hidden layer.
        frames: How many next frames there are to choose from.
    """

    def __init__(self, d_model: int, hidden: int, frames: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.hidden = nn.Linear(d_model, hidden)
        self.scores = nn.Linear(hidden, frames)
        nn.init.zeros_(self.scores.weight)
        nn.init.constant_(self.scores.bias, 0.3)  # a young model looks ahead now and then, and learns when to

    def forward(self, x: Tensor) -> Tensor:
        """``[…, d_model]`` to scores ``[…, frames]``; positive means wait for it."""
        scores: Tensor = self.scores(F.silu(self.hidden(self.norm(x))))
        return scores


def disturbed(scores: Tensor, noise: float) -> Tensor:
    """Scores with logistic noise, fp32: at a ``noise`` of 1 they are positive with the probability of their sigmoids.

    Args:
        scores: ``[…, R]``.
        noise: Scale of the noise; 0 leaves the scores as they are.
    """
    uniform = torch.rand_like(scores, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
    return scores.float() + noise * (uniform.log() - (-uniform).log1p())


def log_gates(scores: Tensor) -> Tensor:
    """Logarithms of the prefix gates, fp32, non-increasing along the last dimension; ``scores`` is ``[…, R]``."""
    return F.logsigmoid(scores.float()).cumsum(-1)


def straight_through(scores: Tensor) -> Tensor:
    """Logarithms of gates that are open or closed, with the gradients of :func:`log_gates`.

    The estimator is that of Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv
    1308.3432, §4), on scores disturbed as in Jang et al., "Categorical Reparameterization with Gumbel-Softmax" (arXiv
    1611.01144, §2.2).
    """
    soft = log_gates(scores)
    hard = torch.where((scores > 0).cumprod(-1).bool(), 0.0, CLOSED_LOG_GATE)
    return hard + soft - soft.detach()


def asked_frames(scores: Tensor) -> Tensor:
    """How many next frames a frame waits for: its leading positive scores, ``int64[…]`` in 0 … R."""
    return (scores > 0).long().cumprod(-1).sum(-1)


def leading_positive(scores: Sequence[float]) -> int:
    """:func:`asked_frames` of one frame, on the host."""
    return next((i for i, score in enumerate(scores) if score <= 0), len(scores))


class Settled(NamedTuple):
    """What the frames of whole inputs wait for.

    Attributes:
        within: ``int64[B, T]``, how many next frames are there by a frame's deadline.
        taken: ``int64[B, T]``, how many of them it sees.
        reach: ``int64[B, T]``, of the layer's outputs.
    """

    within: Tensor
    taken: Tensor
    reach: Tensor


def settle(asked: Tensor, reach: Tensor, deadline: Tensor, *, frames: Tensor, gates: int) -> Settled:
    """Decides on how much of their future the frames of a layer run, for whole inputs at once.

    A frame sees what it asked for as far as that is within its deadline. :func:`run_ready` is the same for a stream.

    Args:
        asked: ``int64[B, T]``.
        reach: ``int64[B, T]``, of the layer's inputs, non-decreasing along a row.
        deadline: ``int64[B, T]``, non-decreasing along a row and never below ``reach``.
        frames: ``int64[B]``, real frames of each row; nothing reaches beyond them.
        gates: R, the most that may be asked for.
    """
    slot = torch.arange(asked.shape[1], device=asked.device)
    there = torch.where(slot < frames[:, None], reach, NOT_YET)
    future = F.pad(there, (0, gates), value=NOT_YET).unfold(1, gates + 1, 1)
    within = (future <= deadline[:, :, None]).sum(-1) - 1
    wanted = torch.minimum(future.gather(2, asked[:, :, None])[:, :, 0], (frames - 1)[:, None])
    return Settled(within, torch.minimum(asked, within), torch.minimum(wanted, deadline).cummax(1).values)


class Place(NamedTuple):
    """A frame that waits in a layer.

    Attributes:
        asked: How many next frames it asked for.
        reach: Reach of its input.
        deadline: Its deadline.
    """

    asked: int
    reach: int
    deadline: int


def run_ready(queue: Sequence[Place], passed: int, fed: int, *, ended: bool) -> list[tuple[int, int]]:
    """Decides which frames of a stream's layer run, and on how much of their future.

    A frame runs when all that it asked for has arrived, when its deadline has passed, or when the audio has ended, and
    not before the frames in front of it. What it sees depends on reaches alone, not on when the audio came.

    Args:
        queue: The frames that wait, and those that have arrived now.
        passed: The furthest reach of the frames that have run.
        fed: Audio frames that have entered the encoder.
        ended: Whether no more will.

    Returns:
        For each frame that runs: how many frames ahead it sees, and its reach.
    """
    ran = []
    for i, (asked, _, deadline) in enumerate(queue):
        if i + asked < len(queue):
            wanted = queue[i + asked].reach
        elif ended or fed > deadline:
            wanted = fed - 1
        else:
            break
        taken = min(asked, len(queue) - 1 - i)
        while queue[i + taken].reach > deadline:
            taken -= 1
        passed = max(passed, min(wanted, deadline))
        ran.append((taken, passed))
    return ran


def soft_reach(log_gate: Tensor, reach: Tensor, frames: Tensor) -> Tensor:
    """Expected reach of a layer's outputs if each gate is the probability that it is open, ``float[B, T]``.

    With gates of 0 and 1 it is the hard reach.

    Args:
        log_gate: ``[B, T, R]``.
        reach: ``float[B, T]`` of the layer's inputs.
        frames: ``int64[B]``, real frames of each row; nothing reaches beyond them.
    """
    B, T, R = log_gate.shape
    gate = F.pad(log_gate.exp(), (1, 0), value=1.0)
    stops = gate - F.pad(gate[:, :, 1:], (0, 1))  # probability of waiting for exactly j frames
    last = (frames - 1).to(reach.dtype)[:, None]
    beyond = torch.cat([torch.minimum(reach, last), last.expand(B, R)], 1)
    beyond = torch.where(torch.arange(T + R, device=reach.device) < frames[:, None], beyond, last)
    return (stops * beyond.unfold(1, R + 1, 1)).sum(-1).cummax(1).values


def attention_bias(log_gate: Tensor, keys: int) -> Tensor:
    """What the gates add to the scores of a whole input, ``[B, 1, T, keys]``: nothing for the past.

    Keys more than R frames ahead have to be masked.
    """
    B, T, R = log_gate.shape
    ahead = torch.arange(keys, device=log_gate.device) - torch.arange(T, device=log_gate.device)[:, None]
    by_distance = F.pad(log_gate, (1, 0))
    return by_distance.gather(2, ahead.clamp(0, R).expand(B, T, keys))[:, None]
