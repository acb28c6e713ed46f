"""How good a recogniser is: its word errors, how late its words come, and what it costs.

The recogniser runs in the sessions that serve people: all recordings in batches, for the errors and the delay that
the look-ahead asks for, and some of them once more, each alone and at the pace of speech, for the delay that
computing adds.

- *Word error rate* is jiwer's, over all words of a set; `NORMALISER` puts both sides into one form. A transcript that
  it refuses counts as empty; a recording whose reference it refuses is left out.
- *Emission delay* of a word is the audio that had come in when it was decided, less the word's end, as the events of
  the session tell them. The end is where the recogniser itself places the word's last piece: a model that hears a
  word late places it late, and its delay looks shorter than it is.
- *Total delay* adds the backlog of computing at the push that brought the word (`backlogs_ms`).
- Words that only the end of the recording decided count as words, but have no delay: a live stream does not end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import jiwer
import numpy as np

from client.files import AudioFile
from client.normalize import normalize_transcript
from client.transcribe import Step, transcribe
from models.config import FRAME_MS
from models.recognizer import Recognizer
from models.translator import AnyTranslator
from models.vad import are_silent
from streaming.audio import SAMPLE_RATE_HZ, Samples
from streaming.errors import DragomanError
from streaming.events import Event, TranscriptDelta
from streaming.session import Decoder, Lookahead, Session, SessionConfig
from streaming.speculation import Speculation

_Item = TypeVar("_Item")

NORMALISER: Final = f"{normalize_transcript.__module__}.{normalize_transcript.__qualname__}"
"""Name of the function that both sides of a word error rate go through."""
STEP_MS: Final = 80
"""Audio in one push of a live stream."""
LANGUAGES: Final = ("es", "de", "fr")
"""Languages whose reference translations a manifest may hold."""


# -------------------------------------------------------------------------------------------------------- manifests


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest.

    Attributes:
        audio: The recording.
        text: What is said in it.
        duration_s: Its length in seconds, where the manifest tells.
        speaker: Who speaks, where the manifest tells.
        translations: By language of `LANGUAGES`, one or more reference translations.
    """

    audio: Path
    text: str
    duration_s: float | None = None
    speaker: str | None = None
    translations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class SpeechSet:
    """The utterances of one manifest.

    Attributes:
        name: The manifest's file name without its suffix; its path where another set has that name.
        utterances: At least one.
    """

    name: str
    utterances: tuple[Utterance, ...]


@dataclass(frozen=True)
class Sentence:
    """One line of a manifest without audio.

    Attributes:
        text: What there is to translate.
        translations: By language of `LANGUAGES`, one or more reference translations.
    """

    text: str
    translations: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class TextSet:
    """The sentences of one manifest without audio; attributes as of `SpeechSet`."""

    name: str
    sentences: tuple[Sentence, ...]


def read_sets(manifests: Sequence[Path], limit: int | None = None) -> list[SpeechSet]:
    """Read manifests of speech: JSON lines, each an object with `audio` (relative to the manifest) and `text`.

    `duration_s`, `speaker` and the languages of `LANGUAGES` may be there too; other keys are passed over, and so are
    blank lines. The recordings are not looked at.

    Args:
        manifests: The files.
        limit: Take only the first so many utterances of each, at least 1; None: all.

    Raises:
        DragomanError: ``manifest_unreadable``, ``manifest_invalid`` with the number of the line, or ``manifest_empty``.
    """
    return [
        _speech_set(name, _records(path), path, limit) for name, path in zip(_names(manifests), manifests, strict=True)
    ]


