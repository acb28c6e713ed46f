"""One speaker's session without I/O: audio in, events out, in the speaker's language and in others.

    session = Session(load_recognizer())
    for pcm in microphone:
        for event in session.push(pcm):
            print(event.to_json())
    for event in session.finish(): ...

Everything that a session remembers is a value that each step replaces and never changes in place. A copy of a
session is therefore shallow and free, and a flush in mid-stream is the end of the audio on such a copy. Several
sessions advance as one batch with :func:`tick`; a session alone is a batch of one.

What the transcript has told is translated before it goes on, so that the order of a session's events does not depend
on how its audio came.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from models import vad
from models.config import FRAME_MS, FRAME_SAMPLES
from models.recognizer import Recognizer
from models.translator import LATENCIES, AnyTranslator
from streaming.audio import AudioFormat, AudioNormalizer
from streaming.encoder import Encoded, EncoderStream, encode
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta
from streaming.features import GROUP_TAIL_SAMPLES, front_end
from streaming.glossary import check_glossary
from streaming.interpreter import UNNUMBERED, Interpretation, Portion, Teller, translate
from streaming.speculation import Speculation
from streaming.text import EmittedWord, FlushGuard, TextState, WordAssembler, close_segment
from streaming.transducer import CtcSearch, Search, Token, TransducerSearch

SAMPLES_PER_MS = 16
Decoder = Literal["rnnt", "ctc"]
Lookahead = Literal["fixed", "adaptive"]
#: Silence decoded after the end of the audio, so that the last word is emitted: one chunk, within these bounds. The
#: largest published chunk is 14 frames; an adaptive model's cap may be far above what its layers ask for.
FLUSH_FRAMES, MAX_FLUSH_FRAMES = 4, 14
#: A chunk that was tried and has no pieces is taken if nobody speaks in the last so many frames.
SILENCE_EVIDENCE_FRAMES = 6
#: Frames without a piece after which a segment may be about to end, so that it is worth to translate as if it did.
PAUSE_FRAMES = 3


@dataclass(frozen=True)
class SessionConfig:
    """What a client may choose.

    Attributes:
        audio: Form of the samples that will be pushed.
        max_lookahead_ms: A model that looks ahead in chunks runs at its largest trained look-ahead not above this; the
            layers of an adaptive one never wait for longer. None: the model's largest.
        decoder: Which head of the model decodes.
        endpoint_silence_ms: Silence that closes a segment, 240 to 10,000 ms.
        lookahead: For a model that looks ahead in chunks: ``fixed``, chunks of one size, or ``adaptive``, each chunk
            the smallest that leaves decoder and voice activity without doubts. None: ``fixed``, or for a model
            whose layers decide, ``adaptive``, which is all that it can do.
        sure_probability: What ``adaptive`` chunks ask of their least probable piece, 0 to 1; below it they wait for
            more audio. A larger one waits longer and errs less.
        languages: Languages to translate into; none for the transcript only.
        latency: How long the translation waits for more words, one of :data:`models.translator.LATENCIES`.
        glossary: Terms whose translations are fixed: ``{term: {language: translation}}``.
    """

    audio: AudioFormat = AudioFormat()
    max_lookahead_ms: int | None = None
    decoder: Decoder = "rnnt"
    endpoint_silence_ms: int = 800
    lookahead: Lookahead | None = None
    sure_probability: float = 0.8
    languages: tuple[str, ...] = ()
    latency: str = "medium"
    glossary: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 240 <= self.endpoint_silence_ms <= 10_000:
            raise DragomanError(
                "unsupported_endpoint",
                f"endpoint_silence_ms is {self.endpoint_silence_ms}; choose a value from 240 to 10000",
            )
        if self.lookahead not in (None, "fixed", "adaptive"):
            raise DragomanError(
                "unsupported_lookahead", f"lookahead is {self.lookahead!r}; choose fixed or adaptive, or leave it out"
            )
        if not 0 <= self.sure_probability <= 1:
            raise DragomanError(
                "unsupported_lookahead", f"sure_probability is {self.sure_probability}; choose a value from 0 to 1"
            )
        if self.latency not in LATENCIES:
            raise DragomanError(
                "unsupported_latency", f"latency is {self.latency!r}; choose one of {', '.join(LATENCIES)}"
            )
        check_glossary(self.glossary)


class Session(Teller):
    """Speech of one source to a growing transcript and growing translations.

    Args:
        recognizer: The model; shared, never changed.
        config: What the client chose.
        translator: The model that translates, if the client may choose languages; shared, never changed.
        speculation: Of the engine, shared by its sessions; None for none. It changes no event.

    Raises:
        DragomanError: ``unsupported_lookahead``, ``unsupported_decoder``, ``unsupported_language`` or
            ``unsupported_latency`` if the models cannot do what is asked, or the setting is unknown.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        config: SessionConfig | None = None,
        translator: AnyTranslator | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.config = config or SessionConfig()
        c = self.config
        super().__init__(Interpretation.begin(translator, c.languages, c.latency, c.glossary, speculation))
        self.recognizer = recognizer
        self._audio = AudioNormalizer(self.config.audio)
        self._front_end = front_end(recognizer.config.features)
        self._features = self._front_end.init_state()
        lookahead_frames = recognizer.lookahead_frames(self.config.max_lookahead_ms)
        trial_sizes = _trial_sizes(recognizer, self.config.lookahead)
        self._encoder = EncoderStream.begin(recognizer.net.encoder, lookahead_frames, trial_sizes)
        self.search = _search(recognizer, self.config.decoder)
        self._decoder = self.search.init_state(1)
        self._silence_frames = -(-self.config.endpoint_silence_ms // FRAME_MS)
        self._words = WordAssembler(recognizer.tokenizer, self._silence_frames)
        self._text = TextState()
        self._recent = np.zeros(0, np.float32)  # audio that an endpoint may still ask about
        self._audio_samples = 0
        self._fresh: tuple[Token, ...] = ()  # pieces decided since the events were last taken
        self._closed = False

    # ------------------------------------------------------------------------------------------- one session

    def push(self, pcm: bytes | np.ndarray) -> list[Event]:
        """Takes audio, of any length, and returns what has become certain.

        Raises:
            DragomanError: ``audio_not_finite`` or ``session_closed``.
        """
        self.write(pcm)
        return self._drain()

    def flush(self) -> list[Event]:
        """Decides all words so far as if the audio ended here; the stream goes on as if it had not."""
        fork = self.begin_flush()
        while fork.ready():
            tick([fork])
        return self.end_flush(fork)

    def begin_flush(self) -> Session:
        """What a flush has to advance until it is no longer ready, while this session neither takes in nor advances."""
        return self._ended_copy()

    def end_flush(self, fork: Session) -> list[Event]:
        """Goes on after a flush, with what it has decided; the stream goes on as if its audio had not ended."""
        guard = FlushGuard(
            until_frame=-(-fork._audio_samples // FRAME_SAMPLES),
            padded_until_frame=fork._decoder.frames[0],
            expected=tuple(token.piece for token in fork._fresh),
        )
        self._text = replace(fork._text, pending=(), silent_from_frame=self._text.silent_from_frame, guard=guard)
        # What the flush has told is told and translated; the translation goes on from there.
        self._interpretation = fork._interpretation
        self._untold = tuple(event for event in self._untold if isinstance(event, ErrorEvent | SessionClosed))
        events = [event for event in fork.take_events() if not isinstance(event, SessionClosed)]
        self._seq += len(events)
        return list(events)

    def finish(self) -> list[Event]:
        """Ends the audio and returns the last events, :class:`SessionClosed` at their end.

        Audio that ends within a sample adds an :class:`ErrorEvent` to them.
        """
        self.close_input()
        return self._drain()

    # ------------------------------------------------------------------------------------ one among several

    def write(self, pcm: bytes | np.ndarray) -> None:
        """Takes audio, and computes nothing."""
        if self._closed:
            raise DragomanError("session_closed", "audio came after the end of the session; open a new one")
        self._take(self._audio.push(pcm), last=False)

    def close_input(self) -> None:
        """Ends the audio; the next ticks decide what is left."""
        if self._closed:
            raise DragomanError("session_closed", "the session has ended already; open a new one")
        self._closed = True
        try:
            self._take(self._audio.finish(), last=False)
        except DragomanError as error:  # half a sample at the end must not cost the words before it
            self._emit(ErrorEvent(UNNUMBERED, error.code, str(error)))
            self._take(self._audio.tail(), last=False)
        self._pad()

    def ready(self, max_chunks: int = 1) -> bool:
        """Whether a tick would advance this session."""
        return self.translates or self._encoder.ready_frames(max_chunks) > 0

    @property
    def decided_ms(self) -> int:
        """Audio before this moment will bring no further events."""
        decoded_ms = self._decoder.frames[0] * FRAME_MS
        if not self.translates or self._interpretation is None or not self._interpretation.words:
            return decoded_ms
        return min(decoded_ms, self._interpretation.words[-1].emitted_ms or 0)

    @property
    def tail(self) -> str:
        """See :class:`streaming.interpreter.Teller`."""
        words, _ = self._words.close_word(self._text)
        return words[0].word.word if words else ""

    @property
    def pausing(self) -> bool:
        """See :class:`streaming.interpreter.Teller`."""
        return self._decoder.frames[0] - self._text.silent_from_frame >= PAUSE_FRAMES

    def take_events(self) -> list[Event]:
        """The events since the last call."""
        events, self._events, self._fresh = self._events, (), ()
        return list(events)

    def set_max_lookahead_ms(self, max_lookahead_ms: int | None) -> None:
        """Changes the look-ahead for the audio that comes from now on; see :class:`SessionConfig`.

        Raises:
            DragomanError: ``unsupported_lookahead``.
        """
        lookahead_frames = self.recognizer.lookahead_frames(max_lookahead_ms)
        self.config = replace(self.config, max_lookahead_ms=max_lookahead_ms)
        self._encoder = replace(self._encoder, lookahead_frames=lookahead_frames)

    # ---------------------------------------------------------------------------------------------- internal

    def _take(self, samples: np.ndarray, *, last: bool) -> None:
        groups, slots, self._features = self._front_end.cut(samples, self._features, last=last)
        self._encoder = self._encoder.extended(groups, slots, ended=last)
        self._recent = np.concatenate([self._recent, samples])
        self._audio_samples += len(samples)

    def _ended_copy(self) -> Session:
        """This session as if its audio ended here; nothing that it does is seen by this one."""
        fork = copy.copy(self)
        fork._events, fork._fresh, fork._closed = (), (), True
        fork._untold = tuple(event for event in fork._untold if not isinstance(event, ErrorEvent))
        fork._take(self._audio.tail(), last=False)
        fork._pad()
        return fork

    def _pad(self) -> None:
        """Ends the features, with so much silence after the audio that the last word is emitted."""
        if not self._audio_samples:
            self._emit(SessionClosed(UNNUMBERED, 0))
            return
        heard = self._audio_samples
        padding_frames = max(FLUSH_FRAMES, min(self._encoder.lookahead_frames + 1, MAX_FLUSH_FRAMES))
        self._take(np.zeros(padding_frames * FRAME_SAMPLES, np.float32), last=True)
        self._audio_samples = heard

    def _drain(self) -> list[Event]:
        while self.ready():
            tick([self])
        return self.take_events()

    def _decoded(self, done: Encoded, tokens: list[Token]) -> Generator[np.ndarray, bool, None]:
        """Takes the pieces of a step in the order in which the audio made them known.

        Yields stretches of audio, and is to be sent whether each is silent.
        """
        self._fresh = (*self._fresh, *tokens)
        end = done.start_frame + done.frames
        for start, stop, reach in done.moments():
            words, self._text = self._words.add([t for t in tokens if start <= t.frame < stop], self._text)
            ended = False
            if self._words.suspects_endpoint(stop, self._text):
                silent = yield self._stretch(stop, self._silence_frames)
                ended, self._text = self._words.at_endpoint(stop, self._text, silent=silent)
            finished = stop == end and self._at_end()
            if ended or finished:
                last, self._text = self._words.close_word(self._text)
                words += last
            self._transcribed(words, reach, closes=ended or finished)
        if self._at_end():
            self._emit(SessionClosed(UNNUMBERED, self._audio_samples // SAMPLES_PER_MS))
        self._forget(end)

    def _has_doubts(self, done: Encoded, tokens: list[Token]) -> bool:
        """Whether a chunk that was tried should wait for more audio."""
        if not self._encoder.may_wait:
            return False
        if tokens:
            return min(token.probability for token in tokens) < self.config.sure_probability
        return not vad.are_silent([self._stretch(done.reach[-1] + 1, SILENCE_EVIDENCE_FRAMES)])[0]

    def _at_end(self) -> bool:
        return self._encoder.ended and not self._encoder.groups

    def _transcribed(self, words: list[EmittedWord], reach: int, *, closes: bool) -> None:
        if words:
            audio_ms = self._audio_samples // SAMPLES_PER_MS
            needed_ms = -(-(reach * FRAME_SAMPLES + GROUP_TAIL_SAMPLES) // SAMPLES_PER_MS)
            # At the end, what was decided in the padding belongs to the last moment of the audio.
            limit_ms = min(needed_ms, audio_ms) if self._closed else needed_ms
            times = [word.word.clipped(limit_ms) for word in words]
            event = TranscriptDelta(
                seq=UNNUMBERED,
                delta="".join(word.delta for word in words),
                start_ms=times[0].start_ms,
                end_ms=times[-1].end_ms,
                emitted_ms=limit_ms,
                segment=self._text.segment,
                endpoint=closes,
                words=tuple(times),
            )
            self._emit(event)
        elif closes:
            self._emit(Portion(closes=True))
        if closes and self._text.segment_words:
            self._text = close_segment(self._text)

    def _stretch(self, end_frame: int, frames: int) -> np.ndarray:
        """The audio of so many frames before ``end_frame``."""
        end = (end_frame - 1) * FRAME_SAMPLES + GROUP_TAIL_SAMPLES - self._recent_start()
        return self._recent[max(0, end - frames * FRAME_SAMPLES) : max(0, end)]

    def _recent_start(self) -> int:
        return self._features.samples - len(self._recent)

    def _forget(self, end_frame: int) -> None:
        """Drops audio that no endpoint can ask about any more."""
        keep_from = (end_frame - max(self._silence_frames, SILENCE_EVIDENCE_FRAMES) - 1) * FRAME_SAMPLES
        self._recent = self._recent[max(0, keep_from - self._recent_start()) :]


def tick(sessions: Sequence[Session], *, max_chunks: int = 1) -> None:
    """Advances every ready session by a step of common batches; their events wait in ``take_events``.

    A session either translates what it has told or goes on with its audio.

    Args:
        sessions: Sessions of one recognizer, ready or not.
        max_chunks: Chunks of a session to run at once, where so much audio is there; see
            :func:`streaming.encoder.encode`.
    """
    translating = [session for session in sessions if session.translates]
    ready = [session for session in sessions if not session.translates and session.ready(max_chunks)]
    translate(translating)
    if not ready:
        return
    net = ready[0].recognizer.net
    encoded, done, streams = encode(
        net.encoder,
        [session._encoder for session in ready],
        max_chunks=max_chunks,
        front_end=ready[0]._front_end,
    )
    taking = list[Generator[np.ndarray, bool, None]]()
    for kind in {type(session.search) for session in ready}:
        rows = [row for row, session in enumerate(ready) if type(session.search) is kind]
        search = ready[rows[0]].search
        states = type(ready[rows[0]]._decoder).cat([ready[row]._decoder for row in rows])
        lengths = [done[row].frames for row in rows]
        tokens, after = search.step(encoded if len(rows) == len(ready) else encoded[rows], lengths, states)
        for row, state, pieces in zip(rows, after.rows(), tokens, strict=True):
            session = ready[row]
            if session._has_doubts(done[row], pieces):
                session._encoder = session._encoder.waiting()
                continue
            session._encoder, session._decoder = streams[row], state
            taking.append(session._decoded(done[row], pieces))
    _listen(taking)


def _listen(taking: Sequence[Generator[np.ndarray, bool, None]]) -> None:
    """Runs generators to their ends; what they yield is listened to for all of them together."""
    asking = [(taker, next(taker, None)) for taker in taking]
    while asking := [(taker, stretch) for taker, stretch in asking if stretch is not None]:
        answers = vad.are_silent([stretch for _, stretch in asking])
        asking = [(taker, _sent(taker, silent)) for (taker, _), silent in zip(asking, answers, strict=True)]


def _sent(taker: Generator[np.ndarray, bool, None], silent: bool) -> np.ndarray | None:
    """The next stretch that it asks about; None at its end."""
    try:
        return taker.send(silent)
    except StopIteration:
        return None


def _trial_sizes(recognizer: Recognizer, lookahead: Lookahead | None) -> tuple[int, ...]:
    """Chunk sizes that a session tries."""
    if recognizer.adaptive and lookahead == "fixed":
        raise DragomanError(
            "unsupported_lookahead",
            f"the layers of model {recognizer.name!r} decide how far they look ahead; a fixed look-ahead is for models"
            " that look ahead in chunks: leave it out, and bound it with max_lookahead_ms",
        )
    if recognizer.adaptive or lookahead != "adaptive":
        return ()
    return tuple(sorted(frames + 1 for frames in recognizer.config.encoder.lookahead_frames))


def _search(recognizer: Recognizer, decoder: str) -> Search:
    has = {"rnnt": recognizer.config.decoder is not None, "ctc": recognizer.config.ctc}
    if not has.get(decoder, False):
        heads = " and ".join(name for name, there in has.items() if there)
        raise DragomanError(
            "unsupported_decoder",
            f"model {recognizer.name!r} has no {decoder!r} head; it decodes with {heads}",
        )
    return TransducerSearch(recognizer.net) if decoder == "rnnt" else CtcSearch(recognizer.net)
