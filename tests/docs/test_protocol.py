"""The page that describes the wire protocol says what the service does."""

import ast
import json
import re
from pathlib import Path
from typing import Any, Final, cast

import pytest

import server
from models.recognizer import Recognizer
from models.translator import LATENCIES, Translator
from streaming import scheduler
from streaming.audio import AudioFormat
from streaming.events import (
    ErrorEvent,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    SessionUpdated,
    TranscriptDelta,
    TranslationDelta,
    parse_event,
)
from streaming.messages import CloseCode, Command, LookaheadChange, Resume
from streaming.session import SessionConfig
from tests.fakes import FakeRecognizer, FakeTranslator
from wire import handler
from wire.translations import describe, parse_message, parse_resume

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "docs" / "protocol.md").read_text("utf-8")
CLIENT, SERVICE = TEXT.split("\n## What a client sends\n")[1].split("\n## What the service sends\n")


def examples(text: str, fence: str = "json") -> list[str]:
    return re.findall(rf"^```{fence}\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.parametrize("example", examples(CLIENT))
def test_what_a_client_may_send(example: str) -> None:
    parse_message(example)


def test_every_event_of_a_client_has_an_example() -> None:
    shown = {json.loads(example)["type"] for example in examples(CLIENT)}
    assert shown == {"session.update", "session.input_audio_buffer.append", *(c.value for c in Command)}
    (later,) = examples(CLIENT, "json later")
    assert parse_message(later, declared=True) == LookaheadChange(160)
    full = json.loads(examples(CLIENT)[0])
    assert set(full["session"]) == set(described()) - {"model", "translator"}
    assert full["session"]["audio"]["input"]["format"].keys() == described()["audio"]["input"]["format"].keys()


@pytest.mark.parametrize("example", examples(SERVICE.split("\n## Errors\n")[0]))
def test_what_the_service_sends(example: str) -> None:
    event = parse_event(example)
    assert event.to_dict() == json.loads(example)
    assert list(event.to_dict()) == list(json.loads(example))
    if isinstance(event, SessionCreated | SessionUpdated):
        named = {"id", "resume"} if isinstance(event, SessionCreated) else set()
        assert set(event.session) == set(described()) | named
        assert event.session["translator"].keys() == described()["translator"].keys()
        assert event.session["translator"]["latencies"] == list(LATENCIES)


def test_how_a_session_goes_on() -> None:
    (created,) = (json.loads(e)["session"] for e in examples(SERVICE) if '"session.created"' in e)
    (resumed,) = (json.loads(e) for e in examples(SERVICE) if '"session.resumed"' in e)
    (resume,) = examples(SERVICE, "json resume")
    assert parse_resume(resume) == Resume(created["resume"]["token"], resumed["seq"])
    assert server.dialect_at(re.findall(r"^    ws://[^/]+(\S+resume=\S+)$", SERVICE, re.M)[0]).resumes == created["id"]
    assert created["resume"]["within_s"] == server.Settings().resume_s
    assert handler._MAX_SAID == 2**20


def test_every_event_of_the_service_has_an_example() -> None:
    deltas = (TranscriptDelta, TranslationDelta)
    known = (SessionCreated, SessionUpdated, SessionResumed, *deltas, SessionClosed, ErrorEvent)
    shown = {json.loads(example)["type"] for example in examples(SERVICE.split("\n## Errors\n")[0])}
    assert shown == {kind.TYPE for kind in known}


def described() -> dict[str, Any]:
    config = SessionConfig(AudioFormat(sample_rate_hz=24_000))
    return describe(config, cast(Recognizer, FakeRecognizer()), cast(Translator, FakeTranslator()))


def test_the_defaults() -> None:
    created = json.loads(examples(SERVICE)[0])["session"]
    assert created["resume"].keys() == {"token", "within_s"}
    for name in ("model", "translator", "id", "resume"):
        del created[name]
    assert created == {key: value for key, value in described().items() if key not in ("model", "translator")}
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `?([^`|]*?)`? \|", CLIENT, re.M))
    fmt = created["audio"]["input"]["format"]
    assert [rows[f"audio.input.format.{key}"] for key in fmt] == [str(value) for value in fmt.values()]
    assert (rows["latency"], rows["decoder"]) == (created["latency"], created["decoder"])
    assert int(rows["endpoint_silence_ms"]) == created["endpoint_silence_ms"]


def test_every_code_of_an_error_is_listed_with_what_to_do() -> None:
    listed = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", SERVICE.split("\n## Errors\n")[1], re.M)
    assert len(listed) == len(set(listed))
    files = ["server.py", "wire/handler.py", "wire/fields.py", "wire/translations.py"]
    files += [f"streaming/{name}.py" for name in ("audio", "glossary", "interpreter", "scheduler", "session")]
    used = {code for name in files for code in codes((ROOT / name).read_text("utf-8"))}
    used |= {"translator_unavailable"} & codes((ROOT / "streaming" / "remote.py").read_text("utf-8"))
    # A client can send nothing to a session that has ended.
    assert set(listed) == used - {"session_closed"}


def codes(source: str) -> set[str]:
    """What looks like a code in the text of a program: the first argument of an error, or alone in a choice."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            wanted = [node.args[0]] if name in ("DragomanError", "fail", "finish", "end_all") else []
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("code", "failure"):
            value = node.value
            wanted = [value.body, value.orelse] if isinstance(value, ast.IfExp) else getattr(value, "elts", [])[:1]
        else:
            wanted = []
        found |= {w.value for w in wanted if isinstance(w, ast.Constant) and isinstance(w.value, str)}
    return found


def test_limits_and_close_codes() -> None:
    assert handler.MAX_MESSAGE_BYTES == 2**20
    limits = SERVICE.split("\n## Limits\n")[1]
    defaults = server.Settings()
    for number in (
        f"`--max-sessions`, {defaults.max_sessions} ",
        f" {scheduler._MAX_WAITING_S} s, or {scheduler._MAX_WAITING_MESSAGES:,} messages ",
        f" {scheduler.MAX_WAITING_EVENTS} ",
        f" {handler._SEND_TIMEOUT_S:g} s ",
        f" {defaults.idle_timeout_s:g} s ",
        f" {server.GOODBYE_TIMEOUT_S:g} s ",
        f" {handler._RESUME_TIMEOUT_S:g} s ",
        f" `--resume-s`, {defaults.resume_s:g} s ",
        f" audio that a session is behind for {scheduler._LATE_S:g} s ",
    ):
        assert f"|{number}|" in limits or f"| {number.strip()} |" in limits
    gone_s = defaults.idle_timeout_s + server.GOODBYE_TIMEOUT_S
    assert f"takes up a place for {gone_s:g} s after its\nlast message" in limits
    assert f"so for {defaults.resume_s + server.GOODBYE_TIMEOUT_S:g} s after its last event" in limits
    listed = set(map(int, re.findall(r"^\| (1\d{3}) \|", SERVICE, re.M)))
    assert listed == {*map(int, CloseCode), 1009}
    (health,) = examples(SERVICE.split("\n## Health and readiness\n")[1])
    assert json.loads(health).keys() == {"status", "sessions", "max_sessions"}


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in re.findall(r"^#+ (.+)$", TEXT, re.M)}
    assert set(re.findall(r"\(#([\w-]+)\)", TEXT)) <= headings
