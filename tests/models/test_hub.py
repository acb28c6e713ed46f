"""The hub is a server in this process that answers the requests that huggingface_hub makes for a model."""

import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from models.checkpoint import load_recognizer, save_checkpoint
from models.hub import fetch
from streaming.errors import DragomanError
from tests.models.archives import members, model_config, pack, tokenizer, weights

OLD, NEW = "a" * 40, "b" * 40
NAME = "speech-lab/streaming-en"


@dataclass
class Hub:
    """Repositories by name: commits by branch, and files by commit."""

    url: str = ""
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    refuses_files: bool = False
    requests: list[str] = field(default_factory=list)

    def add(self, name: str, files: dict[str, bytes], commit: str = NEW, branch: str = "main") -> None:
        self.branches.setdefault(name, {})[branch] = commit
        self.files[name, commit] = files

    def commit(self, name: str, revision: str) -> str | None:
        if (name, revision) in self.files:
            return revision
        return self.branches[name].get(revision)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.respond()

        def do_GET(self) -> None:
            self.respond()

        def respond(self) -> None:
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            hub.requests.append(f"{self.command} /{'/'.join(parts)}")
            api = parts[:2] == ["api", "models"]
            if api:
                parts = parts[2:]
            name, rest = "/".join(parts[:2]), parts[2:]
            if name not in hub.branches:
                return self.refuse(404, "RepoNotFound")
            if name in hub.gated:
                return self.refuse(403, "GatedRepo")
            commit = hub.commit(name, rest[1] if rest else "main")
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            files = hub.files[name, commit]
            if api:
                siblings = [{"rfilename": file} for file in files]
                body = json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
                return self.send(body, {"Content-Type": "application/json"})
            if hub.refuses_files:
                return self.refuse(403, "Forbidden")
            file = "/".join(rest[2:])
            if file not in files:
                return self.refuse(404, "EntryNotFound")
            etag = hashlib.sha256(files[file]).hexdigest()
            return self.send(files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

        def send(self, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield hub
        server.shutdown()


def nemo_file(folder: Path, kind: str = "hybrid") -> bytes:
    return pack(folder / "packed", members(kind), prefix="./").read_bytes()


def model_folder(folder: Path) -> dict[str, bytes]:
    tensors = {name: t for name, t in weights("hybrid").items() if not name.startswith("preprocessor.")}
    save_checkpoint(folder, model_config("hybrid"), tensors, tokenizer(), "# A card")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_archive_is_converted_and_its_commit_recorded(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, {"README.md": b"", "streaming-en.nemo": nemo_file(tmp_path)})

    folder = fetch(NAME, None, tmp_path / "out")

    recognizer = load_recognizer(folder)
    assert folder == tmp_path / "out"
    assert recognizer.config.source == f"{NAME}@{NEW}" and recognizer.name == "streaming-en"
    assert f"{NAME}@{NEW}" in (folder / "README.md").read_text()


def test_the_folder_is_called_like_the_repository(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, {"x.nemo": nemo_file(tmp_path)})

    assert fetch(NAME) == Path("streaming-en")
    assert (tmp_path / "streaming-en" / "model.safetensors").is_file()


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_pinned(revision: str, hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, {"x.nemo": nemo_file(tmp_path, "ctc")}, OLD, branch="v1")
    hub.add(NAME, {"x.nemo": nemo_file(tmp_path)}, NEW)

    config = load_recognizer(fetch(NAME, revision, tmp_path / "out")).config

    assert config.source == f"{NAME}@{OLD}" and config.decoder is None


def test_a_model_folder_is_used_as_it_is(hub: Hub, tmp_path: Path) -> None:
    files = model_folder(tmp_path / "made")
    hub.add(NAME, {**files, "extra.nemo": b"not needed", "training.log": b"not needed"})

    folder = fetch(NAME, None, tmp_path / "out")

    assert {path.name for path in folder.iterdir()} == files.keys()
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert load_recognizer(folder).config.source == f"{NAME}@{NEW}"
    assert not any("extra.nemo" in request or "training.log" in request for request in hub.requests)


def test_a_second_fetch_does_not_download_again(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, {"x.nemo": nemo_file(tmp_path)})
    fetch(NAME, None, tmp_path / "one")
    hub.requests.clear()

    fetch(NAME, None, tmp_path / "two")

    assert f"GET /{NAME}/resolve/{NEW}/x.nemo" not in hub.requests


@pytest.mark.parametrize(
    ("name", "revision", "code", "said"),
    [
        ("speech-lab/unknown", None, "model_not_found", "has no model speech-lab/unknown; check the name"),
        ("one/two/three", None, "model_not_found", "'one/two/three' is not a model's name"),
        ("", None, "model_not_found", "'' is not a model's name"),
        (NAME, "v9", "revision_not_found", f"{NAME} has no revision v9"),
        ("speech-lab/gated", None, "model_not_found", "is gated; accept its terms at http"),
        ("speech-lab/empty", None, "unsupported_model", "has neither a .nemo archive nor config.json"),
        ("speech-lab/two", None, "unsupported_model", "has 2 NeMo archives (a.nemo, b.nemo), one is needed"),
        ("speech-lab/broken", None, "bad_checkpoint", "x.nemo is not a tar archive"),
        ("speech-lab/other", None, "unsupported_model", "model_type is 'llama'"),
    ],
)
def test_what_the_hub_does_not_have(
    name: str, revision: str | None, code: str, said: str, hub: Hub, tmp_path: Path
) -> None:
    hub.add(NAME, {"x.nemo": b""})
    hub.add("speech-lab/gated", {"x.nemo": b""})
    hub.gated.add("speech-lab/gated")
    hub.add("speech-lab/empty", {"README.md": b"", "weights.bin": b""})
    hub.add("speech-lab/two", {"a.nemo": b"", "b.nemo": b""})
    hub.add("speech-lab/broken", {"x.nemo": b"no archive"})
    layout = {"model.safetensors": b"", "tokenizer.model": b"", "README.md": b""}
    hub.add("speech-lab/other", {"config.json": b'{"model_type": "llama"}', **layout})

    with pytest.raises(DragomanError) as caught:
        fetch(name, revision, tmp_path / "out")

    assert caught.value.code == code and said in str(caught.value)


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)

    with pytest.raises(DragomanError, match=f"{endpoint} cannot be reached") as caught:
        fetch(NAME, None, tmp_path / "out")

    assert caught.value.code == "hub_unreachable"


def test_a_hub_that_refuses_the_file(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, {"x.nemo": b"gone"})
    hub.refuses_files = True

    with pytest.raises(DragomanError, match=f"refused {NAME}: .*403") as caught:
        fetch(NAME, None, tmp_path / "out")

    assert caught.value.code == "hub_unreachable"
