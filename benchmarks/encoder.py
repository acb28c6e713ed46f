"""Step time of the encoder beside NeMo's, on the same weights, in one process, step by step in turn.

    python -m benchmarks.encoder
    python -m benchmarks.encoder --graphs --device cuda --dtype bfloat16 --batch 1 --batch 64 --batch 256

Both encoders start every step from full caches, and both return new ones; decoding is not included. With ``--graphs``,
the eager step is compared with the one that :mod:`models.graphs` replays, without NeMo; what it takes beside the step
to join the states of as many streams, and to part them again, stands in a column of its own.

What bounds a step of one frame for one stream (fp32, a 2-core AMD EPYC with AVX-512, load 1.2 to 1.7):

- *Weights.* Every weight is read once and used for one multiplication, so the step is a series of
  matrix-vector products. At 17x512 (418 MB a step) they are three quarters of its 28 ms on two threads: packed for
  oneDNN they are read at 20 to 23 GB/s, which is all that this memory gives. On one thread packed weights are read
  at 14 GB/s (41 ms); a transposed copy would be at 21 for one frame and at a third of that for seven.
- *Calls.* About 45 PyTorch operations a layer, half of NeMo's. An encoder 32 wide and 16 deep, which has nothing to
  read or compute, takes 7.5 of the 12 ms of 16x176: this is the bound there, and why that shape gains least.
- *Arithmetic* counts from about eight frames in a step on; then both engines spend their time in the same products.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.nemo_reference import (
    LEFT_CONTEXT_FRAMES,
    LOOKAHEAD_FRAMES,
    MEL_CACHE_FRAMES,
    SHAPES,
    NemoReference,
    NemoStepper,
    build,
)
from models.config import SUBSAMPLING_FACTOR
from models.fastconformer import EncoderState, FastConformer
from models.folder import dtype_of, require_device
from models.graphs import Capture, CudaCapture, EncoderGraphs
from models.recognizer import RecognizerNet

#: Larger than any cache of the machines this runs on.
PROBE_BYTES = 256 * 2**20
MIN_STEPS = 10
MAIN_SHAPES = ("hybrid_large", "small")
TABLE_WIDTH = 110
#: Width of the encoder whose step is all calls.
THIN = 32


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated steps."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    steps: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarises the durations of single steps."""
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(1e3 * statistics.median(seconds), 1e3 * cuts[0], 1e3 * cuts[-1], len(seconds))


@dataclass(frozen=True)
class Row:
    """One line of the table: both encoders in one setting.

    Attributes:
        shape: Key of the NeMo reference's shapes.
        threads: Threads of PyTorch.
        batch: Streams in one step.
        lookahead: Encoder frames; a step yields one frame more.
        ours: This engine.
        nemo: NeMo's ``cache_aware_stream_step``.
        ratio: NeMo's median over ours.
        load: One-minute load average of the machine when the row was done.
    """

    shape: str
    threads: int
    batch: int
    lookahead: int
    ours: Timing
    nemo: Timing
    ratio: float
    load: float


@dataclass(frozen=True)
class Bound:
    """What a step of one frame for one stream costs at the least.

    Attributes:
        shape: Key of the NeMo reference's shapes.
        threads: Threads of PyTorch.
        weight_mb: Weights that a step reads, MB (10^6 bytes).
        step_ms: Our whole step.
        floor_ms: Multiplying every weight matrix with one vector, and nothing else.
        calls_ms: The same step of an encoder as deep but 32 wide: calls, and little to read or compute.
        weights_gb_s: Weights over our step's time.
        machine_gb_s: What a product of one vector with a matrix beyond the caches reads.
        our_ops: PyTorch operations that our step calls.
        nemo_ops: The same for NeMo's.
    """

    shape: str
    threads: int
    weight_mb: float
    step_ms: float
    floor_ms: float
    calls_ms: float
    weights_gb_s: float
    machine_gb_s: float
    our_ops: int
    nemo_ops: int


