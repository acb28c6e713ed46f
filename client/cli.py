"""The command `dragoman`.

Results go to standard output and everything else to standard error. What the user can put right ends in one
sentence and exit code 2. What takes long to import is imported by the command that needs it.
"""

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from client.output import STDIN, OrderedOutput, OutputFormat
from streaming.errors import DragomanError

if TYPE_CHECKING:
    from client.files import AudioSource
    from models.translator import AnyTranslator, Policy, Translator
    from server import Service
    from streaming.audio import Encoding
    from streaming.glossary import Glossary
    from streaming.session import Decoder, Lookahead
    from streaming.speculation import Speculation
    from wire.handler import Models

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
models_app = typer.Typer(help="List, fetch and import models.", no_args_is_help=True)
app.add_typer(models_app, name="models")
bench_app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

SERVICE_PATH = "/v1/realtime/translations"
DEFAULT_PORT = 8765

FormatOption = Annotated[OutputFormat, typer.Option("--format", help="Form of what is written.")]
ModelOption = Annotated[
    Path | None, typer.Option("--model", metavar="DIR", help="Folder of the model; else the embedded one.")
]
DeviceOption = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the model runs.")]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="float32|bfloat16", help="What the model computes in.")]
DecoderOption = Annotated[Literal["rnnt", "ctc"], typer.Option("--decoder", help="Head of the model to use.")]
LookaheadOption = Annotated[
    int | None,
    typer.Option(
        "--max-lookahead-ms",
        metavar="MS",
        min=0,
        help="Audio that may be heard before a sound is decided, in milliseconds. A model that looks ahead in chunks"
        " uses its largest trained look-ahead not above this. Left out: the model's largest.",
    ),
]
PolicyOption = Annotated[
    Literal["fixed", "adaptive"] | None,
    typer.Option(
        "--lookahead",
        help="For a model that looks ahead in chunks: chunks of one size, or each as small as leaves no doubt."
        " Left out: fixed.",
    ),
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", metavar="LANGUAGE[,...]", help="Translate into these languages, such as es or es,de."),
]
LatencyOption = Annotated[
    str,
    typer.Option(
        "--latency",
        metavar="LEVEL",
        help="How long the translation waits for more words: low, low-medium, medium, medium-high, high; or offline,"
        " until the speaker pauses.",
    ),
]
GlossaryOption = Annotated[
    Path | None,
    typer.Option(
        "--glossary", metavar="FILE", help="Terms to translate so: lines of SOURCE, LANGUAGE, TARGET with tabs between."
    ),
]
TranslatorOption = Annotated[
    Path | None, typer.Option("--translator", metavar="DIR", help="Folder of the translator; else the embedded one.")
]
TranslatorUrlOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="A server with OpenAI's completions API that runs the translator, such as http://127.0.0.1:8000/v1;"
        " --translator then has its tokenizer and chat template.",
    ),
]
TranslatorModelOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The model's name on that server. Left out: the folder's.")
]
TranslatorPolicyOption = Annotated[
    Literal["wait-k", "local-agreement"],
    typer.Option(help="When a translator on a server writes: some words behind, or what it says twice."),
]
TranslatorKeyOption = Annotated[
    str | None, typer.Option(envvar="DRAGOMAN_TRANSLATOR_KEY", help="Secret of that server.")
]
SpeculationOption = Annotated[
    bool | None,
    typer.Option(
        "--speculation/--no-speculation",
        help="Draft the translation ahead, so that it takes fewer steps of the model; the text is the same. Left out:"
        " where the translator's folder has drafts.safetensors.",
    ),
]
RateOption = Annotated[int, typer.Option("--rate", metavar="HZ", help="Sample rate of raw PCM, in Hz.")]
ChannelsOption = Annotated[int, typer.Option("--channels", help="Interleaved channels of raw PCM.")]
EncodingOption = Annotated[Literal["s16le", "f32le"], typer.Option("--encoding", help="Samples of raw PCM.")]
TokenOption = Annotated[
    str | None,
    typer.Option("--token", envvar="DRAGOMAN_TOKEN", help="Secret of the service, as in Authorization: Bearer."),
]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what the user can put right into one sentence and exit code 2."""
    try:
        yield
    except DragomanError as error:
        complain(str(error))
    except BrokenPipeError:
        raise  # whoever read our output has left, which is no error: typer ends the program quietly
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    else:
        return
    raise typer.Exit(2)


def complain(sentence: str) -> None:
    """Print one sentence to standard error."""
    typer.echo(f"dragoman: {sentence}", err=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dragoman {version('dragoman')}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Live speech to text and translation: words that were shown are never taken back."""


