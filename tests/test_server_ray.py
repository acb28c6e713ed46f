"""The service on Ray: two replicas on this machine's processor, and a client at each."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from models.checkpoint import load_recognizer
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.session import Session, SessionConfig
from tests.test_server import events_until_closed, send_event

ROOT = Path(__file__).parents[1]
PORT = 18_765
URL = f"ws://127.0.0.1:{PORT}/v1/realtime/translations"

ray, server_ray = (pytest.importorskip(name) for name in ("ray", "server_ray"))


def test_the_options() -> None:
    options = server_ray.read_options({"max_sessions": "4", "device": "cuda", "cpus": "0.5"})
    assert (options.max_sessions, options.device, options.cpus) == (4, "cuda", 0.5)
    for arguments, sentence in (
        ({"replicas": "2"}, "no option replicas"),
        ({"max_sessions": "many"}, "number"),
        ({"min_replicas": "3", "max_replicas": "2"}, "3 to 2 replicas"),
    ):
        with pytest.raises(DragomanError, match=sentence):
            server_ray.read_options(arguments)


@pytest.mark.parametrize(("sessions", "lag_s", "wanted"), [(8, 0.0, 2), (8, 1.5, 3), (16, 1.5, 4), (0, 0.0, 0)])
def test_how_many_replicas_are_wanted(sessions: int, lag_s: float, wanted: float) -> None:
    context = SimpleNamespace(
        total_num_requests=sessions,
        current_num_replicas=2,
        target_num_replicas=2,
        aggregated_metrics={"lag_s": {"one": 0.1, "other": lag_s}},
        policy_state={},
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 4),
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
    )
    assert server_ray.replicas_wanted(context)[0] == wanted


@pytest.fixture(scope="module")
def service() -> Iterator[None]:
    """Two replicas with the embedded models."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a busy machine starts processes slowly
    patch.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", 300)
    from ray import serve

    environment = {"PYTHONPATH": str(ROOT), "DRAGOMAN_TOKEN": ""}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": environment}, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    options = {"min_replicas": 2, "max_replicas": 2, "max_sessions": 2}
    serve.run(server_ray.build(options), name="dragoman", route_prefix="/")
    yield
    serve.shutdown()
    ray.shutdown()
    patch.undo()


def health() -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/healthz", timeout=30) as response:
        told: dict[str, Any] = json.load(response)
    return told


@pytest.mark.slow
@pytest.mark.model
async def test_sessions_at_two_replicas(service: None) -> None:
    samples, rate_hz = soundfile.read(ROOT / "samples" / "jfk.flac", dtype="int16")
    fmt = {"type": "audio/pcm", "rate": rate_hz}
    settings = {"audio": {"input": {"format": fmt}, "output": {"languages": ["es"]}}}
    connections = [await connect(URL, open_timeout=60, ping_timeout=None) for _ in range(2)]
    for connection in connections:
        assert json.loads(await connection.recv())["type"] == "session.created"
    # Each has one of them: whichever is asked has no more.
    assert [(await asyncio.to_thread(health))["sessions"] for _ in range(12)] == [1] * 12
    for connection in connections:
        await send_event(connection, "session.update", session=settings)
        pcm = samples.astype("<i2").tobytes()
        for start in range(0, len(pcm), 32_000):
            await connection.send(pcm[start : start + 32_000])
        await send_event(connection, "session.close")
    told = await asyncio.gather(*(events_until_closed(connection, 1) for connection in connections))
    assert [connection.close_code for connection in connections] == [1000, 1000]
    texts = [[e["delta"] for e in events if e["type"] == "session.input_transcript.delta"] for events in told]
    translations = [[e["delta"] for e in events if e["type"] == "session.output_transcript.delta"] for events in told]
    alone = Session(load_recognizer(), SessionConfig(AudioFormat("s16le", rate_hz, 1)))
    events = alone.push(np.ascontiguousarray(samples)) + alone.finish()
    expected = [event.delta for event in events if event.to_dict()["type"] == "session.input_transcript.delta"]
    assert texts == [expected, expected] and expected
    assert translations[0] == translations[1] and translations[0]


@pytest.mark.slow
@pytest.mark.model
async def test_what_is_no_session_and_who_finds_no_place(service: None) -> None:
    connections = [await connect(URL, open_timeout=60) for _ in range(4)]
    for connection in connections:
        await connection.recv()
    with pytest.raises(InvalidStatus) as refused:
        await connect(URL, open_timeout=60)
    assert refused.value.response.status_code == 503
    for connection in connections:
        await connection.close()
    assert (await asyncio.to_thread(health))["max_sessions"] == 2
