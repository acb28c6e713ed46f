"""A model behind OpenAI's completions API translates as the same model does here, and fails alone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tokenizer import HuggingFaceTokenizer, decode
from models.translator import Policy, load_translator
from streaming import remote
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, SessionClosed, TranscriptDelta, TranslationDelta
from streaming.fallback import WAIT_WORDS
from streaming.interpreter import translate
from streaming.remote import CompletionServer, Remote, RemoteState, RemoteTranslator, Words, load_remote_translator
from streaming.session import Session, SessionConfig
from streaming.text_session import TextSession
from streaming.translation import TranslatedChunk
from tests import tiny
from tests.completions import Completions, Prompt, completions, plain_folder
from tests.streaming.test_fallback import Kind, Spoken, kinds, latencies, naive, spoken_
from tests.streaming.test_fallback import translator as local


@contextmanager
def served(kind: Kind, seed: int = 0) -> Iterator[tuple[RemoteTranslator, Completions]]:
    """The model of the fallbacks' tests behind a server that takes ids."""
    t = local(kind, seed)

    def go_on(prompt: Prompt, max_tokens: int) -> tuple[str, list[int], bool]:
        assert not isinstance(prompt, str)
        ids = list[int]()
        while len(ids) < max_tokens:
            sequence = torch.tensor([[*prompt, *ids]])
            logits, _ = t.llm.step(sequence, torch.tensor([sequence.shape[1]]), None)
            ids.append(int(logits[0, -1, : t.tokenizer.size].argmax()))
            if ids[-1] in t.tokenizer.controls:
                break
        return decode(t.tokenizer, ids), ids, ids[-1] in t.tokenizer.controls

    with completions(go_on) as server:
        yield RemoteTranslator(CompletionServer(server.url, "tiny"), t.tokenizer, t.config), server


def run(t: RemoteTranslator, state: RemoteState) -> tuple[list[TranslatedChunk], RemoteState]:
    chunks, until_s = list[TranslatedChunk](), time.monotonic() + 60
    while Remote(t).ready(state) and time.monotonic() < until_s:
        [found], [state] = Remote(t).step([state])
        chunks += found
    return chunks, state


def opened(t: RemoteTranslator, targets: Sequence[str], latency: str = "low") -> RemoteState:
    return Remote(t).init_state([t.direction(target, latency) for target in targets])


@settings(max_examples=8, deadline=None)
@given(kind=kinds, seed=st.integers(0, 3), spoken=spoken_, latency=latencies, cut=st.integers(1, 5))
def test_what_is_written_elsewhere_is_what_the_naive_loop_writes(
    kind: Kind, seed: int, spoken: Spoken, latency: str, cut: int
) -> None:
    with served(kind, seed) as (t, _):
        state, chunks = opened(t, ["es", "zh"], latency), list[TranslatedChunk]()
        for start in range(0, len(spoken), cut):
            for word, closes in spoken[start : start + cut]:
                state = Remote(t).feed(state, [word], closes=closes)
            found, state = run(t, state)
            chunks += found
        for row, target in enumerate(("es", "zh")):
            mine = [replace(chunk, row=0) for chunk in chunks if chunk.row == row]
            assert mine == naive(local(kind, seed), spoken, target=target, latency=latency)  # type: ignore[arg-type]


def test_a_server_with_a_prefix_cache_reads_little_anew() -> None:
    with served("wait-k") as (t, server):
        state = opened(t, ["es"])
        for word in "the speaker is still talking and nothing".split():
            _, state = run(t, Remote(t).feed(state, [word]))
        prompts = [request["prompt"] for request in server.requests]
        begun = len(t.direction("es").prompt)
        for before, after in zip(prompts, prompts[1:], strict=False):
            words = before[: before.index(t.direction("es").answer[0], begun)] if t.direction("es").answer else before
            assert after[: len(words)] == words
        assert all(request["temperature"] == 0 and request["return_token_ids"] for request in server.requests)


def planned(prompt: Prompt, max_tokens: int) -> tuple[str, None, bool]:
    """Translates word for word, by writing capitals; Chinese as a character for each word."""
    assert isinstance(prompt, str)
    head, _, rest = prompt.partition("\n\n")
    source, _, answer = rest.partition("=")
    if "Chinese" in head:
        whole = "".join(chr(0x4E00 + len(word)) for word in source.split())
    else:
        whole = " ".join(word.upper() for word in source.split())
    assert whole.startswith(answer), "what was shown is a part of the prompt"
    text = whole[len(answer) :]
    return text[:max_tokens], None, len(text) <= max_tokens


