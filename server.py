"""Live transcription and translation over WebSocket: everything that only websockets, HTTP and TLS need to know.

client → handshake: `Admission` → `wire.handler`, in one of the `DIALECTS`
"""

import asyncio
import base64
import hmac
import json
import logging
import re
import signal
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_websockets
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from metrics import TEXT_FORMAT
from models.recognizer import Recognizer
from models.translator import AnyTranslator
from streaming.errors import DragomanError
from streaming.scheduler import prepare_process
from streaming.speculation import Speculation
from wire.deepgram import Deepgram
from wire.dialect import Dialect, Frame
from wire.fields import shown
from wire.handler import MAX_MESSAGE_BYTES, Handler, Limits, Processes, TransportClosed
from wire.simulstream import Simulstream
from wire.transcriptions import Transcriptions
from wire.translations import Translations

DIALECTS: Final[tuple[type[Dialect], ...]] = (Translations, Transcriptions, Deepgram, Simulstream)
"""What the service speaks, each at a path of its own."""

PATH: Final = Translations.PATH
SUBPROTOCOL: Final = Subprotocol("dragoman.v1")
"""What the service speaks; a client need not offer it, but a browser has to where it sends its token as another."""

METRICS_PATH: Final = "/metrics"

_TOKEN_SUBPROTOCOL: Final = "dragoman.token."
GOODBYE_TIMEOUT_S: Final = 5.0
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_LOOPBACK_HOST: Final = re.compile(r"(127\.0\.0\.1|\[::1\]|localhost)(:\d+)?")

_PAGE: Final = Path(__file__).parent / "client" / "page"
_PAGE_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("page", "session", "audio", "capture", "captions", "subtitles")
    },
}
_PAGE_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self), display-capture=(self)",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings(Limits):
    """How the service is run, beside the limits of its sessions.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        metrics: Whether ``/metrics`` shows what is counted, to whoever has the token.
        origins: Web origins whose pages may connect beside the service's own; programs, which send none, always may.
        tokens: Secrets of which a client must send one, as ``Authorization: Bearer`` or as a subprotocol; none are
            asked for if there are none.
        tls_cert: Certificate chain in PEM, for ``wss``.
        tls_key: Private key in PEM, if the chain's file does not hold it.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    metrics: bool = False
    origins: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None


class Answer(NamedTuple):
    """An answer over HTTP; one with a `kind` is a page of ours, which a browser may show and not keep."""

    status: HTTPStatus
    text: str
    kind: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers of its own."""
        return {"Content-Type": f"{self.kind or 'text/plain'}; charset=utf-8", **(_PAGE_HEADERS if self.kind else {})}


