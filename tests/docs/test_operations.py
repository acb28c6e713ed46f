"""The page about running the service names what there is, and so do the files that build and run its container."""

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import pytest
import typer
import yaml

import benchmarks.load
import client.cli
import server
from metrics import REFUSALS, Metrics
from streaming import remote, scheduler
from wire import handler
from wire.recordings import FORMATS, Recording, Transcription, Translation

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "docs" / "operations.md").read_text("utf-8")
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE: Final = (ROOT / "compose.yaml").read_text("utf-8")
COMMANDS: Final = [
    line for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()
]


def test_every_metric_is_listed_with_its_labels() -> None:
    listed = {
        name: set(re.findall(r"\w+", labels))
        for name, labels in re.findall(r"^\| `(dragoman_\w+)` \| (.*?)\|", TEXT, re.M)
    }
    metrics = Metrics()
    families = [family for family in metrics.registry.collect() if family.name.startswith("dragoman_")]
    shown = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert shown == set(listed)
    for name, collector in metrics.registry._names_to_collectors.items():
        if name in listed:
            assert set(getattr(collector, "_labelnames", ())) == listed[name], name
    assert all(f"`{reason}`" in TEXT for reason in REFUSALS)
    asked = set(re.findall(r"\((dragoman_\w+?)(?:_sum|_bucket)?[{\[]", TEXT))
    assert len(asked) == 5 and asked <= set(listed)


def test_the_defaults() -> None:
    defaults = server.Settings()
    assert f"| `--max-sessions` | {defaults.max_sessions} |" in TEXT
    assert (defaults.max_session_s, defaults.max_lag_s, defaults.metrics) == (None, None, False)
    assert f"`--drain-s` ({defaults.drain_s:g} s)" in TEXT
    assert f"for which it waits {server.GOODBYE_TIMEOUT_S:g} s more" in TEXT
    assert f"may be behind for {scheduler._LATE_S:g} s" in TEXT
    assert f"did not take an event in {handler._SEND_TIMEOUT_S:g} s" in TEXT


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", TEXT, re.M)}
    assert set(re.findall(r"\(#([\w-]+)\)", TEXT)) <= headings


def parse(app: typer.Typer, arguments: list[str]) -> None:
    """Read a command line as the program would, and run nothing."""
    command: Any = typer.main.get_command(app)
    if hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context("command", list(arguments))


def after_image(words: list[str]) -> list[str]:
    """What a command of docker gives to the program in the container."""
    return words[next(i for i, word in enumerate(words) if word.startswith("dragoman")) + 1 :]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands(line: str) -> None:
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    match words:
        case ["dragoman", *arguments]:
            parse(client.cli.app, arguments)
        case ["python", "-m", "benchmarks.load", *arguments]:
            app = typer.Typer()
            app.command()(benchmarks.load.run)
            parse(app, arguments)
        case ["serve", "run", "server_ray:build", *arguments]:
            server_ray = pytest.importorskip("server_ray")
            server_ray.read_options(dict(argument.split("=") for argument in arguments))
        case ["curl", *arguments, url]:
            (kind,) = [kind for kind in (Transcription, Translation) if url.endswith(kind.PATH)]
            fields = dict(value.split("=") for value in arguments[1::2])
            assert set(arguments[::2]) == {"--form"} and (ROOT / fields.pop("file").removeprefix("@")).is_file()
            kind.begin(fields)
        case ["docker", "build", *arguments]:
            for argument in re.findall(r"--build-arg (\w+)", " ".join(arguments)):
                assert re.search(rf"^ARG {argument}=", DOCKERFILE, re.M)
        case ["docker", "run", *_]:
            parse(client.cli.app, ["serve", *after_image(words)])
        case ["docker", "compose", *_]:
            assert words[2:] == ["up", "--build"]
        case [program, *_]:
            assert program in ("pip", "hf", "vllm")


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15


