"""SimulEval's agents write what the sessions tell; where SimulEval is not installed, with a stand-in for it."""

from __future__ import annotations

import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import models.checkpoint
import models.translator
from streaming.audio import AudioFormat
from streaming.events import TranslationDelta
from streaming.session import Session, SessionConfig
from streaming.text_session import TextSession
from tests import tiny

AGENT = Path(__file__).parents[2] / "benchmarks" / "simuleval_agent.py"
TRANSLATOR = tiny.translator(2)
TEXT = "the speaker is still talking and nothing once shown is ever taken back"


@dataclass
class WriteAction:
    content: str
    finished: bool

    def is_read(self) -> bool:
        return False


class ReadAction:
    def is_read(self) -> bool:
        return True


class Agent:
    """What SimulEval 1.1.4's agents do when they are made."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.states = SimpleNamespace(source=[], source_finished=False, source_sample_rate=0)
        self.reset()

    def reset(self) -> None:
        self.states.source, self.states.source_finished = [], False


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, loaded as SimulEval loads it."""
    monkeypatch.setattr(models.checkpoint, "load_recognizer", lambda path, **_: tiny.recognizer())
    monkeypatch.setattr(models.translator, "load_translator", lambda path, **_: TRANSLATOR)
    if importlib.util.find_spec("simuleval") is None:
        parts = {
            "simuleval": {},
            "simuleval.agents": {"TextToTextAgent": Agent, "SpeechToTextAgent": Agent},
            "simuleval.agents.actions": {"Action": object, "ReadAction": ReadAction, "WriteAction": WriteAction},
            "simuleval.utils": {"entrypoint": lambda agent: agent},
        }
        for name, contents in parts.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("agents", AGENT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(agent: Any, *arguments: str) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("--device")  # SimulEval's own
    agent.add_args(parser)
    return parser.parse_args(["--to", "es", "--latency", "low", *arguments])


def drive(agent: Any, pieces: Sequence[Sequence[Any]]) -> list[str | None]:
    """What the agent writes after each piece of a segment, as the evaluator asks it; None where it reads on."""
    agent.reset()
    written: list[str | None] = []
    for i, piece in enumerate(pieces):
        agent.states.source = [*agent.states.source, *piece]
        agent.states.source_finished = i + 1 == len(pieces)
        action = agent.policy()
        written.append(None if action.is_read() else action.content)
        assert action.is_read() or action.finished == agent.states.source_finished
    return written


def deltas(events: Sequence[object]) -> str:
    return "".join(event.delta for event in events if isinstance(event, TranslationDelta))


def test_words_in_words_out(agents: ModuleType) -> None:
    agent = agents.TextAgent(settings(agents.TextAgent))
    for text in (TEXT, "nothing"):  # one segment after another
        words = text.split()
        session = TextSession(TRANSLATOR, ["es"], "low")
        expected: list[str | None] = [deltas(session.push(word)) or None for word in words]
        expected[-1] = (expected[-1] or "") + deltas(session.finish())
        assert drive(agent, [[word] for word in words]) == expected
    assert sum(text is not None for text in drive(agent, [[word] for word in TEXT.split()])) > 2


def test_samples_in_words_out(agents: ModuleType) -> None:
    agent = agents.SpeechAgent(settings(agents.SpeechAgent, "--max-lookahead-ms", "80"))
    swell = np.sin(np.pi * 2 * np.arange(64_000) / 16_000) ** 2
    samples = np.random.default_rng(0).normal(0, 0.15, 64_000) * swell
    pieces = [samples[start : start + 1280].tolist() for start in range(0, len(samples), 1280)]
    agent.states.source_sample_rate = 16_000
    config = SessionConfig(AudioFormat("f32le"), max_lookahead_ms=80, languages=("es",), latency="low")
    session = Session(tiny.recognizer(), config, TRANSLATOR)
    expected: list[str | None] = [deltas(session.push(np.float32(piece)[:, None])) or None for piece in pieces]
    expected[-1] = (expected[-1] or "") + deltas(session.finish())
    assert drive(agent, pieces) == expected
    assert any(expected[:-1]), "the test is empty if nothing is written before the end"


def test_a_segment_without_a_sound_is_finished(agents: ModuleType) -> None:
    agent = agents.SpeechAgent(settings(agents.SpeechAgent))
    assert drive(agent, [[]]) == [""]
