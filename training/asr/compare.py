"""Word error rate over delay of several runs: what the look-ahead of each is worth.

    python -m training.asr.compare --run causal=runs/causal --run adaptive=runs/l03 --reference models/en-small \
        --manifest heldout.jsonl --out look-ahead.json --picture look-ahead.svg

The models of the runs share vocabulary and shape and differ in what they may look at. Each is scored at every
look-ahead that it knows, through the sessions that serve people. Delay is counted twice: from the end of a word as the
recogniser places it, as everywhere else, and from its end as one reference model places it, the same for all, so that
a model gains nothing by placing its words late. The reference aligns the true words with CTC (Graves et al. 2006), at
its largest look-ahead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jiwer
import numpy as np
import torch
import typer
from torch import Tensor
from torchaudio.functional import forced_align

from client.evaluate import SpeechSet, WordErrors, read_sets, session_configs
from client.files import AudioFile
from client.normalize import normalize_transcript
from client.transcribe import transcribe
from models.adaptive import encode_whole
from models.checkpoint import load_recognizer
from models.config import FRAME_MS, SUBSAMPLING_FACTOR
from models.recognizer import Recognizer, RecognizerNet
from streaming.audio import AudioNormalizer
from streaming.events import TranscriptDelta
from streaming.features import FrontEnd
from streaming.session import SessionConfig
from streaming.text import WORD_BOUNDARY
from training.asr.export import averaged


@dataclass(frozen=True)
class Point:
    """One model at one look-ahead.

    Attributes:
        run: Name of the run.
        lookahead_ms: Its chunk's look-ahead, or the cap of an adaptive model.
        wer: Word error rate.
        delay_ms: Mean delay of the words, as the recogniser places them; None without words.
        reference_delay_ms: Mean delay of the correct words, as the reference places them; None without any.
    """

    run: str
    lookahead_ms: int
    wer: float
    delay_ms: float | None
    reference_delay_ms: float | None


@dataclass(frozen=True)
class _Heard:
    """What a recogniser made of one recording.

    Attributes:
        text: What it wrote, piece by piece.
        words: Its words.
        emitted_ms: When each was decided; None for those that only the end of the recording decided.
        delays_ms: Of the others, behind their own ends.
    """

    text: list[str]
    words: list[str]
    emitted_ms: list[int | None]
    delays_ms: list[int]


def read_run(run: Path, tokenizer: bytes, *, chunked: bool = False, gate_bias: float = 0.0) -> Recognizer:
    """The averaged weights of a run, for inference.

    Args:
        run: Folder of the run.
        tokenizer: Its SentencePiece model.
        chunked: As in :func:`training.asr.export.averaged`.
        gate_bias: Added to the scores of its gates: below 0 it waits less than it was trained to, above 0 more.
    """
    config, weights = averaged(run, chunked=chunked)
    for name, tensor in weights.items():
        if name.endswith(".lookahead.scores.bias"):
            tensor += gate_bias
    net = RecognizerNet(config)
    net.load_state_dict(weights)
    return Recognizer(net, tokenizer)


def measure(
    name: str,
    recognizer: Recognizer,
    speech: SpeechSet,
    ends_ms: list[list[int]],
    lookaheads_ms: Sequence[int] | None = None,
    sure_probability: float | None = None,
) -> Iterator[Point]:
    """Scores a model at its look-aheads.

    Args:
        name: What it is called.
        recognizer: The model.
        speech: What it shall hear.
        ends_ms: Of every utterance, where the reference places the ends of its words.
        lookaheads_ms: The look-aheads; None for all that the model knows.
        sure_probability: Of chunks that are as small as leaves no doubt; None for what the model does by itself.
    """
    references = [_words(utterance.text) for utterance in speech.utterances]
    for config in session_configs(recognizer, ["rnnt"], lookaheads_ms or recognizer.lookaheads_ms):
        if sure_probability is not None:
            config = replace(config, lookahead="adaptive", sure_probability=sure_probability)
        heard = _listen(recognizer, speech, config)
        errors = WordErrors.of([" ".join(words) for words in references], ["".join(ear.text) for ear in heard])
        delays_ms = [ms for ear in heard for ms in ear.delays_ms]
        behind_ms = [ms for row in zip(references, ends_ms, heard, strict=True) for ms in _behind_reference(*row)]
        assert errors.wer is not None
        lookahead_ms = recognizer.lookahead_frames(config.max_lookahead_ms) * FRAME_MS
        yield Point(name, lookahead_ms, errors.wer, _mean(delays_ms), _mean(behind_ms))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def reference_ends(recognizer: Recognizer, speech: SpeechSet) -> list[list[int]]:
    """Where a model's CTC head places the ends of the true words, ms of audio."""
    return [_ends(recognizer, AudioFile(utterance.audio), _words(utterance.text)) for utterance in speech.utterances]


