import asyncio
import json
import random
import re
import string
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

import server
from client.output import OutputFormat, make_writer
from models.recognizer import Recognizer
from streaming import scheduler
from streaming.audio import AudioFormat
from streaming.events import Event, TranscriptDelta, TranslationDelta, Word, parse_event
from streaming.session import SessionConfig
from tests.browser import Page, needs_chromium, open_page
from tests.fakes import FakeRecognizer, FakeSession, FakeTranslator, running_service, tone
from tests.proxy import Proxy

FOLDER: Final = Path(__file__).parents[2] / "client" / "page"
# 1.2 s of sound, a pause, and again.
LEVELS: Final = [0.2, 0.4, 0.6, 0, 0.8, 0.3, 0.5, 0, 0.7]
# A microphone begins anywhere, so that a pause needs to be longer to have 400 ms of silence.
HEARD: Final = [0.2, 0.4, 0.6, 0, 0, 0.8, 0.3, 0.5, 0, 0] * 10


pytestmark = pytest.mark.usefixtures("fake_sessions")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return write_recording(tmp_path / "a talk.wav", LEVELS)


def write_recording(path: Path, levels: Sequence[float]) -> Path:
    soundfile.write(path, tone(levels), 16_000, subtype="PCM_16")
    return path


def page_of(url: str) -> str:
    return f"{url.removesuffix(server.PATH).replace('ws', 'http', 1)}/"


async def load(page: Page, url: str, state: str = "Ready") -> None:
    await page.go(page_of(url))
    await state_is(page, state)


async def state_is(page: Page, state: str) -> None:
    await page.until(f"document.getElementById('state').textContent === {json.dumps(state)}")


async def caption_file(page: Page, path: Path, languages: Sequence[str] = ()) -> None:
    """Choose a recording and run it to its end."""
    await page.click("input[value=file]")
    await page.choose_file("#file", path)
    for language in languages:
        await page.evaluate(f"document.querySelector('#languages input[value={language}]').checked = true")
    before = len(page.told)
    await page.click("#start")
    await page.until("document.body.classList.contains('running')")
    await page.until("!document.body.classList.contains('running')")
    assert await problem(page) == ""
    assert page.told[-1]["type"] == "session.closed" and len(page.told) > before


async def problem(page: Page) -> str:
    return str(await page.evaluate("document.getElementById('problem').textContent"))


async def captions(page: Page, language: str = "") -> list[str]:
    """The paragraphs of a text as they are seen."""
    found = f"document.querySelectorAll('.pane[data-language={json.dumps(language)}] .log p')"
    return list(await page.evaluate(f"[...{found}].map((paragraph) => paragraph.textContent)"))


def told_paragraphs(page: Page, language: str = "") -> list[str]:
    """The paragraphs of a text as the service told them."""
    return paragraphs_of(page.told, language)


def paragraphs_of(events: Sequence[dict[str, Any]], language: str) -> list[str]:
    kind = f"session.{'output' if language else 'input'}_transcript.delta"
    paragraphs = [""]
    for event in events:
        if event["type"] == kind and event.get("language", "") == language:
            paragraphs[-1] += event["delta"]
            paragraphs += [""] * event["endpoint"]
    return [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]