@app.command()
def transcribe(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Recordings; - is raw PCM from standard input.")
    ],
    output_format: FormatOption = OutputFormat.TXT,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Write each transcript and translation to a file in this folder."),
    ] = None,
    to: ToOption = None,
    latency: LatencyOption = "medium",
    glossary: GlossaryOption = None,
    translator: TranslatorOption = None,
    speculation: SpeculationOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    decoder: DecoderOption = "rnnt",
    max_lookahead_ms: LookaheadOption = None,
    lookahead: PolicyOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Recordings worked on at a time.")] = 8,
    rate: RateOption = 16_000,
    channels: ChannelsOption = 1,
    encoding: EncodingOption = "s16le",
    translator_url: TranslatorUrlOption = None,
    translator_model: TranslatorModelOption = None,
    translator_policy: TranslatorPolicyOption = "wait-k",
    translator_key: TranslatorKeyOption = None,
) -> None:
    """Transcribe recordings of any format that soundfile or PyAV opens, and with --to translate them.

    What cannot be read is named on standard error; the others are transcribed, and the exit code is 2.
    """
    failed = False
    with one_sentence():
        from client.progress import Display

        display, languages = Display(len(files)), _languages(to)
        results = OrderedOutput(
            files, output_format, output, display.write, languages, bilingual=bool(languages) and sys.stdout.isatty()
        )

        from client.transcribe import transcribe as run
        from models.checkpoint import load_recognizer
        from streaming.session import SessionConfig

        openers = [partial(_open_source, name, encoding, rate, channels) for name in files]
        config = SessionConfig(
            max_lookahead_ms=max_lookahead_ms,
            lookahead=lookahead,
            decoder=decoder,
            languages=languages,
            latency=latency,
            glossary=_glossary(glossary),
        )
        translating = _TranslatorOptions(
            translator, device, dtype, speculation, translator_url, translator_model, translator_policy, translator_key
        )
        recognizer = load_recognizer(model, device=device, dtype=dtype)
        interpreter, drafts = translating.load(languages, latency) if languages else (None, None)
        with display:
            for step in run(openers, recognizer, config, interpreter, batch_size=batch_size, speculation=drafts):
                if step.problem is not None:
                    failed = True
                    complain(f"{files[step.index]}: {step.problem}")
                if step.problem is not None and not step.audio_s:
                    display.skip()
                else:
                    display.advance(step.index, step.audio_s, step.duration_s)
                results.add(step.index, step.events)
                if step.done:
                    results.end(step.index, failed=step.problem is not None)
    if failed:
        raise typer.Exit(2)


def _languages(to: str | None) -> tuple[str, ...]:
    """The languages of --to, each once."""
    languages = [language.strip() for language in to.split(",")] if to is not None else []
    if not all(languages):
        raise DragomanError("unsupported_language", f"--to has an empty language in {to!r}: write it as in --to es,de")
    return tuple(dict.fromkeys(languages))


def _glossary(file: Path | None) -> "Glossary":
    if file is None:
        return {}
    from client.glossary import read_glossary

    return read_glossary(file)


def _load_translator(
    folder: Path | None, device: str, dtype: str, languages: Sequence[str] = (), latency: str = "medium"
) -> "Translator":
    """The translator, which must know these languages at this latency."""
    from models.translator import load_translator

    translator = load_translator(folder, device=device, dtype=dtype)
    for language in languages:
        translator.direction(language, latency)
    return translator


@dataclass(frozen=True)
class _TranslatorOptions:
    """Which translator the options of a command name, and how it runs.

    Attributes:
        folder: Of the model; None for the embedded one. Of a model on a server, it tells how that is asked.
        device: Where a model of this program runs.
        dtype: What it computes in.
        speculation: Whether its translations are drafted ahead; None for where it pays.
        url: Server that runs the model instead; None for none.
        model: Its name there; None for the folder's.
        policy: When it writes.
        key: Secret of that server.
    """

    folder: Path | None
    device: str
    dtype: str
    speculation: bool | None
    url: str | None
    model: str | None
    policy: "Policy"
    key: str | None

    def load(
        self, languages: Sequence[str] = (), latency: str = "medium"
    ) -> "tuple[AnyTranslator, Speculation | None]":
        """The translator, which must know these languages at this latency, and what drafts for it."""
        if self.url is None:
            here = _load_translator(self.folder, self.device, self.dtype, languages, latency)
            return here, _load_speculation(here, self.folder, self.speculation)
        from streaming.remote import load_remote_translator

        name = self.model or ("" if self.folder is None else self.folder.resolve().name)
        elsewhere = load_remote_translator(self.url, name, self.folder, policy=self.policy, key=self.key)
        for language in languages:
            elsewhere.direction(language, latency)
        return elsewhere, None


