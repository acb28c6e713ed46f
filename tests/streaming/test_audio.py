import re

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.audio import SAMPLE_RATE_HZ, AudioFormat, AudioNormalizer, Encoding, Samples
from streaming.errors import DragomanError

ENCODINGS: list[Encoding] = ["s16le", "f32le"]


def noise(samples: int, channels: int = 1, seed: int = 0) -> Samples:
    """Reproducible float32 noise ``[samples, channels]`` within full scale."""
    return np.random.default_rng(seed).uniform(-1, 1, (samples, channels)).astype(np.float32)


def encode(frames: Samples, encoding: Encoding) -> bytes:
    if encoding == "f32le":
        return frames.astype("<f4").tobytes()
    return (frames * 32767).astype("<i2").tobytes()


def normalize(fmt: AudioFormat, pcm: bytes, cuts: list[int]) -> Samples:
    normalizer = AudioNormalizer(fmt)
    edges = [0, *sorted(cuts), len(pcm)]
    parts = [normalizer.push(pcm[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    return np.concatenate([*parts, normalizer.finish()])


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([8_000, 11_025, 16_000, 44_100, 48_000, 96_000]),
    channels=st.integers(1, 6),
    encoding=st.sampled_from(ENCODINGS),
    samples=st.integers(0, 5_000),
    data=st.data(),
)
def test_any_chunking_of_the_bytes_gives_the_same_bits(
    rate: int, channels: int, encoding: Encoding, samples: int, data: st.DataObject
) -> None:
    fmt = AudioFormat(encoding, rate, channels)
    pcm = encode(noise(samples, channels), encoding)
    cuts = data.draw(st.lists(st.integers(0, len(pcm)), max_size=40))  # odd bytes and empty pieces among them
    whole, pieces = normalize(fmt, pcm, []), normalize(fmt, pcm, cuts)
    assert whole.dtype == pieces.dtype == np.float32
    assert whole.tobytes() == pieces.tobytes()


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000, 96_000, 192_000])
def test_resampling_is_soxr_s_and_keeps_the_length(rate: int) -> None:
    pcm = noise(rate)  # one second
    out = normalize(AudioFormat("f32le", rate), encode(pcm, "f32le"), [])
    assert len(out) == SAMPLE_RATE_HZ
    np.testing.assert_allclose(out, soxr.resample(pcm[:, 0], rate, SAMPLE_RATE_HZ), atol=1e-5)


def test_16_khz_mono_passes_untouched() -> None:
    pcm = noise(1_000)
    assert normalize(AudioFormat("f32le"), encode(pcm, "f32le"), [3, 7]).tobytes() == pcm.tobytes()


def test_16_bit_full_scale_is_32768() -> None:
    pcm = np.array([-32768, -1, 0, 1, 32767], "<i2")
    expected = [-1.0, -1 / 32768, 0.0, 1 / 32768, 32767 / 32768]
    assert AudioNormalizer(AudioFormat()).push(pcm.tobytes()).tolist() == expected
    assert AudioNormalizer(AudioFormat()).push(pcm).tolist() == expected


def test_channels_are_averaged() -> None:
    frames = np.array([[0.5, -0.5], [1.0, 0.0], [0.25, 0.75]], np.float32)
    normalizer = AudioNormalizer(AudioFormat("f32le", channels=2))
    assert normalizer.push(frames).tolist() == [0.0, 0.5, 0.5]
    assert normalizer.push(frames.tobytes()).tolist() == [0.0, 0.5, 0.5]
    assert normalizer.received_samples == 6


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_arrays_and_bytes_give_the_same(encoding: Encoding) -> None:
    fmt = AudioFormat(encoding, 48_000, 3)
    pcm = encode(noise(4_800, 3), encoding)
    array = np.frombuffer(pcm, "<i2" if encoding == "s16le" else "<f4").reshape(-1, 3)
    from_array = AudioNormalizer(fmt)
    samples = np.concatenate([from_array.push(array[:1]), from_array.push(array[1:]), from_array.finish()])
    assert samples.tobytes() == normalize(fmt, pcm, []).tobytes()


