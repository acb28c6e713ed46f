"""Drafts from heads on the model's own hidden state (:mod:`models.heads`), which may go on learning.

The hidden state from which the model chose its last token says what may follow. It costs a fraction of a forward, and
unlike n-grams it knows the whole source. How sure a guess is, is what the head for acceptance says of it, so that a
controller ends a draft where a rejection becomes likely.

With ``learns``, what the model chooses is kept as places: a hidden state, and the tokens that came there. A guess of
head ``k`` counts only where those before it were right, and there the model's choice is known, whether it was the guess
or not; so that rejections are learnt from as much as what was accepted. Now and then a step of gradient descent is made
on places of the last ones at random. The heads are those of the engine, and all its sessions teach them.

Source: Liu et al., "Online Speculative Decoding" (arXiv 2310.07177), for learning from rejections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from models.heads import DraftHeads
from models.speculative import Draft
from streaming.drafts import Context, Outcome, Proposal

#: Places that are remembered.
MAX_PLACES: Final = 2048
#: A step is made after so many new places, and from so many of those that are remembered.
EVERY: Final = 64
#: A draft ends before a guess that is less probable than this to be reached and right: it would not pay.
LEAST: Final = 0.1
#: No guess is surer or less sure than that.
_SURE = (1e-3, 0.999)


class Heads:
    """A drafter; a :class:`streaming.drafts.BatchDrafter`.

    Args:
        heads: Of the model that is drafted for. Who learns does so on a copy.
        learns: Whether they go on learning.
        lr: Size of the steps.
        seed: Of the draws of places.
    """

    name = "heads"
    top_k = 0

    def __init__(self, heads: DraftHeads, *, learns: bool = False, lr: float = 1e-3, seed: int = 0) -> None:
        self._heads = heads
        self._pupil = _Pupil(heads, lr, seed) if learns else None
        if self._pupil is not None:
            self._heads = self._pupil.heads

    def propose(self, context: Context, k: int) -> Proposal:
        """See :class:`streaming.drafts.Drafter`."""
        return self.propose_all([context], k)[0]

    def propose_all(self, contexts: Sequence[Context], k: int) -> list[Proposal]:
        """See :class:`streaming.drafts.BatchDrafter`."""
        proposals = [Proposal()] * len(contexts)
        known = [(i, one.hidden, ord(one.sequence[-1])) for i, one in enumerate(contexts) if one.hidden is not None]
        if not known or not k:
            return proposals
        hidden = torch.stack([one for _, one, _ in known])
        last = torch.tensor([token for *_, token in known]).to(hidden.device)
        tokens, sure = self._heads.guess(hidden, last, k, LEAST)
        for (i, *_), guesses, how_sure in zip(known, tokens.tolist(), sure.clamp(*_SURE).tolist(), strict=True):
            n, reached = 0, 1.0
            for token, probability in zip(guesses, how_sure, strict=True):
                reached *= probability
                if token == contexts[i].end or reached < LEAST:
                    break
                n += 1
            proposals[i] = Proposal.of(self.name, Draft.chain(guesses[:n]), how_sure[:n])
        return proposals

    def observe(self, outcome: Outcome) -> None:
        """See :class:`streaming.drafts.Drafter`."""
        if self._pupil is not None:
            self._pupil.observe(outcome)


class _Pupil:
    """Heads that learn, and the places that they learn from."""

    def __init__(self, heads: DraftHeads, lr: float, seed: int) -> None:
        self.heads = heads.copy()
        self.heads.weight.requires_grad_(True)
        self._optimizer = torch.optim.Adam([self.heads.weight], lr=lr)
        self._draws = torch.Generator().manual_seed(seed)
        width, device = self.heads.block.shape[0], self.heads.block.device
        self._hidden = torch.zeros(MAX_PLACES, width, device=device)
        self._tokens = torch.full((MAX_PLACES, len(self.heads) + 1), -1)
        self._seen = 0

    def observe(self, outcome: Outcome) -> None:
        """Remembers the places of an outcome, and makes a step when there are enough new ones."""
        if outcome.context.hidden is not None:
            last = ord(outcome.context.sequence[-1])
            self._remember(outcome.context.hidden, (last, *outcome.accepted))
        if outcome.hidden is not None:
            for i, hidden in enumerate(outcome.hidden[:-1]):
                self._remember(hidden, outcome.accepted[i:])

    def _remember(self, hidden: Tensor, tokens: Sequence[int]) -> None:
        """A place: the token that was chosen there, and those behind it."""
        slot, n = self._seen % MAX_PLACES, min(len(tokens), self._tokens.shape[1])
        self._hidden[slot] = hidden
        self._tokens[slot] = -1
        self._tokens[slot, :n] = torch.tensor(tokens[:n])
        self._seen += 1
        if self._seen % EVERY == 0:
            self._step()

    @torch.enable_grad()
    def _step(self) -> None:
        drawn = torch.randint(min(self._seen, MAX_PLACES), (EVERY,), generator=self._draws)
        loss = self.heads.loss(self._hidden[drawn], self._tokens[drawn].to(self._hidden.device))
        if loss.requires_grad:
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
