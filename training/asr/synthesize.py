"""Speaks English sentences with public synthetic voices: audio files and a manifest to train on.

    python -m training.asr.synthesize --pairs tatoeba.en-de.train.tsv.xz --exclude tatoeba.dev.jsonl \
        --engine flite --hours 14 --out synth

The manifest grows by one line per utterance, so training can start on what is there; a second run with the
same options goes on where the first one ended, and the result is that of one run.
"""

from __future__ import annotations

import json
import logging
import lzma
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import typer

from client.normalize import normalize_transcript, spell_out
from training.asr.voices import SAMPLE_RATE_HZ, Engine, Espeak, Festival, Flite, RHVoice, Samples, SpeechError, Voice

__all__ = ["compose", "fingerprint", "make_engine", "read_sentences", "synthesize", "usable_sentences"]

logger = logging.getLogger(__name__)

# Several sentences are joined up to a number of characters drawn from this range: about 3 to 12 s of speech.
_JOINED_CHARS = (45, 175)
# Longer sentences would last more than 16 s, which no training batch takes.
_MAX_CHARS = 230
_HELD_OUT_PER_VOICE = 40
# Kokoro, the only engine that loads a model, is made by itself.
_ENGINES: dict[str, Callable[[], Engine]] = {
    "flite": Flite,
    "espeak": Espeak,
    "festival": Festival,
    "rhvoice": RHVoice,
}


def fingerprint(text: str) -> str:
    """What two texts share if they are the same sentence: lower-case letters, digits and apostrophes."""
    return re.sub(r"[^\w']|_", "", text.lower().replace("’", "'"))


def read_sentences(path: Path) -> list[str]:
    """Reads the English sentences of a file, in order.

    Args:
        path: Tab-separated pairs (``.tsv``; English is the first column), JSON lines with `en` or `text`,
            verses as SWORD's ``mod2imp -s`` writes them (``.imp``), or any other text with one sentence a
            line; each may be packed (``.xz``).
    """
    opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")
    kind = path.with_suffix("").suffix if path.suffix == ".xz" else path.suffix
    with opened as lines:
        if kind == ".jsonl":
            records = [json.loads(line) for line in lines]
            return [str(record["en"] if "en" in record else record["text"]) for record in records]
        if kind == ".imp":
            verses = [line for line in lines if not line.startswith("$$$")]
            return [part for verse in verses for part in re.split(r"(?<=[.;:!?”])\s+", verse) if part]
        return [line.split("\t", 1)[0] if kind == ".tsv" else line for line in lines]


def usable_sentences(paths: Iterable[Path], exclude: Iterable[Path]) -> list[str]:
    """Collects the distinct sentences of `paths` that can be spoken and do not stand in `exclude`.

    Args:
        paths: Files for `read_sentences`.
        exclude: Files for `read_sentences` whose sentences must not be trained on.

    Returns:
        Sentences with plain spaces and numbers spelled out, sorted, so that their order does not depend on
        the files'.
    """
    seen = {fingerprint(sentence) for path in exclude for sentence in read_sentences(path)}
    usable = []
    for sentence in sorted({" ".join(line.split()) for path in paths for line in read_sentences(path)}):
        mark = fingerprint(sentence)
        if mark in seen or len(sentence) > _MAX_CHARS or normalize_transcript(sentence) is None:
            continue
        seen.add(mark)
        usable.append(spell_out(sentence))
    return usable


def compose(sentences: Sequence[str], seed: Sequence[int], joined_share: float = 0.3) -> Iterator[str]:
    """Yields texts to speak without end: single sentences, and now and then several that are joined.

    Args:
        sentences: Sentences to take in random order; all are taken before the first comes again.
        seed: Seed of the order and of the joins (integers from 0).
        joined_share: Share of the texts that are joined.
    """
    rng = np.random.default_rng(seed)
    order = cycle(rng.permutation(len(sentences)))
    while True:
        text = sentences[next(order)]
        if rng.random() < joined_share:
            target_chars = rng.integers(*_JOINED_CHARS)
            while len(text) < target_chars:
                following = sentences[next(order)]
                if len(text) + len(following) > _MAX_CHARS:
                    break
                text = f"{text} {following}"
        yield text