def _ends(recognizer: Recognizer, source: AudioFile, words: list[str]) -> list[int]:
    audio = AudioNormalizer(source.format)
    parts = [audio.push(block) for block in source.blocks(source.format.sample_rate_hz)]
    front_end = FrontEnd(recognizer.config.features)
    mel, slots, _ = front_end.step(np.concatenate([*parts, audio.finish()]), front_end.init_state(), last=True)
    net, pieces = recognizer.net, recognizer.tokenizer.encode(" ".join(words))
    assert net.ctc_decoder is not None
    scores = net.ctc_decoder(_encode_whole(recognizer, mel.flatten(0, 1)[None], torch.tensor([slots])))
    path, _ = forced_align(scores.log_softmax(-1), torch.tensor([pieces]), blank=recognizer.config.vocab_size)
    begins = [recognizer.tokenizer.id_to_piece(piece).startswith(WORD_BOUNDARY) for piece in pieces]
    return word_ends(path[0].tolist(), recognizer.config.vocab_size, begins)


def word_ends(path: Sequence[int], blank: int, begins: Sequence[bool]) -> list[int]:
    """Ends of words in a CTC alignment, ms of audio: the last frame of each word's last piece.

    Args:
        path: The label of every frame.
        blank: Label of frames without a piece.
        begins: Of each piece in order, whether it begins a word; the first does anyway.
    """
    ends: list[int] = []
    piece, before = -1, blank
    for frame, label in enumerate(path):
        if label not in (blank, before):
            piece += 1
            if piece == 0 or begins[piece]:
                ends.append(0)
        if label != blank:
            ends[-1] = frame * FRAME_MS
        before = label
    return ends


@torch.inference_mode()
def _encode_whole(recognizer: Recognizer, mel: Tensor, slots: Tensor) -> Tensor:
    encoder = recognizer.net.encoder
    mel = torch.nn.functional.pad(mel, (0, 0, 0, -mel.shape[1] % SUBSAMPLING_FACTOR))
    largest = torch.tensor([max(encoder.config.lookahead_frames)])
    if encoder.config.adaptive:
        return encode_whole(encoder, mel, slots=slots, max_lookahead_frames=largest).encoded
    return encoder.step(mel, None, slots=slots, chunk_frames=largest + 1)[0]


def _listen(recognizer: Recognizer, speech: SpeechSet, config: SessionConfig) -> list[_Heard]:
    heard = [_Heard([], [], [], []) for _ in speech.utterances]
    openers = [partial(AudioFile, utterance.audio) for utterance in speech.utterances]
    for step in transcribe(openers, recognizer, config, batch_size=16):
        ear = heard[step.index]
        for event in step.events:
            if isinstance(event, TranscriptDelta):
                ear.text.append(event.delta)
                ear.words.extend(word.word for word in event.words)
                ear.emitted_ms.extend(None if step.ended else event.emitted_ms for _ in event.words)
                ear.delays_ms.extend(event.emitted_ms - word.end_ms for word in event.words if not step.ended)
    return heard


