"""Heads as drafters: what they are given is the model's own state, and what they learn changes no token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.heads import DraftHeads
from models.translator import Translator
from streaming.drafts import Context, Drafter, Outcome, Proposal, spelled
from streaming.heads import EVERY, LEAST, MAX_PLACES, Heads
from streaming.speculation import Speculation
from streaming.translation import Interleaved
from tests import tiny
from tests.models.test_heads import hidden_states, random_heads
from tests.streaming.test_translation import WORDS, Spoken, fed, few, opened, run, seeds, words_

END = 4


class Watcher:
    """Notes where it is asked and what became of it."""

    name, top_k = "watcher", 0

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.outcomes: list[Outcome] = []

    def propose(self, context: Context, k: int) -> Proposal:
        self.contexts.append(context)
        return Proposal()

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def state_behind(t: Translator, tokens: str) -> torch.Tensor:
    ids = torch.tensor([[ord(c) for c in tokens]])
    hidden, _ = t.llm.hidden(ids, torch.tensor([ids.shape[1]]), None)
    return hidden[0, -1]


@few
@given(seed=seeds, spoken=words_, guessing=st.booleans())
def test_a_context_has_the_state_before_its_last_token(seed: int, spoken: Spoken, guessing: bool) -> None:
    """Recomputed from the whole sequence; from the first token of a write on, if its words had been read before."""
    t = tiny.translator(seed)
    watcher = Watcher()
    drafters: list[Drafter] = [watcher, Heads(random_heads(t.llm, seed))] if guessing else [watcher]
    interpreter = Interleaved(t, Speculation(drafters, fixed=True))
    chunks, _ = run(interpreter, fed(interpreter, opened(t)[1], spoken))
    known = [one for one in watcher.contexts if one.hidden is not None]
    if not guessing:
        # Each token is asked for, the first one with the end of what was read as the last token.
        assert len(known) >= sum(len(chunk.ids) for chunk in chunks)
    for one in known[:40]:
        torch.testing.assert_close(one.hidden, state_behind(t, one.sequence[:-1]), atol=2e-4, rtol=2e-4)
    for outcome in watcher.outcomes[:40]:
        if outcome.context.sequence:
            assert outcome.hidden is not None
            for i in range(len(outcome.accepted)):
                text = outcome.context.sequence + spelled(outcome.accepted[:i])
                torch.testing.assert_close(outcome.hidden[i], state_behind(t, text), atol=2e-4, rtol=2e-4)


@few
@given(seed=st.integers(0, 5), rows=st.lists(st.booleans(), max_size=5), k=st.integers(0, 5))
def test_drafts_are_short_end_before_the_end_and_are_those_of_each_row_by_itself(
    seed: int, rows: list[bool], k: int
) -> None:
    llm = tiny.translator(0).llm
    drafter = Heads(random_heads(llm, seed, tokens=torch.tensor([2, END, 9, 30, 31])))
    states = hidden_states(len(rows), llm, seed)
    contexts = [
        Context("es", "", END, "", spelled([5, 40 + i]), states[i] if known else None) for i, known in enumerate(rows)
    ]
    proposals = drafter.propose_all(contexts, k)
    for context, proposal in zip(contexts, proposals, strict=True):
        assert len(proposal.sure) <= min(k, 3) and proposal.draft.is_chain
        assert context.hidden is not None or not proposal.sure
        assert set(proposal.draft.tokens) <= {2, 9, 30, 31} and set(proposal.sources) <= {"heads"}
        assert all(0 < sure < 1 for sure in proposal.sure)
        assert math.prod(proposal.sure) >= LEAST or not proposal.sure
        alone = drafter.propose(context, k)
        assert alone.draft == proposal.draft and alone.sure == pytest.approx(proposal.sure, abs=1e-4)


def untaught(t: Translator) -> DraftHeads:
    return DraftHeads(t.llm, torch.arange(t.llm.config.vocab_size)).requires_grad_(False)


def test_learning_from_a_text_that_recurs_takes_fewer_forwards_and_changes_no_token() -> None:
    t, spoken = tiny.translator(0), [(word, i % 5 == 4) for i, word in enumerate(WORDS[:14])]
    interpreter = Interleaved(t)
    expected, _ = run(interpreter, fed(interpreter, opened(t, latency="offline")[1], spoken))
    forwards: dict[bool, list[int]] = {}
    for learns in (False, True):
        heads = untaught(t)
        drafter, forwards[learns] = Heads(heads, learns=learns, lr=0.05), []
        for _ in range(10):
            speculated = Speculation([drafter], fixed=True, max_tokens=3)
            interpreter = Interleaved(t, speculated)
            state = fed(interpreter, opened(t, latency="offline")[1], spoken)
            assert run(interpreter, state)[0] == expected
            forwards[learns].append(speculated.forwards)
        assert not heads.weight.any()  # a pupil's heads are its own
    assert len(set(forwards[False])) == 1
    assert forwards[True][-1] < 0.8 * forwards[False][0]


def test_who_may_not_learn_does_not_and_a_speculation_may_forbid_it() -> None:
    t = tiny.translator(1)
    for drafter, learns in [(Heads(untaught(t)), True), (Heads(untaught(t), learns=True), False)]:
        interpreter = Interleaved(t, Speculation([drafter], learns=learns))
        run(interpreter, fed(interpreter, opened(t)[1], [(word, False) for word in WORDS[:14]] * 3))
        assert not drafter._heads.weight.any()


def test_places_are_those_of_rejections_and_acceptances_and_the_last_ones_only() -> None:
    t = tiny.translator(0)
    drafter = Heads(untaught(t), learns=True, lr=0.05)
    assert (pupil := drafter._pupil) is not None
    states = hidden_states(4, t.llm, 0)
    context = Context("es", "", END, "", spelled([5, 6]), states[0])
    drafter.observe(Outcome(context, (7, 8, END), (9,), (), states[1:]))
    assert pupil._tokens[:4].tolist() == [[6, 7, 8, END], [7, 8, END, -1], [8, END, -1, -1], [-1] * 4]
    assert torch.equal(pupil._hidden[:3], states[:3])
    memory = pupil._hidden.data_ptr(), pupil._hidden.shape
    for _ in range(MAX_PLACES // 3 + EVERY):
        drafter.observe(Outcome(context, (7, 8, END), (9,), (), states[1:]))
    assert (pupil._hidden.data_ptr(), pupil._hidden.shape) == memory and pupil._seen > MAX_PLACES
    assert drafter.propose(context, 3).draft.tokens == (7, 8)
