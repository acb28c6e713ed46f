"""The comparison of runs: where words end for all alike, and what the points say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from client.evaluate import read_sets, score, session_configs
from models.adaptive import encode_whole
from models.config import FRAME_MS
from models.recognizer import Recognizer
from streaming.session import Session
from tests import tiny
from training.asr.compare import Point, draw, measure, read_run, reference_ends, word_ends
from training.asr.train import Recipe, Trainer

BLANK = 9


@pytest.mark.parametrize(
    ("path", "begins", "frames"),
    [
        ([9, 1, 1, 9, 2, 9, 3, 3], [True, False, True], [4, 7]),  # a repeated label is one piece
        ([1, 9, 1, 9, 9], [True, True], [0, 2]),  # with a blank between them it is two
        ([9, 9, 5, 6], [False, True], [2, 3]),  # the first piece begins a word in any case
        ([9, 9], [], []),
    ],
)
def test_a_word_ends_with_the_last_frame_of_its_last_piece(
    path: list[int], begins: list[bool], frames: list[int]
) -> None:
    assert word_ends(path, BLANK, begins) == [frame * FRAME_MS for frame in frames]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", 0.3 * rng.standard_normal(40_000 + 9_000 * number), 16_000)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": "the speaker is talking"}))
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    return tmp_path / "dev.jsonl"


@pytest.mark.parametrize("gates", [0, 3])
def test_points_agree_with_eval_and_with_the_sessions(manifest: Path, gates: int) -> None:
    recognizer = tiny.recognizer(gates=gates)
    (speech,) = read_sets([manifest])
    points = list(measure("own", recognizer, speech, [[100, 200, 300, 400]] * 3))
    configs = session_configs(recognizer, ["rnnt"], recognizer.lookaheads_ms)
    scores = [score(recognizer, speech, config) for config in configs]
    assert [(p.wer, p.delay_ms) for p in points] == [(s.errors.wer, s.delay.mean_ms) for s in scores]


def test_the_delay_behind_the_reference_counts_correct_words_only(manifest: Path) -> None:
    recognizer = tiny.recognizer()
    (speech,) = read_sets([manifest])
    words, emitted = _heard(recognizer, speech.utterances[0].audio)
    said = f"{words[0]} wrong {' '.join(words[2:])}"
    one = read_sets([_written(manifest.parent, said)])
    ends = [0] * len(said.split())
    last = list(measure("own", recognizer, one[0], [ends]))[-1]
    correct = [ms for k, ms in enumerate(emitted) if k != 1 and ms is not None]
    assert last.reference_delay_ms == pytest.approx(np.mean(correct))


def _written(folder: Path, text: str) -> Path:
    file = folder / "one.jsonl"
    file.write_text(json.dumps({"audio": "0.wav", "text": text}))
    return file


def _heard(recognizer: Recognizer, audio: Path) -> tuple[list[str], list[int | None]]:
    session = Session(recognizer)
    samples, _ = soundfile.read(audio, dtype="int16")
    words: list[str] = []
    emitted: list[int | None] = []
    for events, at_end in ((session.push(samples.tobytes()), False), (session.finish(), True)):
        for event in events:
            for word in getattr(event, "words", ()):
                words.append(word.word)
                emitted.append(None if at_end else event.emitted_ms)
    return words, emitted


def test_the_reference_finds_every_word_in_order(manifest: Path) -> None:
    recognizer = tiny.recognizer()
    (speech,) = read_sets([manifest])
    for ends in reference_ends(recognizer, speech):
        assert len(ends) == 4 and ends == sorted(ends) and ends[-1] > 0


def test_a_bias_moves_what_the_gates_wait_for(tmp_path: Path) -> None:
    Trainer(tiny.config(gates=2), Recipe(), "cpu", autocast=False).save(tmp_path / "last.pt")
    audio = torch.randn(1, 160, 80), torch.tensor([160])

    def reach(bias: float) -> list[int]:
        encoder = read_run(tmp_path, tiny.tokenizer(), gate_bias=bias).net.encoder
        whole = encode_whole(encoder, audio[0], slots=audio[1], max_lookahead_frames=torch.tensor([9]))
        return whole.reach[0].tolist()

    assert reach(-100.0) == list(range(20))
    assert reach(100.0) == [min(19, i + 4) for i in range(20)]


def test_the_picture_has_a_line_for_each_run(tmp_path: Path) -> None:
    points = [Point(name, ms, 0.3, 100.0 + ms, 120.0 + ms) for name in ("fixed", "adaptive") for ms in (0, 80)]
    draw(points, tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_a_run_with_gates_can_be_compared_with_itself_in_chunks(tmp_path: Path) -> None:
    recipe = Recipe(easy_steps=0, flat_steps=0, rnnt_from_step=0)
    config = replace(tiny.config(gates=2), encoder=replace(tiny.config(gates=2).encoder, left_context_frames=56))
    learner = Trainer(config, recipe, "cpu", autocast=False)
    learner.save(tmp_path / "last.pt")
    recognizer = read_run(tmp_path, tiny.tokenizer(), chunked=True)
    assert recognizer.lookaheads_ms == (0, 80, 240, 480) and not recognizer.adaptive
    mel, slots = torch.randn(1, 96, 80), torch.tensor([96])
    own = learner._encode_chunks(mel, slots, (3,), easy=False)[0]
    theirs, _ = recognizer.net.encoder.step(mel, None, slots=slots, chunk_frames=torch.tensor([4]))
    torch.testing.assert_close(theirs, own, atol=1e-4, rtol=1e-4)
