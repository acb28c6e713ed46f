"""What the adaptive encoder costs beside the chunked one: the same shape, weights and audio, step by step in turn.

    python -m benchmarks.adaptive samples/jfk.flac

Live streams bring one frame of 80 ms each to every step, as `streaming.encoder.encode` runs them. The chunked encoder
looks ahead 0 frames, so that it, too, runs one frame of each stream a step; the adaptive one has random gates, so that
frames wait and run in bursts. Figures are processor milliseconds of a step on one thread, which other processes
disturb less than the clock. Streams begin at different places of the recording, so that their frontiers differ.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.speed import read_audio
from models.config import EncoderConfig, FeatureConfig
from models.fastconformer import FastConformer
from models.lookahead import Scheduler
from streaming.encoder import EncoderStream, encode
from streaming.features import front_end

#: Steps before the clock starts: the caches fill.
WARM_UP_STEPS = 90
#: Steps of one encoder before it is the other's turn; bursts of one step are gaps of another.
RUN_STEPS = 10


def build(config: EncoderConfig, gate_frames: int, seed: int = 0) -> tuple[FastConformer, FastConformer]:
    """A chunked and an adaptive encoder of one shape, frozen, with the same random weights but for the gates."""
    torch.manual_seed(seed)
    caps = (config.n_layers * gate_frames,)
    adaptive = FastConformer(replace(config, gate_frames=gate_frames, lookahead_frames=caps), 80)
    chunked = FastConformer(replace(config, gate_frames=0, lookahead_frames=(0,)), 80)
    for module in adaptive.modules():
        if isinstance(module, Scheduler):
            torch.nn.init.normal_(module.scores.bias, -0.5, 0.5)
            torch.nn.init.normal_(module.scores.weight, 0.0, 0.5)
    chunked.load_state_dict({k: v for k, v in adaptive.state_dict().items() if "lookahead" not in k})
    return chunked.freeze(), adaptive.freeze()


class Live:
    """Streams that bring one frame each to every step, for ever."""

    def __init__(self, encoder: FastConformer, mel: Tensor, batch: int, lookahead_frames: int) -> None:
        self.encoder, self.mel = encoder, mel
        self.streams = [EncoderStream.begin(encoder, lookahead_frames) for _ in range(batch)]
        self.at = [i * len(mel) // batch for i in range(batch)]
        self.frames, self.delay_frames = 0, 0

    def step(self) -> None:
        """One frame of every stream."""
        for row, at in enumerate(self.at):
            group = self.mel[at % len(self.mel)][None]
            self.streams[row] = self.streams[row].extended(group, 8, ended=False)
            self.at[row] = at + 1
        _, done, self.streams = encode(self.encoder, self.streams)
        self.frames += sum(one.frames for one in done)
        self.delay_frames += sum(reach - one.start_frame - i for one in done for i, reach in enumerate(one.reach))


def in_turn(functions: Sequence[Callable[[], None]], seconds: float) -> list[float]:
    """Processor milliseconds of each function, called in turn in runs of ten: the median over the runs."""
    taken: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(taken[0]) < 5 or time.perf_counter() < end:
        for function, times in zip(functions, taken, strict=True):
            begun = time.process_time()
            for _ in range(RUN_STEPS):
                function()
            times.append(time.process_time() - begun)
    return [statistics.median(times) / RUN_STEPS * 1e3 for times in taken]


def measure(mel: Tensor, config: EncoderConfig, gate_frames: int, batch: int, seconds: float) -> dict[str, float]:
    """Both encoders on so many streams."""
    chunked, adaptive = build(config, gate_frames)
    lives = [Live(chunked, mel, batch, 0), Live(adaptive, mel, batch, config.n_layers * gate_frames)]
    for live in lives:
        for _ in range(WARM_UP_STEPS):
            live.step()
    chunked_ms, adaptive_ms = in_turn([live.step for live in lives], seconds)
    return {
        "batch": batch,
        "chunked_ms": chunked_ms,
        "adaptive_ms": adaptive_ms,
        "ratio": adaptive_ms / chunked_ms,
        "adaptive_ms_per_stream": adaptive_ms / batch,
        "mean_delay_ms": lives[1].delay_frames / lives[1].frames * 80,
        "load": os.getloadavg()[0],
    }


def run(
    recording: Annotated[Path, typer.Argument(help="Any sound file that soundfile opens.")],
    layers: Annotated[int, typer.Option(help="Conformer layers.")] = 6,
    width: Annotated[int, typer.Option(help="Width of the layers.")] = 256,
    gates: Annotated[int, typer.Option(help="Next frames that the gates choose from.")] = 6,
    batch: Annotated[list[int] | None, typer.Option(help="Streams in a step; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each batch size.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints processor milliseconds of a step of both encoders, and their ratio."""
    torch.set_num_threads(1)
    config = EncoderConfig(layers, width, width // 64, subsampling_conv_channels=64, left_context_frames=56,
                           lookahead_frames=(0,))  # fmt: skip
    features = front_end(FeatureConfig())
    mel, _, _ = features.step(read_audio(recording), features.init_state(), last=False)
    rows = [measure(mel, config, gates, n, seconds) for n in batch or [1, 8, 32]]
    if as_json:
        print(json.dumps(rows))
        return
    print(" ".join(f"{name:>22}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{value:22.2f}" for value in row.values()))


if __name__ == "__main__":
    typer.run(run)
