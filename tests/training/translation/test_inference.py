"""A session whose model decides and writes as the corpus says has, id for id, the sequence of training before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.kv_cache import KvCache
from models.tokenizer import SentencePieceTokenizer, encode_words
from models.translator import OWN_ENDPOINT, TranslationConfig, Translator
from streaming.translation import Interleaved, looping, write_cap
from tests import tiny
from training.translation.chunks import OFFLINE
from training.translation.data import Chunks, Encoder

TOKENIZER = SentencePieceTokenizer(tiny.translation_tokenizer())
ENCODER = Encoder(TOKENIZER)
WORDS = "the speaker is still talking Talking, 42 straße 🎉 同声传译 <|es|> <|end-of-read|>and <s>".split()


class Oracle:
    """In the place of a language model: after a prefix of a gold sequence it is sure of the id that follows there.

    Its cache has ids for keys, and what it makes of a token is the number of the prefix that the token ends.
    """

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, gold: Sequence[Sequence[int]]) -> None:
        self.config = tiny.translator().llm.config
        self.gold = gold
        self.prefixes: list[list[int]] = []

    def init_state(self, batch: int, *, capacity: int = 16) -> KvCache:
        none = torch.zeros(batch, dtype=torch.int64)
        memory = torch.zeros(1, 2, batch, 1, capacity, 1, dtype=self.dtype)
        return KvCache(memory, torch.zeros(batch, capacity, dtype=torch.int64), none, none)

    def hidden(
        self, tokens: Tensor, counts: Tensor, cache: KvCache, *, positions: Tensor | None, visible: Tensor | None
    ) -> tuple[Tensor, KvCache]:
        assert positions is None and visible is None  # nobody drafts trees here
        cache = cache.with_room(tokens.shape[1])
        numbers = torch.zeros(*tokens.shape, 1, dtype=torch.int64)
        for b, count in enumerate(counts.tolist()):
            for t in range(count):
                slot = int(cache.lengths[b]) + t
                cache.memory[0, :, b, 0, slot] = tokens[b, t].double()
                cache.positions[b, slot] = slot
                numbers[b, t] = len(self.prefixes)
                self.prefixes.append(ids_of(cache, b, slot + 1))
        return numbers, KvCache(cache.memory, cache.positions, cache.lengths + counts, cache.next_positions + counts)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.config.vocab_size)
        for k, number in enumerate(hidden[:, 0].tolist()):
            prefix = self.prefixes[number]
            for gold in self.gold:
                if prefix == list(gold[: len(prefix)]) and len(prefix) < len(gold):
                    logits[k, gold[len(prefix)]] = 50.0
        return logits


def ids_of(cache: KvCache, row: int, length: int) -> list[int]:
    ids: list[int] = cache.memory[0, 0, row, 0, :length, 0].long().tolist()
    return ids


def within_bounds(chunks: Chunks) -> Chunks:
    """With the last words of each target, few enough that the write is neither capped nor taken for a loop."""
    targets = []
    for source, target in zip(chunks.source, chunks.target, strict=True):
        cap = write_cap(sum(len(ENCODER.word(word)) for word in source))
        while True:
            ids = encode_words(TOKENIZER, " ".join(target))
            if len(ids) < cap and not any(looping(ids[:n]) for n in range(len(ids) + 1)):
                break
            target = target[1:]
        targets.append(target)
    return Chunks(chunks.source, targets)


words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(
    schedules=st.lists(st.lists(st.tuples(st.integers(1, 4), words), min_size=1, max_size=5), min_size=1, max_size=3),
    # Upon others, of which the model reads nothing, it does not decide.
    source=st.lists(st.sampled_from([word for word in WORDS if ENCODER.word(word)]), min_size=20, max_size=20),
    cuts=st.lists(st.integers(1, 20), max_size=4),
    forwards=st.integers(1, 3),
    latency=st.sampled_from(["low", "high", OFFLINE]),
)
def test_a_gold_schedule_gives_the_sequence_of_training(
    schedules: list[list[tuple[int, list[str]]]], source: list[str], cuts: list[int], forwards: int, latency: str
) -> None:
    """Rows read the same words, and cut and translate them in their own ways; words come in any portions."""
    size = min(sum(n for n, _ in schedule) for schedule in schedules)
    gold, directions = list[list[int]](), list[Any]()
    for k, schedule in enumerate(schedules):
        chunks = Chunks([], [])
        for n, (count, target) in enumerate(schedule):
            read = sum(map(len, chunks.source))
            if more := source[read : min(size, read + count)]:
                chunks.source.append(more)
                chunks.target.append([*target, f"{n}"])  # a row whose chunks all say the same would begin anew
        chunks = within_bounds(chunks.joined() if latency == OFFLINE else chunks)
        made = ENCODER.begin("es de fr".split()[k], latency)
        ENCODER.add_segment(made, chunks)
        gold.append(made.ids)
    oracle: Any = Oracle(gold)
    translator = Translator(oracle, TOKENIZER, TranslationConfig(endpoint=OWN_ENDPOINT))
    directions = [translator.direction("es de fr".split()[k], latency) for k in range(len(schedules))]

    interpreter = Interleaved(translator)
    state, fed = interpreter.init_state(directions), 0
    for end in sorted({*(cut for cut in cuts if cut < size), size}):
        state = interpreter.feed(state, source[fed:end], closes=end == size)
        fed = end
        while interpreter.ready(state):
            _, [state] = interpreter.step([state], max_forwards=forwards)
    for b, row in enumerate(state.rows):
        assert ids_of(state.cache, b, int(state.cache.lengths[b])) + list(row.pending) == gold[b]
