"""Speculation of one engine: its drafters, how long their drafts may be, and what became of them.

It is shared by the sessions of the engine and is no part of their states: two engines that differ in it write the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.speculative import Draft
from models.translator import Translator
from streaming.drafts import SEED, BatchDrafter, Context, Drafter, NGrams, Outcome, Proposal, load_seeds
from streaming.errors import DragomanError
from streaming.goodput import Cost, Goodput, Shape

#: How sure it is, before the first is seen, that a model writes after a word.
WRITE_PROBABILITY = 0.2
#: Source of the guess that the model writes, with the number of words since its last write up to this one.
READ = "read"
_MAX_WORDS = 9


@dataclass(frozen=True)
class Wish:
    """Where a row could take a draft.

    Attributes:
        context: Its target side.
        words: For a row that reads: source words since its last write, which the draft follows; 0 for one that writes.
        certain: Whether the model must write after them.
    """

    context: Context
    words: int = 0
    certain: bool = False


class Speculation:
    """Drafts for the rows of a batch.

    Args:
        drafters: Asked for each row; the one whose draft promises most is taken.
        max_tokens: Longest draft.
        fixed: Whether drafts have that length whatever they cost, for comparison; else a controller decides.
            It also decides for how long drafts the drafters are asked, which may not be worth the time at all.
        learns: Whether the drafters are told what became of their drafts.
        cost: As measured by :func:`streaming.goodput.calibrated`; None to find out by and by.

    Attributes:
        goodput: The controller. It counts acceptance even where lengths are fixed.
        forwards: How many there have been.
        drafted: Tokens read in vain or not, for each source.
        accepted: Of those, the ones that were right.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        max_tokens: int = 6,
        fixed: bool = False,
        learns: bool = True,
        cost: Cost | None = None,
    ) -> None:
        self._drafters = tuple(drafters)
        self._askers = [_asker(drafter) for drafter in drafters]
        self._max_tokens, self._fixed, self._learns = max_tokens, fixed, learns
        self.top_k = max((drafter.top_k for drafter in drafters), default=0) if learns else 0
        self.goodput = Goodput(cost)
        self._length, self._asked_rows = max_tokens, 0
        self.forwards = 0
        self.drafted: dict[str, int] = {}
        self.accepted: dict[str, int] = {}

    def propose(
        self, wishes: Sequence[Wish | None], decided: Sequence[int], keys: int, *, begin_write: int
    ) -> list[Proposal]:
        """The drafts of one forward.

        Args:
            wishes: For each row; None for one that can take none.
            decided: Tokens that each row reads in any case.
            keys: Slots of the longest row.
            begin_write: The token with which a model begins to write.
        """
        asking = [wish for wish in wishes if wish is not None]
        self._asked_rows = len(wishes) if asking and not self._fixed else 0
        if self._asked_rows:
            self._length = self.goodput.asking.length(self._asked_rows, self._max_tokens)
        found = self._asked(asking)
        candidates = [[] if wish is None else self._candidates(wish, next(found), begin_write) for wish in wishes]
        given = [int(wish is not None and wish.words > 0) for wish in wishes]
        return self.goodput.choose(candidates, decided, keys, given=given, longest=self._fixed)

    def _asked(self, wishes: Sequence[Wish]) -> Iterator[list[Proposal]]:
        """For each wish what the drafters propose."""
        contexts, k = [wish.context for wish in wishes], self._length
        by_drafter = [ask(contexts, k) for ask in self._askers] if k and contexts else []
        return iter([list(proposals) for proposals in zip(*by_drafter, strict=True)] or [[] for _ in wishes])

    def _candidates(self, wish: Wish, found: Sequence[Proposal], begin_write: int) -> list[Proposal]:
        if not wish.words:
            return list(found)
        if not wish.certain and self._fixed:
            return []  # seldom right, so that only who counts may guess it
        source, sure = f"{READ} {min(wish.words, _MAX_WORDS)}", WRITE_PROBABILITY
        if wish.certain:
            source, sure = f"{READ} all", 1.0
        return [Proposal(Draft()).after(source, begin_write, sure)] + [
            one.first(self._max_tokens - 1).after(source, begin_write, sure) for one in found if one.sure
        ]

    @property
    def learning(self) -> bool:
        """Whether the drafters are told what became of the present step; not where it does not pay to ask them."""
        return self._learns and self._length > 0

    def observe(self, wish: Wish, proposal: Proposal, path: Sequence[int], outcome: Outcome | None) -> None:
        """Learns what became of a draft.

        Args:
            wish: Where it was to follow.
            proposal: The draft, perhaps empty.
            path: Its tokens that were right.
            outcome: For the drafters, if they are learning and the model has chosen something.
        """
        self.goodput.acceptance.observe(proposal, path)
        for i, source in enumerate(proposal.sources):
            self.drafted[source] = self.drafted.get(source, 0) + 1
            self.accepted[source] = self.accepted.get(source, 0) + (i in path)
        if outcome is not None and self.learning:
            for drafter in self._drafters:
                drafter.observe(outcome)

    def took(self, shape: Shape, seconds: float, asking_s: float) -> None:
        """Learns how long a forward took, with all that belongs to it but the making of drafts and learning from them.

        Args:
            shape: What was computed.
            seconds: That it took.
            asking_s: What drafts took beside it.
        """
        self.forwards += 1
        self.goodput.cost.measured(shape, seconds)
        if self._asked_rows:
            self.goodput.asking.learned(self._asked_rows, self._max_tokens, self.goodput.saved, asking_s)


def _asker(drafter: Drafter) -> Callable[[Sequence[Context], int], list[Proposal]]:
    """How to ask a drafter for all rows."""
    if isinstance(drafter, BatchDrafter):
        return drafter.propose_all
    return lambda contexts, k: [drafter.propose(context, k) for context in contexts]


def speculation_for(translator: Translator, folder: Path, wanted: bool | None = None) -> Speculation | None:
    """The speculation that a translator is run with: n-grams, seeded with those of its training targets.

    Args:
        translator: The model.
        folder: Its folder, which may hold the seed.
        wanted: Whether there shall be speculation; None for "if there is a seed": what is only learnt from the text
            itself saves little until there is much of it.

    Returns:
        One for all sessions of an engine; None for none.

    Raises:
        DragomanError: ``bad_checkpoint`` if the seed cannot be read; ``unsupported_model`` if speculation is wanted and
            a policy decides for the model when to write.
    """
    if wanted is False or (wanted is None and translator.policy != "interleaved"):
        return None
    if translator.policy != "interleaved":
        raise DragomanError(
            "unsupported_model",
            f"model {translator.name!r} writes by the policy {translator.policy}; drafts are for one that was trained"
            " to decide itself when to write: leave --speculation out",
        )
    seeds = load_seeds(folder)
    size = translator.tokenizer.size
    if foreign := [token for seed in seeds.values() for token, _ in seed.values() if token >= size]:
        raise DragomanError(
            "bad_checkpoint",
            f"{folder / SEED} guesses the token {foreign[0]}, and model {translator.name!r} has {size}; make it anew"
            " for this model with training.translation.drafts, or take the file away",
        )
    return Speculation([NGrams(seeds)]) if seeds or wanted else None