def test_the_folder_is_whole_and_asks_nothing_of_others() -> None:
    names = {name for name, _ in server._PAGE_FILES.values()}
    assert names == {file.name for file in FOLDER.iterdir()}
    html, code = (FOLDER / "index.html").read_text(), (FOLDER / "page.js").read_text()
    used = set(re.findall(r'\$\("([\w-]+)"\)', code)) | set(re.findall(r' for="([\w-]+)"', html))
    assert used <= set(re.findall(r' id="([\w-]+)"', html))
    for name in names:
        text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|innerHTML|eval\(", text), name
        for reference in re.findall(r'(?:src|href|from)[= ]"(?:\./)?([^"#]+)"', text):
            assert reference in names
    assert not re.search(r'<script(?![^>]* src)|<style|\sstyle="|\son\w+="', html), "the policy forbids it"


@needs_chromium
async def test_what_the_microphone_hears_is_captioned(tmp_path: Path) -> None:
    heard = write_recording(tmp_path / "mic.wav", HEARD)
    async with running_service(translator=FakeTranslator()) as url, open_page(tmp_path, heard) as page:
        await load(page, url)
        assert await page.evaluate("[...document.querySelectorAll('#latency option')].map((o) => o.value)") == [
            "low", "low-medium", "medium", "medium-high", "high", "offline",
        ]  # fmt: skip
        for language in ("es", "fr"):
            await page.click(f"#languages input[value={language}]")
        await page.evaluate("document.getElementById('latency').value = 'high'")
        await page.click("#start")
        await page.until("document.querySelectorAll('.pane[data-language=fr] .log p').length >= 2")
        assert await page.evaluate("document.getElementById('level').value") > -60
        assert re.fullmatch(r"\d+\.\d s", await page.evaluate("document.getElementById('delay-value').textContent"))
        await page.click("#start")
        await state_is(page, "Ready")
        updated = next(event["session"] for event in page.told if event["type"] == "session.updated")
        assert updated["audio"]["input"]["format"]["rate"] == await page.evaluate("new AudioContext().sampleRate")
        assert (updated["audio"]["output"]["languages"], updated["latency"]) == (["es", "fr"], "high")
        assert page.told[-1]["type"] == "session.closed" and page.told[-1]["audio_ms"] >= 1_200
        for language in ("", "es", "fr"):
            assert await captions(page, language) == told_paragraphs(page, language)
        assert len(" ".join(await captions(page, "es")).split()) >= 3
        assert (page.complaints, await problem(page)) == ([], "")


@needs_chromium
async def test_a_recording_is_captioned_and_saved_as_the_command_line_would(tmp_path: Path, recording: Path) -> None:
    async with running_service(translator=FakeTranslator()) as url, open_page(tmp_path) as page:
        await load(page, url)
        await caption_file(page, recording, ["es"])
        assert await captions(page) == ["w20 w40 w60", "w80 w30 w50", "w70"]
        assert await captions(page, "es") == ["es20 es40 es60", "es80 es30 es50", "es70"]
        events = [parse_event(json.dumps(event)) for event in page.told]
        for language, name in (("", "a talk"), ("es", "a talk.es")):
            for form in ("txt", "srt", "vtt"):
                await page.click(f".pane[data-language={json.dumps(language)}] .saves button[title*={KINDS[form]}]")
                assert await downloaded(tmp_path / f"{name}.{form}") == as_python(events, language, form)
        assert page.complaints == []


KINDS: Final = {"txt": "text", "srt": "SubRip", "vtt": "WebVTT"}


async def downloaded(path: Path) -> str:
    def wait() -> str:
        for _ in range(500):
            if path.exists() and path.stat().st_size:
                return path.read_text()
            time.sleep(0.02)
        raise AssertionError(f"{path} was not saved")

    return await asyncio.to_thread(wait)


def as_python(events: Sequence[Event], language: str, form: str) -> str:
    writer = make_writer(OutputFormat(form), "a", [language] if language else [])
    return writer.push(events) + writer.finish()


@needs_chromium
async def test_subtitles_are_those_of_the_command_line(tmp_path: Path, recording: Path) -> None:
    talks = [random_talk(random.Random(seed)) for seed in range(60)]
    jobs = [([event.to_dict() for event in talk], form) for talk in talks for form in ("txt", "srt", "vtt")]
    code = """(async (jobs) => {
        const { Transcript } = await import("/subtitles.js");
        return jobs.map(([deltas, form]) => {
            const transcript = new Transcript();
            for (const delta of deltas) transcript.push(delta);
            return transcript.written(form);
        });
    })"""
    async with running_service() as url, open_page(tmp_path) as page:
        await load(page, url)
        written = await page.evaluate(f"{code}({json.dumps(jobs)})")
    expected = [
        as_python(talk, "es" if isinstance(talk[0], TranslationDelta) else "", form)
        for talk in talks
        for form in ("txt", "srt", "vtt")
    ]
    assert written == expected


def random_talk(rng: random.Random) -> list[Event]:
    """Deltas of words of any length and times, in one text; some end a segment, some are empty."""
    is_translation, at_ms = rng.random() < 0.5, 0
    events: list[Event] = []
    for seq in range(rng.randint(1, 60)):
        words = []
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            start_ms = at_ms + rng.choice([0, 0, 20, 300, 1_499, 1_500, 1_501, 5_000, 4_000_000])
            at_ms = start_ms + rng.choice([0, 1, 80, 240, 999, 1_001, 7_000])
            letters = string.ascii_letters + "é𝄞<>&-"
            text = "".join(rng.choices(letters, k=rng.choice([1, 3, 6, 12, 41, 43]))) + rng.choice(["", "-->"])
            words.append(Word(text, start_ms, at_ms, 0.5))
        endpoint = rng.random() < 0.2
        delta = "".join(f" {word.word}" for word in words)
        start_ms = words[0].start_ms if words else at_ms
        if is_translation:
            times = {"source_start_ms": start_ms, "source_end_ms": at_ms, "emitted_ms": at_ms}
            events.append(TranslationDelta(seq, delta, "es", (0, 0), endpoint, **times))
        else:
            events.append(TranscriptDelta(seq, delta, start_ms, at_ms, at_ms, 0, endpoint, tuple(words)))
    return events


@needs_chromium
async def test_hours_of_captions_do_not_fill_the_page(tmp_path: Path) -> None:
    code = """(async () => {
        const { Pane } = await import("/captions.js");
        const pane = new Pane("", "Speech", () => {});
        document.getElementById("panes").append(pane.element);
        let count = 0;
        for (let i = 0; i < 5000; i++) {
            const [start_ms, end_ms] = [400 * i, 400 * i + 300];
            const words = [{ word: `w${i}`, start_ms, end_ms }];
            pane.push({ delta: ` w${i}`, words, endpoint: i % 50 === 49, start_ms, end_ms });
            count = Math.max(count, pane.element.querySelectorAll("*").length);
        }
        return [count, pane.transcript.written("txt"), pane.log.lastElementChild.textContent];
    })()"""
    async with running_service() as url, open_page(tmp_path) as page:
        await load(page, url)
        elements, text, last = await page.evaluate(code)
    assert elements < 60 * 51 + 30
    assert text.split() == [f"w{i}" for i in range(5_000)]
    assert last == " ".join(f"w{i}" for i in range(4_950, 5_000))


@needs_chromium
async def test_the_keyboard_is_enough(tmp_path: Path) -> None:
    heard = write_recording(tmp_path / "mic.wav", HEARD)

    async def tab_to(page: Page, selector: str) -> None:
        for _ in range(30):
            if await page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            await page.press("Tab")
        raise AssertionError(f"Tab never comes to {selector}")

    async with running_service(translator=FakeTranslator()) as url, open_page(tmp_path, heard) as page:
        await load(page, url)
        await page.press("Tab")
        assert await page.evaluate("document.activeElement.className") == "skip"
        await tab_to(page, "input[value=de]")
        await page.press("Space")
        await tab_to(page, "#start")
        await page.press("Enter")
        await page.until("document.querySelector('.pane[data-language=de] .log p')")
        await tab_to(page, "#stage-on")
        await page.press("Enter")
        await page.until("document.body.classList.contains('stage') && document.activeElement.id === 'stage-off'")
        await page.press("Escape")
        await page.until("!document.body.classList.contains('stage') && document.activeElement.id === 'stage-on'")
        await tab_to(page, ".pane[data-language=de] .log")
        await page.evaluate("document.getElementById('start').focus()")
        await page.press("Enter")
        await state_is(page, "Ready")
        assert await page.evaluate("document.activeElement.id") == "start"
        assert await captions(page, "de") == told_paragraphs(page, "de")


@needs_chromium
async def test_who_scrolls_back_is_left_there_until_the_newest_words_are_asked_for(tmp_path: Path) -> None:
    long = write_recording(tmp_path / "long.wav", LEVELS * 12)
    end = "(log.scrollHeight - log.scrollTop - log.clientHeight < 2)"

    async with running_service(translator=FakeTranslator()) as url, open_page(tmp_path) as page:
        await load(page, url)
        await caption_file(page, long, ["es"])
        await page.evaluate("globalThis.log = document.querySelector('.pane[data-language=es] .log')")
        await page.until(end)
        await page.evaluate("log.scrollTop = 0")
        await page.until("!log.parentElement.querySelector('.latest').hidden")
        await caption_file(page, long)
        assert await page.evaluate("log.scrollTop") == 0
        await page.click(".pane[data-language=es] .latest")
        await page.until(f"{end} && log.parentElement.querySelector('.latest').hidden")
        await page.click("#stage-on")
        for shown in ("*", "", "es"):
            choose = f"choice.value = {json.dumps(shown)}, choice.dispatchEvent(new Event('change'))"
            await page.evaluate(f"((choice) => ({choose}))(document.getElementById('stage-shown'))")
            if shown != "":
                await page.until(f"log.checkVisibility() && log.scrollTop > 0 && {end}")


# Every text of the page with its contrast to what is behind it, by the formula of WCAG 2.
CONTRASTS: Final = """(() => {
    const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => rgb(color).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return (rgb(color)[3] ?? 1) === 1 ? color : behind(element.parentElement);
    };
    return [...document.querySelectorAll("body *")]
        .filter((element) => element.checkVisibility() && !element.closest(":disabled, svg"))
        .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
        .map((element) => {
            const [a, b] = [getComputedStyle(element).color, behind(element)].map(luminance);
            return [element.textContent.trim(), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
        });
})()"""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_can_be_read_and_is_told_to_those_who_do_not_see_it(
    scheme: str, tmp_path: Path, recording: Path
) -> None:
    async with running_service(translator=FakeTranslator()) as url, open_page(tmp_path) as page:
        await load(page, url)
        await caption_file(page, recording, ["es", "de"])
        await page.evaluate("document.getElementById('problem').hidden = false")
        await page.look(tmp_path / "picture.png", scheme=scheme)
        dim = [text for text, contrast in await page.evaluate(CONTRASTS) if contrast < 4.5]
        assert dim == []
        nodes = (await page.command("Accessibility.getFullAXTree"))["nodes"]
        properties = [
            ({p["name"]: p["value"].get("value") for p in node.get("properties", [])}, node) for node in nodes
        ]
        reachable = [
            node for own, node in properties if own.get("focusable") and node["role"]["value"] != "RootWebArea"
        ]
        assert len(reachable) > 15
        assert [node["role"]["value"] for node in reachable if not node.get("name", {}).get("value")] == []
        logs = {
            node["name"]["value"]: own.get("live", "off") for own, node in properties if node["role"]["value"] == "log"
        }
        assert logs == {"Speech": "off", "Spanish": "polite", "German": "off"}
        await page.click(".pane[data-language=''] .announce")
        assert await page.evaluate("document.querySelector('.pane .log').ariaLive") == "polite"
        await page.click("#stage-on")
        assert [text for text, contrast in await page.evaluate(CONTRASTS) if contrast < 7] == []
        size = "parseFloat(getComputedStyle(document.querySelector('.log')).fontSize)"
        assert await page.evaluate(size) > 40


@needs_chromium
async def test_the_token_is_asked_for(tmp_path: Path, recording: Path) -> None:
    async with running_service(tokens=("sésame ~?",)) as url, open_page(tmp_path) as page:
        await load(page, url, "Not connected")
        assert "asks for a token" in await problem(page)
        assert await page.evaluate("document.activeElement.id") == "token"
        await page.write("wrong")
        await page.press("Enter")
        await page.until("document.getElementById('problem').textContent.includes('wrong')")
        await page.evaluate("document.getElementById('token').select()")
        await page.write("sésame ~?")
        await page.press("Enter")
        await state_is(page, "Ready")
        assert await page.evaluate("document.getElementById('token-fields').hidden")
        await caption_file(page, recording)
        assert await captions(page) == ["w20 w40 w60", "w80 w30 w50", "w70"]


@needs_chromium
async def test_a_full_service_is_told_and_tried_again(tmp_path: Path) -> None:
    from websockets.asyncio.client import connect

    async with running_service(max_sessions=1) as url, open_page(tmp_path) as page:
        async with connect(url):
            await load(page, url, "Not connected")
            assert "in use" in await problem(page)
            assert await page.evaluate("document.getElementById('start').textContent") == "Connect"
        for _ in range(50):
            await page.click("#start")
            await page.until("document.getElementById('state').dataset.state !== 'connecting'")
            if await page.evaluate("document.getElementById('state').textContent === 'Ready'"):
                break
        assert await problem(page) == ""


@needs_chromium
async def test_a_microphone_that_is_refused(tmp_path: Path) -> None:
    async with running_service() as url, open_page(tmp_path, allow=False) as page:
        await load(page, url)
        await page.click("#start")
        await page.until("!document.getElementById('problem').hidden")
        assert "microphone" in (await problem(page)).lower()
        await page.until("!document.body.classList.contains('running')")
        assert await page.evaluate("document.getElementById('start').textContent") == "Start"


@needs_chromium
async def test_what_another_tab_plays_is_captioned(tmp_path: Path) -> None:
    async with running_service() as url, open_page(tmp_path) as page:
        await load(page, url)
        await page.click("input[value=tab]")
        await page.click("#start")
        await page.until("document.querySelector('.log p')")
        await page.click("#start")
        await state_is(page, "Ready")
        assert await captions(page) == told_paragraphs(page)
        assert await problem(page) == ""


@needs_chromium
async def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "letter.wav").write_bytes(b"not audio")
    async with running_service() as url, open_page(tmp_path) as page:
        await load(page, url)
        await page.click("input[value=file]")
        await page.click("#start")
        await page.until("document.getElementById('problem').textContent.includes('Choose a recording')")
        await page.choose_file("#file", tmp_path / "letter.wav")
        await page.click("#start")
        await page.until("document.getElementById('problem').textContent.includes('letter.wav cannot be read')")