def _behind_reference(reference: list[str], ends_ms: list[int], heard: _Heard) -> Iterator[int]:
    """How long after their reference ends the correct words were decided."""
    if not heard.words:
        return
    for chunk in jiwer.process_words(" ".join(reference), " ".join(heard.words)).alignments[0]:
        if chunk.type == "equal":
            for offset in range(chunk.ref_end_idx - chunk.ref_start_idx):
                emitted_ms = heard.emitted_ms[chunk.hyp_start_idx + offset]
                if emitted_ms is not None:
                    yield emitted_ms - ends_ms[chunk.ref_start_idx + offset]


def _words(text: str) -> list[str]:
    return (normalize_transcript(text) or "").split()


def draw(points: Sequence[Point], file: Path) -> None:
    """Draws word error rate over both delays, a line for each run, and for each dial of one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    lines: dict[str, list[Point]] = {}
    for point in points:
        name = re.sub(", gate_bias .*", ", other gate biases", point.run)
        lines.setdefault(re.sub(", by doubt .*", ", by doubt", name), []).append(point)
    for name, own in lines.items():
        own.sort(key=lambda point: point.delay_ms or 0.0)
        rates = [100 * p.wer for p in own]
        axes[0].plot([p.delay_ms or np.nan for p in own], rates, marker="o", label=name)
        axes[1].plot([p.reference_delay_ms or np.nan for p in own], rates, marker="o", label=name)
    axes[0].set(xlabel="mean delay behind the recogniser's own word ends, ms", ylabel="word error rate, %")
    axes[1].set(xlabel="mean delay behind the reference's word ends, ms")
    for plot in axes:
        plot.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file)


def main(
    run: Annotated[list[str], typer.Option(metavar="NAME=DIR", help="A run, and what it is called in the curve.")],
    reference: Annotated[Path, typer.Option(help="Model folder that places the true words.")],
    manifest: Annotated[list[Path], typer.Option(help="Speech to score on; several are taken as one set.")],
    out: Annotated[Path, typer.Option(help="JSON lines with the points; runs that stand there are not scored again.")],
    picture: Annotated[Path | None, typer.Option(help="Curve, .svg or .png; needs matplotlib.")] = None,
    chunked: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="A run with gates, to be scored without, in chunks.")
    ] = None,
    gate_bias: Annotated[
        list[float] | None, typer.Option(help="Also score the runs with this added to their gates' scores.")
    ] = None,
    sure_probability: Annotated[
        list[float] | None, typer.Option(help="Also score chunks as small as leaves so little doubt; models in chunks.")
    ] = None,
    threads: int = 2,
) -> None:
    """Scores runs at all their look-aheads."""
    torch.set_num_threads(threads)
    speech = SpeechSet("all", tuple(u for part in read_sets(manifest) for u in part.utterances))
    placing = load_recognizer(reference)
    ends_ms = reference_ends(placing, speech)
    points = [Point(**json.loads(line)) for line in out.read_text().splitlines()] if out.exists() else []
    variants: list[tuple[str, dict[str, Any]]] = [(item, {}) for item in run]
    variants += [(item, {"chunked": True}) for item in chunked or ()]
    variants += [(item, {"gate_bias": bias}) for item in run for bias in gate_bias or ()]
    for item, variant in variants:
        name, _, folder = item.partition("=")
        name += f", gate_bias {variant['gate_bias']:g}" if "gate_bias" in variant else ""
        if name in {point.run for point in points}:
            continue
        recognizer = read_run(Path(folder), (reference / "tokenizer.model").read_bytes(), **variant)
        # A bias is a look-ahead of its own; caps are for the model as it was trained.
        lookaheads_ms = recognizer.lookaheads_ms[-1:] if "gate_bias" in variant else None
        found = list(measure(name, recognizer, speech, ends_ms, lookaheads_ms))
        if not recognizer.adaptive:
            for sure in sure_probability or ():
                largest = recognizer.lookaheads_ms[-1:]
                found += measure(f"{name}, by doubt {sure:g}", recognizer, speech, ends_ms, largest, sure)
        points += found
        with out.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(asdict(point)) + "\n" for point in found)
        typer.echo("\n".join(map(str, found)))
    if picture is not None:
        draw(points, picture)


if __name__ == "__main__":
    typer.run(main)
