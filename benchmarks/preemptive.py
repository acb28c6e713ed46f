"""What it brings to translate before anything is told, and to draft a translation from the one before it.

    python -m benchmarks.preemptive --speech kokoro.jsonl --text test.jsonl --json

*Re-translation*: every beginning of a sentence is translated anew, from the end of the sentence before, as a display of
provisional translations would; without drafts, and with drafts from the translation of the beginning before
(``old output``), from n-grams, and from both.

- ``identical``: whether all of them wrote the same ids.
- ``forward_ratio``: forwards without drafts for each forward here; ``cpu_ratio`` the same of processor seconds.

*Ahead*: a session hears all recordings, with a pause after each, and a text session reads the sentences a word at a
time; once as it is and once translating ahead while nothing else is to do. Audio comes in pieces of 80 ms by a clock
that processor seconds move on, so that other processes do not disturb it; words and ends come when the session is done
with everything before them.

- ``identical``: whether both told the same events.
- ``delay_p50_ms``, ``delay_p95_ms``: from the telling of a word to that of a translation that ends with it.
- ``at_once``: share of the translations that were told with their word.
- ``guessed``: share of the words that stood there, as they were told, when the session was last idle.
- ``forwards``, ``in_vain``: of the translator, with all that was translated ahead, and those that no event needed.

``next_word``: how often the model itself would have guessed the next word of the source, from the text before it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.speculation import Build
from benchmarks.speed import PIECE_SAMPLES, read_audio
from client.evaluate import SpeechSet, TextSet, read_all_sets
from client.normalize import normalize_transcript
from models.checkpoint import load_recognizer
from models.llm import Llm
from models.recognizer import Recognizer
from models.translator import EMBEDDED_TRANSLATOR, Translator, load_translator
from streaming.audio import AudioFormat
from streaming.drafts import NGrams, OldOutput, load_seeds
from streaming.events import Event, TranscriptDelta, TranslationDelta
from streaming.goodput import calibrated
from streaming.interpreter import translate, translate_ahead
from streaming.session import Session, SessionConfig, tick
from streaming.speculation import Speculation
from streaming.text_session import TextSession
from streaming.translation import Interleaved

PAUSE_MS = 1200
#: Longest draft from an old translation: more than most writes have.
OLD_OUTPUT_TOKENS = 32


@contextmanager
def forwards(llm: Llm) -> Iterator[list[int]]:
    """Counts a model's forwards, in the one number of the list."""
    count, hidden = [0], llm.hidden

    def counted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return hidden(*args, **options)

    llm.hidden = counted  # type: ignore[method-assign]
    try:
        yield count
    finally:
        llm.hidden = hidden  # type: ignore[method-assign]


# -------------------------------------------------------------------------------------------------- re-translation


@dataclass
class Retranslated:
    """What the translations of all beginnings of all sentences have given.

    Attributes:
        ids: Of each translation.
        forwards: For them.
        cpu_s: For them.
        acceptance: Share of the drafted tokens that were right, for each source.
    """

    ids: list[tuple[int, ...]] = field(default_factory=list)
    forwards: int = 0
    cpu_s: float = 0.0
    acceptance: dict[str, float] = field(default_factory=dict)


def retranslate(
    translator: Translator, sentences: Sequence[Sequence[str]], build: Build, *, target: str, latency: str
) -> Retranslated:
    """Translates every beginning of every sentence; the sentences before it are context.

    Args:
        translator: An interleaved one.
        sentences: Words of each.
        build: Makes what drafts.
        target: Language to write.
        latency: Level; at ``offline`` a beginning is one write.
    """
    speculation, found = build(), Retranslated()
    interpreter = Interleaved(translator, speculation)
    state = interpreter.init_state([translator.direction(target, latency)])
    begun = time.thread_time()
    with forwards(translator.llm) as count:
        for words in sentences:
            for n in range(1, len(words) + 1):
                chunks, after = [], interpreter.feed(state, words[:n], closes=True)
                while interpreter.ready(after):
                    [new], [after] = interpreter.step([after])
                    chunks += new
                found.ids.append(tuple(token for chunk in chunks for token in chunk.ids))
                # Its end is told, and what was before it is not gone on with.
                state = after if n == len(words) else interpreter.recalling(state, after, chunks)
    found.forwards, found.cpu_s = count[0], time.thread_time() - begun
    if speculation is not None:
        found.acceptance = {name: speculation.accepted[name] / n for name, n in sorted(speculation.drafted.items())}
    return found