class Admission:
    """Who may begin a session, and what everyone else is answered."""

    def __init__(self, handler: Handler, settings: Settings) -> None:
        self._handler = handler
        self._settings = settings
        self._page = {path: (kind, (_PAGE / name).read_text("utf-8")) for path, (name, kind) in _PAGE_FILES.items()}

    def answer(self, target: str, headers: Headers) -> Answer | None:
        """The answer to a GET request for a path with a query; None lets the client in."""
        path = target.partition("?")[0]
        if path in self._page:
            kind, text = self._page[path]
            return Answer(HTTPStatus.OK, text, kind)
        if path in ("/healthz", "/readyz"):
            return self._health(is_ready=path == "/readyz")
        refusal = self._refusal(target, headers)
        if refusal is None:
            if path == METRICS_PATH:
                return Answer(HTTPStatus.OK, self._handler.metrics.text(), TEXT_FORMAT)
            return self._unusable(target)
        reason, status, text = refusal
        if reason and path in _DIALECTS and "Upgrade" in headers:
            self._handler.metrics.refused.labels(reason).inc()
        return Answer(status, f"{text}\n")

    def _health(self, *, is_ready: bool) -> Answer:
        """Whether the service runs; with `is_ready`, whether it would take a session."""
        unavailable = self._handler.unavailable() if is_ready else None
        health = {
            "status": unavailable[0] if unavailable else "ok",
            "sessions": self._handler.sessions,
            "max_sessions": self._settings.max_sessions,
        }
        status = HTTPStatus.SERVICE_UNAVAILABLE if unavailable else HTTPStatus.OK
        return Answer(status, f"{json.dumps(health)}\n")

    def _refusal(self, target: str, headers: Headers) -> tuple[str, HTTPStatus, str] | None:
        """Why a client may not begin a session or see the metrics, if it may not: reason, status and sentence."""
        path = target.partition("?")[0]
        is_metrics = path == METRICS_PATH and self._settings.metrics
        if path not in _DIALECTS and not is_metrics:
            return "", HTTPStatus.NOT_FOUND, f"there is no {path} here: connect to {PATH}"
        return self.refusal(headers, takes_place=not is_metrics and not _resumed(target))

    def refusal(self, headers: Headers, *, takes_place: bool) -> tuple[str, HTTPStatus, str] | None:
        """Why a client may not use the service, if it may not: reason, status and sentence.

        Args:
            headers: Of the client.
            takes_place: Whether what it asks for is a session.
        """
        if not self._allows_origin(headers):
            origin = shown(", ".join(headers.get_all("Origin")))
            return "origin", HTTPStatus.FORBIDDEN, f"pages of {origin} may not connect: --allow-origin lets them"
        if self._settings.tokens and not _has_token(headers, self._settings.tokens):
            text = "the token is missing or wrong: send Authorization: Bearer TOKEN"
            return "token", HTTPStatus.UNAUTHORIZED, text
        if takes_place and (unavailable := self._handler.unavailable()):
            reason, text = unavailable
            return reason, HTTPStatus.SERVICE_UNAVAILABLE, text
        return None

    def _unusable(self, target: str) -> Answer | None:
        """What is wrong with the address of a session, if anything is."""
        try:
            session_id = dialect_at(target).resumes
        except DragomanError as error:
            return Answer(HTTPStatus.BAD_REQUEST, f"{error}\n")
        if session_id is not None and not self._handler.resumable(session_id):
            return Answer(HTTPStatus.GONE, f"there is no session {shown(session_id)} any more: begin a new one\n")
        return None

    def _allows_origin(self, headers: Headers) -> bool:
        """Whether a program asks, or a page that may: of an origin that was named, or our own.

        On a loopback address and without a token, our own is only one with a name of this machine. Another
        name may be one that a stranger has made to point here (DNS rebinding).
        """
        origins, hosts = headers.get_all("Origin"), headers.get_all("Host")
        if not origins or all(origin in self._settings.origins for origin in origins):
            return True
        if [origin.lower().partition("://")[2] for origin in origins] != [host.lower() for host in hosts]:
            return False
        is_private = self._settings.host in _LOOPBACK and not self._settings.tokens
        return not is_private or all(_LOOPBACK_HOST.fullmatch(host.lower()) for host in hosts)