def _load_speculation(translator: "Translator", folder: Path | None, wanted: bool | None) -> "Speculation | None":
    """What drafts for a translator of this program, if it pays."""
    from models.translator import EMBEDDED_TRANSLATOR
    from streaming.speculation import speculation_for

    return speculation_for(translator, folder or EMBEDDED_TRANSLATOR, wanted)


def _open_source(name: str, encoding: "Encoding", rate_hz: int, channels: int) -> "AudioSource":
    from client.files import AudioFile, PcmStream
    from streaming.audio import AudioFormat

    if name != STDIN:
        return AudioFile(Path(name))
    if sys.stdin.isatty():
        raise DragomanError("audio_empty", "standard input is a terminal: pipe raw PCM into it")
    return PcmStream(sys.stdin.buffer, AudioFormat(encoding, rate_hz, channels))  # type: ignore[arg-type]


@app.command()
def translate(
    to: Annotated[
        str, typer.Option("--to", metavar="LANGUAGE[,...]", help="Translate into these languages, such as es or es,de.")
    ],
    text: Annotated[
        str, typer.Argument(metavar="[FILE]", help="UTF-8 text, a sentence or paragraph a line; - is standard input.")
    ] = STDIN,
    output_format: Annotated[
        Literal["txt", "jsonl"], typer.Option("--format", help="A line for each line, or the events of each.")
    ] = "txt",
    latency: LatencyOption = "medium",
    glossary: GlossaryOption = None,
    translator: TranslatorOption = None,
    speculation: SpeculationOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Lines worked on at a time.")] = 8,
    translator_url: TranslatorUrlOption = None,
    translator_model: TranslatorModelOption = None,
    translator_policy: TranslatorPolicyOption = "wait-k",
    translator_key: TranslatorKeyOption = None,
) -> None:
    """Translate text, reading each line word by word as if it were spoken.

    Text into several languages has them on one line, with tabs between them.
    """
    with one_sentence():
        from client.translate import JsonLines, Lines, TextLines
        from client.translate import translate as run
        from streaming.events import ErrorEvent
        from streaming.text_session import TextSession

        languages, terms = _languages(to), _glossary(glossary)
        stream = sys.stdin.buffer if text == STDIN else Path(text).open("rb")
        translating = _TranslatorOptions(
            translator, device, dtype, speculation, translator_url, translator_model, translator_policy, translator_key
        )
        interpreter, drafts = translating.load(languages, latency)
        writer = TextLines(languages) if output_format == "txt" else JsonLines()
        open_session = partial(TextSession, interpreter, languages, latency, terms, drafts)
        for step in run(Lines(stream, text), open_session, batch_size=batch_size):
            for event in step.events:
                if isinstance(event, ErrorEvent):
                    raise DragomanError(event.code, event.message)
            sys.stdout.write(writer.push(step))
            sys.stdout.flush()


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = DEFAULT_PORT,
    model: ModelOption = None,
    translator: TranslatorOption = None,
    speculation: SpeculationOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    engines: Annotated[
        int, typer.Option(min=1, help="Processes to compute in, for a CPU with several cores; sessions are shared out.")
    ] = 1,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions at a time; more are refused.")] = 16,
    max_session_minutes: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", min=0.1, help="Time after which a session's audio ends. Left out: no limit."),
    ] = None,
    max_lag_s: Annotated[
        float | None,
        typer.Option(
            "--max-lag-s",
            metavar="S",
            min=3,
            max=25,
            help="Where a session stays so many seconds of audio behind, end the newest. Left out: end none.",
        ),
    ] = None,
    resume_s: Annotated[
        float,
        typer.Option("--resume-s", metavar="S", min=0, help="Time that a session waits for a client that was lost."),
    ] = 30.0,
    drain_s: Annotated[
        float, typer.Option("--drain-s", metavar="S", min=0, help="Time that sessions have to finish after SIGTERM.")
    ] = 5.0,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Show Prometheus metrics at /metrics, to whoever has the token.")
    ] = False,
    ahead: Annotated[
        bool, typer.Option("--translate-ahead", help="While idle, translate words that are not certain yet.")
    ] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Another web origin whose pages may connect, such as https://example.org."),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--token",
            metavar="SECRET",
            envvar="DRAGOMAN_TOKEN",
            help="Secret of the service, as in Authorization: Bearer; may be given several times.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="PEM", help="Certificate chain, for wss.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="Private key, for wss.")] = None,
    over_asgi: Annotated[
        bool, typer.Option("--asgi", help="Serve with uvicorn, and take recordings at /v1/audio/transcriptions, too.")
    ] = False,
    translator_url: TranslatorUrlOption = None,
    translator_model: TranslatorModelOption = None,
    translator_policy: TranslatorPolicyOption = "wait-k",
    translator_key: TranslatorKeyOption = None,
) -> None:
    """Serve live transcription and translation over WebSocket until SIGTERM or Ctrl-C."""
    with one_sentence():
        import logging

        import server
        from wire.handler import Processes

        settings = server.Settings(
            host=host,
            port=port,
            max_sessions=max_sessions,
            max_session_s=None if max_session_minutes is None else 60 * max_session_minutes,
            max_lag_s=max_lag_s,
            resume_s=resume_s,
            drain_s=drain_s,
            metrics=metrics,
            translate_ahead=ahead,
            origins=tuple(allow_origin or ()),
            tokens=tuple(tokens or ()),
            tls_cert=tls_cert,
            tls_key=tls_key,
        )
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        for name in ("websockets", "uvicorn", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        service = _asgi_service() if over_asgi else server.Service
        translating = _TranslatorOptions(
            translator, device, dtype, speculation, translator_url, translator_model, translator_policy, translator_key
        )
        if engines > 1 and not device.startswith("cpu"):
            raise DragomanError("unsupported_engines", f"{engines} engines would share one GPU: --engines is for a CPU")
        _leave_a_core()
        load = partial(_load_models, translating, model)
        processes = Processes(engines, load) if engines > 1 else None
        recognizer, interpreter, drafts = load()
        asyncio.run(server.serve(recognizer, settings, interpreter, drafts, processes, kind=service))


def _leave_a_core() -> None:
    """Compute with one thread fewer than there are cores: the last one moves audio and text, which may not wait."""
    import torch

    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) - 1)))