def test_the_fields_of_a_recording() -> None:
    section = TEXT.split("\n## Recordings over REST\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.M)
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    kinds: tuple[type[Recording], ...] = (Transcription, Translation)
    for kind in kinds:
        for name in listed - {"file"}:
            known = name in kind.FIELDS or name in ("model", "prompt", "temperature", "chunking_strategy", "include[]")
            assert known or name == "response_format" or any(name in other.FIELDS for other in kinds), name
        assert set(kind.FIELDS) <= listed
    assert all(f"`{form}`" in section for form in FORMATS)
    asgi = pytest.importorskip("asgi")
    source = (ROOT / "asgi.py").read_text("utf-8")
    codes = re.findall(r'(?:DragomanError\(|_Refusal\([\w.]+, |code = |" else )"(\w+)"', source)
    assert len(codes) > 5 and all(f"`{code}`" in section for code in codes if code != "invalid_value")
    assert f"at most {asgi.MAX_UPLOAD_BYTES >> 20} MiB" in section and f"{asgi.MAX_WAITING} more wait" in section
    assert f"last {asgi.MAX_RECORDING_S // 3600} hours, and {asgi._UPLOAD_TIMEOUT_S:g} s may pass" in section


def test_the_times_of_a_translator() -> None:
    section = TEXT.split("\n## A translator on vLLM\n")[1].split("\n## ")[0]
    assert remote.ATTEMPTS == 3 and f"made three times, within {remote.TIMEOUT_S:g} s" in section
    assert f"by {1000 * remote.WAIT_S:g} ms at most" in section and f"up to {remote.FIRST_TIMEOUT_S:g} s" in section


def test_the_options_of_replicas() -> None:
    server_ray = pytest.importorskip("server_ray")
    section = TEXT.split("\n## Several replicas\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", section, re.M)
    listed = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    options = server_ray.Options()
    assert set(listed) == set(vars(options))
    for name, default in listed.items():
        value = vars(options)[name]
        assert str(value) in default if value else default in ("the embedded ones", "three quarters of them"), name
    assert f"more than {server_ray.LATE_S:g} s behind" in section


def test_what_a_container_is_built_from() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] not in ("#", "")]
    copied = [
        source for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for source in sources.split()
    ]
    assert len(copied) > 8
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored and ignored[0] == "*"
        assert not any(fnmatch(source, pattern) for pattern in ignored[1:] if not pattern.startswith("!"))
    packaged = re.search(r"^only-include = (\[.*?\])", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert packaged is not None and set(yaml.safe_load(packaged[1])) <= set(copied)


def test_how_a_container_runs() -> None:
    (port,) = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M)
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)
    shell = yaml.safe_load(entry)[2]
    assert "${DRAGOMAN_TOKEN:?" in shell and shell.index("DRAGOMAN_TOKEN") < shell.index("exec dragoman")
    (given,) = re.findall(r"exec dragoman (.+) \"\$@\"", shell)
    (more,) = re.findall(r"^CMD (.+)$", DOCKERFILE, re.M)
    parse(client.cli.app, [*given.split(), *yaml.safe_load(more)])
    assert f"--port {port}" in given and f"127.0.0.1:{port}/healthz" in DOCKERFILE
    stages = DOCKERFILE.split("\nFROM ")
    assert "USER 10001" in stages[-1] and "STOPSIGNAL SIGTERM" in stages[-1]


def test_how_compose_runs_it() -> None:
    services = yaml.safe_load(COMPOSE)["services"]
    ours = services["dragoman"]
    parse(client.cli.app, ["serve", *re.sub(r"\$\{.*?\}", "", ours["command"]).split()])
    (options,) = re.findall(r'DRAGOMAN_OPTIONS="(.+)"', COMPOSE)
    parse(client.cli.app, ["serve", *options.split()])
    assert ours["ports"] == ["127.0.0.1:8765:8765"] and ":?" in ours["environment"]["DRAGOMAN_TOKEN"]
    drain_s = float(re.findall(r"--drain-s (\d+)", ours["command"])[0])
    assert int(ours["stop_grace_period"].removesuffix("s")) > drain_s + server.GOODBYE_TIMEOUT_S
    assert "ports" not in services["vllm"] and services["vllm"]["profiles"] == ["vllm"]
    assert set(ours["depends_on"]) <= set(services)
