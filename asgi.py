"""The same service as an ASGI application: the sessions of `server`, and recordings over REST.

Everything that is said on a WebSocket is said by `wire.handler`, and who may come in is decided by
`server.Admission`, as in `server`. What that cannot carry is a request with a body: here `/v1/audio/transcriptions`
and `/v1/audio/translations` take a file, as OpenAI's do. A recording is a session too, which has a slot, limits and
metrics like any other; the engine works on what comes faster than speech when live sessions need nothing.
"""

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from http import HTTPStatus
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message, Receive, Scope
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.datastructures import Headers

from client.files import AudioFile
from models.recognizer import Recognizer
from models.translator import AnyTranslator
from server import GOODBYE_TIMEOUT_S, PATH, SUBPROTOCOL, Admission, Service, Settings, dialect_at
from streaming.errors import DragomanError
from streaming.messages import CloseCode
from streaming.speculation import Speculation
from wire.dialect import Frame
from wire.handler import MAX_MESSAGE_BYTES, Handler, TransportClosed
from wire.recordings import END, Recording, Transcription, Translation

MAX_UPLOAD_BYTES: Final = 25 << 20
"""Size of a request with a recording, the same as OpenAI's."""

MAX_WAITING: Final = 16
"""Recordings that wait for a place; more are refused."""

MAX_RECORDING_S: Final = 4 * 3600
"""Length of a recording: a small file can be very long."""

_UPLOAD_TIMEOUT_S: Final = 120.0
_MAX_FIELDS: Final = 20
_MAX_FIELD_BYTES: Final = 64 << 10
_BLOCK_S: Final = 1
_STATUS_OF: Final = {
    "internal_error": HTTPStatus.INTERNAL_SERVER_ERROR,
    "overloaded": HTTPStatus.SERVICE_UNAVAILABLE,
    "server_shutdown": HTTPStatus.SERVICE_UNAVAILABLE,
    "translator_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
}
"""What is not the client's fault."""

logger = logging.getLogger(__name__)


class _Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code


