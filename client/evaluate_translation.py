"""How good a translation is and how far it lags behind: of text that comes word by word, and of speech.

The translator runs in the sessions that serve people, many segments in a batch: text a word at a time, all segments in
step; speech as files are transcribed. Some segments run once more, each alone and at the pace of speech, for what
computing adds.

- *BLEU* and *chrF* are sacrebleu's over all segments of a set, against all their references; the signatures are part of
  the score. Of speech there are also those that the translator would have had, had all been recognised without error,
  and those of the translation against the one that it would then have made: they need no references.
- *Lag* is that of `client.latency`, against the first reference, or that translation. On text the delay of a target
  word is the number of source words that had come; in milliseconds, each of them takes `WORD_MS`. On speech it is the
  audio that had come in when its source words were decided; in words, how many the recogniser had told.
- *Computing* adds the backlog (`client.evaluate.backlogs_ms`) at the push that brought the word. The end of a segment
  is a push that comes at once after the last one.
- *Delay* of a source word of speech is the audio that had come in when the chunk that was written upon it was decided,
  less the word's end. Words upon which only the end of the recording led to a write have none.
- *Erasure* is counted on what was shown.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, zip_longest
from typing import Any, Final, Literal, Self

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from client.evaluate import (
    LANGUAGES,
    STEP_MS,
    Delay,
    Sentence,
    SpeechSet,
    TextSet,
    Utterance,
    backlogs_ms,
    open_session,
    pieces,
    spread,
)
from client.files import AudioFile
from client.latency import Instance, Lagging, normalized_erasure, word_delays
from client.normalize import normalize_transcript
from client.transcribe import Step, transcribe
from models.config import FRAME_MS
from models.recognizer import Recognizer
from models.translator import AnyTranslator
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta, TranslationDelta
from streaming.interpreter import translate
from streaming.session import SessionConfig
from streaming.speculation import Speculation
from streaming.text_session import TextSession

WORD_MS: Final = 400
"""How long a word of text takes to come: 150 words a minute, as in an ordinary talk."""

# ----------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Quality:
    """How close translations are to their references, by sacrebleu.

    Attributes:
        bleu: BLEU of the set, 0 to 100.
        chrf: chrF2 of the set, 0 to 100.
        bleu_signature: How BLEU was computed.
        chrf_signature: How chrF was computed.
    """

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str

    @classmethod
    def of(cls, translations: Sequence[str], references: Sequence[Sequence[str]]) -> Self:
        """Score at least one translation, each against one or more references."""
        streams = list(zip_longest(*references))  # None where a segment has no further reference
        bleu, chrf = BLEU(), CHRF()
        return cls(
            bleu=bleu.corpus_score(list(translations), streams).score,
            chrf=chrf.corpus_score(list(translations), streams).score,
            bleu_signature=str(bleu.get_signature()),
            chrf_signature=str(chrf.get_signature()),
        )


@dataclass(frozen=True)
class LiveTranslation:
    """What live translations of some segments were like, each alone on the machine and into one language.

    Attributes:
        segments: How many.
        lag_ms: Their lag without computing, to compare with `total_lag_ms`.
        total_lag_ms: Their lag with the backlog of computing.
        push_p50_ms: Time that computing took for a word of text or `STEP_MS` of speech, the median; None without any.
        push_p95_ms: And the 95th percentile.
        real_time_factor: Processor seconds for a second of audio; None for text.
        delay: Delay of source words without computing; None for text.
        total_delay: Of the same words with the backlog; None for text.
    """

    segments: int
    lag_ms: Lagging
    total_lag_ms: Lagging
    push_p50_ms: float | None
    push_p95_ms: float | None
    real_time_factor: float | None = None
    delay: Delay | None = None
    total_delay: Delay | None = None


@dataclass(frozen=True)
class TranslationScore:
    """One set in one language at one latency.

    Attributes:
        manifest: Name of the set.
        medium: What was translated.
        language: Into what.
        latency: Level of the translator.
        recognition: Settings of the recogniser, such as ``rnnt, 480 ms``; None for text.
        segments: How many were scored.
        left_out: How many were not, for want of a reference or of a readable recording. Of a set of speech in which
            nothing has a reference, all are scored by their agreement.
        quality: Of their translations; None if there are none, or no references.
        quality_from_text: Of the translations of what was said, had it been recognised without error; None for text.
        agreement: Of the translations of speech against those; None for text.
        lag_words: Lag in source words.
        lag_ms: Lag in milliseconds.
        erasure: Normalized erasure; None if nothing was written.
        delay: Delay of the source words of speech; None for text.
        live: Live translations of some of the segments; None if there are none.
        problems: One sentence for each recording that could not be read, or not to its end.
    """

    manifest: str
    medium: Literal["text", "speech"]
    language: str
    latency: str
    recognition: str | None
    segments: int
    left_out: int
    quality: Quality | None
    quality_from_text: Quality | None
    agreement: Quality | None
    lag_words: Lagging
    lag_ms: Lagging
    erasure: float | None
    delay: Delay | None
    live: LiveTranslation | None
    problems: tuple[str, ...] = ()


Scored = tuple[TranslationScore, list[Instance]]
"""A score, and the log that its lag comes from: delays of text in words, of speech in milliseconds."""


@dataclass(frozen=True)
class _Delta:
    """One piece of a translation: the source that had come by then, and the push that brought it."""

    text: str
    words: int
    ms: int
    push: int = 0


@dataclass(frozen=True)
class _Told:
    """The translation of one segment into one language.

    Attributes:
        source: The text, or the recording's path.
        references: At least one.
        words: Source words in all.
        ms: And milliseconds.
        deltas: What was told.
        word_delays: Of each source word of speech, its delay in milliseconds and the push that ended it.
        words_at_end: Source words without a delay.
    """

    source: str
    references: tuple[str, ...]
    words: int
    ms: int
    deltas: tuple[_Delta, ...]
    word_delays: tuple[tuple[int, int], ...] = ()
    words_at_end: int = 0

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas).strip()

    @property
    def shown(self) -> Iterable[str]:
        return accumulate(delta.text for delta in self.deltas)

    def in_words(self) -> Instance:
        return self._instance([delta.words for delta in self.deltas], self.words)

    def in_ms(self, backlogs: Sequence[float] = ()) -> Instance:
        """A line of the log; with the backlog at each push, it has elapsed times."""
        line = self._instance([delta.ms for delta in self.deltas], self.ms)
        if not backlogs:
            return line
        late = self._instance([delta.ms + backlogs[delta.push] for delta in self.deltas], self.ms)
        return replace(line, elapsed=late.delays)

    def _instance(self, delays: Sequence[float], length: int) -> Instance:
        text, times = word_delays((delta.text, delay) for delta, delay in zip(self.deltas, delays, strict=True))
        return Instance(self.source, text, self.references[0], times, length)


def _quality(told: Sequence[_Told]) -> Quality | None:
    return Quality.of([one.text for one in told], [one.references for one in told]) if told else None


# ------------------------------------------------------------------------------------------------------------- text


def score_text(
    translator: AnyTranslator,
    texts: TextSet,
    languages: Sequence[str],
    latency: str,
    *,
    spoken: bool = False,
    batch_size: int = 16,
    replay: int = 0,
    speculation: Speculation | None = None,
) -> list[Scored]:
    """Score a translator on text.

    Args:
        translator: The model.
        texts: What it shall read.
        languages: What it shall write.
        latency: How long it shall wait.
        spoken: Whether the text is read as a recogniser writes it, lower-case words without punctuation; what has no
            such form is read as it is.
        batch_size: Sentences at a time, at least 1; the translations do not depend on it.
        replay: How many sentences to translate as live streams too, spread evenly over the set.
        speculation: What drafts the translations; they do not depend on it.

    Returns:
        For each language its score.
    """
    sources = [as_spoken(sentence.text) if spoken else sentence.text for sentence in texts.sentences]
    deltas = _read_out(translator, sources, languages, latency, batch_size, speculation)
    results = []
    for language in languages:
        told = [
            _told_text(source, sentence.translations[language], found[language])
            for source, sentence, found in zip(sources, texts.sentences, deltas, strict=True)
            if language in sentence.translations
        ]
        live, lines = _replay_text(translator, told, language, latency, replay, speculation)
        score = TranslationScore(
            manifest=texts.name,
            medium="text",
            language=language,
            latency=latency,
            recognition=None,
            segments=len(told),
            left_out=len(sources) - len(told),
            quality=_quality(told),
            quality_from_text=None,
            agreement=None,
            lag_words=Lagging.of([one.in_words() for one in told]),
            lag_ms=Lagging.of([one.in_ms() for one in told]),
            erasure=normalized_erasure(one.shown for one in told),
            delay=None,
            live=live,
        )
        log = [_with_elapsed(one.in_words(), lines.get(i), WORD_MS) for i, one in enumerate(told)]
        results.append((score, log))
    return results


def as_spoken(text: str) -> str:
    """A text as a recogniser writes it, or as it is where it has no such form."""
    return normalize_transcript(text) or text


def _told_text(source: str, references: tuple[str, ...], deltas: Sequence[_Delta]) -> _Told:
    words = len(source.split())
    return _Told(source, references, words, words * WORD_MS, tuple(deltas))


def _with_elapsed(line: Instance, live: Instance | None, unit_ms: int) -> Instance:
    """A line of the log, whose unit is so many milliseconds, with the elapsed times of its live translation.

    A computer that rounds otherwise in a batch than alone may have made another translation of it: then it has none.
    """
    if live is None or live.prediction != line.prediction:
        return line
    return replace(line, elapsed=tuple(ms / unit_ms for ms in live.elapsed))


def _read_out(
    translator: AnyTranslator,
    sources: Sequence[str],
    languages: Sequence[str],
    latency: str,
    batch_size: int,
    speculation: Speculation | None,
) -> list[dict[str, list[_Delta]]]:
    """Give every text to a session of its own, a word at a time; those of about one length together."""
    found: list[dict[str, list[_Delta]]] = [{language: [] for language in languages} for _ in sources]
    words = [source.split() for source in sources]
    order = sorted(range(len(sources)), key=lambda i: len(words[i]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        batch = {i: TextSession(translator, languages, latency, speculation=speculation) for i in some}
        for count in range(1, max(len(words[i]) for i in batch) + 2):
            for i, session in batch.items():
                if count <= len(words[i]):
                    session.write(words[i][count - 1])
                elif count == len(words[i]) + 1:
                    session.close_input()
            while ready := [session for session in batch.values() if session.ready()]:
                translate(ready)
            for i, session in batch.items():
                read = min(count, len(words[i]))
                for event in _translations(_whole(session.take_events())):
                    found[i][event.language].append(_Delta(event.delta, read, read * WORD_MS))
    return found


def _translations(events: Iterable[Event]) -> list[TranslationDelta]:
    return [event for event in events if isinstance(event, TranslationDelta)]


def _replay_text(
    translator: AnyTranslator,
    told: Sequence[_Told],
    language: str,
    latency: str,
    count: int,
    speculation: Speculation | None,
) -> tuple[LiveTranslation | None, dict[int, Instance]]:
    """Translate some of the texts alone; lines of a log in milliseconds, by index."""
    costs_ms, lines = list[float](), dict[int, Instance]()
    for i in spread(range(len(told)), count):
        session = TextSession(translator, [language], latency, speculation=speculation)
        deltas, costs = list[_Delta](), list[float]()
        words = told[i].source.split()
        pushes: list[Callable[[], list[Event]]] = [*(partial(session.push, word) for word in words), session.finish]
        for push, run in enumerate(pushes):
            events, cost_ms = _timed(run)
            read = min(push + 1, len(words))
            deltas += [_Delta(e.delta, read, read * WORD_MS, push) for e in _translations(events)]
            costs.append(cost_ms)
        backlogs = _backlogs(costs, WORD_MS)
        lines[i] = replace(told[i], deltas=tuple(deltas)).in_ms(backlogs)
        costs_ms += costs[:-1]
    return _live(list(lines.values()), costs_ms), lines


def _timed(run: Callable[[], list[Event]]) -> tuple[list[Event], float]:
    begun_s = time.perf_counter()
    events = run()
    return _whole(events), 1e3 * (time.perf_counter() - begun_s)


def _whole(events: list[Event]) -> list[Event]:
    """The events, unless one of them says that there will be no more translations: what came before has no score.

    Raises:
        DragomanError: ``translator_unavailable``.
    """
    for event in events:
        if isinstance(event, ErrorEvent):
            raise DragomanError(event.code, event.message)
    return events


def _backlogs(costs_ms: Sequence[float], step_ms: float) -> list[float]:
    """The backlog at each push; the last push, the end, comes together with the one before it."""
    *before, end = costs_ms
    backlogs = backlogs_ms(before, step_ms)
    return [*backlogs, (backlogs[-1] if backlogs else 0.0) + end]


def _live(lines: Sequence[Instance], costs_ms: Sequence[float], **speech: Any) -> LiveTranslation | None:
    if not lines:
        return None
    p50_ms, p95_ms = np.percentile(costs_ms, (50, 95)).tolist() if costs_ms else (None, None)
    total = Lagging.of(lines, computation_aware=True)
    return LiveTranslation(len(lines), Lagging.of(lines), total, p50_ms, p95_ms, **speech)


# ----------------------------------------------------------------------------------------------------------- speech


def score_speech(
    recognizer: Recognizer,
    translator: AnyTranslator,
    speech: SpeechSet,
    config: SessionConfig,
    *,
    batch_size: int = 16,
    replay: int = 0,
    speculation: Speculation | None = None,
) -> list[Scored]:
    """Score a recogniser and a translator on speech.

    A recording that cannot be read, or not to its end, is left out and named in the scores' problems.

    Args:
        recognizer: The model that hears.
        translator: The model that translates.
        speech: What they shall hear.
        config: How; its languages are scored.
        batch_size: Recordings at a time, at least 1; the translations do not depend on it.
        replay: How many recordings to translate as live streams too, spread evenly over the set.
        speculation: What drafts the translations; they do not depend on it.

    Returns:
        For each language its score.
    """
    openers = [partial(AudioFile, utterance.audio) for utterance in speech.utterances]
    steps: list[list[Step]] = [[] for _ in openers]
    for step in transcribe(openers, recognizer, config, translator, batch_size=batch_size, speculation=speculation):
        steps[step.index].append(step)
    pairs = list(zip(speech.utterances, steps, strict=True))
    heard = [(utterance, own) for utterance, own in pairs if own[-1].problem is None]
    problems = [f"{u.audio}: {own[-1].problem}; it is not scored" for u, own in pairs if own[-1].problem is not None]
    results = []
    for language in config.languages:
        scored = [(u, own) for u, own in heard if language in u.translations]
        ours = scored or heard
        utterances = [utterance for utterance, _ in ours]
        from_text = _from_text(translator, utterances, language, config.latency, batch_size, speculation)
        if not scored:
            utterances = [
                replace(u, translations={language: (text,)}) for u, text in zip(utterances, from_text, strict=True)
            ]
        told = [
            _told_speech(utterance, language, [(s.events, s.ended) for s in own])
            for utterance, (_, own) in zip(utterances, ours, strict=True)
        ]
        references = [utterance.translations[language] for utterance in utterances]
        own_config = replace(config, languages=(language,))
        live, lines = _replay_speech(recognizer, translator, utterances, own_config, replay, speculation)
        score = TranslationScore(
            manifest=speech.name,
            medium="speech",
            language=language,
            latency=config.latency,
            recognition=_recognition(recognizer, config),
            segments=len(told),
            left_out=len(speech.utterances) - len(told),
            quality=_quality(told) if scored else None,
            quality_from_text=Quality.of(from_text, references) if scored else None,
            agreement=Quality.of([one.text for one in told], [[text] for text in from_text]) if told else None,
            lag_words=Lagging.of([one.in_words() for one in told]),
            lag_ms=Lagging.of([one.in_ms() for one in told]),
            erasure=normalized_erasure(one.shown for one in told),
            delay=_delay(told),
            live=live,
            problems=tuple(problems),
        )
        results.append((score, [_with_elapsed(one.in_ms(), lines.get(i), 1) for i, one in enumerate(told)]))
    return results


def _recognition(recognizer: Recognizer, config: SessionConfig) -> str:
    lookahead_ms = recognizer.lookahead_frames(config.max_lookahead_ms) * FRAME_MS
    adaptive = recognizer.adaptive or config.lookahead == "adaptive"
    return f"{config.decoder}, {'≤ ' if adaptive else ''}{lookahead_ms} ms"


def _from_text(
    translator: AnyTranslator,
    utterances: Sequence[Utterance],
    language: str,
    latency: str,
    batch_size: int,
    speculation: Speculation | None,
) -> list[str]:
    """The translations had everything been recognised without error."""
    texts = [as_spoken(utterance.text) for utterance in utterances]
    found = _read_out(translator, texts, [language], latency, batch_size, speculation)
    return ["".join(delta.text for delta in deltas[language]).strip() for deltas in found]


def _told_speech(utterance: Utterance, language: str, pushes: Sequence[tuple[Sequence[Event], bool]]) -> _Told:
    """What the events of each push tell, which may be the end of the recording."""
    ends_ms, audio_ms, covered, at_end = list[int](), 0, 0, 0
    deltas, delays = list[_Delta](), list[tuple[int, int]]()
    for push, (events, ended) in enumerate(pushes):
        for event in events:
            if isinstance(event, TranscriptDelta):
                ends_ms += [word.end_ms for word in event.words]
            elif isinstance(event, SessionClosed):
                audio_ms = event.audio_ms
            elif isinstance(event, TranslationDelta) and event.language == language and event.delta:
                assert event.emitted_ms is not None, "speech has times"
                words = event.source_words[1] + 1
                deltas.append(_Delta(event.delta, words, event.emitted_ms, push))
                if ended:
                    at_end += words - covered
                else:
                    delays += [(event.emitted_ms - end_ms, push) for end_ms in ends_ms[covered:words]]
                covered = words
    return _Told(
        source=str(utterance.audio),
        references=utterance.translations[language],
        words=len(ends_ms),
        ms=audio_ms,
        deltas=tuple(deltas),
        word_delays=tuple(delays),
        words_at_end=at_end,
    )


def _delay(told: Sequence[_Told], backlogs: Sequence[Sequence[float]] | None = None) -> Delay:
    """The delay of the source words, with the backlogs of each segment's pushes, if there are any."""
    delays_ms = [
        ms + (backlogs[i][push] if backlogs else 0.0) for i, one in enumerate(told) for ms, push in one.word_delays
    ]
    return Delay.of(delays_ms, sum(one.words_at_end for one in told))