def compare_retranslation(
    translator: Translator, sentences: Sequence[Sequence[str]], *, target: str, latency: str, seeds: dict[str, Any]
) -> dict[str, Any]:
    """The figures of all ways to draft; see the head of this file."""
    cost = calibrated(translator.llm, rows=(1,))
    ways: dict[str, Build] = {
        "without drafts": lambda: None,
        "old output": lambda: Speculation([OldOutput()], max_tokens=OLD_OUTPUT_TOKENS, fixed=True, cost=cost.copy()),
        "old output, controller": lambda: Speculation([OldOutput()], max_tokens=OLD_OUTPUT_TOKENS, cost=cost.copy()),
        "n-grams, controller": lambda: Speculation([NGrams(seeds)], cost=cost.copy()),
        "both, controller": lambda: Speculation(
            [OldOutput(), NGrams(seeds)], max_tokens=OLD_OUTPUT_TOKENS, cost=cost.copy()
        ),
    }
    runs = {name: retranslate(translator, sentences, way, target=target, latency=latency) for name, way in ways.items()}
    plain = runs["without drafts"]
    return {
        "target": target,
        "latency": latency,
        "sentences": len(sentences),
        "translations": len(plain.ids),
        "tokens": sum(map(len, plain.ids)),
        "identical": all(run.ids == plain.ids for run in runs.values()),
        "ways": {
            name: {
                "forwards": run.forwards,
                "forward_ratio": plain.forwards / run.forwards,
                "cpu_ratio": plain.cpu_s / run.cpu_s,
                "acceptance": run.acceptance,
            }
            for name, run in runs.items()
        },
    }


# ---------------------------------------------------------------------------------------------------------- ahead


@dataclass
class Told:
    """What a session has told, and when by the clock.

    Attributes:
        events: As JSON.
        words: How many have been told.
        guessed: Of them, those that stood there when the session was last idle.
        delays_s: For each translation, since its last word was told.
        forwards: Of the translator.
    """

    events: list[str] = field(default_factory=list)
    words: int = 0
    guessed: int = 0
    delays_s: list[float] = field(default_factory=list)
    forwards: int = 0
    _told_s: list[float] = field(default_factory=list)

    def take(self, events: Sequence[Event], now_s: float, tail: str) -> None:
        """Counts events that are told now; ``tail`` is what stood there before."""
        for event in events:
            self.events.append(event.to_json())
            if isinstance(event, TranscriptDelta):
                self.read(len(event.words), now_s)
                self.guessed += bool(event.words) and event.words[0].word == tail
            elif isinstance(event, TranslationDelta) and event.delta:
                self.delays_s.append(now_s - self._told_s[event.source_words[1]])

    def read(self, words: int, now_s: float) -> None:
        """Counts words that are told now."""
        self.words += words
        self._told_s += [now_s] * words


def hear(recognizer: Recognizer, translator: Translator, audio: np.ndarray, target: str, *, ahead: bool) -> Told:
    """One session that hears ``float32[n]`` at 16 kHz as it is spoken."""
    session, told, now_s, begun = _session(recognizer, translator, target), Told(), 0.0, 0.0

    def idle_until(moment_s: float) -> None:
        nonlocal now_s
        while ahead and now_s < moment_s:
            begun = time.thread_time()
            more = translate_ahead([session])
            now_s += time.thread_time() - begun
            if not more:
                break
        now_s = max(now_s, moment_s)

    with forwards(translator.llm) as count:
        for start in range(0, len(audio) + PIECE_SAMPLES, PIECE_SAMPLES):
            piece = audio[start : start + PIECE_SAMPLES]
            idle_until((start + len(piece)) / 16000)
            tail, begun = session.tail, time.thread_time()
            if len(piece):
                session.write(piece)
            else:
                session.close_input()
            while session.ready():
                tick([session])
                now_s += time.thread_time() - begun
                told.take(session.take_events(), now_s, tail)
                begun = time.thread_time()
    told.forwards = count[0]
    return told


def _session(recognizer: Recognizer, translator: Translator, target: str) -> Session:
    return Session(recognizer, SessionConfig(AudioFormat("f32le"), languages=(target,)), translator)


def read_words(
    translator: Translator, sentences: Sequence[Sequence[str]], target: str, latency: str, *, ahead: bool
) -> Told:
    """One text session that reads sentences a word at a time, and is done with each before the next comes."""
    session, told, now_s = TextSession(translator, [target], latency), Told(), 0.0
    with forwards(translator.llm) as count:
        for words in sentences:
            for i, word in enumerate(words):
                for closes in (False, True)[: 2 if i + 1 == len(words) else 1]:
                    begun = time.thread_time()
                    session.write("" if closes else word, closes=closes)
                    told.read(0 if closes else 1, now_s)
                    told.take(session.take_events(), now_s, "")
                    while session.ready():
                        translate([session])
                        told.take(session.take_events(), now_s + time.thread_time() - begun, "")
                    while ahead and translate_ahead([session]):
                        pass
    told.forwards = count[0]
    return told


def compare_ahead(plain: Told, ahead: Told) -> dict[str, Any]:
    """The figures of a session that translates ahead beside those of one that does not."""

    def figures(one: Told) -> dict[str, float]:
        delays_ms = 1000 * np.array(one.delays_s or [0.0])
        return {
            "delay_p50_ms": float(np.median(delays_ms)),
            "delay_p95_ms": float(np.quantile(delays_ms, 0.95)),
            "at_once": float((delays_ms < 0.01).mean()),
            "forwards": one.forwards,
        }

    return {
        "identical": plain.events == ahead.events,
        "words": plain.words,
        "translations": len(plain.delays_s),
        "guessed": ahead.guessed / max(1, ahead.words),
        "in_vain": ahead.forwards - plain.forwards,
        "plain": figures(plain),
        "ahead": figures(ahead),
    }


