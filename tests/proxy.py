"""A network between clients and a service that can fail."""

import asyncio
from typing import Self
from urllib.parse import urlsplit, urlunsplit


class Proxy:
    """Carries TCP to a service, byte for byte, until a test cuts or stops it; gives the service's URL through it.

    Attributes:
        connections: How many there have been.
    """

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._flows = asyncio.Event()
        self._flows.set()
        self._is_up = True
        self._writers: set[asyncio.StreamWriter] = set()
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._flows.set()
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        port = self._server.sockets[0].getsockname()[1]
        return urlunsplit(self._parts._replace(netloc=f"127.0.0.1:{port}"))

    def cut(self) -> None:
        """Lose every connection with all that is on its way, and take no new one."""
        self._is_up = False
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        """Take connections again."""
        self._is_up = True
        self._flows.set()

    def stall(self) -> None:
        """Carry nothing more; the connections stay open, and neither side is told."""
        self._flows.clear()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._is_up:
            writer.transport.abort()
            return
        self.connections += 1
        beyond = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        self._writers |= {writer, beyond[1]}
        pipes = [self._pipe(reader, beyond[1]), self._pipe(beyond[0], writer)]
        await asyncio.gather(*pipes, return_exceptions=True)
        self._writers -= {writer, beyond[1]}

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