@contextmanager
def of_text(folder: Path, kind: Kind = "wait-k") -> Iterator[tuple[RemoteTranslator, Completions]]:
    with completions(planned, takes_ids=False) as server:
        yield load_remote_translator(server.url, "tiny", plain_folder(folder), policy=kind), server


@pytest.mark.parametrize("language", ["es", "zh"])
def test_wait_k_with_a_server_of_text(tmp_path: Path, language: str) -> None:
    with of_text(tmp_path) as (t, server):
        assert isinstance(t.tokenizer, Words) and t.name == "tiny" and t.policy == "wait-k"
        assert "<s>" not in decode(t.tokenizer, t.encode_word("<s>"))
        session, words = TextSession(t, [language], "low"), "a speaker goes on and on without a pause".split()
        shown = ""
        for n, word in enumerate(words, start=1):
            shown += "".join(e.delta for e in session.push(word) if isinstance(e, TranslationDelta))
            assert len(shown if language == "zh" else shown.split()) == max(0, n - WAIT_WORDS["low"] + 1)
        shown += "".join(e.delta for e in session.finish() if isinstance(e, TranslationDelta))
        if language == "zh":
            assert shown == "".join(chr(0x4E00 + len(word)) for word in words)
        else:
            assert shown == " ".join(words).upper()
        assert all(isinstance(request["prompt"], str) for request in server.requests[1:])


def test_local_agreement_with_a_server_of_text(tmp_path: Path) -> None:
    with of_text(tmp_path, "local-agreement") as (t, _):
        session, words, shown = TextSession(t, ["es"], "low"), "a speaker goes on and on".split(), list[str]()
        for word in words:
            shown.append("".join(e.delta for e in session.push(word) if isinstance(e, TranslationDelta)))
        assert shown == ["", "A", " SPEAKER", " GOES", " ON", " AND"]  # one word behind
        assert "".join(e.delta for e in session.finish() if isinstance(e, TranslationDelta)) == " ON"


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_words_of_text_are_its_text(text: str) -> None:
    words = Words(None)
    ids = words.encode(text)
    assert decode(words, ids) == text
    assert all(len(decode(words, [token]).split()) <= 1 for token in ids)


def test_odd_words_of_text() -> None:
    words = Words(None)
    assert decode(words, words.encode_word("a\ud800b")) == " a?b"
    assert len(decode(words, words.encode_word("x" * 5_000))) < 300
    careful = Words(None, ["<|end|>", "<s>"])
    assert "<|end|>" not in decode(careful, careful.encode_word("a<|end|><|end|>b")) != decode(careful, ())
    assert [decode(words, [token]) for token in words.encode(" ja, 你好 gut")] == [" ja,", " 你", "好", " gut"]


@pytest.mark.parametrize("fault", ["drop", 500, 503, 429])
def test_what_may_pass_is_tried_again(tmp_path: Path, fault: int | str) -> None:
    with of_text(tmp_path) as (t, server):
        server.faults = [fault, fault]
        session = TextSession(t, ["es"], "low")
        session.write("a speaker goes on")
        assert [e.delta for e in session.finish() if isinstance(e, TranslationDelta)] == ["A", " SPEAKER", " GOES ON"]
        assert not server.faults


def problems(events: Sequence[object]) -> list[tuple[str, str]]:
    return [(event.code, event.message) for event in events if isinstance(event, ErrorEvent)]


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        ([500] * 3, "answers with status 500"),
        (["drop"] * 3, "cannot be reached"),
        (["noise"], "answered with what is no completion"),
        ([400], "refuses a request with status 400"),
    ],
)
def test_what_does_not_pass_ends_the_translation_once(tmp_path: Path, faults: list[int | str], sentence: str) -> None:
    with of_text(tmp_path) as (t, server):
        session = TextSession(t, ["es", "de"], "low")
        events = session.push("a speaker goes")
        server.faults = list(faults) * 2  # one of two languages may fail before the other has asked
        events += session.push("on")
        server.faults = []
        events += session.push("and on") + session.finish()
        [(code, message)] = problems(events)
        assert code == "translator_unavailable" and sentence in message
        assert "speaker" not in message and server.url not in message
        assert [e.delta for e in events if isinstance(e, TranslationDelta)][:1] == ["A"]
        assert isinstance(events[-1], SessionClosed) and [e.seq for e in events] == list(range(len(events)))


