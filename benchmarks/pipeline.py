"""This project's sessions beside NeMo's own streaming pipeline: same weights, same audio, same process, in turn.

    python -m benchmarks.pipeline samples/jfk.flac

NeMo 3.0.0's cache-aware transducer pipeline (``nemo.collections.asr.inference``) reads wave files and streams them in
chunks of one look-ahead. Ours takes the same samples: as `dragoman transcribe` does for several files together, and
as a live client sends them, in pieces of 80 ms, for one stream. The weights are those of the embedded model, or random
ones of a shape (``--shape``). NeMo's pipeline computes its features chunk by chunk, so that the texts differ; the
letters of both are printed, because each costs time. Figures count processor seconds of one thread, which other
processes disturb less than the clock; a live stream's is the share of one core that it takes.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import torch
import typer

from benchmarks.nemo_reference import NemoReference, Shape, build, of_folder
from benchmarks.speed import PIECE_SAMPLES, files, read_audio
from models.checkpoint import EMBEDDED_MODEL
from models.config import FRAME_MS
from models.recognizer import Recognizer, RecognizerNet
from streaming.audio import AudioFormat
from streaming.session import Session, SessionConfig

#: Added to the blank's score. Without it random weights write ten times as much as people say, and the searches would
#: be most of what is measured.
BLANK_LEAD = 6.0


def nemo_pipeline(archive: Path, shape: Shape, lookahead_frames: int, streams: int, dtype: str = "float32") -> Any:
    """NeMo's pipeline on the CPU; what is not about speed is as in its example's configuration.

    Args:
        archive: A ``.nemo`` file.
        shape: Of its model.
        lookahead_frames: Encoder frames; one of those that the model was made for.
        streams: How many run in a batch.
        dtype: ``float32``, or ``bfloat16`` with autocast.
    """
    from nemo.collections.asr.inference.factory.pipeline_builder import PipelineBuilder
    from omegaconf import OmegaConf

    greedy = {"use_cuda_graph_decoder": False, "max_symbols": 10}
    config = {
        "pipeline_type": "cache_aware",
        "asr_decoding_type": "rnnt",
        "asr": {
            "model_name": str(archive),
            "device": "cpu",
            "device_id": 0,
            "compute_dtype": dtype,
            "use_amp": dtype != "float32",
            "decoding": {"strategy": "greedy_batch", "fused_batch_size": -1, "greedy": greedy},
        },
        "streaming": {
            "sample_rate": 16000,
            "batch_size": streams,
            "num_slots": streams,
            "att_context_size": [shape.left_context_frames, lookahead_frames],
            "use_cache": True,
            "use_feat_cache": True,
            "chunk_size_in_secs": None,
            "request_type": "frame",
            "word_boundary_tolerance": 4,
        },
        "endpointing": {"stop_history_eou": 800, "residue_tokens_at_end": 2},
        "confidence": {"exclude_blank": True, "aggregation": "mean", "method_cfg": {"name": "max_prob"}},
        "itn": {"batch_size": 1, "n_jobs": 1, "left_padding_size": 0},
        "enable_itn": False,
        "enable_nmt": False,
        "asr_output_granularity": "segment",
        "return_tail_result": False,
        "matmul_precision": "highest",
        "log_level": 40,
    }
    return PipelineBuilder.build_pipeline(OmegaConf.create(config))


def our_recognizer(reference: NemoReference) -> Recognizer:
    """The same weights in this engine."""
    net = RecognizerNet(reference.config())
    net.load_checkpoint(reference.state_dict())
    return Recognizer(net, reference.tokenizer_bytes)


def live(recognizer: Recognizer, audio: np.ndarray, config: SessionConfig) -> str:
    """What one stream says that comes in pieces of 80 ms."""
    session = Session(recognizer, config)
    starts = range(0, len(audio), PIECE_SAMPLES)
    events = [event for start in starts for event in session.push(audio[start : start + PIECE_SAMPLES])]
    return "".join(getattr(event, "delta", "") for event in events + session.finish())


def in_turn(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median processor seconds of each function, called one after the other; the first round does not count."""
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, seconds in zip(functions, taken, strict=True):
            begun = time.process_time()
            function()
            seconds.append(time.process_time() - begun)
    return [statistics.median(seconds[1:]) for seconds in taken]


def random_model(shape: str) -> NemoReference:
    """Random weights that write about as much as people say."""
    reference = build(shape, seed=0)
    with torch.no_grad():
        reference.model.joint.joint_net[-1].bias[-1] += BLANK_LEAD
    return reference


def measure(
    reference: NemoReference, audio: np.ndarray, lookaheads: Sequence[int], batch: int, rounds: int
) -> list[dict[str, Any]]:
    """One entry a look-ahead: both engines' speed for one live stream and for files in a batch."""
    recognizer, audio_s = our_recognizer(reference), len(audio) / 16000
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        archive, wave = Path(folder) / "model.nemo", Path(folder) / "audio.wav"
        reference.save_nemo(archive)
        soundfile.write(wave, audio, 16000, subtype="FLOAT")
        for lookahead in lookaheads:
            config = SessionConfig(AudioFormat("f32le"), lookahead * FRAME_MS)
            alone, together = (nemo_pipeline(archive, reference.shape, lookahead, n) for n in (1, batch))
            ours, theirs, our_files, their_files = in_turn(
                [
                    partial(live, recognizer, audio, config),
                    partial(alone.run, [str(wave)]),
                    partial(files, recognizer, audio, batch, config),
                    partial(together.run, [str(wave)] * batch),
                ],
                rounds,
            )
            (nemo,) = alone.run([str(wave)]).values()
            row = {
                "lookahead_ms": lookahead * FRAME_MS,
                "letters": len(live(recognizer, audio, config)),
                "nemo_letters": len(nemo["text"]),
                "live_core_share": ours / audio_s,
                "nemo_live_core_share": theirs / audio_s,
                "live_ratio": theirs / ours,
                f"times_real_time_batch_{batch}": batch * audio_s / our_files,
                f"nemo_times_real_time_batch_{batch}": batch * audio_s / their_files,
                "batch_ratio": their_files / our_files,
                "load_average": os.getloadavg()[0],
            }
            rows.append(row)
    return rows


def run(
    recording: Annotated[Path, typer.Argument(help="Any sound file that soundfile opens.")],
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights of a shape of benchmarks/nemo_reference.py."),
    ] = None,
    lookahead: Annotated[list[int] | None, typer.Option(help="Encoder frames; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(help="Files together.")] = 8,
    seconds: Annotated[float, typer.Option(help="Length that the recording is repeated or cut to.")] = 11.0,
    rounds: Annotated[int, typer.Option(help="Repetitions; the median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints both engines' share of a core for a live stream and speed for files in a batch."""
    torch.set_num_threads(1)
    audio = np.resize(read_audio(recording), int(seconds * 16000))
    reference = of_folder(EMBEDDED_MODEL) if shape is None else random_model(shape)
    rows = measure(reference, audio, lookahead or [6, 0], batch, rounds)
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print("\n".join(f"{name:32} {value:.4g}" for name, value in row.items()), end="\n\n")


if __name__ == "__main__":
    typer.run(run)
