"""The recipe of the heads: the translator's own output, the states behind it, and heads that are better for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.heads import DraftHeads, load_heads
from models.translator import load_translator
from streaming.drafts import Context, Outcome, Proposal, spelled
from streaming.speculation import Speculation
from streaming.translation import Interleaved, TranslatedChunk, TranslationState
from tests import tiny
from training.translation.heads import (
    Guesses,
    Places,
    Recipe,
    Talk,
    _windows,
    guesses,
    own_output,
    places,
    report,
    run,
    talks,
    train,
    train_acceptance,
)

SENTENCES = [
    "The speaker is still talking.", "And nothing once shown is taken back.", "While words go on, words go on!",
    "Nothing is ever shown.", "Is the speaker talking?", "And still words go on and on.", "Words are taken back once.",
]  # fmt: skip


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "train.tsv"
    file.write_text("".join(f"{x}\t{s}\tnichts\n" for s in SENTENCES for x in ("es", "de")), encoding="utf-8")
    return file


def test_talks_are_whole_sentences_and_recur_with_the_seed(pairs: Path) -> None:
    t = tiny.translator(0)
    some = list(islice(talks(t, pairs, random.Random(3)), 12))
    assert some == list(islice(talks(t, pairs, random.Random(3)), 12))
    spoken = {" ".join(s.lower().replace(",", "").rstrip(".?!") for s in [sentence]) for sentence in SENTENCES}
    for talk in some:
        texts, words = list[str](), list[str]()
        for word, closes in talk.words:
            words.append(word)
            if closes:
                texts.append(" ".join(words))
                words = []
        assert not words and len(talk.words) >= 30
        assert set(texts) <= set(SENTENCES) or set(texts) <= spoken
    assert len({talk.direction for talk in some}) > 3


class Witness:
    """What the engine itself tells drafters."""

    name, top_k = "witness", 0

    def __init__(self) -> None:
        self.told: dict[str, Tensor] = {}

    def propose(self, context: Context, k: int) -> Proposal:
        if context.hidden is not None:
            self.told[context.sequence] = context.hidden
        return Proposal()

    def observe(self, outcome: Outcome) -> None: ...


def interpreted(interpreter: Interleaved, talk: Talk) -> tuple[list[TranslatedChunk], TranslationState]:
    state, found = interpreter.init_state([talk.direction]), list[TranslatedChunk]()
    for word, closes in talk.words:
        state = interpreter.feed(state, [word], closes=closes)
    while interpreter.ready(state):
        [chunks], [state] = interpreter.step([state])
        found += chunks
    return found, state


@pytest.mark.parametrize("seed", [0, 1])
def test_places_have_the_states_that_the_engine_has_and_what_it_writes(pairs: Path, seed: int) -> None:
    t = tiny.translator(seed)
    some = [
        replace(talk, words=talk.words[:20] + [(talk.words[20][0], True)])
        for talk in islice(talks(t, pairs, random.Random(seed)), 4)
    ]
    sequences = own_output(t, some)
    found, compared = places(t, sequences, 2), 0
    for i, talk in enumerate(some):
        witness = Witness()
        chunks, _ = interpreted(Interleaved(t, Speculation([witness], fixed=True)), talk)
        begin, end = t.end_of_read, t.end_of_write
        written = [ids for chunk in chunks for ids in windows([begin, *chunk.ids, end])]
        mine = found.tokens[found.talk == i]
        assert mine.tolist() == written
        # The engine's sequences end with the token that was decided at the place; a loop that was cut is not there.
        text, at = spelled(token for token, _ in sequences[i]), _windows(sequences[i], end, 3)[0]
        told = {at.index(len(s) - 2): state for s, state in witness.told.items() if text.startswith(s)}
        compared += len(told)
        for row, state in told.items():
            torch.testing.assert_close(found.hidden[found.talk == i][row], state, atol=2e-4, rtol=2e-4)
        assert [token for token, own in sequences[i] if own] == [
            token for chunk in chunks for token in (begin, *chunk.ids, end)
        ]
    assert compared > 10


def windows(ids: Sequence[int]) -> list[list[int]]:
    return [[*ids[i : i + 3], -1, -1][:3] for i in range(len(ids) - 1)]


def taught() -> tuple[DraftHeads, Places]:
    """Heads of a rule: behind token ``n`` come ``n + 1`` and ``n + 2``, or for one state of two something else."""
    llm, draws = tiny.translator(0).llm, torch.Generator().manual_seed(0)
    first = torch.randint(20, 30, (2000,), generator=draws)
    hidden = torch.randn(2000, llm.config.d_model, generator=draws)
    tokens = torch.stack([first, first + 1, first + 2], 1)
    noise = torch.randint(40, 60, (2000,), generator=draws)
    tokens[:, 2] = torch.where(hidden[:, 0] > 0, tokens[:, 2], noise)
    found = Places(hidden, tokens, torch.arange(2000))
    recipe = Recipe(heads=2, epochs=20, lr=2e-2, batch=200)
    heads = train(llm, found.of(lambda talk: talk % 10 < 5), recipe)
    train_acceptance(heads, found.of(lambda talk: (talk % 10 > 4) & (talk % 10 < 9)), recipe)
    return heads, found.of(lambda talk: talk % 10 == 9)


def test_heads_learn_what_follows_and_when_they_cannot_know() -> None:
    heads, held_out = taught()
    one, two = guesses(heads, held_out)
    assert float(one.right.float().mean()) > 0.95
    assert len(two.right) == int(one.right.sum())
    sure = heads.acceptance(1, two.state, two.log_probability).sigmoid()
    known = sure > 0.5
    assert float(two.right[known].float().mean()) > 0.8 > 0.4 > float(two.right[~known].float().mean())
    assert "head 2: " in report(heads, held_out) and "are right" in report(heads, held_out)


def test_a_guess_counts_where_those_before_it_are_right() -> None:
    llm = tiny.translator(0).llm
    heads = DraftHeads(llm, torch.arange(20, 40), 2).requires_grad_(False)
    hidden = torch.randn(6, llm.config.d_model, generator=torch.Generator().manual_seed(1))
    says = (hidden @ llm.output_rows(heads.tokens).T).argmax(-1) + 20  # untaught heads repeat what the state says
    tokens = torch.stack([says, says, says], 1)
    tokens[1, 1], tokens[2, 2], tokens[3, 2] = 41, 41, -1
    one, two = guesses(heads, Places(hidden, tokens, torch.arange(6)))
    assert isinstance(one, Guesses)
    assert one.right.tolist() == [True, False, True, True, True, True]
    assert two.right.tolist() == [True, False, True, True] and two.alone == pytest.approx(4 / 5)


def test_the_command_leaves_heads_beside_the_model(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_tiny_translator(pairs.parent / "model", 0)
    run(pairs, folder, tokens=600, heads=2, vocabulary=30, epochs=2, seed=1, threads=1, device="cpu")
    printed = capsys.readouterr().out
    assert "held-out places, 30 tokens to guess" in printed and "head 2" in printed
    t = load_translator(folder)
    heads = load_heads(folder, t.llm)
    assert heads is not None and len(heads) == 2 and len(heads.tokens) == 30 and heads.weight.any()
    assert not t.unwritable[heads.tokens].any()