def test_who_is_slow_holds_up_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT_S", 1.0)
    with of_text(tmp_path / "a") as (slow, server), of_text(tmp_path / "b") as (quick, _):
        server.slow_s = 3.0
        sessions = [TextSession(t, ["es"], "low") for t in (slow, quick)]
        for session in sessions:
            session.write("a speaker goes on")
            session.close_input()
        began_s, longest_s = time.monotonic(), 0.0
        while sessions[1].ready():
            step_s = time.monotonic()
            translate(sessions)
            longest_s = max(longest_s, time.monotonic() - step_s)
        assert isinstance(sessions[1].take_events()[-1], SessionClosed)
        assert sessions[0].ready() and longest_s < 0.5
        while sessions[0].ready():
            translate(sessions)
        assert time.monotonic() - began_s < 3.0
        [(code, message)] = problems(sessions[0].take_events())
        assert code == "translator_unavailable" and "did not answer within 1 s" in message


def test_the_transcript_goes_on_without_the_translation(tmp_path: Path) -> None:
    pcm = (8_000 * torch.randn(16_000 * 6, generator=torch.Generator().manual_seed(0))).short().numpy().tobytes()
    config = SessionConfig(languages=("es",), latency="low")
    with of_text(tmp_path) as (t, server):
        server.faults = [500] * 99
        whole, flushed = (Session(tiny.recognizer(), config, t) for _ in range(2))
        events = whole.push(pcm) + whole.finish()
        [(code, _)] = problems(events)
        assert code == "translator_unavailable"
        alone = Session(tiny.recognizer(), replace(config, languages=()))
        told = [e for e in events if not isinstance(e, ErrorEvent | TranslationDelta)]
        expected = alone.push(pcm) + alone.finish()
        assert [replace(e, seq=0) for e in told] == [replace(e, seq=0) for e in expected]
        assert any(isinstance(e, TranscriptDelta) for e in told)
        # The same if a flush finds out.
        events = flushed.push(pcm[:1000]) + flushed.flush() + flushed.push(pcm[1000:]) + flushed.flush()
        events += flushed.finish()
        assert len(problems(events)) == 1 and [e.seq for e in events] == list(range(len(events)))


def test_a_server_that_ceases_to_give_ids() -> None:
    with served("wait-k") as (t, server):
        server.go_on = lambda prompt, max_tokens: ("x", None, False)
        _, state = run(t, Remote(t).feed(opened(t, ["es"]), ["a"] * 3))
        assert state.problem is not None and "ceased to answer with token ids" in str(state.problem)


def test_ids_that_are_none() -> None:
    with served("wait-k") as (t, server):
        server.go_on = lambda prompt, max_tokens: ("x", [-1], False)
        _, state = run(t, Remote(t).feed(opened(t, ["es"]), ["a"] * 3))
        assert state.problem is not None and "no completion" in str(state.problem)
        server.go_on = lambda prompt, max_tokens: ("x", [1 << 20], True)  # more than the tokenizer has
        [chunk], _ = run(t, Remote(t).feed(opened(t, ["es"]), ["a"] * 3))
        assert chunk.delta == ""


def test_answers_without_end_or_text_end(tmp_path: Path) -> None:
    with of_text(tmp_path) as (t, server):
        session = TextSession(t, ["es"], "low")
        server.go_on = lambda prompt, max_tokens: ("", None, False)
        assert not [e for e in session.push("a speaker goes on") if isinstance(e, TranslationDelta)]
        server.go_on = lambda prompt, max_tokens: (" so" * max_tokens, None, False)
        [delta, _] = session.finish()
        assert isinstance(delta, TranslationDelta) and delta.delta.count("so") == 1  # a loop, of which one is kept


