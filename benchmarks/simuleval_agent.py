r"""Agents for SimulEval 1.1.4: the sessions of this project under its evaluator.

    simuleval --agent benchmarks/simuleval_agent.py --agent-class agents.TextAgent --to es --latency medium \
        --source dev.en --target dev.es --quality-metrics BLEU --latency-metrics AL LAAL DAL --output out/
    simuleval --agent benchmarks/simuleval_agent.py --agent-class agents.SpeechAgent --to es --source-segment-size 80 \
        --source wavs.txt --target dev.es --quality-metrics BLEU --latency-metrics AL LAAL DAL --computation-aware

SimulEval pins old packages, so it goes into an environment of its own, with this project beside it. `dragoman eval
--log` writes the same log without it. Delays of speech come in steps of the segment size here: they count the audio
that SimulEval had sent, not what the words needed.
"""

from __future__ import annotations

from abc import abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from simuleval.agents import SpeechToTextAgent, TextToTextAgent
from simuleval.agents.actions import Action, ReadAction, WriteAction
from simuleval.utils import entrypoint

from models.checkpoint import load_recognizer
from models.translator import load_translator
from streaming.audio import AudioFormat
from streaming.events import Event, TranslationDelta
from streaming.session import Session, SessionConfig
from streaming.text_session import TextSession


class _Agent:
    """What both agents have in common: a session for each segment, given what has come since the last look."""

    args: Namespace
    states: Any

    def __init__(self, args: Namespace) -> None:
        self._translator = load_translator(args.translator, device=args.device or "cpu")
        self._translator.direction(args.to, args.latency)
        self._session: Any = None
        self._seen = 0
        super().__init__(args)  # type: ignore[call-arg]

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """Declare the settings beside SimulEval's own."""
        parser.add_argument("--to", required=True, metavar="LANGUAGE", help="translate into this language")
        parser.add_argument("--latency", default="medium", help="how long the translation waits for more words")
        parser.add_argument("--translator", type=Path, metavar="DIR", help="folder of the translator")

    def reset(self) -> None:
        """Begin a segment."""
        super().reset()  # type: ignore[misc]
        self._session, self._seen = None, 0

    def policy(self) -> Action:
        """Give the session what is new, and write what it tells."""
        new = self.states.source[self._seen :]
        self._seen += len(new)
        events: list[Event] = []
        if self._session is None and new:
            self._session = self.begin()
        if new:
            events += self._session.push(self.form(new))
        if self.states.source_finished and self._session is not None:
            events += self._session.finish()
        content = "".join(event.delta for event in events if isinstance(event, TranslationDelta))
        if content or self.states.source_finished:
            return WriteAction(content, finished=self.states.source_finished)
        return ReadAction()

    @abstractmethod
    def begin(self) -> Session | TextSession:
        """A session for the segment that begins."""

    @abstractmethod
    def form(self, new: Sequence[Any]) -> Any:
        """What came, as the session takes it."""


@entrypoint
class TextAgent(_Agent, TextToTextAgent):  # type: ignore[misc]
    """Words in, words out."""

    def begin(self) -> TextSession:
        """A session that reads text."""
        return TextSession(self._translator, [self.args.to], self.args.latency)

    def form(self, new: Sequence[Any]) -> str:
        """Words with spaces between them."""
        return " ".join(new)


@entrypoint
class SpeechAgent(_Agent, SpeechToTextAgent):  # type: ignore[misc]
    """Samples in, words out."""

    def __init__(self, args: Namespace) -> None:
        self._recognizer = load_recognizer(args.model, device=args.device or "cpu")
        super().__init__(args)

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """Declare the settings beside SimulEval's own."""
        _Agent.add_args(parser)
        parser.add_argument("--model", type=Path, metavar="DIR", help="folder of the recogniser")
        parser.add_argument("--max-lookahead-ms", type=int, metavar="MS", help="audio heard before a sound is decided")

    def begin(self) -> Session:
        """A session that hears one channel at the rate of the segment."""
        config = SessionConfig(
            AudioFormat("f32le", self.states.source_sample_rate),
            max_lookahead_ms=self.args.max_lookahead_ms,
            languages=(self.args.to,),
            latency=self.args.latency,
        )
        return Session(self._recognizer, config, self._translator)

    def form(self, new: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Samples as one channel, ``[samples, 1]``."""
        return np.asarray(new, np.float32)[:, None]
