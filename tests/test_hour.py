"""An hour of one session: nothing grows."""

import numpy as np
import pytest

from benchmarks.flatness import measure
from streaming.audio import AudioFormat
from streaming.session import SessionConfig
from tests import tiny


@pytest.mark.slow
def test_an_hour_costs_no_more_memory_or_time_than_its_first_minutes() -> None:
    rng = np.random.default_rng(0)
    bursts = np.repeat(rng.integers(0, 2, 60), 8000)
    audio = (rng.standard_normal(len(bursts)) * bursts * 0.1).astype(np.float32)
    rows = measure(tiny.recognizer(), audio, 60, SessionConfig(AudioFormat("f32le")))
    early, late = rows[4], rows[-1]
    assert late["words"] > 10 * early["words"] > 0, "the hour was spoken to its end"
    assert late["resident_mb"] < 1.05 * early["resident_mb"]
    assert late["step_ms"] < 1.5 * early["step_ms"]  # growth with time would be tenfold; a busy machine is not
