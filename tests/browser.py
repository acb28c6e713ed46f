"""Headless Chromium for tests of the page, driven over its DevTools protocol.

A microphone that plays a file stands where the real one would be.
"""

import asyncio
import base64
import itertools
import json
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from websockets.asyncio.client import ClientConnection, connect

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium: Final = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

_FLAGS: Final = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --disable-extensions --mute-audio
    --remote-debugging-port=0 --use-fake-device-for-media-stream""".split()
# On a busy machine everything takes its time.
_TIMEOUT_S: Final = 60.0
_KEYS: Final = {
    "Tab": ("Tab", 9, ""),
    "Enter": ("Enter", 13, "\r"),
    "Space": ("Space", 32, " "),
    "Escape": ("Escape", 27, ""),
}


class Page:
    """One tab of the browser.

    Attributes:
        complaints: What the page has written to the console as an error, and exceptions that nothing caught.
        told: The JSON frames that came over its WebSockets.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._session: str | None = None
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())
        self.complaints: list[str] = []
        self.told: list[dict[str, Any]] = []

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol; returns its result."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        await self._connection.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        async with asyncio.timeout(_TIMEOUT_S):
            return await answer

    async def open(self, downloads: Path) -> None:
        """Open an empty tab; what it saves goes to `downloads`."""
        context = (await self.command("Target.createBrowserContext"))["browserContextId"]
        await self.command(
            "Browser.setDownloadBehavior", behavior="allow", browserContextId=context, downloadPath=str(downloads)
        )
        target = await self.command("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network", "Accessibility"):
            await self.command(f"{domain}.enable")
        await self.command("Emulation.setFocusEmulationEnabled", enabled=True)

    async def go(self, url: str) -> None:
        """Load a page."""
        await self.command("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited if it is a promise."""
        answer = await self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise AssertionError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait for a condition in JavaScript."""
        for _ in range(round(_TIMEOUT_S / 0.02)):
            if await self.evaluate(f"Boolean({condition})"):
                return
            await asyncio.sleep(0.02)
        shown = await self.evaluate("document.body.innerText")
        pytest.fail(f"{condition} is false after {_TIMEOUT_S:g} s: {shown!r}, {self.complaints}")

    async def click(self, selector: str) -> None:
        """Click on an element."""
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    async def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key."""
        code, number, text = _KEYS[key]
        name = " " if key == "Space" else key
        common = {"key": name, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        await self.command("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self.command("Input.dispatchKeyEvent", type="keyUp", **common)

    async def write(self, text: str) -> None:
        """Type into what has the focus."""
        await self.command("Input.insertText", text=text)

    async def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into a file input."""
        document = await self.command("DOM.getDocument")
        node = await self.command("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.command("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path)])

    async def look(self, path: Path, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        """Save a picture of the page."""
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.command("Emulation.setEmulatedMedia", features=features)
        picture = await self.command("Page.captureScreenshot", format="png")
        await asyncio.to_thread(path.write_bytes, base64.b64decode(picture["data"]))

    async def close(self) -> None:
        """Stop listening to the tab."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        async for frame in self._connection:
            message = json.loads(frame)
            if "id" in message:
                answer = self._answers.pop(message["id"])
                if answer.done():
                    continue
                if "error" in message:
                    answer.set_exception(AssertionError(message["error"]["message"]))
                else:
                    answer.set_result(message["result"])
            elif message["method"] == "Network.webSocketFrameReceived":
                frame = message["params"]["response"]
                if frame["opcode"] == 1:
                    self.told.append(json.loads(frame["payloadData"]))
            elif message["method"] == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description", details["text"]))
            elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.complaints.append(message["params"]["entry"]["text"])


@asynccontextmanager
async def open_page(folder: Path, microphone: Path | None = None, *, allow: bool = True) -> AsyncIterator[Page]:
    """A tab of a browser of its own.

    Args:
        folder: Where its profile and its downloads go.
        microphone: A wav file that is heard once; None is a beep a second.
        allow: Whether the person lets the page use the microphone.
    """
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder / 'profile'}"]
    command.append("--use-fake-ui-for-media-stream" if allow else "--deny-permission-prompts")
    if microphone is not None:
        command.append(f"--use-file-for-fake-audio-capture={microphone}%noloop")
    devnull = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, "about:blank", stdout=devnull, stderr=devnull)
    try:
        async with connect(
            await asyncio.to_thread(_address, folder / "profile"), max_size=None, compression=None
        ) as connection:
            page = Page(connection)
            try:
                await page.open(folder)
                yield page
            finally:
                await page.close()
    finally:
        process.terminate()
        await process.wait()


def _address(profile: Path) -> str:
    """Where a browser that has just been started can be reached."""
    port = profile / "DevToolsActivePort"
    for _ in range(round(_TIMEOUT_S / 0.05)):
        lines = port.read_text().split() if port.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise TimeoutError(f"the browser does not start within {_TIMEOUT_S:g} s")
