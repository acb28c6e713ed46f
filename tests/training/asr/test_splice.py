"""Splices: cut where it is quiet, of one speaker, and saying what their parts say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.config import FRAME_SAMPLES
from tests import tiny
from training.asr.data import AudioStore, read_packed
from training.asr.splice import Splicer, align, cut_packed, join, word_cuts


@dataclass(frozen=True)
class Said:
    text: str
    speaker: str
    cuts_samples: tuple[int, ...]


def tones(words_s: list[float], gaps_s: list[float]) -> tuple[np.ndarray, list[int], list[int]]:
    """Tones with gaps between them: samples, where each begins, and where it ends."""
    parts, begins, ends, at = [], [], [], 0
    for word_s, gap_s in zip(words_s, [*gaps_s, 0.0], strict=True):
        n, gap = int(16_000 * word_s), int(16_000 * gap_s)
        parts += [0.3 * np.sin(np.arange(n) * 0.3), np.zeros(gap)]
        begins.append(at)
        ends.append(at + n)
        at += n + gap
    return np.concatenate(parts).astype(np.float32), begins, ends


@given(
    st.lists(st.tuples(st.floats(0.3, 0.6), st.floats(0.04, 0.1)), min_size=2, max_size=6),
    st.floats(0.15, 0.25),  # of which a frame's beginning takes up to 0.08 away
)
def test_cuts_lie_in_the_gaps_wherever_ctc_puts_the_piece(words: list[tuple[float, float]], late_s: float) -> None:
    samples, begins, ends = tones([word for word, _ in words], [gap for _, gap in words[:-1]])
    frames = [(begin + int(16_000 * late_s)) // FRAME_SAMPLES for begin in begins]
    cuts = word_cuts(samples, frames, list(range(len(frames))))
    assert cuts[0] == 0 and cuts[-1] == len(samples) and len(cuts) == len(words) + 1
    for cut, end, begin in zip(cuts[1:-1], ends, begins[1:], strict=False):
        assert end - 160 <= cut <= begin + 160


def test_words_that_run_into_one_another_are_not_parted() -> None:
    samples, begins, _ = tones([0.4, 0.4, 0.4], [0.0, 0.08])
    frames = [(begin + 2_560) // FRAME_SAMPLES for begin in begins]
    cuts = word_cuts(samples, frames, [0, 1, 2])
    assert cuts[1] == -1 and 12_800 <= cuts[2] <= 14_080


@st.composite
def speeches(draw: st.DrawFn) -> list[Said]:
    """Utterances of several speakers; every word is another one, and as many samples long as its number says."""
    said, number = [], 0
    for speaker in "abc":
        for _ in range(draw(st.integers(0, 12))):
            words = range(number, number := number + draw(st.integers(1, 9)))
            ends = np.cumsum([word + 1 for word in words]).tolist()
            cuts = [end if draw(st.booleans()) or end == ends[-1] else -1 for end in ends]
            known = draw(st.integers(0, 9)) > 0
            said.append(Said(" ".join(f"w{word}" for word in words), speaker, (0, *cuts) if known else ()))
    return said


@given(speeches(), st.integers(0, 2**32 - 1))
def test_a_splice_says_what_its_parts_say(said: list[Said], seed: int) -> None:
    splicer, rng = Splicer(said), np.random.default_rng(seed)
    for number, utterance in enumerate(said):
        own = [other for other in said if other.speaker == utterance.speaker and other.cuts_samples]
        enough = sum(len(other.text.split()) for other in own) >= 40
        assert (number in splicer) == (bool(utterance.cuts_samples) and enough)
        if number not in splicer:
            continue
        text, parts = splicer.draw(number, rng)
        heard = []
        for source, part in parts:
            assert said[source].speaker == utterance.speaker
            cuts = said[source].cuts_samples
            assert part.start in cuts and part.stop in cuts and 0 <= part.start < part.stop
            heard += said[source].text.split()[cuts.index(part.start) : cuts.index(part.stop)]
        assert text.split() == heard
        assert sum(int(word[1:]) + 1 for word in heard) == sum(part.stop - part.start for _, part in parts)
        assert len(heard) >= len(utterance.text.split())


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5))
def test_joints_are_silent_and_the_rest_is_as_it_was(lengths: list[int]) -> None:
    parts = [np.full(n, i + 1, np.float32) for i, n in enumerate(lengths)]
    joined = join(parts)
    assert len(joined) == sum(lengths)
    if len(parts) == 1:
        assert np.array_equal(joined, parts[0])
    at = 0
    for i, part in enumerate(parts):
        heard = joined[at : at + len(part)]
        assert np.array_equal(heard[80:-80], part[80:-80])
        if i > 0 and len(part) > 1:
            assert heard[0] == 0
        if i < len(parts) - 1 and len(part) > 1:
            assert heard[-1] == 0
        at += len(part)


def test_what_has_no_room_for_its_text_is_not_cut() -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)
    assert (
        align(tiny.recognizer(), samples, "the speaker is still talking and nothing once shown is taken back") is None
    )
    assert align(tiny.recognizer(), samples, "") is None


def test_training_hears_splices_of_a_packed_set_that_was_cut(tmp_path: Path) -> None:
    text, lines, audio = "words go on while the speaker is still talking", [], []
    for number in range(8):
        samples, _, _ = tones([0.3] * 9, [0.08] * 8)
        line = {"offset_samples": sum(map(len, audio)), "n_samples": len(samples), "speaker": "s", "source": "x"}
        lines.append(line | {"text": text if number else " ".join([text] * 20)})
        audio.append((samples * 32_768).astype("<i2"))
    np.concatenate(audio).tofile(tmp_path / "audio.i16")
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cut_packed(tmp_path, tiny.recognizer()) == 7  # the first has no room for its text

    entries = read_packed([tmp_path])
    assert entries[0].cuts_samples == () and all(len(entry.cuts_samples) == 10 for entry in entries[1:])
    rng = np.random.default_rng(0)
    plain, spliced = AudioStore(entries), AudioStore(entries, 1.0)
    for number, entry in enumerate(entries):
        heard, said, _ = plain.draw(number, rng)
        assert said == entry.text and np.array_equal(heard, plain[entry])
    assert spliced.draw(0, rng).text == entries[0].text
    heard, said, _ = spliced.draw(1, rng)
    assert set(said.split()) <= set(text.split()) and len(said.split()) >= 9
    assert heard.dtype == np.float32 and len(heard) > 0