def read_all_sets(manifests: Sequence[Path], limit: int | None = None) -> list[SpeechSet | TextSet]:
    """Read manifests of speech, and of text alone.

    A manifest whose first line has a translation and no `audio` is one of text: each of its lines has a language of
    `LANGUAGES`, and the English in `text` or `en`.

    Args:
        manifests: The files.
        limit: As of `read_sets`, which says what else holds.

    Raises:
        DragomanError: As of `read_sets`.
    """
    sets: list[SpeechSet | TextSet] = []
    for name, path in zip(_names(manifests), manifests, strict=True):
        records = _records(path)
        _, first = records[0]
        if "audio" not in first and any(language in first for language in LANGUAGES):
            sets.append(TextSet(name, tuple(_sentence(record, where) for where, record in records[:limit])))
        else:
            sets.append(_speech_set(name, records, path, limit))
    return sets


def _names(manifests: Sequence[Path]) -> list[str]:
    stems = [manifest.stem for manifest in manifests]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, manifests, strict=True)]


_Record = tuple[str, dict[str, Any]]  # where it stands, and what it says


def _speech_set(name: str, records: Sequence[_Record], manifest: Path, limit: int | None) -> SpeechSet:
    utterances = [_utterance(record, where, manifest.parent) for where, record in records]
    return SpeechSet(name, tuple(utterances[:limit]))


