"""Many recordings through one recogniser, and one translator, a few of them at a time in one batch."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from client.files import AudioSource
from models.recognizer import Recognizer
from models.translator import AnyTranslator
from streaming.audio import Samples
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed
from streaming.session import Session, SessionConfig, tick
from streaming.speculation import Speculation

# A little of a recording at a time, but some of the model's chunks, which cost less together than one by one.
_BLOCK_S: Final = 5
_MAX_CHUNKS: Final = 4


@dataclass(frozen=True)
class Step:
    """What one step of the batch brought for one recording.

    Attributes:
        index: Which recording, in the order given.
        events: What its session told.
        audio_s: How much of it has been read so far, in seconds.
        duration_s: How long it is, where known.
        problem: One sentence, if it could not be read, or not to its end.
        done: Whether this is its last step.
        ended: Whether the recording had ended before `events` were decided.
    """

    index: int
    events: Sequence[Event] = ()
    audio_s: float = 0.0
    duration_s: float | None = None
    problem: str | None = None
    done: bool = False
    ended: bool = False


def transcribe(
    openers: Sequence[Callable[[], AudioSource]],
    recognizer: Recognizer,
    config: SessionConfig,
    translator: AnyTranslator | None = None,
    *,
    batch_size: int,
    speculation: Speculation | None = None,
) -> Iterator[Step]:
    """Run every recording through a session of its own; at most `batch_size` are open, and share each step.

    A recording that cannot be read ends with a problem; the others are not touched by it.

    Args:
        openers: One function for each recording, that opens it.
        recognizer: The model.
        config: Settings of the sessions; the audio format is taken from each recording.
        translator: The model that translates, if `config` names languages.
        batch_size: Recordings at a time, at least 1.
        speculation: What drafts the translations; they do not depend on it.

    Yields:
        For each step of the batch, one `Step` for each of its recordings.
    """
    waiting = deque(enumerate(openers))
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < batch_size:
                index, open_source = waiting.popleft()
                try:
                    running.append(_Job(index, open_source(), recognizer, config, translator, speculation))
                except DragomanError as error:
                    yield Step(index, problem=str(error), done=True)
            for job in running:
                job.feed()
            tick([job.session for job in running], max_chunks=_MAX_CHUNKS)
            for job in running:
                yield job.step()
            running = [job for job in running if not job.done]
    finally:
        for job in running:
            job.source.close()


class _Job:
    """One recording under way."""

    def __init__(
        self,
        index: int,
        source: AudioSource,
        recognizer: Recognizer,
        config: SessionConfig,
        translator: AnyTranslator | None,
        speculation: Speculation | None,
    ) -> None:
        self.index = index
        self.source = source
        self.done = False
        self._problem: str | None = None
        self._read_s = 0.0
        try:
            self.session = Session(recognizer, replace(config, audio=source.format), translator, speculation)
        except DragomanError:
            source.close()
            raise
        self._blocks = source.blocks(_BLOCK_S * source.format.sample_rate_hz)
        self._at_end = False

    def feed(self) -> None:
        """Read on until the session can make a step, or the recording ends."""
        while not self._at_end and not self.session.ready():
            try:
                block = next(self._blocks, None)
                if block is None:
                    self._at_end = True
                    self._problem = self.source.problem
                    self.session.close_input()
                else:
                    self._read_s += self._seconds(block)
                    self.session.write(block)
            except DragomanError as error:
                self._at_end = self.done = True
                self._problem = str(error)

    def step(self) -> Step:
        """What the last step brought; after a problem, the words before it too."""
        events = self.session.take_events()
        if self.done:
            events += self.session.flush()
        for event in events:
            if isinstance(event, ErrorEvent):
                self._problem = event.message
            self.done |= isinstance(event, SessionClosed)
        if self.done:
            self.source.close()
        problem = self._problem if self.done else None
        return Step(self.index, events, self._read_s, self.source.duration_s, problem, self.done, self._at_end)

    def _seconds(self, block: bytes | Samples) -> float:
        fmt = self.source.format
        samples = len(block) / fmt.bytes_per_sample if isinstance(block, bytes) else len(block)
        return samples / fmt.sample_rate_hz