@torch.no_grad()
def next_word_rate(translator: Translator, sentences: Sequence[Sequence[str]], target: str) -> float:
    """How often all pieces of the next word of the source are the model's best ones, if it does not write."""
    right = words = 0
    for sentence in sentences:
        prompt = translator.direction(target, "offline").prompt
        ids = [translator.encode_word(word) for word in sentence]
        tokens = [*prompt, *(token for word in ids for token in word)]
        logits, _ = translator.llm.step(
            torch.tensor([tokens[:-1]]), torch.tensor([len(tokens) - 1]), None, logits_at=len(tokens) - 1
        )
        logits[..., translator.end_of_read] = -torch.inf
        hits = [False] * len(prompt) + (
            logits[0].argmax(-1).cpu()[len(prompt) - 1 :] == torch.tensor(tokens[len(prompt) :])
        ).tolist()
        at = len(prompt) + len(ids[0]) if ids else 0
        for word in ids[1:]:  # the first one follows nothing
            right += all(hits[at : at + len(word)])
            words += 1
            at += len(word)
    return right / max(1, words)


# --------------------------------------------------------------------------------------------------------- command


def report(found: dict[str, Any]) -> str:
    """The figures as tables."""
    lines = [f"load average {found['load_average']:.1f}"]
    for one in found.get("retranslation", []):
        lines.append(
            f"\nre-translation into {one['target']} at {one['latency']}: {one['translations']} beginnings of"
            f" {one['sentences']} sentences, identical: {one['identical']}"
        )
        lines.append(f"{'':24} forwards  ratio   cpu")
        for name, way in one["ways"].items():
            lines.append(f"{name:24} {way['forwards']:8} {way['forward_ratio']:6.2f} {way['cpu_ratio']:5.2f}")
    for name in ("speech", "text"):
        if (one := found.get(name)) is None:
            continue
        lines.append(
            f"\nahead of {name}: {one['words']} words, {one['translations']} translations, identical:"
            f" {one['identical']}, guessed {one['guessed']:.2f}, {one['in_vain']} forwards in vain"
        )
        lines.append(f"{'':24} forwards  at once  delay p50 ms  p95 ms")
        for way in ("plain", "ahead"):
            row = one[way]
            lines.append(
                f"{way:24} {row['forwards']:8} {row['at_once']:8.2f} {row['delay_p50_ms']:13.1f}"
                f" {row['delay_p95_ms']:7.1f}"
            )
    if "next_word" in found:
        lines.append(f"\nnext words of the source that the model would have guessed: {found['next_word']:.3f}")
    return "\n".join(lines)


def main(
    speech: Annotated[list[Path] | None, typer.Option(help="Manifest with audio; may be repeated.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Manifest without audio; may be repeated.")] = None,
    to: Annotated[str, typer.Option("--to", help="Language to write.")] = "es",
    latency: Annotated[str, typer.Option(help="Levels of re-translation, with commas.")] = "offline,medium",
    utterances: Annotated[int, typer.Option(help="Recordings to hear.")] = 60,
    sentences: Annotated[int, typer.Option(help="Sentences to read.")] = 200,
    min_words: Annotated[int, typer.Option(help="Shortest sentence to read.")] = 1,
    translator: Annotated[Path | None, typer.Option(help="Folder of the translator.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compares translating ahead, and drafts from old output, with neither."""
    torch.set_num_threads(1)
    model, found = load_translator(translator), dict[str, Any]()
    if text:
        texts = [one.text for group in read_all_sets(text) if isinstance(group, TextSet) for one in group.sentences]
        heard = [(normalize_transcript(one) or "").split() for one in texts]
        read = [words for words in heard if len(words) >= max(1, min_words)][:sentences]
        seeds: dict[str, Any] = dict(load_seeds(translator or EMBEDDED_TRANSLATOR))
        found["next_word"] = next_word_rate(model, read, to)
        found["retranslation"] = [
            compare_retranslation(model, read, target=to, latency=level, seeds=seeds) for level in latency.split(",")
        ]
        runs = [read_words(model, read, to, "medium", ahead=ahead) for ahead in (False, True)]
        found["text"] = compare_ahead(*runs)
    if speech:
        recordings = [
            one.audio for group in read_all_sets(speech) if isinstance(group, SpeechSet) for one in group.utterances
        ]
        pause = np.zeros(PAUSE_MS * 16, np.float32)
        audio = np.concatenate([part for one in recordings[:utterances] for part in (read_audio(one), pause)])
        recognizer = load_recognizer()
        heard_ = [hear(recognizer, model, audio, to, ahead=ahead) for ahead in (False, True)]
        found["speech"] = {"audio_s": len(audio) / 16000} | compare_ahead(*heard_)
    found["load_average"] = os.getloadavg()[0]
    typer.echo(json.dumps(found) if as_json else report(found))


if __name__ == "__main__":
    typer.run(main)
