import os
import re
import threading
from collections.abc import Callable
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
import soundfile
from av.container import OutputContainer

from client.files import AudioFile, PcmStream
from streaming.audio import AudioFormat, Samples
from streaming.errors import DragomanError
from tests.fakes import tone

LEVELS = [0.2, 0.8, 0.4, 0.6, 0.3]  # 2 s


def by_soundfile(path: Path, samples: Samples, rate_hz: int) -> None:
    kind = {".opus": ("OGG", "OPUS"), ".ogg": ("OGG", "VORBIS")}.get(path.suffix, (None, None))
    soundfile.write(path, samples, rate_hz, format=kind[0], subtype=kind[1])


def by_ffmpeg(path: Path, samples: Samples, rate_hz: int, video: bool = False) -> None:
    codec = {".mp3": "libmp3lame", ".webm": "libopus", ".mka": "pcm_s16le"}.get(path.suffix, "aac")
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[samples.shape[1]]
    with av.open(str(path), "w") as container:
        stream = cast(av.AudioStream, container.add_stream(codec, rate=rate_hz, layout=layout))
        if video:
            add_picture(container)
        frame = av.AudioFrame.from_ndarray(samples.T.copy(), format="fltp", layout=layout)
        frame.sample_rate = rate_hz
        resampler = av.AudioResampler(stream.format, layout, rate_hz)
        for piece in resampler.resample(frame):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


def add_picture(container: OutputContainer) -> None:
    """One black frame."""
    stream = container.add_stream("mpeg4", rate=10)
    stream.width = stream.height = 64
    image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
    container.mux(stream.encode(image))
    container.mux(stream.encode(None))


def with_video(path: Path, samples: Samples, rate_hz: int) -> None:
    by_ffmpeg(path, samples, rate_hz, video=True)


def read(path: Path, block_samples: int = 1_600) -> tuple[Samples, AudioFile]:
    audio = AudioFile(path)
    blocks = list(audio.blocks(block_samples))
    audio.close()
    assert all(len(block) >= block_samples for block in blocks[:-1])
    assert all(block.dtype == np.float32 for block in blocks)
    return np.concatenate(blocks), audio


