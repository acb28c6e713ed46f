"""The transducer loss, as a walk over the anti-diagonals of the lattice.

Graves, "Sequence Transduction with Recurrent Neural Networks" (arXiv 1211.3711), §2.4. torchaudio's loss gives the
same value, but on a CPU it takes its logarithms one by one and needs five times as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Log-probability of what cannot be; finite, so that its gradient is a number.
_NEVER = -1e30


def transducer_loss(
    logits: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor, blank: int, *, cost: Tensor | None = None
) -> Tensor:
    """Negative log-probability of the targets, summed over all alignments and all rows (fp32 scalar).

    With costs it is ``-log Σ P(alignment) exp(-cost of the alignment)``: alignments that cost less count for more, and
    what makes a cost (such as the look-ahead of a frame) is pushed as hard as the emissions that pay it are probable.

    Args:
        logits: ``[B, T, U + 1, V]``, scores of the joint.
        targets: ``int64[B, U]``, padded with anything in range.
        frames: ``int64[B]``, real frames of each row, 1 … T.
        lengths: ``int64[B]``, real targets of each row, 0 … U.
        blank: Which of the V entries moves on to the next frame; the others stay.
        cost: ``[B, T, U]``, in nats, of emitting each target at each frame; None: nothing costs.
    """
    scores = logits.float().log_softmax(-1)
    B, T, width, _ = scores.shape
    stay = scores[:, :, :-1].gather(3, targets[:, None, :, None].expand(B, T, width - 1, 1))[..., 0]
    if cost is not None:
        stay = stay - cost
    moves = _diagonals(scores[..., blank]).unbind(2)
    stays = _diagonals(F.pad(stay, (0, 1), value=_NEVER)).unbind(2)
    # reached[n][b, u]: u pieces and n - u frames have been passed.
    reached = [F.pad(moves[0].new_zeros(B, 1), (0, width - 1), value=_NEVER)]
    for n in range(T + width - 2):
        stayed = F.pad(reached[n] + stays[n], (1, -1), value=_NEVER)
        reached.append(torch.logaddexp(reached[n] + moves[n], stayed))
    rows, last = torch.arange(B, device=logits.device), frames + lengths - 1
    ends = torch.stack(reached)[last, rows, lengths] + scores[rows, frames - 1, lengths, blank]
    return -ends.sum()


def _diagonals(x: Tensor) -> Tensor:
    """``[B, T, U]`` to ``[B, U, T + U - 1]``: column ``n`` holds the entries with ``t + u = n``."""
    B, T, U = x.shape
    sheared = F.pad(x.transpose(1, 2), (0, U), value=_NEVER).reshape(B, -1)
    return sheared[:, : U * (T + U - 1)].view(B, U, T + U - 1)