@dataclass(frozen=True)
class GraphRow:
    """One line of the table of graphs.

    Attributes:
        shape: Key of the NeMo reference's shapes.
        batch: Streams in one step.
        lookahead: Encoder frames; a step yields one frame more.
        eager: The step, launched kernel by kernel.
        graph: The step, replayed; None where there are no graphs.
        states: What it takes to join the streams' states before a step and to part them after it.
        load: One-minute load average of the machine when the row was done.
    """

    shape: str
    batch: int
    lookahead: int
    eager: Timing
    graph: Timing | None
    states: Timing
    load: float


def full_state(encoder: FastConformer, batch: int) -> EncoderState:
    """Streams whose caches are full, of noise."""
    state = encoder.init_state(batch)
    state.attention.normal_()
    state.conv.normal_()
    state.frames.fill_(LEFT_CONTEXT_FRAMES)
    return state


def our_step(encoder: FastConformer, mel: Tensor, lookahead: int) -> Callable[[], object]:
    """A step of our encoder on streams whose caches are full; it starts from the same state every time."""
    batch = mel.shape[0]
    state = full_state(encoder, batch)
    slots = torch.full((batch,), mel.shape[1])
    chunk = torch.full((batch,), lookahead + 1)
    return lambda: encoder.step(mel, state, slots=slots, chunk_frames=chunk)


def nemo_step(reference: NemoReference, mel: Tensor, lookahead: int) -> Callable[[], object]:
    """The same for NeMo, which is fed nine cached mel frames before the new ones."""
    reference.set_lookahead(lookahead)
    batch, _, bins = mel.shape
    fed = torch.cat([torch.randn(batch, MEL_CACHE_FRAMES, bins), mel], 1).transpose(1, 2).contiguous()
    stepper = NemoStepper(reference, batch)
    channel, conv, _ = stepper.caches
    stepper.caches = (channel.normal_(), conv.normal_(), torch.full((batch,), LEFT_CONTEXT_FRAMES))
    return lambda: stepper.step(fed, MEL_CACHE_FRAMES)


