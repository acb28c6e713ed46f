"""The transducer loss, against torchaudio's and against a sum over every alignment."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.functional import rnnt_loss

from training.asr.loss import transducer_loss


def lattice(seed: int, frames: list[int], lengths: list[int], classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits = 3 * torch.randn(len(frames), max(frames), max(lengths) + 1, classes)
    return logits.requires_grad_(), torch.randint(classes - 1, (len(frames), max(lengths)))


rows = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=4)


@given(rows, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_equals_torchaudio(rows: list[tuple[int, int]], seed: int) -> None:
    frames, lengths = map(list, zip(*rows, strict=True))
    logits, targets = lattice(seed, frames, lengths)
    ours = transducer_loss(logits, targets, torch.tensor(frames), torch.tensor(lengths), 4)
    (gradient,) = torch.autograd.grad(ours, logits)
    ints = (torch.tensor(x, dtype=torch.int32) for x in (frames, lengths))
    theirs = rnnt_loss(logits, targets.int(), *ints, blank=4, reduction="sum")
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("costs", [False, True])
def test_equals_the_sum_over_all_alignments(costs: bool) -> None:
    frames, pieces, blank = 4, 3, 4
    logits, targets = lattice(7, [frames], [pieces])
    cost = torch.rand(1, frames, pieces) * (3.0 if costs else 0.0)
    scores = logits.detach().double().log_softmax(-1)[0]
    alignments = []
    for order in set(itertools.permutations("m" * (frames - 1) + "s" * pieces)):
        t = u = 0
        total = torch.tensor(0.0, dtype=torch.double)
        for move in order:
            total += scores[t, u, blank if move == "m" else int(targets[0, u])]
            total -= cost[0, t, u] if move == "s" else 0.0
            t, u = t + (move == "m"), u + (move == "s")
        alignments.append(total + scores[t, u, blank])
    sizes = torch.tensor([frames]), torch.tensor([pieces])
    loss = transducer_loss(logits, targets, *sizes, blank, cost=cost if costs else None)
    assert loss.item() == pytest.approx(-torch.stack(alignments).logsumexp(0).item(), rel=1e-5)


def test_a_cost_is_pushed_as_hard_as_the_emissions_that_pay_it_are_probable() -> None:
    logits, targets = lattice(5, [6], [3])
    cost = torch.zeros(1, 6, 3, requires_grad=True)
    sizes = torch.tensor([6]), torch.tensor([3])
    (paid,) = torch.autograd.grad(transducer_loss(logits, targets, *sizes, 4, cost=cost), cost)
    torch.testing.assert_close(paid.sum(1), torch.ones(1, 3))  # each target is emitted once, somewhere
    dear = torch.zeros(1, 6, 3)
    dear[:, 4:] = 20.0
    (elsewhere,) = torch.autograd.grad(transducer_loss(logits, targets, *sizes, 4, cost=dear.requires_grad_()), dear)
    assert elsewhere[:, 4:].max() < 1e-3


def test_padding_is_not_read() -> None:
    logits, targets = lattice(3, [5, 3], [4, 1])
    lengths = (torch.tensor([5, 3]), torch.tensor([4, 1]))
    before = transducer_loss(logits, targets, *lengths, 4)
    spoiled, other = logits.detach().clone(), targets.clone()
    spoiled[1, 3:], spoiled[1, :, 2:], other[1, 1:] = 50.0, -50.0, 0
    assert torch.equal(before.detach(), transducer_loss(spoiled, other, *lengths, 4))