def test_how_a_server_is_asked(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path)
    with completions(planned, takes_ids=False) as server:
        t = load_remote_translator(f"{server.url}/", "tiny", folder, key="secret")
        assert t.config.max_context_tokens == 2048 and t.config.kind == "wait-k"
        assert set(server.keys) == {"Bearer secret"}
        server.faults = [404, 404]
        with pytest.raises(DragomanError, match=r"404.*usually ends in /v1"):
            load_remote_translator(server.url, "tiny", folder)
    with pytest.raises(DragomanError, match="cannot be reached") as raised:
        load_remote_translator("http://127.0.0.1:9/v1", "tiny", folder)
    assert raised.value.code == "translator_unavailable"
    for url in ("127.0.0.1:8000", "ftp://host/v1", "http://"):
        with pytest.raises(DragomanError, match="no URL of a server"):
            load_remote_translator(url, "tiny", folder)
    with pytest.raises(DragomanError, match="name a folder"):
        load_remote_translator(server.url, "tiny", None)
    (folder / "config.json").write_text('{"translation": {}}')
    with pytest.raises(DragomanError, match="decides itself when to write"):
        load_remote_translator(server.url, "tiny", folder)
    with pytest.raises(DragomanError, match="no tokenizer.json with a chat template"):
        load_remote_translator(server.url, "tiny", tiny.save_tiny_translator(tmp_path / "own") and _without(tmp_path))


def _without(folder: Path) -> Path:
    """The folder without its chat template."""
    (folder / "config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    return folder


SPOKEN = "the speaker is still talking and nothing is taken back while words go on"


@pytest.mark.slow
def test_a_real_server_of_text(tmp_path: Path) -> None:
    """What `transformers serve` writes of a segment is what its model finds most probable, token by token."""
    pytest.importorskip("fastapi")
    folder = plain_folder(tmp_path / "tiny", weights=True)
    command = shutil.which("transformers") or "transformers"
    with real(command, "serve", str(folder), "--device", "cpu", "--dtype", "float32", name=str(folder)) as t:
        assert isinstance(t.tokenizer, Words)
        session = TextSession(t, ["es"], "offline")
        session.write(SPOKEN)
        [delta, _] = session.finish()
        here = load_translator(folder)
        assert isinstance(here.tokenizer, HuggingFaceTokenizer) and isinstance(delta, TranslationDelta)
        prompt = decode(t.tokenizer, t.direction("es").prompt) + " " + SPOKEN
        sequence, answer = [*here.tokenizer.encode_prompt(prompt + decode(t.tokenizer, t.direction("es").answer))], []
        while len(answer) < 60:
            logits, _ = here.llm.step(torch.tensor([sequence + answer]), torch.tensor([len(sequence + answer)]), None)
            answer.append(int(logits[0, -1].argmax()))
            if answer[-1] in here.tokenizer.controls:
                break
        assert delta.delta and decode(here.tokenizer, answer).strip().startswith(delta.delta)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wait-k", "local-agreement"])
def test_a_real_server_of_ids(tmp_path: Path, kind: Kind) -> None:
    """What vLLM writes is what the same weights write here."""
    if (command := os.environ.get("VLLM") or shutil.which("vllm")) is None:
        pytest.skip("there is no vLLM: put it on the path, or name its command in VLLM")
    folder = plain_folder(tmp_path / "tiny", weights=True)
    options = ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    with real(command, "serve", str(folder), *options, name="tiny", folder=folder, policy=kind) as t:
        assert isinstance(t.tokenizer, HuggingFaceTokenizer)
        told = [TextSession(one, ["es", "zh"], "low") for one in (t, load_translator(folder, fallback=kind))]
        events = [session.push(SPOKEN) + session.end_segment() + session.push(SPOKEN) + session.finish()
                  for session in told]  # fmt: skip
        assert events[0] == events[1] and len(events[0]) > 4


@contextmanager
def real(*command: str, name: str, folder: Path | None = None, policy: Policy = "wait-k") -> Iterator[RemoteTranslator]:
    """A translator whose model a program serves; the program ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with TemporaryFile() as log:
        program = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
        try:
            yield connected(program, lambda: load_remote_translator(url, name, folder or Path(name), policy=policy))
        except AssertionError:
            log.seek(0)
            print(log.read().decode()[-4000:])
            raise
        finally:
            program.terminate()
            program.wait(60)


def connected(program: subprocess.Popen[bytes], load: Callable[[], RemoteTranslator]) -> RemoteTranslator:
    """What loads as soon as the program listens."""
    until_s = time.monotonic() + 300
    while True:
        try:
            return load()
        except DragomanError as error:
            assert "cannot be reached" in str(error) and time.monotonic() < until_s and program.poll() is None, error
            time.sleep(1)