@dataclass(frozen=True)
class _Task:
    """One utterance to make: its number, text and voice."""

    index: int
    text: str
    voice: Voice


def _tasks(sentences: Sequence[str], engine: Engine, seed: int) -> Iterator[_Task]:
    # Each engine takes the sentences in its own order, or all would speak the same first ones.
    for index, text in enumerate(compose(sentences, [seed, *engine.name.encode()])):
        # A generator of its own for each utterance: a resumed run draws the voices that one run would have
        # drawn.
        yield _Task(index, text, engine.draw(np.random.default_rng([seed, index])))


def _speak(engine: Engine, task: _Task) -> Samples | None:
    try:
        return engine.speak(task.text, task.voice)
    except SpeechError as error:
        logger.warning("utterance %d left out: %s", task.index, error)
        return None


def _speak_all(engine: Engine, tasks: Iterator[_Task], workers: int) -> Iterator[tuple[_Task, Samples | None]]:
    """Speaks the tasks with some threads and yields them in order; few are in flight at any time."""
    with ThreadPoolExecutor(workers) as pool:
        window: deque[tuple[_Task, Future[Samples | None]]] = deque()
        try:
            for task in tasks:
                window.append((task, pool.submit(_speak, engine, task)))
                if len(window) > 2 * workers:
                    first, result = window.popleft()
                    yield first, result.result()
            while window:
                first, result = window.popleft()
                yield first, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _resume(manifest: Path) -> tuple[int, float]:
    """Finds where a manifest ended: the number of the next utterance, and the seconds of audio made so far.

    A line that a killed run left unfinished is cut off.
    """
    if not manifest.exists():
        return 0, 0.0
    content = manifest.read_text(encoding="utf-8")
    complete = content[: content.rfind("\n") + 1]
    if complete != content:
        manifest.write_text(complete, encoding="utf-8")
    records = [json.loads(line) for line in complete.splitlines()]
    following = int(Path(records[-1]["audio"]).stem) + 1 if records else 0
    return following, sum(float(record["duration_s"]) for record in records)


def _write(out: Path, manifest: Path, engine: Engine, task: _Task, samples: Samples, text_licence: str) -> float:
    """Writes one utterance and its manifest line; returns its seconds."""
    audio = Path(manifest.stem) / f"{task.index:06d}.flac"
    soundfile.write(out / audio, samples, SAMPLE_RATE_HZ, subtype="PCM_16")
    duration_s = round(len(samples) / SAMPLE_RATE_HZ, 3)
    record = {
        "audio": audio.as_posix(),
        "text": task.text,
        "speaker": task.voice.speaker,
        "duration_s": duration_s,
        "licence": f"{engine.licence}; text {text_licence}",
    }
    with manifest.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    return duration_s


def synthesize(
    sentences: Sequence[str],
    engine: Engine,
    out: Path,
    *,
    hours: float,
    max_minutes: float = float("inf"),
    seed: int = 0,
    workers: int = 1,
    name: str | None = None,
    text_licence: str = "Tatoeba CC BY 2.0",
) -> float:
    """Speaks sentences until there are `hours` of audio, going on from what `out` already holds.

    Args:
        sentences: What `usable_sentences` returned.
        engine: Who speaks.
        out: Folder; gets ``<name>/NNNNNN.flac`` and ``<name>.jsonl``.
        hours: Hours of audio wanted, with what is there.
        max_minutes: Minutes of wall clock after which to stop all the same.
        seed: Seed of texts and voices.
        workers: Threads that speak at the same time.
        name: Name of the set; the engine's own if left out.
        text_licence: Licence of the sentences, for the manifest.

    Returns:
        Hours of audio that `out` holds now.

    Raises:
        ValueError: If there is no sentence to speak.
    """
    if not sentences:
        raise ValueError("0 usable sentences: give --pairs files with English text that the excluded files do not hold")
    manifest = out / f"{name or engine.name}.jsonl"
    (out / manifest.stem).mkdir(parents=True, exist_ok=True)
    done, seconds = _resume(manifest)
    deadline = time.monotonic() + 60 * max_minutes
    spoken = _speak_all(engine, islice(_tasks(sentences, engine, seed), done, None), workers)
    while seconds < 3600 * hours and time.monotonic() < deadline:
        task, samples = next(spoken)
        if samples is not None:
            seconds += _write(out, manifest, engine, task, samples, text_licence)
        if task.index % 500 == 0:
            logger.info("%s: utterance %d, %.2f h", manifest.stem, task.index, seconds / 3600)
    spoken.close()  # type: ignore[attr-defined]
    return seconds / 3600