class App:
    """What answers requests.

    Args:
        handler: The sessions.
        admission: Who may begin one.
    """

    def __init__(self, handler: Handler, admission: Admission) -> None:
        self._handler = handler
        self._admission = admission
        # Most places are for those who speak.
        self._places = asyncio.Semaphore(max(1, handler.limits.max_sessions // 4))
        self._waiting = 0

    def routes(self) -> list[Route | WebSocketRoute]:
        """What is answered where."""
        recordings = [
            Route(kind.PATH, self._recording(kind), methods=["POST"]) for kind in (Transcription, Translation)
        ]
        return [*recordings, Route("/{path:path}", self._get), WebSocketRoute("/{path:path}", self._session)]

    async def _get(self, request: Request) -> Response:
        answer = self._admission.answer(_target(request.scope), _headers(request.scope))
        if answer is None:
            return Response("connect with a WebSocket\n", HTTPStatus.UPGRADE_REQUIRED, {"Upgrade": "websocket"})
        return Response(answer.text, answer.status, answer.headers)

    async def _session(self, websocket: WebSocket) -> None:
        target = _target(websocket.scope)
        if (answer := self._admission.answer(target, _headers(websocket.scope))) is not None:
            if "websocket.http.response" in websocket.scope.get("extensions", {}):
                await websocket.send_denial_response(Response(answer.text, answer.status, answer.headers))
            else:
                await websocket.close()  # which the ASGI server makes a 403
            return
        chosen = SUBPROTOCOL if SUBPROTOCOL in websocket.scope["subprotocols"] else None
        await websocket.accept(chosen)
        await self._handler.converse(_Socket(websocket), dialect_at(target))

    def _recording(self, kind: type[Recording]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                self._admit(_headers(request.scope))
                return await self._take(request, kind)
            except _Refusal as refusal:
                return _error(refusal.status, refusal.code, str(refusal))
            except DragomanError as error:
                return _error(HTTPStatus.BAD_REQUEST, error.code, str(error))

        return answer

    def _admit(self, headers: Headers) -> None:
        refusal = self._admission.refusal(headers, takes_place=True)
        if refusal is None and self._waiting >= MAX_WAITING:
            refusal = "full", HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_WAITING} recordings wait: try again later"
        if refusal is not None:
            reason, status, sentence = refusal
            self._handler.metrics.refused.labels(reason).inc()
            raise _Refusal(status, {"token": "invalid_token", "origin": "origin_refused"}.get(reason, reason), sentence)

    async def _take(self, request: Request, kind: type[Recording]) -> Response:
        async with AsyncExitStack() as stack:
            self._waiting += 1
            try:
                request = Request(request.scope, _bounded(request.receive))
                recording, path = await _received(request, kind)
                stack.callback(path.unlink)
                await stack.enter_async_context(self._places)
            finally:
                self._waiting -= 1
            return await self._transcribed(request, recording, path)

    async def _transcribed(self, request: Request, recording: Recording, path: Path) -> Response:
        source = await asyncio.to_thread(AudioFile, path)
        try:
            recording.audio = source.format
            upload = _Upload(request, source)
            await self._handler.converse(upload, recording)
        finally:
            source.close()
        if upload.problem is not None:
            raise upload.problem
        if upload.close_code == CloseCode.TRY_AGAIN_LATER and not recording.events:
            raise _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "full", upload.reason)
        if (error := recording.error) is not None:
            raise _Refusal(_STATUS_OF.get(error.code, HTTPStatus.BAD_REQUEST), error.code, error.message)
        body = recording.body(source.problem)
        return Response(body.text, media_type=None, headers={"Content-Type": body.kind})


class _Socket:
    """A WebSocket of ASGI as the handler takes it."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._close_code: int | None = None

    async def recv(self) -> Frame:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            # A connection that was lost has no reason; a client that said goodbye without a code has an empty one.
            if message.get("reason") is not None:
                self._close_code = self._close_code or message.get("code", 1005)
            raise TransportClosed
        binary = message.get("bytes")
        frame: Frame = message["text"] if binary is None else binary
        if len(frame) > MAX_MESSAGE_BYTES:  # where the ASGI server has not been told
            await self.close(1009)
            raise TransportClosed
        return frame

    async def send(self, frame: Frame) -> None:
        try:
            await (self._websocket.send_text(frame) if isinstance(frame, str) else self._websocket.send_bytes(frame))
        except (WebSocketDisconnect, RuntimeError):  # Starlette raises the second where a close has been seen
            raise TransportClosed from None

    async def close(self, code: int, reason: str = "") -> None:
        self._close_code = code
        try:
            await self._websocket.close(code, reason)
        except (WebSocketDisconnect, RuntimeError):
            pass

    def abort(self) -> None:
        """Do no more: when the application returns, the ASGI server drops the connection."""

    @property
    def close_code(self) -> int | None:
        return self._close_code


class _Upload:
    """A file in place of a connection: its audio comes as fast as it is taken.

    Attributes:
        problem: Why it could not be read.
        close_code: The code that the session ended with.
        reason: And the sentence.
    """

    def __init__(self, request: Request, source: AudioFile) -> None:
        self.problem: DragomanError | None = None
        self.close_code: int | None = None
        self.reason = ""
        self._request = request
        self._blocks: Iterator[Any] = source.blocks(_BLOCK_S * source.format.sample_rate_hz)
        self._left_samples = MAX_RECORDING_S * source.format.sample_rate_hz
        self._closed = asyncio.Event()

    async def recv(self) -> Frame:
        if self._closed.is_set() or await self._request.is_disconnected():
            raise TransportClosed
        try:
            block = await asyncio.to_thread(next, self._blocks, None)
        except DragomanError as error:
            self.problem = error
            raise TransportClosed from None
        self._left_samples -= 0 if block is None else len(block)
        if self._left_samples < 0:
            sentence = f"the recording is longer than {MAX_RECORDING_S / 3600:g} hours: cut it"
            self.problem = DragomanError("recording_too_long", sentence)
            raise TransportClosed
        return END if block is None else block.tobytes()

    async def send(self, frame: Frame) -> None:
        raise AssertionError("a recording is told nothing on the way")

    async def close(self, code: int, reason: str = "") -> None:
        self.close_code, self.reason = code, reason
        self._closed.set()

    def abort(self) -> None:
        self._closed.set()


def _target(scope: Scope) -> str:
    query = scope["query_string"].decode("ascii", errors="replace")
    return f"{scope['path']}?{query}" if query else str(scope["path"])


def _headers(scope: Scope) -> Headers:
    return Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]])


async def _received(request: Request, kind: type[Recording]) -> tuple[Recording, Path]:
    """What a form asks for, and its recording, in a file that the caller deletes."""
    try:
        async with (
            asyncio.timeout(_UPLOAD_TIMEOUT_S),
            request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES) as form,
        ):
            file = form.get("file")
            recording = kind.begin(_fields(form))
            if not isinstance(file, UploadFile):
                raise DragomanError("missing_file", "the form has no file: send multipart/form-data with one")
            return recording, await asyncio.to_thread(_saved, file)
    except TimeoutError:
        sentence = f"the request took more than {_UPLOAD_TIMEOUT_S:g} s to arrive: send a smaller recording"
        raise _Refusal(HTTPStatus.REQUEST_TIMEOUT, "upload_too_slow", sentence) from None
    except HTTPException as error:
        code = "invalid_form" if error.status_code == HTTPStatus.BAD_REQUEST else "upload_too_large"
        raise _Refusal(HTTPStatus(error.status_code), code, error.detail) from None


def _fields(form: FormData) -> dict[str, str]:
    """The fields of a form but its file; values of one field are parted by commas."""
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if name == "file":
            continue
        if isinstance(value, str):
            fields[name] = f"{fields[name]},{value}" if name in fields else value
        else:
            raise DragomanError("invalid_value", f"{name} is a file: send the recording as file, and nothing else so")
    return fields


def _bounded(receive: Receive) -> Receive:
    """What comes of a request, up to the size that it may have."""
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_UPLOAD_BYTES:
            limit = f"{MAX_UPLOAD_BYTES >> 20} MiB"
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request is larger than {limit}: cut it")
        return message

    return bounded


def _saved(file: UploadFile) -> Path:
    """The upload as a file with a name; FFmpeg wants to go to and fro in it."""
    with NamedTemporaryFile(prefix="dragoman-", delete=False) as copy:
        while block := file.file.read(1 << 20):
            copy.write(block)
    return Path(copy.name)


def _error(status: HTTPStatus, code: str, sentence: str) -> Response:
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    told = {"error": {"message": sentence, "type": kind, "param": None, "code": code}}
    return Response(json.dumps(told, ensure_ascii=False), status, media_type="application/json")


def application(
    recognizer: Recognizer,
    settings: Settings,
    translator: AnyTranslator | None = None,
    speculation: Speculation | None = None,
) -> Starlette:
    """The service for an ASGI server of one's own, which ends it by the protocol of lifespans.

    Of the settings, those of the address and of TLS are the server's business. It should take messages of 1 MiB, and
    not end connections whose answer to a ping is late: that waits behind audio that has not been read.
    """
    handler = Handler(recognizer, settings, translator, speculation)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        handler.dismiss()
        await handler.stop()

    app = Starlette(routes=App(handler, Admission(handler, settings)).routes(), lifespan=lifespan)
    app.state.handler = handler
    return app


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it, and tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self.listening.set()


class AsgiService(Service):
    """`server.Service` with recordings, carried by uvicorn."""

    _uvicorn: _Server | None = None
    _serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen; return the URL of the service, as `Service.start`."""
        s = self._settings
        config = uvicorn.Config(
            Starlette(routes=App(self._handler, self._admission).routes()),
            ws="websockets-sansio",
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            ws_ping_timeout=None,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            ssl_certfile=None if s.tls_cert is None else os.fspath(s.tls_cert),
            ssl_keyfile=None if s.tls_key is None else os.fspath(s.tls_key),
        )
        config.load()
        family = socket.AF_INET6 if ":" in s.host else socket.AF_INET
        listening = socket.create_server((s.host, s.port), family=family, backlog=config.backlog)
        self._uvicorn = _Server(config)
        self._serving = asyncio.create_task(self._uvicorn.serve([listening]))
        await self._uvicorn.listening.wait()
        host = f"[{s.host}]" if ":" in s.host else s.host
        return f"{'wss' if s.tls_cert else 'ws'}://{host}:{listening.getsockname()[1]}{PATH}"

    async def stop(self) -> None:
        """Tell every client that the server goes away, close with 1001 and stop computing."""
        self._handler.dismiss()
        try:
            await asyncio.wait_for(self._handler.emptied(), GOODBYE_TIMEOUT_S)
        except TimeoutError:
            logger.warning("%d clients did not take the goodbye", self._handler.sessions)
        if self._uvicorn is not None and self._serving is not None:
            self._uvicorn.should_exit = True
            await self._serving
        await self._handler.stop()
