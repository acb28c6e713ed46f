"""Speculation: whatever drafters say, what is written is what is written without them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.speculative import ROOT, Draft
from models.translator import Translator
from streaming.drafts import (
    SEED,
    Context,
    Drafter,
    NGrams,
    Outcome,
    Proposal,
    Recycling,
    Repetition,
    save_seeds,
    spelled,
)
from streaming.errors import DragomanError
from streaming.glossary import Glossary
from streaming.heads import Heads
from streaming.speculation import READ, Speculation, Wish, speculation_for
from streaming.translation import Interleaved, TranslatedChunk, TranslationState
from tests import tiny
from tests.models.test_heads import random_heads
from tests.streaming.test_translation import WORDS, Spoken, fed, few, opened, run, seeds, words_


class Liar:
    """Knows what is written, and often says something else; perhaps several things at once."""

    name, top_k = "liar", 0

    def __init__(self, texts: Sequence[str], lies: random.Random, *, tree: bool, truth: float) -> None:
        self.texts, self.lies, self.tree, self.truth = texts, lies, tree, truth

    def propose(self, context: Context, k: int) -> Proposal:
        coming = next((text[len(context.past) :] for text in self.texts if text.startswith(context.past)), "")
        size = self.lies.randint(0, k)
        parents = [self.lies.randint(ROOT, i - 1) if self.tree else i - 1 for i in range(size)]
        depths, tokens = {ROOT: 0}, []
        for i, parent in enumerate(parents):
            depths[i] = depths[parent] + 1
            true = ord(coming[depths[i] - 1]) if depths[i] <= len(coming) else 7
            tokens.append(true if self.lies.random() < self.truth else self.lies.randrange(300))
        draft = Draft(tuple(tokens), tuple(parents)).without(context.end)
        return Proposal.of(self.name, draft, [0.9] * len(draft.tokens))

    def observe(self, outcome: Outcome) -> None:
        assert outcome.context.end not in outcome.accepted[:-1]


GLOSSARY = {"speaker": {"es": "el Zug"}, "still": {"es": "hablante"}}


def begun(t: Translator, languages: Sequence[str], glossary: Glossary) -> TranslationState:
    return Interleaved(t).init_state([t.direction(language) for language in languages], glossary)


def plain(
    t: Translator, spoken: Spoken, languages: Sequence[str], glossary: Glossary | None = None
) -> tuple[list[TranslatedChunk], TranslationState]:
    interpreter = Interleaved(t)
    return run(interpreter, fed(interpreter, begun(t, languages, glossary or {}), spoken))


drafters_ = st.sampled_from(
    [
        "liar",
        "tree of lies",
        "n-grams",
        "repetition",
        "recycling",
        "tree of recycling",
        "heads",
        "learning heads",
        "all",
    ]
)


def speculation(
    kind: str, expected: Sequence[TranslatedChunk], t: Translator, lies: random.Random, *, fixed: bool
) -> Speculation:
    texts = {}
    for chunk in expected:
        texts[chunk.row] = texts.get(chunk.row, "") + spelled((*chunk.ids, t.end_of_write))
    truth = lies.choice([0.0, 0.5, 0.9, 1.0])
    sources = {
        "liar": [Liar(list(texts.values()), lies, tree=False, truth=truth)],
        "tree of lies": [Liar(list(texts.values()), lies, tree=True, truth=truth)],
        "n-grams": [NGrams(max_contexts=20)],
        "repetition": [Repetition(shortest=1)],
        "recycling": [Recycling()],
        "tree of recycling": [Recycling((2, 2, 1))],
        "heads": [Heads(random_heads(t.llm, lies.randint(0, 3)))],
        "learning heads": [Heads(random_heads(t.llm), learns=True, lr=0.1), NGrams()],
        "all": [Repetition(), NGrams(), Recycling((2, 1)), Liar(list(texts.values()), lies, tree=True, truth=truth)],
    }
    return Speculation(sources[kind], fixed=fixed, max_tokens=lies.randint(1, 7))


@few
@given(
    seed=seeds,
    talks=st.lists(words_, min_size=1, max_size=3),
    kind=drafters_,
    lies=st.integers(0, 1 << 32).map(random.Random),
    fixed=st.booleans(),
    context=st.sampled_from([48, 512]),
    glossary=st.sampled_from([{}, GLOSSARY]),
)
def test_any_drafter_writes_what_is_written_without(
    seed: int, talks: list[Spoken], kind: str, lies: random.Random, fixed: bool, context: int, glossary: Glossary
) -> None:
    """Ids, texts, spans and the state at the end; sessions of one and more languages, read and advanced at random."""
    t = tiny.translator(seed, max_context_tokens=context)
    languages = [("es",), ("es", "de"), ("fr",)]
    expected = [plain(t, talk, languages[i], glossary) for i, talk in enumerate(talks)]
    known = [replace(chunk, row=10 * i + chunk.row) for i, (chunks, _) in enumerate(expected) for chunk in chunks]
    interpreter = Interleaved(t, speculation(kind, known, t, lies, fixed=fixed))
    states = [begun(t, languages[i], glossary) for i in range(len(talks))]
    chunks: list[list[TranslatedChunk]] = [[] for _ in talks]
    at = [0] * len(talks)
    while any(a < len(talk) for a, talk in zip(at, talks, strict=True)) or any(map(interpreter.ready, states)):
        for i, talk in enumerate(talks):
            if lies.random() < 0.3:
                n = lies.randint(1, 9)
                states[i], at[i] = fed(interpreter, states[i], talk[at[i] : at[i] + n]), at[i] + n
        part = [i for i in range(len(talks)) if lies.random() < 0.8]
        if part:
            found, after = interpreter.step([states[i] for i in part], max_forwards=lies.randint(1, 3))
            for i, new, state in zip(part, found, after, strict=True):
                chunks[i], states[i] = chunks[i] + new, state
    for i, (before, state) in enumerate(expected):
        for row in range(len(languages[i])):
            assert [c for c in chunks[i] if c.row == row] == [c for c in before if c.row == row]
        assert states[i].rows == state.rows
        assert states[i].cache.lengths.tolist() == state.cache.lengths.tolist()
        assert states[i].cache.next_positions.tolist() == state.cache.next_positions.tolist()


@few
@given(
    seed=seeds,
    spoken=st.lists(st.sampled_from(WORDS[:14]), min_size=2, max_size=12),
    lies=st.integers(0, 1 << 32).map(random.Random),
)
def test_a_revised_tail_is_written_as_without(seed: int, spoken: list[str], lies: random.Random) -> None:
    t = tiny.translator(seed)
    expected, _ = plain(t, [(word, False) for word in spoken], ["es"])
    interpreter = Interleaved(t, speculation("liar", expected, t, lies, fixed=True))
    state = opened(t)[1]
    [shown], [state] = interpreter.step([interpreter.feed(state, [*spoken[:-1], "nothing"])])
    free = len(state.rows[0].read) + len(state.rows[0].queue)
    if not free:
        return
    later, _ = run(interpreter, interpreter.revise(state, 1, spoken[-1:]))
    assert shown + later == expected


# -------------------------------------------------------------------------------------------------------- forwards


def truthful(t: Translator, expected: Sequence[TranslatedChunk]) -> Speculation:
    text = spelled(token for chunk in expected for token in (*chunk.ids, t.end_of_write))
    liar = Liar([text], random.Random(0), tree=False, truth=1.0)
    liar.lies.randint = lambda a, b: b  # type: ignore[method-assign]
    return Speculation([liar], max_tokens=300, fixed=True)


def test_with_true_drafts_words_and_write_take_one_forward() -> None:
    """The test whether to write, the beginning of the write, and all of it."""
    lengths, spoken = [], [(word, word == "talking") for word in "the speaker is still talking".split()]
    for t in map(tiny.translator, range(6)):
        interpreter, state = opened(t, latency="offline")
        [chunk], _ = run(interpreter, fed(interpreter, state, spoken))
        interpreter = Interleaved(t, truthful(t, [chunk]))
        [found], [after] = interpreter.step([fed(interpreter, opened(t, latency="offline")[1], spoken)])
        assert found == [chunk] and not interpreter.ready(after)
        lengths.append(len(chunk.ids))
    assert max(lengths) > 10


@pytest.mark.parametrize("drafter", [NGrams(), Recycling()], ids=["n-grams", "recycling"])
def test_what_one_session_has_written_another_writes_faster(drafter: Drafter) -> None:
    t, spoken = tiny.translator(0), [(word, i % 5 == 4) for i, word in enumerate(WORDS[:14])]
    expected, _ = run(*opened_and_fed(t, Interleaved(t), spoken))
    forwards = []
    for _ in range(2):
        speculated = Speculation([drafter], fixed=True)
        assert run(*opened_and_fed(t, Interleaved(t, speculated), spoken))[0] == expected
        forwards.append(speculated.forwards)
    assert 0 < speculated.accepted[drafter.name] <= speculated.drafted[drafter.name]
    assert forwards[1] < 0.7 * forwards[0]


def opened_and_fed(t: Translator, interpreter: Interleaved, spoken: Spoken) -> tuple[Interleaved, TranslationState]:
    return interpreter, fed(interpreter, opened(t, latency="offline")[1], spoken)


def test_drafters_learn_only_if_they_may() -> None:
    t = tiny.translator(3)
    for learns in (True, False):
        recycling, n_grams = Recycling(), NGrams()
        speculated = Speculation([recycling, n_grams], learns=learns)
        interpreter = Interleaved(t, speculated)
        run(interpreter, fed(interpreter, opened(t)[1], [("the", False), ("speaker", True)] * 5))
        assert any(map(len, recycling._best.values())) == any(map(len, n_grams._counts.values())) == learns
        assert speculated.top_k == int(learns)


def test_whether_the_model_will_write_is_guessed_by_how_much_it_has_read() -> None:
    speculated, context, begin_write = Speculation([]), Context("es", "", 4), 9

    def proposed(words: int, *, certain: bool = False) -> Proposal:
        [found] = speculated.propose([Wish(context, words, certain)], [2], 30, begin_write=begin_write)
        return found

    assert proposed(3) == Proposal(Draft.chain([begin_write]), proposed(3).sure, (f"{READ} 3",))
    for _ in range(100):
        speculated.observe(Wish(context, 3), proposed(3), [], Outcome(context, ()))
    assert not proposed(3).sure and proposed(4).sure
    assert proposed(3, certain=True).sources == (f"{READ} all",)


def test_words_after_which_a_write_is_certain_are_read_with_its_beginning() -> None:
    t = tiny.translator(3)
    speculated = Speculation([], fixed=True)
    interpreter = Interleaved(t, speculated)
    state = opened(t)[1]
    for word, closes in [("the", False), ("speaker", False), ("is", True)] * 8:
        _, state = run(interpreter, interpreter.feed(state, [word], closes=closes))
    assert speculated.drafted == speculated.accepted == {f"{READ} all": 8}


def test_a_seed_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    translator = tiny.translator()
    save_seeds(tmp_path / SEED, {"es": {chr(60): (translator.tokenizer.size, 0.5)}})
    with pytest.raises(DragomanError, match=f"guesses the token {translator.tokenizer.size}, and model 'tiny' has"):
        speculation_for(translator, tmp_path)