def synthesize_held_out(sentences: Sequence[str], engines: Sequence[Engine], out: Path, *, seed: int = 0) -> int:
    """Speaks sentences with the voices that training never hears: 40 utterances a voice.

    Args:
        sentences: What `usable_sentences` returned.
        engines: All `held_out` voices of these speak.
        out: Folder; gets ``heldout_voices.jsonl`` and its audio.
        seed: Seed of texts and voices.

    Returns:
        The number of utterances.
    """
    manifest = out / "heldout_voices.jsonl"
    (out / manifest.stem).mkdir(parents=True, exist_ok=True)
    manifest.unlink(missing_ok=True)
    voices = [(engine, name) for engine in engines for name in engine.held_out]
    texts = compose(sentences, [seed])
    for index in range(_HELD_OUT_PER_VOICE * len(voices)):
        engine, name = voices[index % len(voices)]
        task = _Task(index, next(texts), engine.draw(np.random.default_rng([seed, index]), name))
        _write(out, manifest, engine, task, engine.speak(task.text, task.voice), "Tatoeba CC BY 2.0")
    return _HELD_OUT_PER_VOICE * len(voices)


def make_engine(name: str, styles: Path | None = None) -> Engine:
    """Makes an engine by name.

    Args:
        name: One of `_ENGINES`, or ``kokoro``.
        styles: Folder of Kokoro styles, which only Kokoro needs.

    Raises:
        ValueError: If there is no such engine, or Kokoro gets no styles.
    """
    if name in _ENGINES:
        return _ENGINES[name]()
    if name == "kokoro" and styles is not None:
        from training.asr.kokoro import Kokoro

        return Kokoro(styles)
    raise ValueError(
        "kokoro needs --styles"
        if name == "kokoro"
        else f"unknown engine {name!r}: choose {', '.join(_ENGINES)} or kokoro"
    )


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for audio and manifests.")],
    pairs: Annotated[
        list[Path], typer.Option(help="File with English sentences: .tsv, .jsonl or text, .xz or not.")
    ] = [],  # noqa: B006
    exclude: Annotated[list[Path], typer.Option(help="File whose sentences must not be spoken.")] = [],  # noqa: B006
    engine: Annotated[str, typer.Option(help=f"{', '.join(_ENGINES)} or kokoro.")] = "flite",
    styles: Annotated[Path | None, typer.Option(help="Folder of Kokoro styles: `voices` of npm's kokoro-js.")] = None,
    hours: Annotated[float, typer.Option(help="Hours of audio wanted, with what is there.")] = 1.0,
    max_minutes: Annotated[float, typer.Option(help="Minutes of wall clock to stop after.")] = float("inf"),
    seed: Annotated[int, typer.Option(help="Seed of texts and voices.")] = 0,
    workers: Annotated[int, typer.Option(help="Threads that speak at the same time.")] = 1,
    name: Annotated[str | None, typer.Option(help="Name of the set (default: the engine's).")] = None,
    text_licence: Annotated[str, typer.Option(help="Licence of the sentences.")] = "Tatoeba CC BY 2.0",
    held_out: Annotated[
        Path | None, typer.Option(help="Speak this file's sentences with the held-out voices instead.")
    ] = None,
) -> None:
    """Speaks sentences with public synthetic voices into FLAC files and a manifest."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if held_out is not None:
        count = synthesize_held_out(usable_sentences([held_out], exclude), [Flite(), Espeak()], out, seed=seed)
        typer.echo(f"{count} utterances of held-out voices in {out}")
        return
    try:
        speaker = make_engine(engine, styles)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--engine") from error
    reached = synthesize(
        usable_sentences(pairs, exclude),
        speaker,
        out,
        hours=hours,
        max_minutes=max_minutes,
        seed=seed,
        workers=workers,
        name=name,
        text_licence=text_licence,
    )
    typer.echo(f"{name or engine}: {reached:.2f} h in {out}")


if __name__ == "__main__":
    app()