def _load_models(translating: _TranslatorOptions, model: Path | None) -> "Models":
    """What a service computes with; called in each of its processes."""
    from models.checkpoint import load_recognizer
    from models.translator import EMBEDDED_TRANSLATOR
    from wire.handler import Models

    is_there = translating.url is not None or translating.folder is not None or EMBEDDED_TRANSLATOR.exists()
    interpreter, drafts = translating.load() if is_there else (None, None)
    return Models(load_recognizer(model, device=translating.device, dtype=translating.dtype), interpreter, drafts)


def _asgi_service() -> "type[Service]":
    try:
        import asgi
    except ImportError as error:
        raise DragomanError(
            "missing_dependency", f"--asgi needs the package {error.name}: pip install 'dragoman[asgi]'"
        ) from None
    return asgi.AsgiService


@app.command()
def live(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Recording; - is raw PCM from standard input.")],
    url: Annotated[
        str, typer.Option(metavar="URL", help="The service.")
    ] = f"ws://127.0.0.1:{DEFAULT_PORT}{SERVICE_PATH}",
    output_format: FormatOption = OutputFormat.TXT,
    pace: Annotated[float, typer.Option(min=0.01, help="Speed of sending, in times real time.")] = 1.0,
    fast: Annotated[bool, typer.Option("--fast", help="Send as fast as the service takes it.")] = False,
    to: ToOption = None,
    latency: LatencyOption = "medium",
    glossary: GlossaryOption = None,
    decoder: DecoderOption = "rnnt",
    max_lookahead_ms: LookaheadOption = None,
    lookahead: PolicyOption = None,
    token: TokenOption = None,
    rate: RateOption = 16_000,
    channels: ChannelsOption = 1,
    encoding: EncodingOption = "s16le",
) -> None:
    """Send a recording to a running service as if it were spoken now, and print what comes back.

    Ctrl-C ends the audio; the last words still come.
    """
    with one_sentence():
        from client.live import stream
        from client.output import make_writer
        from client.progress import Display

        languages = _languages(to)
        bilingual = bool(languages) and sys.stdout.isatty()
        try:
            source = _open_source(file, encoding, rate, channels)
        except DragomanError as error:
            raise DragomanError(error.code, f"{file}: {error}") from None
        is_whole = asyncio.run(
            stream(
                source,
                url,
                make_writer(output_format, file, languages, bilingual=bilingual),
                Display(1),
                pace=None if fast else pace,
                token=token,
                languages=languages,
                latency=latency,
                glossary=_glossary(glossary),
                decoder=decoder,
                max_lookahead_ms=max_lookahead_ms,
                lookahead=lookahead,
            )
        )
        if not is_whole:
            raise typer.Exit(2)