def assert_sounds_like_levels(samples: Samples, rate_hz: int) -> None:
    """The middle half of each 400 ms is as loud as it was made."""
    parts = np.split(samples[: 5 * (rate_hz * 2 // 5)], 5)
    heard = [np.abs(part[len(part) // 4 : -len(part) // 4]).max() for part in parts]
    assert heard == pytest.approx(LEVELS, abs=0.15)


@pytest.mark.parametrize(
    ("name", "write", "rate_hz", "channels"),
    [
        ("a.wav", by_soundfile, 8_000, 1),
        ("a.wav", by_soundfile, 96_000, 6),
        ("a.flac", by_soundfile, 44_100, 2),
        ("a.ogg", by_soundfile, 16_000, 1),
        ("a.opus", by_soundfile, 48_000, 2),
        ("a.aiff", by_soundfile, 22_050, 1),
        ("a.mp3", by_soundfile, 16_000, 1),
        ("a.mp3", by_ffmpeg, 44_100, 2),
        ("a.m4a", by_ffmpeg, 16_000, 1),
        ("a.m4a", by_ffmpeg, 48_000, 6),
        ("a.mp4", by_ffmpeg, 48_000, 2),
        ("video.mp4", with_video, 44_100, 1),
        ("a.webm", by_ffmpeg, 48_000, 1),
        ("a.mka", by_ffmpeg, 11_025, 2),
    ],
)
def test_formats(
    name: str, write: Callable[[Path, Samples, int], None], rate_hz: int, channels: int, tmp_path: Path
) -> None:
    write(tmp_path / name, tone(LEVELS, rate_hz, channels), rate_hz)
    samples, audio = read(tmp_path / name)
    assert audio.format == AudioFormat("f32le", rate_hz, channels)
    assert audio.problem is None
    assert samples.shape[1] == channels
    assert len(samples) == pytest.approx(2 * rate_hz, abs=0.15 * rate_hz)  # codecs pad
    assert audio.duration_s == pytest.approx(2, abs=0.15)
    assert_sounds_like_levels(samples, rate_hz)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
@pytest.mark.parametrize("piped", [False, True])
def test_sample_types_have_the_same_scale(subtype: str, piped: bool, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(LEVELS, 8_000), 8_000, subtype=subtype)
    samples, _ = read_piped(tmp_path / "a.wav") if piped else read(tmp_path / "a.wav")
    assert_sounds_like_levels(samples, 8_000)


def read_piped(path: Path) -> tuple[Samples, AudioFile]:
    """Read a file through a named pipe, which goes forwards only, and through PyAV."""
    fifo = path.with_name("fifo")
    os.mkfifo(fifo)
    feeder = threading.Thread(target=lambda: fifo.write_bytes(path.read_bytes()))
    feeder.start()
    result = read(fifo)
    feeder.join()
    return result


def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    by_soundfile(tmp_path / "a.mp3", tone(LEVELS), 16_000)
    samples, audio = read_piped(tmp_path / "a.mp3")
    assert_sounds_like_levels(samples, 16_000)
    assert audio.format.sample_rate_hz == 16_000


def test_one_sample_is_audio(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(1), 16_000)
    assert len(read(tmp_path / "a.wav")[0]) == 1


def test_blocks_are_of_the_asked_size_and_not_held(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(160_000), 16_000)
    sizes = [len(block) for block in AudioFile(tmp_path / "a.wav").blocks(20_000)]
    assert sum(sizes) == 160_000
    assert max(sizes) < 40_000


def error(path: Path) -> DragomanError:
    with pytest.raises(DragomanError) as caught:
        read(path)
    assert re.fullmatch(r"[a-z0-9][^\n]*[^.\n]", str(caught.value)), "one sentence, to follow a file's name"
    return caught.value


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "notes.txt").write_text("shopping list\n" * 100)
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(10_000))
    (tmp_path / "pcm.raw").write_bytes(bytes(10_000))
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "many.wav", np.zeros((100, 9)), 16_000)
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 4_000)
    assert error(tmp_path / "missing.wav").code == "file_missing"
    assert error(tmp_path).code == "file_unreadable"
    assert error(tmp_path / "empty.wav").code == "file_empty"
    assert error(tmp_path / "notes.txt").code == "not_audio"
    assert error(tmp_path / "noise.mp3").code in ("not_audio", "audio_empty")
    assert error(tmp_path / "pcm.raw").code == "not_audio"
    assert error(tmp_path / "nothing.wav").code == "audio_empty"
    assert error(tmp_path / "many.wav").code == "unsupported_channels"
    assert error(tmp_path / "slow.wav").code == "unsupported_rate"


def test_a_video_without_sound(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        add_picture(container)
    assert error(tmp_path / "a.mp4").code == "not_audio"


@pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a.webm"])
def test_a_file_cut_off_gives_what_it_has_and_says_so(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (by_ffmpeg if name == "a.webm" else by_soundfile)(tmp_path / name, tone(LEVELS * 2, 48_000), 48_000)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / f"cut.{name}").write_bytes(whole[: len(whole) // 2])
    samples, audio = read(tmp_path / f"cut.{name}")
    assert 0.8 * 48_000 < len(samples) < 3 * 48_000
    assert audio.problem is not None
    assert re.match(r"the file is (cut off|damaged)", audio.problem)
    assert capfd.readouterr().err == "", "no decoder may write to stderr on its own"


@pytest.mark.parametrize("name", ["a.m4a", "a.mp3"])
def test_a_file_cut_off_before_its_audio(name: str, tmp_path: Path) -> None:
    by_ffmpeg(tmp_path / name, tone(LEVELS), 16_000)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    assert error(tmp_path / name).code in ("not_audio", "audio_empty")


def test_a_hole_in_an_mp3_is_skipped_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    by_soundfile(tmp_path / "a.mp3", tone(LEVELS * 2), 16_000)
    data = bytearray((tmp_path / "a.mp3").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2_000] = np.random.default_rng(0).bytes(2_000)
    (tmp_path / "a.mp3").write_bytes(data)
    samples, _ = read(tmp_path / "a.mp3")
    assert len(samples) > 2.5 * 16_000
    assert capfd.readouterr().err == ""


def test_an_mp3_without_a_stated_length_is_not_called_cut_off(tmp_path: Path) -> None:
    # Quiet first, then noise: a variable bit rate, of which FFmpeg guesses a length that is far off.
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000 * 10).astype(np.float32)
    soundfile.write(tmp_path / "a.mp3", np.concatenate([np.zeros(160_000, np.float32), noise]), 16_000)
    data = (tmp_path / "a.mp3").read_bytes()
    tag = max(data[:300].find(b"Xing"), data[:300].find(b"Info"))
    assert tag > 0
    (tmp_path / "a.mp3").write_bytes(data[:tag] + bytes(4) + data[tag + 4 :])
    assert read(tmp_path / "a.mp3")[1].problem is None


def test_a_playlist_does_not_open_what_it_names(tmp_path: Path) -> None:
    by_soundfile(tmp_path / "secret.wav", tone(LEVELS), 16_000)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:2,\nhttp://127.0.0.1:9/secret.wav\n#EXT-X-ENDLIST\n")
    assert error(tmp_path / "list.m3u8").code in ("not_audio", "audio_empty")


def test_a_stream_gives_bytes_as_they_arrive() -> None:
    fmt = AudioFormat("s16le", 8_000, 2)
    stream = PcmStream(BufferedReader(BytesIO(bytes(1001))), fmt)
    blocks = list(stream.blocks(100))
    assert b"".join(blocks) == bytes(1001)
    assert max(map(len, blocks)) <= 400


def test_a_stream_without_a_byte() -> None:
    stream = PcmStream(BufferedReader(BytesIO()), AudioFormat())
    with pytest.raises(DragomanError, match="0 s"):
        list(stream.blocks(100))
