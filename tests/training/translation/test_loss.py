"""The fused loss against its definition, and its gradient against autograd's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.translation import loss
from training.translation.data import PROMPT, READ_ON, SOURCE, WRITE
from training.translation.loss import interleaved_loss, logits_loss

END = 3


def case(seed: int, B: int, T: int, V: int = 23, D: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, matrix = torch.randn(B, T, D, generator=generator), torch.randn(V, D, generator=generator)
    kinds = torch.randint(0, 4, (B, T), generator=generator).to(torch.uint8)
    ids = torch.randint(0, V, (B, T), generator=generator)
    ids[(kinds == READ_ON) & (ids == END)] = END + 1  # reading on is never an end of read
    return hidden, matrix, ids, kinds


def plain(
    hidden: Tensor, matrix: Tensor, ids: Tensor, kinds: Tensor, source_weight: float, smoothing: float
) -> tuple[Tensor, float, float, float]:
    """The definition, position by position."""
    total, write, source, decision = hidden.new_zeros(()), 0.0, 0.0, 0.0
    for row in range(len(ids)):
        for t in range(1, ids.shape[1]):
            log_p, wanted, kind = (hidden[row, t - 1] @ matrix.T).log_softmax(0), ids[row, t], int(kinds[row, t])
            if kind == WRITE:
                total = total - (1 - smoothing) * log_p[wanted] - smoothing * log_p.mean()
                write -= log_p[wanted].item()
                decision -= log_p[END].item() if wanted == END else 0.0
            elif kind in (SOURCE, READ_ON):
                total = total - source_weight * log_p[wanted]
                source -= log_p[wanted].item()
            if kind == READ_ON:
                on = -torch.log(1 - log_p[END].exp())
                total, decision = total + on, decision + on.item()
            assert kind in (PROMPT, SOURCE, READ_ON, WRITE)
    return total, write, source, decision


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99), st.integers(1, 4), st.integers(2, 9), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.1])
)
def test_fused_is_the_definition(seed: int, B: int, T: int, source_weight: float, smoothing: float) -> None:
    hidden, matrix, ids, kinds = case(seed, B, T)
    kinds[0, 1] = WRITE
    wanted = [x.double().requires_grad_() for x in (hidden, matrix)]
    total, write, source, decision = plain(*wanted, ids, kinds, source_weight, smoothing)
    (total * 0.5).backward()
    mine = [x.requires_grad_() for x in (hidden, matrix)]
    found = interleaved_loss(*mine, ids, kinds, END, source_weight=source_weight, smoothing=smoothing, bf16=False)
    (found.total * 0.5).backward()
    for value, expected in zip(found, (total.item(), write, source, decision), strict=True):
        assert abs(value.item() - expected) < 1e-4 * max(1.0, abs(expected))
    for x, y in zip(mine, wanted, strict=True):
        assert x.grad is not None and y.grad is not None
        torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-4, atol=1e-5)
    # And so are the losses of logits.
    whole = [x.detach().requires_grad_() for x in (hidden, matrix)]
    losses = logits_loss(whole[0] @ whole[1].T, ids, kinds, END, source_weight=source_weight, smoothing=smoothing)
    (losses.total * 0.5).backward()
    torch.testing.assert_close([x.item() for x in losses], [x.item() for x in found], rtol=1e-4, atol=1e-4)
    for x, y in zip(whole, wanted, strict=True):
        assert x.grad is not None and y.grad is not None
        torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-4, atol=1e-5)


def test_rows_are_taken_in_portions(monkeypatch) -> None:
    hidden, matrix, ids, kinds = case(1, 5, 40)
    kinds[:] = WRITE
    whole = interleaved_loss(hidden, matrix, ids, kinds, END, source_weight=0.1, smoothing=0.1, bf16=False)
    monkeypatch.setattr(loss, "ROWS", 17)
    parts = interleaved_loss(hidden, matrix, ids, kinds, END, source_weight=0.1, smoothing=0.1, bf16=False)
    torch.testing.assert_close(parts, whole)


def test_bf16_is_close() -> None:
    hidden, matrix, ids, kinds = case(2, 6, 30)
    results = []
    for bf16 in (False, True):
        mine = [x.clone().requires_grad_() for x in (hidden, matrix)]
        found = interleaved_loss(*mine, ids, kinds, END, source_weight=0.1, smoothing=0.1, bf16=bf16)
        found.total.backward()
        results.append([found.total.detach(), *(x.grad for x in mine)])
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_what_is_not_judged_has_no_gradient() -> None:
    hidden, matrix, ids, kinds = case(3, 2, 10)
    kinds[1] = PROMPT
    kinds[0, 5] = PROMPT
    kinds[0, 6] = WRITE
    hidden.requires_grad_()
    interleaved_loss(hidden, matrix, ids, kinds, END, source_weight=0.1, smoothing=0.1, bf16=False).total.backward()
    assert hidden.grad is not None
    assert not hidden.grad[1].any() and not hidden.grad[0, 4].any() and not hidden.grad[:, -1].any()
    assert hidden.grad[0, 5].any()
