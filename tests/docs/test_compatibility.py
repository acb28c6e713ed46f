"""The page about clients of other services says what the service does."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import wave
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pytest

import server
from tests.docs.test_protocol import codes
from tests.fakes import tone
from tests.integration.service import FAKE, running
from wire import deepgram, transcriptions
from wire.simulstream import Simulstream

# The packages of the examples were written for an earlier websockets.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "docs" / "compatibility.md").read_text("utf-8")


def examples(fence: str) -> list[str]:
    return re.findall(rf"^```{fence}\n(.*?)^```$", TEXT, re.M | re.S)


def section(heading: str) -> str:
    return TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def row(text: str, name: str) -> str:
    """The second cell of the row of a table."""
    found = re.search(rf"^\| `{re.escape(name)}`.*?\| (.+?) \|", text, re.M)
    assert found, name
    return found[1]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(FAKE) as host:
        yield host


@pytest.fixture
def talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recordings that the examples read, in the folder where they run; their last 400 ms are silent."""
    monkeypatch.chdir(tmp_path)
    for rate_hz in (16_000, 24_000):
        audio = (tone([0.2, 0.3, 0], rate_hz) * 32_767).astype("<i2").tobytes()
        Path(f"talk-{rate_hz // 1000}khz.pcm").write_bytes(audio)
    with wave.open("talk.wav", "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(Path("talk-16khz.pcm").read_bytes())
    Path("talks.txt").write_text("talk.wav\n")


@pytest.mark.parametrize(
    ("example", "printed"),
    list(zip(examples("python"), ("w20 w30\n", " es20 es30", "w20\nw30\n\n"), strict=True)),
)
@pytest.mark.usefixtures("talks")
def test_a_program(example: str, printed: str, address: str) -> None:
    pytest.importorskip("deepgram" if "deepgram" in example else "openai")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(example.replace("127.0.0.1:8765", address), {})
    assert output.getvalue() == printed


@pytest.mark.usefixtures("talks")
def test_a_command(address: str) -> None:
    pytest.importorskip("simulstream")
    (example,) = examples("sh")
    program, *arguments = shlex.split(example.replace("127.0.0.1:8765", address))
    command = [str(Path(sys.executable).parent / program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "All 1 files sent." in result.stderr
    assert result.returncode == 0


def test_messages_of_simulstream() -> None:
    settings, text = examples("json")
    dialect = Simulstream.begin({"latency": "low"})
    dialect.take(settings)
    (config, _) = dialect.take(b"")
    assert getattr(config, "languages", None) == ("es",)
    assert json.loads(text).keys() == {"new", "deleted"}


def test_every_address_is_listed() -> None:
    listed = re.findall(r"^\| \[.+\]\(#.+\) \| `(.+)` \|", TEXT, re.M)
    assert sorted(listed) == sorted(dialect.PATH for dialect in server.DIALECTS)
    assert set(re.findall(r"ws://127.0.0.1:8765(/[\w/]+)", TEXT)) == set(listed)


@pytest.mark.parametrize("package", ["openai", "deepgram-sdk", "simulstream"])
def test_the_versions_are_those_of_the_tests(package: str) -> None:
    pytest.importorskip(package.removesuffix("-sdk"))
    (listed,) = set(re.findall(rf"`{package}` ([\d.]+) \|", TEXT))
    assert version(package).startswith(f"{listed}.")


def test_every_parameter_of_deepgram_is_listed() -> None:
    text = section("Deepgram's live transcription")
    used = {name for names in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.M) for name in names.split(", ")}
    assert {f"`{name}`" for name in (*deepgram._USED, "smart_format")} <= used
    prose = " ".join(text.split())
    effect, refused = prose.split("Without effect: ")[1].split(". Refused, unless they are `false`: ")
    assert set(re.findall(r"`(\w+)`", effect)) == set(deepgram._WITHOUT_EFFECT) - {"smart_format"}
    assert set(re.findall(r"`(\w+)`", refused.split(". ")[0])) == set(deepgram._NOT_THERE)
    for encoding in (*deepgram._ENCODINGS, *deepgram._LAWS):
        assert f"`{encoding}`" in row(text, "encoding")
    assert f"; {deepgram._DEFAULT_ENDPOINTING_MS} if it is left out" in row(text, "endpointing")
    assert f"{deepgram._MIN_SILENCE_MS} to {deepgram._MAX_SILENCE_MS:,} or" in row(text, "endpointing")


def test_every_event_and_setting_of_openai_is_listed() -> None:
    text = section("OpenAI's realtime transcription")
    source = (ROOT / "wire" / "transcriptions.py").read_text("utf-8")
    taken = re.findall(r'case "([a-z_]+\.[\w.]+)":', source)
    told = re.findall(r'_event\(\s*f?"([^"]+)"', source)
    kinds = {kind.replace("{_TRANSCRIPTION}", transcriptions._TRANSCRIPTION) for kind in (*taken, *told)}
    assert (len(taken), len(set(told))) == (5, 9)
    assert all(f"`{kind}`" in text for kind in kinds)
    for name, ms in transcriptions._LOOKAHEADS_MS.items():
        assert f"`{name}` {'as far' if ms is None else f'{ms:,}'}" in row(text, "transcription.delay")
    detection = row(text, "turn_detection")
    silences_s = [transcriptions._SILENCES_MS[name] / 1_000 for name in ("low", "medium", "high")]
    assert "{}, {} or {} s".format(*silences_s) in detection
    assert f"{transcriptions._MIN_SILENCE_MS} to {transcriptions._MAX_SILENCE_MS:,}, or" in detection
    assert transcriptions._LOGPROBS in row(text, "include")


def test_every_code_of_an_error_is_listed_here_or_with_the_protocol() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", section("Errors"), re.M))
    others = set(re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", (ROOT / "docs" / "protocol.md").read_text("utf-8"), re.M))
    files = (ROOT / "wire" / f"{name}.py" for name in ("deepgram", "simulstream", "transcriptions"))
    used = {code for file in files for code in codes(file.read_text("utf-8"))}
    assert listed == used - others


def test_links_lead_somewhere() -> None:
    for target, fragment in re.findall(r"\((protocol\.md)?#([\w-]+)\)", TEXT):
        text = TEXT if not target else (ROOT / "docs" / target).read_text("utf-8")
        headings = {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in re.findall(r"^#+ (.+)$", text, re.M)}
        assert fragment in headings