def _replay_speech(
    recognizer: Recognizer,
    translator: AnyTranslator,
    utterances: Sequence[Utterance],
    config: SessionConfig,
    count: int,
    speculation: Speculation | None,
) -> tuple[LiveTranslation | None, dict[int, Instance]]:
    """Translate some of the recordings alone; lines of a log in milliseconds, by index."""
    told, costs_ms, backlogs = list[_Told](), list[float](), list[list[float]]()
    lines, audio_s, processor_s = dict[int, Instance](), 0.0, 0.0
    for i in spread(range(len(utterances)), count):
        samples, session = open_session(recognizer, utterances[i].audio, config, translator, speculation)
        rate_hz = session.config.audio.sample_rate_hz
        runs: list[Callable[[], list[Event]]] = [partial(session.push, piece) for piece in pieces(samples, rate_hz)]
        runs.append(session.finish)
        begun_s = time.process_time()
        timed = [_timed(run) for run in runs]
        processor_s += time.process_time() - begun_s
        audio_s += len(samples) / rate_hz
        costs = [cost_ms for _, cost_ms in timed]
        pushes = [(events, push == len(runs) - 1) for push, (events, _) in enumerate(timed)]
        told.append(_told_speech(utterances[i], config.languages[0], pushes))
        backlogs.append(_backlogs(costs, STEP_MS))
        lines[i] = told[-1].in_ms(backlogs[-1])
        costs_ms += costs[:-1]
    if not told:
        return None, {}
    speech = {"delay": _delay(told), "total_delay": _delay(told, backlogs)}
    return _live(list(lines.values()), costs_ms, real_time_factor=processor_s / audio_s, **speech), lines


