"""G.711 as libsndfile reads it."""

import io

import numpy as np
import pytest
import soundfile

from wire.g711 import Law, to_s16le


@pytest.mark.parametrize(("law", "subtype"), [("mulaw", "ULAW"), ("alaw", "ALAW")])
def test_every_byte_is_the_sample_that_libsndfile_reads(law: Law, subtype: str) -> None:
    every = bytes(range(256))
    raw = {"format": "RAW", "samplerate": 8_000, "channels": 1, "subtype": subtype}
    wanted, _ = soundfile.read(io.BytesIO(every), dtype="int16", **raw)
    assert np.array_equal(np.frombuffer(to_s16le(every, law), "<i2"), wanted)


def test_nothing_is_nothing() -> None:
    assert to_s16le(b"", "mulaw") == b""