@app.command()
def mic(
    list_devices: Annotated[bool, typer.Option("--list-devices", help="Print the input devices and end.")] = False,
    device: Annotated[
        str | None,
        typer.Option(metavar="NUMBER|NAME", help="Input device; a part of its name will do. Left out: the system's."),
    ] = None,
    output_format: FormatOption = OutputFormat.TXT,
    save: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Write NAME.wav, NAME.srt and, for --to es, NAME.es.srt as you speak."),
    ] = None,
    to: ToOption = None,
    latency: LatencyOption = "medium",
    glossary: GlossaryOption = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A service to use. Left out: the models run in this program.")
    ] = None,
    token: TokenOption = None,
    translator: TranslatorOption = None,
    speculation: SpeculationOption = None,
    model: ModelOption = None,
    model_device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the model runs.")] = "cpu",
    dtype: DtypeOption = "float32",
    decoder: DecoderOption = "rnnt",
    max_lookahead_ms: LookaheadOption = None,
    lookahead: PolicyOption = None,
    translator_url: TranslatorUrlOption = None,
    translator_model: TranslatorModelOption = None,
    translator_policy: TranslatorPolicyOption = "wait-k",
    translator_key: TranslatorKeyOption = None,
) -> None:
    """Transcribe what a microphone hears, and with --to translate it, while you speak.

    On a terminal the words stand above their translations; elsewhere they are written as they come.
    Ctrl-C ends the audio; the last words still come.
    """
    problems: list[str] = []
    with one_sentence():
        from client.mic import listen, save_as
        from client.microphone import Microphone, choose_device, input_devices
        from client.view import make_view

        devices = input_devices()
        chosen = choose_device(devices, device)
        if list_devices:
            typer.echo("\n".join(map(str, devices)))
            return
        translating = _TranslatorOptions(
            translator,
            model_device,
            dtype,
            speculation,
            translator_url,
            translator_model,
            translator_policy,
            translator_key,
        )
        languages, terms, microphone = _languages(to), _glossary(glossary), Microphone(chosen)
        view = make_view(output_format, languages)
        with save_as(save, microphone.format, languages) if save else nullcontext() as recording:
            service: AbstractAsyncContextManager[tuple[str, str | None]] = nullcontext((url or "", token))
            if url is None:
                complain("loading the models")
                service = _own_service(model, model_device, dtype, translating, languages, latency)
            complain(f"listening to {chosen.name}, until Ctrl-C")
            is_whole = asyncio.run(
                listen(
                    microphone,
                    view,
                    recording,
                    service,
                    languages=languages,
                    latency=latency,
                    glossary=terms,
                    decoder=decoder,
                    max_lookahead_ms=max_lookahead_ms,
                    lookahead=lookahead,
                )
            )
        problems = [*microphone.problems(), *(recording.problems() if recording else [])]
    for problem in problems:
        complain(problem)
    if problems or not is_whole:
        raise typer.Exit(2)


def _own_service(
    model: Path | None,
    device: str,
    dtype: str,
    translating: _TranslatorOptions,
    languages: Sequence[str],
    latency: str,
) -> AbstractAsyncContextManager[tuple[str, str | None]]:
    """A service within this program, with its models loaded."""
    from client.mic import own_service
    from models.checkpoint import load_recognizer

    _leave_a_core()
    interpreter, drafts = translating.load(languages, latency) if languages else (None, None)
    return own_service(load_recognizer(model, device=device, dtype=dtype), interpreter, drafts)