# The page asks over HTTP why a WebSocket was refused: only when a test says that nothing has been asked.
ASK_LATE: Final = """globalThis.asked = 0, globalThis.fetch = ((fetch) => async (...request) => {
    globalThis.asked += 1;
    while (globalThis.asked) await new Promise((resolve) => setTimeout(resolve, 10));
    return fetch(...request);
})(fetch), null"""


@needs_chromium
@pytest.mark.parametrize("source", ["file", "microphone"])
async def test_a_session_goes_on_over_another_connection(
    source: str, tmp_path: Path, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The captions are those of all that was said, as if nothing had happened."""
    heard = bytearray()

    class Recorded(FakeSession):
        def write(self, pcm: bytes | npt.NDArray[Any]) -> None:
            heard.extend(bytes(pcm))
            super().write(pcm)

    async def more_words(page: Page) -> None:
        written = "(document.querySelector('.log')?.textContent.length ?? 0)"
        await page.until(f"{written} > {await page.evaluate(written)}")

    monkeypatch.setattr(scheduler, "Session", Recorded)
    playing = write_recording(tmp_path / "mic.wav", HEARD)
    async with (
        running_service(max_sessions=1, translator=FakeTranslator()) as url,
        Proxy(url) as proxy,
        open_page(tmp_path, playing) as page,
    ):
        await load(page, proxy.url)
        await page.click("#languages input[value=es]")
        await page.click(f"input[value={source}]")
        if source == "file":
            await page.choose_file("#file", recording)
            await page.click("#paced")
        await page.evaluate(ASK_LATE)
        await page.click("#start")
        await more_words(page)
        began_s = time.monotonic()
        for waiting_s in (0.0, 0.5 if source == "file" else 2.0):
            await more_words(page)
            proxy.cut()
            await state_is(page, "Connecting again")
            assert await page.evaluate("document.getElementById('state').dataset.state") == "lost"
            await page.until(f"parseFloat(document.getElementById('delay-value').textContent) >= {waiting_s}")
            await page.until("globalThis.asked > 0")  # why it was refused, which it is told when it would not be
            proxy.mend()
            await page.evaluate("globalThis.asked = 0")
        if source == "microphone":
            await state_is(page, "Live")
            await more_words(page)
            await page.click("#start")
            spoken_ms = 1_000 * (time.monotonic() - began_s)
        await state_is(page, "Ready")
        assert await problem(page) == "" and proxy.connections > 2
        updated = next(event["session"] for event in page.told if event["type"] == "session.updated")
        fmt = AudioFormat(sample_rate_hz=updated["audio"]["input"]["format"]["rate"])
        alone = FakeSession(None, SessionConfig(fmt, languages=("es",)), FakeTranslator())
        alone.write(bytes(heard))
        alone.close_input()
        while alone.ready():
            alone.step()
        events = [event.to_dict() for event in alone.take_events()]
        for language in ("", "es"):
            assert await captions(page, language) == paragraphs_of(events, language)
        if source == "file":
            assert await captions(page) == ["w20 w40 w60", "w80 w30 w50", "w70"]
        else:
            assert events[-1]["audio_ms"] - events[0]["emitted_ms"] > spoken_ms - 1_000


@needs_chromium
async def test_a_lost_connection_keeps_what_was_said_and_another_session_goes_on(
    tmp_path: Path, recording: Path
) -> None:
    heard = write_recording(tmp_path / "mic.wav", HEARD)
    service = server.Service(cast(Recognizer, FakeRecognizer()), server.Settings(port=0))
    async with open_page(tmp_path, heard) as page:
        url = await service.start()
        await load(page, url)
        await page.click("#start")
        await page.until("document.querySelector('.log p')")
        await service.stop()
        await state_is(page, "Not connected")
        assert "shutting down" in await problem(page)
        before = await captions(page)
        assert before == told_paragraphs(page)
        await page.click("#start")
        await page.until("document.getElementById('problem').textContent.includes('does not answer')")
        port = int(url.split(":")[2].partition("/")[0])
        service = server.Service(cast(Recognizer, FakeRecognizer()), server.Settings(port=port))
        try:
            await service.start()
            told = len(page.told)
            await caption_file(page, recording)
        finally:
            await service.stop()
        after = await captions(page)
        assert after[: len(before)] == before
        assert after[len(before) :] == ["w20 w40 w60", "w80 w30 w50", "w70"]
        first = [event["emitted_ms"] for event in page.told[:told] if "emitted_ms" in event][-1]
        await page.click(".saves button[title*=SubRip]")
        starts = re.findall(r"^(\d+):(\d+):(\d+),(\d+) -->", await downloaded(tmp_path / "a talk.srt"), re.M)
        starts_ms = [1000 * (3600 * int(h) + 60 * int(m) + int(s)) + int(ms) for h, m, s, ms in starts]
        assert starts_ms == sorted(starts_ms) and first in starts_ms


@pytest.mark.slow
@pytest.mark.model
@needs_chromium
async def test_the_sample_with_the_embedded_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.checkpoint import load_recognizer
    from models.translator import load_translator
    from streaming.session import Session, SessionConfig, tick

    monkeypatch.setattr(scheduler, "Session", Session)
    monkeypatch.setattr(scheduler, "tick", tick)
    recognizer, translator = load_recognizer(), load_translator()
    sample = Path(__file__).parents[2] / "samples" / "jfk.flac"
    samples, rate_hz = soundfile.read(sample, dtype="float32")
    heard = tmp_path / "mic.wav"
    soundfile.write(heard, np.tile(samples, 20), rate_hz, subtype="PCM_16")
    alone = Session(recognizer, SessionConfig(languages=("es",)), translator)
    events = alone.push(samples) + alone.finish()
    async with running_service(recognizer, translator) as url, open_page(tmp_path, heard) as page:
        await load(page, url)
        await caption_file(page, sample, ["es"])
        for language, name in (("", "jfk"), ("es", "jfk.es")):
            await page.click(f".pane[data-language={json.dumps(language)}] .saves button[title*=text]")
            assert await downloaded(tmp_path / f"{name}.txt") == as_python(events, language, "txt")
        await page.click("#clear")
        page.told.clear()
        await page.click("input[value=microphone]")
        await page.click("#start")
        await page.until("document.querySelector('.pane[data-language=es] .log')?.textContent.length > 20")
        await page.click("#start")
        await state_is(page, "Ready")
        for language in ("", "es"):
            assert [p.split() for p in await captions(page, language)] == [
                p.split() for p in told_paragraphs(page, language)
            ]
        assert page.complaints == []
