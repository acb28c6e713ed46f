"""The loss of interleaved sequences, fused with the output matrix.

Each position is judged by the kind of the id that follows it (:mod:`training.translation.data`): cross-entropy on that
id, smoothed (Szegedy et al., "Rethinking the Inception Architecture", arXiv 1512.00567, §7), in full for what is
written and with a small weight for the source. At the end of a source word inference asks whether the probability of
``<|end-of-read|>`` reaches a threshold, so there the loss is binary: where the model has to read on it is
``-log(1 - P(end of read))``, and where it has to write, the cross-entropy itself is ``-log P(end of read)``.

Logits are never kept: some rows at a time are multiplied, softmaxed and multiplied back, so that memory stays small and
a CPU's cache is hit. The gradient is thus known when the loss is (Hsu et al., "Liger Kernel", arXiv 2410.10989, §3.2).
By the logits ``z`` with softmax ``p`` it is, for each row and constants of that row,

    a p_k - b - c [k = wanted] + d [k = end of read],

so nothing but ``p`` itself has to be made of ``z``; the other terms are added to the two products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.translation.data import PROMPT, READ_ON, WRITE

#: Rows of logits at a time; the last ones are padded, so that one shape occurs.
ROWS = 256


class Losses(NamedTuple):
    """Sums over a batch, in nats.

    Attributes:
        total: What is minimised; the only one with a gradient.
        write: Cross-entropy of what is written, not smoothed.
        source: Cross-entropy of the source, not weighted.
        decision: Of the ends of source words, read on or write.
    """

    total: Tensor
    write: Tensor
    source: Tensor
    decision: Tensor


def interleaved_loss(
    hidden: Tensor,
    matrix: Tensor,
    ids: Tensor,
    kinds: Tensor,
    end_of_read: int,
    *,
    source_weight: float,
    smoothing: float,
    bf16: bool,
) -> Losses:
    """The losses of a batch.

    Args:
        hidden: ``float32[B, T, d_model]``, what the model makes of ``ids``.
        matrix: ``float32[vocab_size, d_model]``, its output matrix.
        ids: ``int64[B, T]``.
        kinds: ``uint8[B, T]``, of each id.
        end_of_read: Id of ``<|end-of-read|>``.
        source_weight: Of the cross-entropy of the source; what is written has 1.
        smoothing: Share of the probability that is spread over all ids, where something is written.
        bf16: Whether products are made in bf16.
    """
    following, wanted = kinds[:, 1:], ids[:, 1:]
    judged = following != PROMPT
    rows, wanted, following = hidden[:, :-1][judged], wanted[judged], following[judged]
    fused = _Fused.apply(rows, matrix, wanted, following, end_of_read, source_weight, smoothing, bf16)  # type: ignore[no-untyped-call]
    return Losses(*fused)


def logits_loss(
    logits: Tensor, ids: Tensor, kinds: Tensor, end_of_read: int, *, source_weight: float, smoothing: float
) -> Losses:
    """The same losses where the logits ``[B, T, vocab_size]`` are there, as published models give them."""
    following, wanted = kinds[:, 1:], ids[:, 1:]
    judged = following != PROMPT
    z = logits[:, :-1][judged].float()
    terms = _terms(z, z.softmax(1), wanted[judged], following[judged], end_of_read, source_weight, smoothing)
    return Losses(terms.sums[0], *terms.sums[1:].detach())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        matrix: Tensor,
        wanted: Tensor,
        kinds: Tensor,
        end_of_read: int,
        source_weight: float,
        smoothing: float,
        bf16: bool,
    ) -> tuple[Tensor, ...]:
        dtype = torch.bfloat16 if bf16 else torch.float32
        weights, column_sums = matrix.detach().to(dtype), matrix.detach().sum(0)
        row_gradient, matrix_gradient = torch.empty_like(rows), torch.zeros_like(matrix)
        flat_gradient, end_gradient = torch.zeros_like(column_sums), torch.zeros_like(column_sums)
        sums = torch.zeros(4, device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, len(rows), ROWS):
                part = slice(start, start + ROWS)
                x = rows[part].detach()
                padded = _padded(x.to(dtype))
                z = padded @ weights.T
                p = z.softmax(1)
                terms = _terms(
                    z[: len(x)], p[: len(x)], wanted[part], kinds[part], end_of_read, source_weight, smoothing
                )
                sums += terms.sums
                a, b, c, d = (term[:, None] for term in terms[:4])
                gradient = a * (p @ weights)[: len(x)].float()
                gradient -= b * column_sums
                gradient -= c * matrix.detach()[wanted[part]]
                row_gradient[part] = gradient.add_(d * matrix.detach()[end_of_read])
                matrix_gradient += p.T @ _padded((a * x).to(dtype))
                matrix_gradient.index_add_(0, wanted[part], c * x, alpha=-1)
                flat_gradient += (b * x).sum(0)
                end_gradient += (d * x).sum(0)
        matrix_gradient -= flat_gradient
        matrix_gradient[end_of_read] += end_gradient
        ctx.save_for_backward(row_gradient, matrix_gradient)
        others = sums[1:].unbind()
        ctx.mark_non_differentiable(*others)
        return sums[0], *others

    @staticmethod
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor | None, ...]:
        row_gradient, matrix_gradient = ctx.saved_tensors
        return row_gradient * of[0], matrix_gradient * of[0], *[None] * 6


def _padded(x: Tensor) -> Tensor:
    """Up to ``ROWS`` rows."""
    missing = ROWS - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


class _Terms(NamedTuple):
    """Of the gradient, ``float32[rows]`` each, and the sums of :class:`Losses`, ``float32[4]``."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    sums: Tensor


def _terms(
    z: Tensor, p: Tensor, wanted: Tensor, kinds: Tensor, end_of_read: int, source_weight: float, smoothing: float
) -> _Terms:
    writes, reads_on = kinds == WRITE, kinds == READ_ON
    norm = z.amax(1).float() - p.amax(1).float().log()
    entropy = norm - z.gather(1, wanted[:, None])[:, 0].float()
    spread = norm - z.mean(1, dtype=torch.float32)  # cross-entropy against all ids alike
    log_p_end = z[:, end_of_read].float() - norm
    p_end = torch.where(reads_on, log_p_end.exp().clamp(max=1 - 1e-6), 0.0)
    smooth = torch.where(writes, smoothing, 0.0)
    weight = torch.where(writes, 1.0, source_weight)
    decision = -torch.log1p(-p_end)
    total = weight * ((1 - smooth) * entropy + smooth * spread) + decision
    ends = log_p_end[writes & (wanted == end_of_read)]
    parts = [total.sum(), entropy[writes].sum(), entropy[~writes].sum(), decision.sum() - ends.sum()]
    # d(-log(1 - p_e)) / dz_k is p_e for k = e, and -p_k p_e / (1 - p_e) for the others.
    odds = p_end / (1 - p_end)
    return _Terms(
        a=weight - odds,
        b=weight * smooth / z.shape[1],
        c=weight * (1 - smooth),
        d=odds * p_end + p_end,
        sums=torch.stack(parts),
    )