def test_input_is_never_changed_nor_kept() -> None:
    pcm = noise(1_000)
    before = pcm.copy()
    normalizer = AudioNormalizer(AudioFormat("f32le", 8_000))
    first = normalizer.push(pcm[:, 0])
    pcm[:] = 9
    again = AudioNormalizer(AudioFormat("f32le", 8_000))
    expected = np.concatenate([again.push(before[:, 0]), again.finish()])
    assert np.concatenate([first, normalizer.finish()]).tobytes() == expected.tobytes()


def test_a_partial_sample_at_the_end_is_an_error_in_a_sentence() -> None:
    normalizer = AudioNormalizer(AudioFormat())
    assert len(normalizer.push(b"\0\0\0")) == 1
    with pytest.raises(DragomanError, match="1 of its 2 bytes") as caught:
        normalizer.finish()
    assert caught.value.code == "audio_odd_bytes"


@settings(max_examples=25, deadline=None)
@given(
    bad=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]),
    index=st.integers(0, 999),
    channel=st.integers(0, 1),
    cut=st.integers(0, 8_000),
)
def test_a_bad_float_is_named_with_its_index(bad: float, index: int, channel: int, cut: int) -> None:
    frames = noise(1_000, 2)
    frames[index, channel] = bad
    normalizer = AudioNormalizer(AudioFormat("f32le", 48_000, 2))
    pcm = frames.tobytes()
    with pytest.raises(DragomanError, match=rf"sample index {index}\b") as caught:
        normalizer.push(pcm[:cut])
        normalizer.push(pcm[cut:])
    assert caught.value.code == ("audio_out_of_range" if np.isfinite(bad) else "audio_not_finite")


@pytest.mark.parametrize(
    ("arguments", "code", "number"),
    [
        (("s16le", 7_999, 1), "unsupported_rate", "7999"),
        (("s16le", 192_001, 1), "unsupported_rate", "192001"),
        (("s16le", 16_000, 0), "unsupported_channels", "0"),
        (("s16le", 16_000, 9), "unsupported_channels", "9"),
        (("mulaw", 8_000, 1), "unsupported_encoding", "mulaw"),
    ],
)
def test_unsupported_formats(arguments: tuple[Encoding, int, int], code: str, number: str) -> None:
    with pytest.raises(DragomanError, match=number) as caught:
        AudioFormat(*arguments)
    assert caught.value.code == code


def test_arrays_of_the_wrong_kind() -> None:
    normalizer = AudioNormalizer(AudioFormat("f32le", channels=2))
    with pytest.raises(ValueError, match=re.escape("[samples, 2]")):
        normalizer.push(noise(10, 3))
    with pytest.raises(ValueError, match="float64"):
        normalizer.push(np.zeros((10, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 24_000, 44_100, 48_000, 96_000, 191_999])
@pytest.mark.parametrize("seconds", [0.0, 0.004, 0.1, 1.7, 3.123])
def test_the_tail_is_what_finish_would_give_and_changes_nothing(rate: int, seconds: float) -> None:
    pcm = encode(noise(round(rate * seconds)), "s16le") + b"\1"  # the end of a sample is still to come
    asked, other = (
        AudioNormalizer(AudioFormat(sample_rate_hz=rate)),
        AudioNormalizer(AudioFormat("s16le", rate)),
    )
    for normalizer in (asked, other):
        normalizer.push(pcm[: len(pcm) // 3])
        normalizer.push(pcm[len(pcm) // 3 :])
    tail = asked.tail()
    assert asked.tail().tobytes() == tail.tobytes()
    assert asked.push(b"\2" + pcm[:-1]).tobytes() == other.push(b"\2" + pcm[:-1]).tobytes()
    ended = AudioNormalizer(AudioFormat(sample_rate_hz=rate))
    ended.push(pcm[:-1])
    np.testing.assert_allclose(tail, ended.finish(), atol=1e-5)


def test_memory_is_flat() -> None:
    normalizer = AudioNormalizer(AudioFormat("s16le", 44_100))
    for _ in range(100):
        normalizer.push(bytes(2 * 44_100 + 1))
        assert len(normalizer._waiting) < 441
        assert len(normalizer._taken) <= 23_000
