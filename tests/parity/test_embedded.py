"""The embedded model in NeMo: the published names, and what it says."""

from pathlib import Path

import pytest
import soundfile
import torch

from benchmarks.nemo_reference import of_folder
from models.checkpoint import EMBEDDED_MODEL, load_recognizer
from streaming.audio import AudioFormat
from streaming.events import TranscriptDelta
from streaming.session import Session, SessionConfig

pytestmark = pytest.mark.nemo
SAMPLE = Path(__file__).parents[2] / "samples" / "jfk.flac"


@pytest.mark.parametrize("lookahead", [6, 1, 0])
def test_nemo_reads_the_same_from_the_sample(lookahead: int) -> None:
    pytest.importorskip("nemo")
    audio, _ = soundfile.read(SAMPLE, dtype="float32")
    reference = of_folder(EMBEDDED_MODEL)
    mel, frames = reference.log_mel(torch.from_numpy(audio)[None], torch.tensor([len(audio)]))
    ((pieces, _),) = reference.rnnt_greedy(*reference.encode_offline(mel, frames, lookahead))

    recognizer = load_recognizer()
    session = Session(recognizer, SessionConfig(AudioFormat("f32le"), 80 * lookahead))
    events = [event for start in range(0, len(audio), 7_777) for event in session.push(audio[start : start + 7_777])]
    said = "".join(event.delta for event in events + session.finish() if isinstance(event, TranscriptDelta))
    expected = recognizer.tokenizer.decode(pieces)
    assert len(expected) > 20
    # Silence is read behind the audio here, which may bring one more word.
    assert said.strip().startswith(expected) and len(said.split()) <= len(expected.split()) + 1