@app.command("eval")
def evaluate(
    context: typer.Context,
    manifests: Annotated[
        list[Path],
        typer.Argument(
            metavar="MANIFEST...",
            help="JSON lines with text, and audio, relative to the manifest, or reference translations in es, de, fr.",
        ),
    ],
    to: ToOption = None,
    latency: Annotated[
        str,
        typer.Option(metavar="LEVEL[,...]", help="Latencies of the translation to score; all: every one it knows."),
    ] = "medium",
    spoken: Annotated[
        bool, typer.Option("--spoken", help="Read text as a recogniser writes it: lower case, no punctuation.")
    ] = False,
    translator: TranslatorOption = None,
    speculation: SpeculationOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    decoder: Annotated[
        list[str] | None,
        typer.Option(metavar="rnnt|ctc", help="Head of the model to score; may be given twice. Left out: rnnt."),
    ] = None,
    max_lookahead_ms: Annotated[
        list[int] | None,
        typer.Option(
            "--max-lookahead-ms",
            metavar="MS",
            min=0,
            help="Look-ahead to score, in milliseconds; may be given several times. Left out: the model's largest.",
        ),
    ] = None,
    lookahead: Annotated[
        list[str] | None,
        typer.Option(metavar="fixed|adaptive", help="Policy to score; may be given twice. Left out: the model's own."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score the first so many utterances of each set.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Recordings worked on at a time.")] = 16,
    replay: Annotated[
        int,
        typer.Option(
            min=0, help="Recordings or texts of each set to replay as live streams, for delay with computing."
        ),
    ] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch. Left out: its own choice.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write a report in JSON.")] = None,
    log: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the delays of translations as OmniSTEval's JSON lines to this folder."),
    ] = None,
    curve: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw word error rate over delay, BLEU over lag, to a .png or .svg; needs matplotlib."
        ),
    ] = None,
    translator_url: TranslatorUrlOption = None,
    translator_model: TranslatorModelOption = None,
    translator_policy: TranslatorPolicyOption = "wait-k",
    translator_key: TranslatorKeyOption = None,
) -> None:
    """Score models on recordings and texts: word error rate, BLEU, chrF, delay and lag, speed.

    Recordings are translated where --to says so, text always.
    What cannot be read is named on standard error; the others are scored, and the exit code is 2.
    """
    problems: list[str] = []
    with one_sentence():
        import torch

        from client.evaluate import SpeechSet, TextSet, read_all_sets, score, session_configs
        from client.evaluate_translation import log_name, translation_jobs
        from client.latency import write_log
        from client.progress import counted
        from client.report import (
            Conditions,
            draw_curve,
            json_report,
            print_scores,
            print_translations,
            require_curve,
            require_output,
        )
        from models.checkpoint import load_recognizer

        if json_file is not None:
            require_output(json_file)
        if curve is not None:
            require_curve(curve)
        if log is not None:
            log.mkdir(parents=True, exist_ok=True)
        if threads is not None:
            torch.set_num_threads(threads)
        sets, languages = read_all_sets(manifests, limit), _languages(to)
        speech = [one for one in sets if isinstance(one, SpeechSet)]
        to_translate = sets if languages else [one for one in sets if isinstance(one, TextSet)]
        recognizer = load_recognizer(model, device=device, dtype=dtype) if speech else None
        translating = _TranslatorOptions(
            translator, device, dtype, speculation, translator_url, translator_model, translator_policy, translator_key
        )
        interpreter, drafts = translating.load() if to_translate else (None, None)
        decoders, policies = cast("list[Decoder]", decoder or ["rnnt"]), cast("list[Lookahead]", lookahead or [None])
        configs = session_configs(recognizer, decoders, max_lookahead_ms or [None], policies) if recognizer else []
        sizes = {"batch_size": batch_size, "replay": replay}
        pairs = [(one, config) for one in speech for config in configs]
        jobs, levels = [], [level.strip() for level in latency.split(",")]
        if interpreter:
            jobs = translation_jobs(
                interpreter,
                to_translate,
                languages,
                levels,
                recognizer=recognizer,
                configs=configs,
                spoken=spoken,
                speculation=drafts,
                **sizes,
            )
        load_before = os.getloadavg()
        scores = [score(recognizer, one, config, **sizes) for one, config in counted(pairs) if recognizer]
        logged = [result for job in counted(jobs) for result in job()]
        translations = [result for result, _ in logged]
        met = [*(one.problems for one in scores), *(one.problems for one in translations)]
        problems = list(dict.fromkeys(problem for some in met for problem in some))
        for problem in problems:
            complain(problem)
        conditions = Conditions.now(
            {name: value for name, value in context.params.items() if name != "translator_key"},
            load_before,
            model=recognizer.name if recognizer else None,
            translator=interpreter.name if interpreter else None,
        )
        if scores:
            print_scores(scores, conditions)
        if translations:
            print_translations(translations, conditions)
        if json_file is not None:
            json_file.write_text(json_report(scores, conditions, translations), encoding="utf-8")
        if log is not None:
            for result, instances in logged:
                write_log(instances, log / log_name(result))
        if curve is not None:
            draw_curve(scores, conditions.model or conditions.translator, curve, translations)
    if problems:
        raise typer.Exit(2)