# ------------------------------------------------------------------------------------------------------ several sets


def translation_jobs(
    translator: AnyTranslator,
    sets: Sequence[SpeechSet | TextSet],
    languages: Sequence[str],
    latencies: Sequence[str],
    *,
    recognizer: Recognizer | None = None,
    configs: Sequence[SessionConfig] = (),
    spoken: bool = False,
    batch_size: int = 16,
    replay: int = 0,
    speculation: Speculation | None = None,
) -> list[Callable[[], list[Scored]]]:
    """What there is to score: each set at each latency, and speech at each setting of the recogniser.

    Args:
        translator: The model.
        sets: What there is. Those without a reference in any of the languages are passed over, but for speech in
            languages that are asked for.
        languages: Languages that must be scored; none: all that the model knows.
        latencies: Levels; ``all`` stands for every one that the model knows.
        recognizer: The model that hears, if there is speech.
        configs: And how.
        spoken: As of `score_text`, and so are the others.
        batch_size: Segments at a time.
        replay: Segments of each set to translate as live streams.
        speculation: What drafts the translations.

    Raises:
        DragomanError: ``unsupported_language``, ``unsupported_latency``, or ``no_references`` where the sets have none
            in a language, and no speech.
    """
    asked = translator.config.latencies if "all" in latencies else tuple(dict.fromkeys(latencies))
    chosen = _scored_languages(translator, sets, languages)
    for latency in asked:
        translator.direction(translator.config.targets[0], latency)
    jobs: list[Callable[[], list[Scored]]] = []
    sizes: dict[str, Any] = {"batch_size": batch_size, "replay": replay, "speculation": speculation}
    for one in sets:
        own = chosen
        if isinstance(one, TextSet) or not languages:
            own = tuple(language for language in chosen if any(language in s.translations for s in _segments(one)))
        for latency in asked if own else ():
            if isinstance(one, TextSet):
                jobs.append(partial(score_text, translator, one, own, latency, spoken=spoken, **sizes))
            elif recognizer is not None:
                for config in configs:
                    full = replace(config, languages=own, latency=latency)
                    jobs.append(partial(score_speech, recognizer, translator, one, full, **sizes))
    return jobs


def _scored_languages(
    translator: AnyTranslator, sets: Sequence[SpeechSet | TextSet], wanted: Sequence[str]
) -> tuple[str, ...]:
    known = {language for one in sets for segment in _segments(one) for language in segment.translations}
    for language in wanted:
        translator.direction(language, translator.config.latencies[0])
        if language not in known and all(isinstance(one, TextSet) for one in sets):
            have = f"in {', '.join(sorted(known))} only" if known else "at all"
            names = ", ".join(one.name for one in sets)
            raise DragomanError("no_references", f"{names}: no reference in {language!r}; there are references {have}")
    return tuple(wanted) or tuple(
        language for language in LANGUAGES if language in known & {*translator.config.targets}
    )


def _segments(one: SpeechSet | TextSet) -> Sequence[Sentence | Utterance]:
    return one.sentences if isinstance(one, TextSet) else one.utterances


def log_name(score: TranslationScore) -> str:
    """A file name for the log of a score: ``SET.LANGUAGE.LATENCY.jsonl``, for speech with the recogniser's settings."""
    parts = [score.manifest, score.language, score.latency, *([score.recognition] if score.recognition else [])]
    return ".".join(re.sub(r"[^\w-]+", "-", part).strip("-") for part in parts) + ".jsonl"