def _records(manifest: Path) -> list[_Record]:
    try:
        # Not splitlines: a text may hold characters that it takes for the end of a line.
        lines = manifest.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DragomanError("manifest_unreadable", f"{manifest}: there is no such file") from None
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DragomanError("manifest_unreadable", f"{manifest} cannot be read as a manifest: {reason}") from None
    read = [_record(line, f"{manifest}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not read:
        raise DragomanError(
            "manifest_empty", f"{manifest} has no lines: a manifest has one JSON object with audio and text in each"
        )
    return read


def _record(line: str, where: str) -> _Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DragomanError("manifest_invalid", f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DragomanError("manifest_invalid", f"{where} is not a JSON object with audio and text")
    return where, record


def _utterance(record: Mapping[str, Any], where: str, folder: Path) -> Utterance:
    for key in ("audio", "text"):
        if not isinstance(record.get(key), str):
            what = f"has a {key} that is not a string" if key in record else f"has no {key}"
            raise DragomanError("manifest_invalid", f"{where} {what}: give every utterance audio and text")
    duration_s, speaker = record.get("duration_s"), record.get("speaker")
    return Utterance(
        audio=folder / record["audio"],
        text=record["text"],
        duration_s=float(duration_s) if isinstance(duration_s, int | float) else None,
        speaker=None if speaker is None else str(speaker),
        translations=_translations(record),
    )


def _sentence(record: Mapping[str, Any], where: str) -> Sentence:
    text, translations = record.get("text", record.get("en")), _translations(record)
    if "audio" in record or not isinstance(text, str) or not translations:
        raise DragomanError(
            "manifest_invalid",
            f"{where} is no line of a manifest without audio, as line 1 of it is: give every line text and a"
            f" translation ({', '.join(LANGUAGES)}), or every line audio",
        )
    return Sentence(text, translations)


def _translations(record: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {language: _strings(record[language]) for language in LANGUAGES if language in record}


def _strings(value: Any) -> tuple[str, ...]:
    """One string, or a list of them."""
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


# ----------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class WordErrors:
    """What it takes to make the references of the transcripts, counted by jiwer over all words of a set.

    Attributes:
        words: Words of the references.
        substitutions: Words taken for others.
        deletions: Words missed.
        insertions: Words that nobody said.
        wer: Substitutions, deletions and insertions over `words`, from 0, maybe above 1; None if `words` is 0.
    """

    words: int
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    wer: float | None = None

    @classmethod
    def of(cls, references: list[str], transcripts: list[str]) -> Self:
        """Count the errors of transcripts as the model wrote them; the references are normalised already."""
        if not references:
            return cls(0)
        counted = jiwer.process_words(references, [normalize_transcript(text) or "" for text in transcripts])
        words = counted.hits + counted.substitutions + counted.deletions
        return cls(words, counted.substitutions, counted.deletions, counted.insertions, counted.wer)


@dataclass(frozen=True)
class Delay:
    """How long after their end words were decided, in milliseconds.

    Attributes:
        words_timed: Words decided while audio was coming in; the figures are about these.
        words_at_end: Words that only the end of a recording decided; they are in no figure.
        p50_ms: Median; None, as the others, if ``words_timed`` is 0.
        p95_ms: 95th percentile, linear between the nearest two.
        mean_ms: Arithmetic mean.
    """

    words_timed: int
    words_at_end: int
    p50_ms: float | None = None
    p95_ms: float | None = None
    mean_ms: float | None = None

    @classmethod
    def of(cls, delays_ms: Sequence[float], words_at_end: int) -> Self:
        """Sum up the delays of single words."""
        if not delays_ms:
            return cls(0, words_at_end)
        p50_ms, p95_ms = np.percentile(delays_ms, (50, 95))
        return cls(len(delays_ms), words_at_end, float(p50_ms), float(p95_ms), float(np.mean(delays_ms)))


@dataclass(frozen=True)
class Replay:
    """What live streams of some recordings were like, each alone on the machine.

    Attributes:
        utterances: Recordings that were replayed.
        audio_s: Their length together, in seconds.
        real_time_factor: Processor seconds for a second of audio, the decoding of the end included; below 1 the
            stream keeps up on one core.
        algorithmic: Delay of their words without computing, to compare with `total`.
        total: Delay of the same words with the backlog of computing.
    """

    utterances: int
    audio_s: float
    real_time_factor: float
    algorithmic: Delay
    total: Delay


@dataclass(frozen=True)
class Score:
    """One set at one setting.

    Attributes:
        manifest: Name of the set.
        decoder: ``rnnt`` or ``ctc``.
        lookahead_ms: Look-ahead that the session may use, in milliseconds.
        adaptive: Whether it uses less where that is enough.
        utterances: How many were scored.
        left_out: How many were not, for want of a usable reference or of a readable recording.
        errors: Word errors.
        delay: Algorithmic emission delay, in milliseconds of audio.
        audio_s: Seconds of audio that went through the batches.
        times_real_time: Seconds of audio for a second of the clock in batches, the reading of the files included.
        replay: Live streams of some of the recordings; None if none was replayed.
        problems: One sentence for each recording that could not be read, or not to its end.
    """

    manifest: str
    decoder: Decoder
    lookahead_ms: int
    adaptive: bool
    utterances: int
    left_out: int
    errors: WordErrors
    delay: Delay
    audio_s: float
    times_real_time: float
    replay: Replay | None
    problems: tuple[str, ...] = ()

    @property
    def lookahead(self) -> str:
        """The look-ahead as people read it."""
        return f"{'≤ ' if self.adaptive else ''}{self.lookahead_ms} ms"


def session_configs(
    recognizer: Recognizer,
    decoders: Iterable[Decoder] = ("rnnt",),
    max_lookaheads_ms: Iterable[int | None] = (None,),
    policies: Iterable[Lookahead | None] = (None,),
) -> list[SessionConfig]:
    """The settings to score: every decoder at every look-ahead, each once.

    Args:
        recognizer: The model that must be able to run them.
        decoders: Heads of the model.
        max_lookaheads_ms: As in :class:`streaming.session.SessionConfig`; those that come to the same trained
            look-ahead are one.
        policies: As ``lookahead`` in :class:`streaming.session.SessionConfig`.

    Raises:
        DragomanError: ``unsupported_decoder`` or ``unsupported_lookahead``.
    """
    lookaheads_ms = dict.fromkeys(recognizer.lookahead_frames(ms) * FRAME_MS for ms in max_lookaheads_ms)
    configs = [
        SessionConfig(max_lookahead_ms=ms, lookahead=policy, decoder=decoder)
        for decoder in dict.fromkeys(decoders)
        for policy in dict.fromkeys(policies)
        for ms in lookaheads_ms
    ]
    for config in configs:
        Session(recognizer, config)  # asks the model
    return configs


def score(
    recognizer: Recognizer,
    speech: SpeechSet,
    config: SessionConfig,
    *,
    batch_size: int = 16,
    replay: int = 0,
) -> Score:
    """Score a recogniser on a set.

    A recording that cannot be read, or not to its end, is left out and named in the score's problems.

    Args:
        recognizer: The model.
        speech: What it shall hear.
        config: How, one of `session_configs`; the audio format is each recording's own.
        batch_size: Recordings at a time, at least 1; the transcripts do not depend on it.
        replay: How many recordings to replay as live streams, spread evenly over the set; 0 for none.
    """
    references = [normalize_transcript(utterance.text) for utterance in speech.utterances]
    pairs = [(u, reference) for u, reference in zip(speech.utterances, references, strict=True) if reference]
    _warm_up(recognizer, config)
    begun_s = time.perf_counter()
    heard = _listen(recognizer, [utterance.audio for utterance, _ in pairs], config, batch_size)
    wall_s = time.perf_counter() - begun_s
    sound = [(*pair, ear) for pair, ear in zip(pairs, heard, strict=True) if ear.problem is None]
    audio_s = sum(ear.audio_s for ear in heard)
    return Score(
        manifest=speech.name,
        decoder=config.decoder,
        lookahead_ms=recognizer.lookahead_frames(config.max_lookahead_ms) * FRAME_MS,
        adaptive=recognizer.adaptive or config.lookahead == "adaptive",
        utterances=len(sound),
        left_out=len(speech.utterances) - len(sound),
        errors=WordErrors.of([reference for _, reference, _ in sound], [ear.text for _, _, ear in sound]),
        delay=Delay.of([ms for *_, ear in sound for ms in ear.delays_ms], sum(ear.words_at_end for *_, ear in sound)),
        audio_s=audio_s,
        times_real_time=audio_s / wall_s,
        replay=_replay(recognizer, spread([utterance.audio for utterance, *_ in sound], replay), config),
        problems=tuple(
            f"{utterance.audio}: {ear.problem}; it is not scored"
            for (utterance, _), ear in zip(pairs, heard, strict=True)
            if ear.problem is not None
        ),
    )


def _warm_up(recognizer: Recognizer, config: SessionConfig) -> None:
    """Make what is made once and belongs in no figure: packed weights, positions, the voice activity detector."""
    silence = np.zeros(SAMPLE_RATE_HZ, np.float32)
    session = Session(recognizer, config)
    session.push(silence)
    session.finish()
    are_silent([silence])


# ---------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class _Heard:
    """What the recogniser made of one recording."""

    text: str
    delays_ms: tuple[int, ...]
    words_at_end: int
    audio_s: float
    problem: str | None


def _listen(recognizer: Recognizer, audio: Sequence[Path], config: SessionConfig, batch_size: int) -> list[_Heard]:
    steps: list[list[Step]] = [[] for _ in audio]
    for step in transcribe([partial(AudioFile, file) for file in audio], recognizer, config, batch_size=batch_size):
        steps[step.index].append(step)
    return [_heard(own) for own in steps]


def _heard(steps: Sequence[Step]) -> _Heard:
    last = steps[-1]
    return _Heard(
        text="".join(delta.delta for step in steps for delta in _deltas(step.events)),
        delays_ms=tuple(ms for step in steps if not step.ended for ms in _delays_ms(step.events)),
        words_at_end=sum(_words(step.events) for step in steps if step.ended),
        audio_s=last.audio_s,
        problem=last.problem,
    )


def _deltas(events: Sequence[Event]) -> Iterator[TranscriptDelta]:
    return (event for event in events if isinstance(event, TranscriptDelta))


def _delays_ms(events: Sequence[Event]) -> list[int]:
    """Of each word in the events, the audio that had come in less the word's end."""
    return [delta.emitted_ms - word.end_ms for delta in _deltas(events) for word in delta.words]


def _words(events: Sequence[Event]) -> int:
    return sum(len(delta.words) for delta in _deltas(events))


# ----------------------------------------------------------------------------------------------------- live streams


def backlogs_ms(costs_ms: Iterable[float], step_ms: float = STEP_MS) -> list[float]:
    """How far behind a busy engine is after each push of a live stream.

    A step of audio comes every `step_ms`, and in that time the engine works off what it still has to do; then it
    has the new push to compute as well: ``b[t] = max(0, b[t-1] - step_ms) + cost[t]``, with nothing before the first.

    Args:
        costs_ms: Time that each push takes to compute, from 0.
        step_ms: Audio in one push, in milliseconds.
    """
    return list(accumulate(costs_ms, lambda backlog, cost: max(0.0, backlog - step_ms) + cost))


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """So many of them, or all, at even distances: neighbours are often one speaker's."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@dataclass(frozen=True)
class _Stream:
    """One recording as a live stream; `delays_ms` and `totals_ms` have the same words."""

    audio_s: float
    processor_s: float
    delays_ms: tuple[int, ...]
    totals_ms: tuple[float, ...]
    words_at_end: int


def _replay(recognizer: Recognizer, audio: Sequence[Path], config: SessionConfig) -> Replay | None:
    streams = [_stream(recognizer, file, config) for file in audio]
    if not streams:
        return None
    words_at_end, audio_s = sum(one.words_at_end for one in streams), sum(one.audio_s for one in streams)
    return Replay(
        utterances=len(streams),
        audio_s=audio_s,
        real_time_factor=sum(one.processor_s for one in streams) / audio_s,
        algorithmic=Delay.of([ms for one in streams for ms in one.delays_ms], words_at_end),
        total=Delay.of([ms for one in streams for ms in one.totals_ms], words_at_end),
    )


def _stream(recognizer: Recognizer, file: Path, config: SessionConfig) -> _Stream:
    """Push a recording in steps of `STEP_MS`, as fast as may be, and time each push."""
    samples, session = open_session(recognizer, file, config)
    rate_hz = session.config.audio.sample_rate_hz
    costs_ms, told = [], []
    begun_s = time.process_time()
    for piece in pieces(samples, rate_hz):
        pushed_s = time.perf_counter()
        events = session.push(piece)
        costs_ms.append(1e3 * (time.perf_counter() - pushed_s))
        told.append(_delays_ms(events))
    at_end = session.finish()
    return _Stream(
        audio_s=len(samples) / rate_hz,
        processor_s=time.process_time() - begun_s,
        delays_ms=tuple(ms for delays in told for ms in delays),
        totals_ms=tuple(
            ms + backlog for delays, backlog in zip(told, backlogs_ms(costs_ms), strict=True) for ms in delays
        ),
        words_at_end=_words(at_end),
    )


def open_session(
    recognizer: Recognizer,
    file: Path,
    config: SessionConfig,
    translator: AnyTranslator | None = None,
    speculation: Speculation | None = None,
) -> tuple[Samples, Session]:
    """A whole recording, ``[samples, channels]``, and a session that takes its format."""
    source = AudioFile(file)
    try:
        samples = np.concatenate(list(source.blocks(source.format.sample_rate_hz)))
    finally:
        source.close()
    return samples, Session(recognizer, replace(config, audio=source.format), translator, speculation)


def pieces(samples: Samples, rate_hz: int) -> Iterator[Samples]:
    """Steps of `STEP_MS`, the last one maybe shorter; where a step is no whole number of samples, none drifts."""
    step, start = 0, 0
    while start < len(samples):
        step += 1
        end = step * STEP_MS * rate_hz // 1000
        yield samples[start:end]
        start = end
