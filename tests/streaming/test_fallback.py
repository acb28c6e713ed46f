"""Policies for a plain language model: they do what a naive loop over whole sequences does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.llm import Llm
from models.llm_config import LlmConfig
from models.tokenizer import ChatTemplate, HuggingFaceTokenizer, decode
from models.translator import FALLBACK_PROMPT, Latency, TranslationConfig, Translator
from streaming.fallback import AGREEMENT_WORDS, WAIT_WORDS, Fallback, FallbackState
from streaming.translation import TranslatedChunk, looping
from tests.models.test_tokenizer import hugging_face

Kind = Literal["wait-k", "local-agreement"]
Spoken = Sequence[tuple[str, bool]]
WORDS = "the speaker is still talking and 🎉 <s> nothing".split()
kinds = st.sampled_from(["wait-k", "local-agreement"])
latencies = st.sampled_from(["low", "low-medium", "medium", "offline"])
spoken_ = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([False] * 5 + [True])), max_size=14)
few = settings(max_examples=10, deadline=None)


def chatting() -> HuggingFaceTokenizer:
    """A tokenizer with a short chat template."""
    tokenizer = HuggingFaceTokenizer(hugging_face("byte-level"))
    tokenizer.chat = ChatTemplate("<s>{{ messages[0]['content'] }}=", {})
    return tokenizer


@cache
def translator(kind: Kind, seed: int = 0, context: int = 2048) -> Translator:
    """Random weights that end their answers now and then."""
    tokenizer = chatting()
    torch.manual_seed(seed)
    llm = Llm(LlmConfig(tokenizer.size, 32, 48, 2, 4, 2, 8, tied=False))
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
        assert llm.lm_head is not None
        for token in range(tokenizer.size):
            if tokenizer.bytes_of(token).startswith(b" "):
                llm.lm_head.weight[token] *= 1.5
        llm.lm_head.weight[tokenizer.id_of("<s>")] *= 4.0
    prompt = FALLBACK_PROMPT.partition("\n\n")[2]
    config = TranslationConfig(kind, prompt, targets=("es", "de", "zh"), max_context_tokens=context)
    return Translator(llm.freeze(), tokenizer, config, name="plain")


def begins(t: Translator, target: str, before: Sequence[int], token: int) -> bool:
    if not before:
        return True
    if target == "zh":
        return not decode(t.tokenizer, before).endswith("\ufffd")
    return t.tokenizer.bytes_of(token).startswith((b" ", b"\n"))


def naive(t: Translator, spoken: Spoken, *, target: str, latency: Latency) -> list[TranslatedChunk]:
    """Every answer anew from whole sequences."""
    direction, limit = t.direction(target, latency), t.config.max_context_tokens // 4
    chunks, told, begun = list[TranslatedChunk](), 0, False
    source, shown, previous, n = list[int](), list[int](), list[int](), 0
    for i, (word, ends) in enumerate(spoken):
        source, n = source + list(t.encode_word(word)), n + 1
        closes = ends or len(source) >= limit
        if latency == "offline":
            due = closes
        elif t.policy == "wait-k":
            due = closes or n >= WAIT_WORDS[latency]
        else:
            due = closes or n % AGREEMENT_WORDS[latency] == 0
        if not due:
            continue
        answer = list(shown)
        while True:
            sequence = [*direction.prompt, *source, *direction.answer, *answer]
            logits, _ = t.llm.step(torch.tensor([sequence]), torch.tensor([len(sequence)]), None)
            token = int(logits[0, -1, : t.tokenizer.size].argmax())
            if token in t.tokenizer.controls:
                break
            starts = [j for j in range(len(answer)) if begins(t, target, answer[:j], answer[j])]
            if t.policy == "wait-k" and not closes and begins(t, target, answer, token):
                if len(starts) == n - WAIT_WORDS[latency] + 1:
                    break
            answer.append(token)
            if cut := looping(answer):
                answer = answer[: max(len(shown), len(answer) - cut)]
                break
            if len(answer) >= 2 * len(source) + 25:
                break
        if t.policy == "local-agreement" and not closes:
            common = 0
            while common < min(len(answer), len(previous)) and answer[common] == previous[common]:
                common += 1
            ends_of_words = [
                at
                for at in range(common + 1)
                if all(at == len(one) or begins(t, target, one[:at], one[at]) for one in (answer, previous))
            ]
            previous, answer = answer, answer[: max([len(shown), *ends_of_words])]
        new = answer[len(shown) :]
        if new or closes:
            text = decode(t.tokenizer, new)
            if not begun:
                text = text.lstrip()
            elif text and not shown and target != "zh" and not text[0].isspace():
                text = " " + text
            chunks.append(TranslatedChunk(0, target, text, tuple(new), min(told, i), i, closes))
            begun, told, shown = begun or bool(text), i + 1, answer
        if closes:
            source, shown, previous, n = [], [], [], 0
    return chunks


def opened(t: Translator, targets: Sequence[str], latency: str) -> FallbackState:
    return Fallback(t).init_state([t.direction(target, latency) for target in targets])


def run(t: Translator, state: FallbackState, forwards: int = 1) -> tuple[list[TranslatedChunk], FallbackState]:
    chunks: list[TranslatedChunk] = []
    while Fallback(t).ready(state):
        [found], [state] = Fallback(t).step([state], max_forwards=forwards)
        chunks += found
    return chunks, state


@few
@given(
    kind=kinds, seed=st.integers(0, 3), spoken=spoken_, latency=latencies, cut=st.integers(1, 5),
    target=st.sampled_from(["es", "zh"]), context=st.sampled_from([96, 2048]),
)  # fmt: skip
def test_a_policy_does_what_the_naive_loop_does(
    kind: Kind, seed: int, spoken: Spoken, latency: Latency, cut: int, target: str, context: int
) -> None:
    t = translator(kind, seed, context)
    state, chunks = opened(t, [target], latency), list[TranslatedChunk]()
    for start in range(0, len(spoken), cut):
        for word, closes in spoken[start : start + cut]:
            state = Fallback(t).feed(state, [word], closes=closes)
        found, state = run(t, state, 1 + start % 3)
        chunks += found
    assert chunks == naive(t, spoken, target=target, latency=latency)


@few
@given(kind=kinds, talks=st.lists(spoken_, min_size=2, max_size=3), order=st.lists(st.integers(0, 2), max_size=20))
def test_sessions_change_nothing_for_each_other(kind: Kind, talks: list[Spoken], order: list[int]) -> None:
    t = translator(kind, 1)
    interpreter, languages = Fallback(t), [("es",), ("de", "es"), ("zh", "de")]
    states = [opened(t, languages[i], "low") for i in range(len(talks))]
    chunks: list[list[TranslatedChunk]] = [[] for _ in talks]
    for i, talk in enumerate(talks):
        for word, closes in talk:
            states[i] = interpreter.feed(states[i], [word], closes=closes)
    while any(map(interpreter.ready, states)):
        part = [i for i in range(len(talks)) if i not in order[:1]] or [0]
        order = order[1:]
        found, after = interpreter.step([states[i] for i in part])
        for i, new, state in zip(part, found, after, strict=True):
            chunks[i] += new
            states[i] = state
    for i, talk in enumerate(talks):
        for row, language in enumerate(languages[i]):
            got = [replace(chunk, row=0) for chunk in chunks[i] if chunk.row == row]
            assert got == naive(t, talk, target=language, latency="low")


@pytest.mark.parametrize("kind", ["wait-k", "local-agreement"])
def test_an_end_without_words_ends_the_answer(kind: Kind) -> None:
    t = translator(kind)
    interpreter, state = Fallback(t), opened(t, ["es"], "offline")
    assert not interpreter.ready(interpreter.feed(state, [], closes=True))
    chunks, state = run(t, interpreter.feed(state, ["the", "speaker"]))
    assert not chunks
    [chunk], state = run(t, interpreter.feed(state, [], closes=True))
    assert (chunk.first_word, chunk.last_word, chunk.endpoint) == (0, 1, True)
    assert not interpreter.ready(interpreter.feed(state, [], closes=True))


def test_what_is_kept_does_not_grow() -> None:
    t = translator("wait-k", 0, 96)
    state, lengths = opened(t, ["es"], "low"), []
    for i in range(120):
        _, state = run(t, Fallback(t).feed(state, [WORDS[i % 6]]))
        lengths.append(int(state.cache.lengths[0]))
    assert max(lengths) < 160