@models_app.command("list")
def list_models() -> None:
    """List the embedded models."""
    import models

    for config_path in sorted(Path(models.__file__).parent.glob("*/config.json")):
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if translation := config.get("translation"):
            what = f"{', '.join(translation['sources'])} → {', '.join(translation['targets'])}"
        else:
            lookaheads = sorted(80 * frames for frames in config["encoder"]["lookahead_frames"])
            what = f"look-ahead {', '.join(map(str, lookaheads))} ms"
        typer.echo(f"{config_path.parent.name}  {what}")


@models_app.command("import")
def import_model(
    archive: Annotated[Path, typer.Argument(metavar="X.nemo", help="A NeMo archive.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the model to.")],
) -> None:
    """Convert a NeMo archive of a cache-aware streaming model, without NeMo."""
    with one_sentence():
        from models.nemo import import_nemo

        import_nemo(archive, out)
        typer.echo(out)


@models_app.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(metavar="NAME[@REV]", help="A model on the hub, at a revision.")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder; left out: named like it.")] = None,
) -> None:
    """Fetch a published model by name and convert it where needed."""
    with one_sentence():
        from models.hub import fetch

        repository, _, revision = name.partition("@")
        typer.echo(fetch(repository, revision or None, out))


@bench_app.command("speculation")
def bench_speculation(
    manifests: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[MANIFEST...]", help="JSON lines with text, as for eval; left out: a short talk."),
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="LANGUAGE", help="Language to write.")] = "es",
    latency: LatencyOption = "medium",
    translator: TranslatorOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    draft_model: Annotated[
        Path | None,
        typer.Option("--draft-model", metavar="DIR", help="A smaller model with the same tokenizer."),
    ] = None,
    words: Annotated[int, typer.Option(min=1, help="Words to read, in all talks together.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each way, which take turns.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads to compute with.")] = 1,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Talks at a time; may be given several times. Left out: 1, 4, 16.")
    ] = None,
    identity: Annotated[
        bool, typer.Option("--identity", help="Only compare what all ways write, each run once, and print JSON.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare speculation with writing a token at a time: the same text, fewer forwards, how much time?"""
    with one_sentence():
        import torch

        from benchmarks.speculation import BATCHES, TALK, measure, report
        from benchmarks.speculation import identity as compare
        from client.evaluate import TextSet, read_all_sets
        from models.heads import load_heads
        from models.translator import EMBEDDED_TRANSLATOR
        from streaming.draft_model import load_draft_model
        from streaming.drafts import load_seeds

        torch.set_num_threads(threads)
        texts = TALK.read_text(encoding="utf-8").splitlines()
        if manifests:
            sets = read_all_sets(manifests)
            texts = [one.text for s in sets for one in (s.sentences if isinstance(s, TextSet) else s.utterances)]
        model, folder = _load_translator(translator, device, dtype, [to], latency), translator or EMBEDDED_TRANSLATOR
        seeds, heads, batches = load_seeds(folder), load_heads(folder, model.llm), batch or BATCHES
        more = {}
        if draft_model is not None:
            more["draft model"] = partial(load_draft_model, draft_model, model, device=device, dtype=dtype)
        if identity:
            same = compare(
                model,
                texts,
                target=to,
                latency=latency,
                words=words,
                batch=max(batches),
                seeds=seeds,
                heads=heads,
                more=more,
            )
            typer.echo(json.dumps(same))
            return
        found = measure(
            model,
            texts,
            target=to,
            latency=latency,
            words=words,
            repeats=repeats,
            batches=batches,
            seeds=seeds,
            heads=heads,
            more=more,
        )
        typer.echo(json.dumps(found) if as_json else report(found))


if __name__ == "__main__":
    app()