class _Carrier:
    """A connection of websockets as the handler takes it."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection

    async def recv(self) -> Frame:
        try:
            return await self._connection.recv()
        except ConnectionClosed:
            raise TransportClosed from None

    async def send(self, frame: Frame) -> None:
        try:
            await self._connection.send(frame)
        except ConnectionClosed:
            raise TransportClosed from None

    async def close(self, code: int, reason: str = "") -> None:
        await self._connection.close(code, reason)

    def abort(self) -> None:
        self._connection.transport.abort()

    @property
    def close_code(self) -> int | None:
        close = self._connection.protocol.close_rcvd
        return None if close is None else int(close.code)


class Service:
    """The WebSocket side: the address, handshakes, connections."""

    def __init__(
        self,
        recognizer: Recognizer,
        settings: Settings,
        translator: AnyTranslator | None = None,
        speculation: Speculation | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Prepare the service and start its engine; `start` opens the socket."""
        self._settings = settings
        self._handler = Handler(recognizer, settings, translator, speculation, processes)
        self._admission = Admission(self._handler, settings)
        self._server: Server | None = None

    async def start(self) -> str:
        """Listen; return the URL of the service.

        Raises:
            OSError: The address is in use or not this machine's, or the certificate cannot be read.
        """
        tls = None
        if self._settings.tls_cert is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(self._settings.tls_cert, self._settings.tls_key)
        self._server = await serve_websockets(
            self._handle,
            self._settings.host,
            self._settings.port,
            process_request=self._admit,
            select_subprotocol=_select_subprotocol,
            compression=None,  # PCM does not compress
            max_size=MAX_MESSAGE_BYTES,
            # The answer to a ping waits behind audio that is not read yet, so a late one says little about a
            # client that sends fast. One that has gone is noticed by the idle and send timeouts, and then does not
            # take the goodbye. Pings are sent for what stands between: it may drop a connection that is silent.
            ping_timeout=None,
            close_timeout=GOODBYE_TIMEOUT_S,
            ssl=tls,
        )
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        port = self._server.sockets[0].getsockname()[1]
        return f"{'wss' if tls else 'ws'}://{host}:{port}{PATH}"

    async def drain(self) -> None:
        """Take no more sessions, and wait until those that there are have finished, or for `drain_s`."""
        await self._handler.drain()

    async def stop(self) -> None:
        """Tell every client that the server goes away, close with 1001 and stop computing."""
        if self._server is not None:
            self._server.close(close_connections=False)
            self._handler.dismiss()
            try:
                await asyncio.wait_for(self._server.wait_closed(), GOODBYE_TIMEOUT_S)
            except TimeoutError:
                logger.warning("%d clients did not take the goodbye", self._handler.sessions)
        await self._handler.stop()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer what is no session with HTTP; None lets the client in."""
        answer = self._admission.answer(request.path, request.headers)
        if answer is None:
            return None
        response = connection.respond(answer.status, answer.text)
        del response.headers["Content-Type"]
        response.headers.update(answer.headers)
        return response

    async def _handle(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        await self._handler.converse(_Carrier(connection), dialect_at(connection.request.path))


_DIALECTS: Final = {dialect.PATH: dialect for dialect in DIALECTS}


def dialect_at(target: str) -> Dialect:
    """The dialect of a session that is asked for at a path with a query.

    Raises:
        DragomanError: The query cannot be used.
        KeyError: There is no such path.
    """
    path, _, query = target.partition("?")
    return _DIALECTS[path].begin(dict(parse_qsl(query, keep_blank_values=True)))


def _resumed(target: str) -> bool:
    """Whether an address asks to go on with a session, which has its place already."""
    try:
        return dialect_at(target).resumes is not None
    except DragomanError:
        return False


def _has_token(headers: Headers, tokens: Sequence[str]) -> bool:
    """Whether a client sends one of the tokens: in a header, or, as browsers cannot, among its subprotocols."""
    offered = [part.strip() for value in headers.get_all("Sec-WebSocket-Protocol") for part in value.split(",")]
    sent = [value.partition(" ") for value in headers.get_all("Authorization")]
    # "Token" is Deepgram's.
    keys = [given for scheme, _, given in sent if scheme.lower() in ("bearer", "token")]
    encoded = [base64.urlsafe_b64encode(token.encode()).decode().rstrip("=") for token in tokens]
    pairs = [*product(keys, tokens), *product(offered, (f"{_TOKEN_SUBPROTOCOL}{token}" for token in encoded))]
    # All are compared, whichever is right. What is no UTF-8 comes with surrogates.
    return any(
        [hmac.compare_digest(given.encode(errors="surrogateescape"), wanted.encode()) for given, wanted in pairs]
    )


def _select_subprotocol(_: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Ours, if it is offered; never the one that carries the token, which would be sent back."""
    return SUBPROTOCOL if SUBPROTOCOL in offered else None


async def serve(
    recognizer: Recognizer,
    settings: Settings,
    translator: AnyTranslator | None = None,
    speculation: Speculation | None = None,
    processes: Processes | None = None,
    *,
    kind: type[Service] = Service,
) -> None:
    """Serve until SIGTERM or Ctrl-C, let sessions finish until another one comes, and say goodbye to the rest."""
    prepare_process()
    service = kind(recognizer, settings, translator, speculation, processes)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        url = await service.start()
        page = f"{url.removesuffix(PATH).replace('ws', 'http', 1)}/"
        print(
            f"dragoman: {recognizer.name} is listening at {url} and shows a page at {page}", file=sys.stderr, flush=True
        )
        if not settings.tokens and settings.host not in _LOOPBACK:
            logger.warning("whoever reaches %s can use the service: --token asks for a secret", settings.host)
        await stop.wait()
        stop.clear()
        ends = [asyncio.create_task(wait) for wait in (service.drain(), stop.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
    finally:
        await service.stop()
