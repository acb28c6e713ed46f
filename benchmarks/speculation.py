"""What speculation saves: forwards and time of a translator that guesses ahead, against one token at a time.

    dragoman bench speculation talk.jsonl --json

Talks come a word at a time, all in step, and everything that a word leads to is computed before the next one comes:
those that have something to do are gathered for a few forwards at a time, as they are in the service. For each number
of talks they are translated a token at a time, and with n-grams as drafts, of a fixed length and of the controller's,
and if the model has heads, with both (``heads too``); one talk also with each other drafter. The runs take turns, so
that a busy machine slows them alike; each begins with drafters that have learnt nothing but their seed, and the cost of
a forward is measured before the clock runs.

- ``identical``: whether all of them wrote the same ids, chunk by chunk.
- ``tokens_per_forward``: tokens written, ends of writes included, for each forward of a talk. Forwards that only read
  words count too.
- ``forward_ratio``: forwards of a token at a time for each forward here.
- ``wall_ratio``, ``cpu_ratio``: the same of seconds, and of processor seconds: medians over the repeats.
- ``word_p50_ms``, ``word_p95_ms``: what a word's forwards took together.
- ``controller_over_best``: seconds of a token at a time, or of the fixed length if that took fewer, for each second of
  the controller's, the median over the repeats and the worst over the numbers of talks; ``…_cpu`` the same of processor
  seconds, which a loaded machine disturbs less.

With ``--identity``, every way is run once upon as many talks at a time as there may be, and only compared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from models.heads import DraftHeads
from models.translator import Translator
from streaming.drafts import Drafter, NGrams, Recycling, Repetition, Seed
from streaming.errors import DragomanError
from streaming.goodput import Cost, calibrated
from streaming.heads import Heads
from streaming.interpreter import FORWARDS_PER_TICK
from streaming.speculation import Speculation
from streaming.translation import Interleaved, TranslatedChunk, TranslationState

#: What is read when nothing else is given.
TALK: Final = Path(__file__).parent / "talk.txt"
BATCHES = (1, 4, 16)
FIXED_TOKENS = 2
MAX_TOKENS = 6

Talk = Sequence[tuple[str, bool]]  # words, and whether each ends a sentence
Build = Callable[[], Speculation | None]


@dataclass
class Run:
    """What one run over the talks has given.

    Attributes:
        ids: Tokens of each chunk, for each talk.
        forwards: Of the batch.
        seconds: By the clock.
        cpu_seconds: Of the process.
        word_s: For each word of the longest talk what its forwards took.
    """

    ids: list[list[tuple[int, ...]]]
    forwards: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    word_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Counted(Interleaved):
    """One that notes for each of its forwards how many rows it had."""

    batches: list[int] = field(default_factory=list, compare=False)

    def _forward(self, state: TranslationState) -> tuple[list[tuple[int, TranslatedChunk]], TranslationState]:
        self.batches.append(len(state.rows))
        return super()._forward(state)


def talks_of(texts: Sequence[str], talks: int, words: int) -> list[Talk]:
    """Sentences dealt out to talks, until each has so many words or there are no more."""
    dealt: list[list[tuple[str, bool]]] = [[] for _ in range(talks)]
    for text in texts:
        shortest = min(dealt, key=len)
        spoken = text.split()
        if len(shortest) < words:
            shortest += [(word, i + 1 == len(spoken)) for i, word in enumerate(spoken)]
    return [talk[:words] for talk in dealt]


def translate(translator: Translator, talks: Sequence[Talk], build: Build, *, target: str, latency: str) -> Run:
    """Translates talks in step."""
    interpreter = _Counted(translator, build())
    states = [interpreter.init_state([translator.direction(target, latency)]) for _ in talks]
    run, begun, cpu = Run([[] for _ in talks]), time.perf_counter(), time.process_time()
    for i in range(max(map(len, talks))):
        word_begun = time.perf_counter()
        for t, talk in enumerate(talks):
            if i < len(talk):
                states[t] = interpreter.feed(states[t], [talk[i][0]], closes=talk[i][1])
        while ready := [t for t, state in enumerate(states) if interpreter.ready(state)]:
            chunks, after = interpreter.step([states[t] for t in ready], max_forwards=FORWARDS_PER_TICK)
            for t, found, state in zip(ready, chunks, after, strict=True):
                run.ids[t] += [chunk.ids for chunk in found]
                states[t] = state
        run.word_s.append(time.perf_counter() - word_begun)
    run.seconds, run.cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
    run.forwards = len(interpreter.batches)
    return run


def figures(runs: Sequence[Run], plain: Sequence[Run], talks: int) -> dict[str, float | bool]:
    """What the repeats of one way say beside those of a token at a time."""
    tokens = sum(len(ids) + 1 for talk in plain[0].ids for ids in talk)
    pairs = list(zip(plain, runs, strict=True))
    return {
        "identical": all(run.ids == plain[0].ids for run in runs),
        "tokens_per_forward": tokens / (runs[-1].forwards * talks),
        "forward_ratio": plain[-1].forwards / runs[-1].forwards,
        "wall_ratio": float(np.median([p.seconds / run.seconds for p, run in pairs])),
        "cpu_ratio": float(np.median([p.cpu_seconds / run.cpu_seconds for p, run in pairs])),
        "word_p50_ms": 1000 * float(np.median([s for run in runs for s in run.word_s])),
        "word_p95_ms": 1000 * float(np.quantile([s for run in runs for s in run.word_s], 0.95)),
    }


def over_best(runs: Mapping[str, Sequence[Run]], seconds: Callable[[Run], float]) -> float:
    """How the controller compares with the better of plain and fixed, run by run; 1 or more if it is no slower."""
    turns = zip(runs["plain"], runs["fixed"], runs["controller"], strict=True)
    return float(np.median([min(seconds(plain), seconds(fixed)) / seconds(own) for plain, fixed, own in turns]))


def measure(
    translator: Translator,
    texts: Sequence[str],
    *,
    target: str,
    latency: str = "medium",
    words: int = 1000,
    repeats: int = 3,
    batches: Sequence[int] = BATCHES,
    seeds: dict[str, Any] | None = None,
    heads: DraftHeads | None = None,
    more: Mapping[str, Callable[[], Drafter]] | None = None,
) -> dict[str, Any]:
    """All figures; see the head of this file.

    Args:
        translator: An interleaved one.
        texts: Sentences to read.
        target: Language to write.
        latency: Level.
        words: Of all talks together.
        repeats: Runs of each way.
        batches: Numbers of talks.
        seeds: N-grams of the training targets.
        heads: Of the translator's model.
        more: Further drafters by name, each tried by itself, with drafts of a fixed length and of the controller's.

    Raises:
        DragomanError: ``unsupported_model`` if a policy decides for the model when to write.
    """
    _require_interleaved(translator)
    cost, used = calibrated(translator.llm, rows=batches), dict[str, Speculation]()
    by_batch: list[dict[str, Any]] = []
    translate(translator, talks_of(texts, 1, 20), lambda: None, target=target, latency=latency)  # what is made once
    for batch in batches:
        talks = talks_of(texts, batch, max(1, words // batch))
        ways = _ways(used, cost, seeds or {}, heads, more or {}, alone=batch == 1)
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, build in ways.items():
                runs[name].append(translate(translator, talks, build, target=target, latency=latency))
        by_batch.append(
            {"talks": batch, "words": sum(map(len, talks))}
            | {
                "controller_over_best": over_best(runs, lambda run: run.seconds),
                "controller_over_best_cpu": over_best(runs, lambda run: run.cpu_seconds),
            }
            | {name: figures(found, runs["plain"], batch) for name, found in runs.items()}
        )
    every = [way for one in by_batch for way in one.values() if isinstance(way, dict)]
    return {
        **by_batch[0]["controller"],
        "identical": all(way["identical"] for way in every),
        **{name: min(one[name] for one in by_batch) for name in ("controller_over_best", "controller_over_best_cpu")},
        "batches": by_batch,
        "acceptance": {
            name: {source: one.accepted[source] / drafted for source, drafted in sorted(one.drafted.items())}
            for name, one in used.items()
        },
        "load_average": os.getloadavg()[0],
    }


def identity(
    translator: Translator,
    texts: Sequence[str],
    *,
    target: str,
    latency: str = "medium",
    words: int = 10_000,
    batch: int = BATCHES[-1],
    seeds: dict[str, Any] | None = None,
    heads: DraftHeads | None = None,
    more: Mapping[str, Callable[[], Drafter]] | None = None,
) -> dict[str, Any]:
    """Whether every way writes the same ids; see the head of this file. Arguments and errors are :func:`measure`'s."""
    _require_interleaved(translator)
    talks = talks_of(texts, batch, -(-words // batch))
    ways = _ways({}, Cost(), seeds or {}, heads, more or {}, alone=True)
    ids = {
        name: translate(translator, talks, build, target=target, latency=latency).ids for name, build in ways.items()
    }
    plain = ids.pop("plain")
    same = {name: found == plain for name, found in ids.items()}
    return {
        "identical": all(same.values()),
        "words": sum(map(len, talks)),
        "tokens": sum(len(chunk) + 1 for talk in plain for chunk in talk),
        "ways": same,
    }


def _require_interleaved(translator: Translator) -> None:
    if translator.policy != "interleaved":
        raise DragomanError(
            "unsupported_model",
            f"model {translator.name!r} writes by the policy {translator.policy}; drafts are for one that was trained"
            " to decide itself when to write",
        )


def _ways(
    used: dict[str, Speculation],
    cost: Cost,
    seeds: dict[str, Seed],
    heads: DraftHeads | None,
    more: Mapping[str, Callable[[], Drafter]],
    *,
    alone: bool,
) -> dict[str, Build]:
    """The ways to translate; what was used last under each name is left in ``used``, if ``alone``."""

    def way(name: str, drafters: Callable[[], Sequence[Drafter]], max_tokens: int, fixed: bool) -> Build:
        def build() -> Speculation:
            one = Speculation(drafters(), max_tokens=max_tokens, fixed=fixed, cost=cost.copy())
            if alone:
                used[name] = one
            return one

        return build

    def seeded() -> Sequence[Drafter]:
        return [NGrams(seeds)]

    ways: dict[str, Build] = {
        "plain": lambda: None,
        "fixed": way("fixed", seeded, FIXED_TOKENS, True),
        "controller": way("controller", seeded, MAX_TOKENS, False),
    }
    each: dict[str, Callable[[], Sequence[Drafter]]] = {
        "repetition": lambda: [Repetition()],
        "n-grams without seed": lambda: [NGrams()],
        "recycling": lambda: [Recycling()],
        "recycling tree": lambda: [Recycling((2, 2, 2))],
    }
    if heads is not None:
        trained = heads
        each |= {"heads": lambda: [Heads(trained)], "learning heads": lambda: [Heads(trained, learns=True)]}
        ways["heads too"] = way("heads too", lambda: [NGrams(seeds), Heads(trained)], MAX_TOKENS, False)
    for name, drafters in each.items() if alone else ():
        ways[name] = way(name, drafters, MAX_TOKENS if "tree" in name else FIXED_TOKENS, True)
    for name, drafter in more.items() if alone else ():
        one = partial(_single, drafter)
        ways[name] = way(name, one, FIXED_TOKENS, True)
        ways[f"{name}, controlled"] = way(f"{name}, controlled", one, MAX_TOKENS, False)
    return ways


def _single(drafter: Callable[[], Drafter]) -> Sequence[Drafter]:
    return [drafter()]


def report(found: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"identical: {found['identical']}   controller over best: {found['controller_over_best']:.3f}, of processor"
        f" seconds {found['controller_over_best_cpu']:.3f}   load average {found['load_average']:.1f}"
    ]
    for one in found["batches"]:
        lines.append(
            f"\n{one['talks']} talks, {one['words']} words; controller over best"
            f" {one['controller_over_best']:.3f}, cpu {one['controller_over_best_cpu']:.3f}"
        )
        lines.append(f"{'':22} tokens/forward  forwards   wall    cpu  word p50 ms  p95 ms")
        for name, way in one.items():
            if isinstance(way, dict):
                lines.append(
                    f"{name:22} {way['tokens_per_forward']:14.2f} {way['forward_ratio']:9.2f} {way['wall_ratio']:6.2f}"
                    f" {way['cpu_ratio']:6.2f} {way['word_p50_ms']:12.1f} {way['word_p95_ms']:7.1f}"
                )
    lines.append("\nshare of the drafted tokens that were right")
    for name, sources in found["acceptance"].items():
        lines.append(f"{name:22} " + "  ".join(f"{source} {share:.2f}" for source, share in sources.items()))
    return "\n".join(lines)