def in_turn(functions: Sequence[Callable[[], object]], seconds: float) -> list[Timing]:
    """Times functions one call after the other, so that all meet the same load.

    Args:
        functions: What to time.
        seconds: For all of them together; each runs at least ten times.
    """
    durations: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    end = time.perf_counter() + seconds
    while len(durations[0]) < MIN_STEPS or time.perf_counter() < end:
        for function, taken in zip(functions, durations, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [Timing.of(taken) for taken in durations]


def count_ops(step: Callable[[], object]) -> int:
    """PyTorch operations that Python calls in one step; those that operations call inside are not counted."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        step()
    return sum(event.cpu_parent is None and event.name.startswith("aten::") for event in profile.events())


def bound(name: str, threads: int, reference: NemoReference, encoder: FastConformer, seconds: float) -> Bound:
    """Measures what limits a step of one frame for one stream."""
    mel = torch.randn(1, SUBSAMPLING_FACTOR, reference.shape.mel_bins)
    # Positions are projected once and cached, so their weights are not read in a step. The frozen encoder has
    # given its matrices up for packed ones of the same size; an unfrozen one tells it.
    unfrozen = FastConformer(encoder.config, reference.shape.mel_bins).requires_grad_(False)
    weights = {key: w for key, w in unfrozen.named_parameters() if "linear_pos" not in key}
    matrices = [w.flatten(1) for key, w in weights.items() if w.dim() > 1 and "depthwise" not in key]
    vectors = [torch.randn(matrix.shape[1]) for matrix in matrices]
    size = sum(w.numel() * w.element_size() for w in weights.values())
    side = int((PROBE_BYTES / 4) ** 0.5)
    probe, vector = torch.randn(side, side), torch.randn(side)
    thin = replace(encoder.config, d_model=THIN, n_heads=1, subsampling_conv_channels=THIN)
    thin_step = our_step(FastConformer(thin, reference.shape.mel_bins).freeze(), mel, 0)

    ours, theirs = our_step(encoder, mel, 0), nemo_step(reference, mel, 0)
    step, floor, machine, calls = in_turn(
        [
            ours,
            lambda: [torch.mv(matrix, v) for matrix, v in zip(matrices, vectors, strict=True)],
            lambda: torch.mv(probe, vector),
            thin_step,
        ],
        4 * seconds,
    )
    return Bound(
        shape=name,
        threads=threads,
        weight_mb=size / 1e6,
        step_ms=step.median_ms,
        floor_ms=floor.median_ms,
        calls_ms=calls.median_ms,
        weights_gb_s=size / step.median_ms / 1e6,
        machine_gb_s=PROBE_BYTES / machine.median_ms / 1e6,
        our_ops=count_ops(ours),
        nemo_ops=count_ops(theirs),
    )


def measure(
    names: Sequence[str],
    threads: Sequence[int],
    batches: Sequence[int],
    lookaheads: Sequence[int],
    seconds: float,
) -> tuple[list[Row], list[Bound]]:
    """Measures every combination."""
    rows, bounds = [], []
    for name in names:
        reference = build(name, seed=0)
        net = RecognizerNet(reference.config())
        net.load_checkpoint(reference.state_dict())
        encoder = net.encoder.freeze()
        for count in threads:
            torch.set_num_threads(count)
            with torch.inference_mode():
                bounds.append(bound(name, count, reference, encoder, seconds))
                for batch in batches:
                    for lookahead in lookaheads:
                        mel = torch.randn(batch, SUBSAMPLING_FACTOR * (lookahead + 1), reference.shape.mel_bins)
                        steps = [our_step(encoder, mel, lookahead), nemo_step(reference, mel, lookahead)]
                        ours, theirs = in_turn(steps, 2 * seconds)
                        ratio = theirs.median_ms / ours.median_ms
                        load = os.getloadavg()[0]
                        rows.append(Row(name, count, batch, lookahead, ours, theirs, ratio, load))
    return rows, bounds


def measure_graphs(
    names: Sequence[str],
    batches: Sequence[int],
    lookaheads: Sequence[int],
    seconds: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
    capture: Capture | None,
) -> list[GraphRow]:
    """Measures eager and replayed steps; without ``capture`` there are only eager ones."""
    rows = []
    for name in names:
        torch.manual_seed(0)
        config = NemoReference(None, SHAPES[name], "hybrid").config()
        encoder = RecognizerNet(config).to(device, dtype).encoder.freeze()
        graphs = None if capture is None else EncoderGraphs(encoder, capture)
        for batch in batches:
            for lookahead in lookaheads:
                with torch.inference_mode():
                    timings = _graph_timings(encoder, graphs, batch, lookahead, seconds)
                rows.append(GraphRow(name, batch, lookahead, *timings, os.getloadavg()[0]))
    return rows


def _graph_timings(
    encoder: FastConformer, graphs: EncoderGraphs | None, batch: int, lookahead: int, seconds: float
) -> tuple[Timing, Timing | None, Timing]:
    state = full_state(encoder, batch)
    mel = torch.randn(batch, SUBSAMPLING_FACTOR * (lookahead + 1), encoder.mel_bins).to(state.conv)
    step, streams = our_step(encoder, mel, lookahead), state.rows()

    def run(replayed: EncoderGraphs | None) -> None:
        encoder.graphs = replayed
        step()
        _finish(mel.device)

    def join_and_part() -> None:
        EncoderState.cat(streams).rows()
        _finish(mel.device)

    functions: list[Callable[[], object]] = [lambda: run(None), join_and_part]
    functions += [] if graphs is None else [lambda: run(graphs)]
    eager, states, *graph = in_turn(functions, len(functions) * seconds)
    return eager, graph[0] if graph else None, states


def _finish(device: torch.device) -> None:
    """Waits for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_graphs(console: Console, rows: Sequence[GraphRow], where: str) -> None:
    """Prints eager steps beside replayed ones."""
    table = Table(title=f"one step, ms: median and 10 to 90 %; {where}")
    heads = ("shape", "streams", "look-ahead", "eager", "", "graph", "", "ratio", "states", "load")
    for column in heads:
        table.add_column(column, justify="left" if column == "shape" else "right", no_wrap=True)
    for row in rows:
        cells = [row.shape, str(row.batch), str(row.lookahead)]
        for timing in (row.eager, row.graph):
            if timing is None:
                cells += ["needs CUDA", ""]
            else:
                cells += [f"{timing.median_ms:.2f}", f"{timing.p10_ms:.2f}–{timing.p90_ms:.2f}"]
        ratio = "" if row.graph is None else f"{row.eager.median_ms / row.graph.median_ms:.1f}"
        table.add_row(*cells, ratio, f"{row.states.median_ms:.2f}", f"{row.load:.1f}")
    console.print(table)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Prints the step times."""
    table = Table(title="one step, ms: median and 10 to 90 %")
    heads = ("shape", "threads", "streams", "look-ahead", "ours", "", "NeMo", "", "ratio", "load")
    for column in heads:
        table.add_column(column, justify="left" if column == "shape" else "right", no_wrap=True)
    for row in rows:
        cells = [row.shape, str(row.threads), str(row.batch), str(row.lookahead)]
        for timing in (row.ours, row.nemo):
            cells += [f"{timing.median_ms:.1f}", f"{timing.p10_ms:.1f}–{timing.p90_ms:.1f}"]
        table.add_row(*cells, f"{row.ratio:.1f}", f"{row.load:.1f}")
    console.print(table)


def print_bounds(console: Console, bounds: Sequence[Bound]) -> None:
    """Prints what limits a step."""
    table = Table(title="what bounds a step of one frame, one stream")
    heads = (
        "shape",
        "threads",
        "MB",
        "step ms",
        "floor ms",
        "calls ms",
        "GB/s",
        "machine GB/s",
        "ops",
        "NeMo's",
    )
    for column in heads:
        table.add_column(column, justify="left" if column == "shape" else "right", no_wrap=True)
    for b in bounds:
        figures = (b.weight_mb, b.step_ms, b.floor_ms, b.calls_ms, b.weights_gb_s, b.machine_gb_s)
        table.add_row(b.shape, str(b.threads), *(f"{f:.1f}" for f in figures), str(b.our_ops), str(b.nemo_ops))
    console.print(table)


def main(
    shape: Annotated[
        list[str], typer.Option(help="Model shape; may be repeated.", default_factory=lambda: [*MAIN_SHAPES])
    ],
    lookahead: Annotated[
        list[int],
        typer.Option(help="Encoder frames of 80 ms.", default_factory=lambda: [*LOOKAHEAD_FRAMES[::-1]]),
    ],
    batch: Annotated[list[int], typer.Option(help="Streams in one step.", default_factory=lambda: [1, 8])],
    threads: Annotated[list[int], typer.Option(help="Threads of PyTorch.", default_factory=lambda: [1, 2])],
    seconds: Annotated[float, typer.Option(help="Time for each measurement, in seconds.")] = 5.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    graphs: Annotated[bool, typer.Option(help="Compare with replayed steps, not with NeMo.")] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="With --graphs: where.")] = "cuda",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="With --graphs: in what.")] = "bfloat16",
) -> None:
    """Compare the step time of this encoder with NeMo's on this machine, or eager steps with replayed ones."""
    console = Console(width=TABLE_WIDTH, height=TABLE_WIDTH)
    if graphs:
        require_device(device)
        on, in_dtype = torch.device(device), dtype_of(dtype)
        capture = CudaCapture(on) if on.type == "cuda" else None
        found = measure_graphs(shape, batch, lookahead, seconds, device=on, dtype=in_dtype, capture=capture)
        where = torch.cuda.get_device_name(on) if on.type == "cuda" else device
        print_graphs(console, found, f"{where}, {dtype}, PyTorch {torch.__version__}")
        _write(json_file, {"device": where, "dtype": dtype, "rows": [asdict(row) for row in found]})
        return
    rows, bounds = measure(shape, threads, batch, lookahead, seconds)
    console.print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}")
    print_rows(console, rows)
    print_bounds(console, bounds)
    _write(json_file, {"rows": [asdict(row) for row in rows], "bounds": [asdict(b) for b in bounds]})


def _write(json_file: Path | None, figures: dict[str, Any]) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
