"""Trains a translator on packed sequences.

    python -m training.translation.train --packed packed --tokenizer tokenizer.model --valid corpus/dev.jsonl \
        --out run --steps 8000 --bf16

The run goes on where it stopped if ``--out`` holds a checkpoint; with ``--init`` a new one starts from the weights of
a model folder, with its tokenizer. The learning rate warms up, stays, and falls to
zero over the last ``--decay-steps``; a run that was stopped in its flat part may be given other ``--steps``.
Weights are averaged exponentially; the average is what is validated and exported.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from client.normalize import normalize_transcript
from models.folder import CONFIG, WEIGHTS, read_object, read_tensors, require_fit, required_file
from models.llm import Llm
from models.llm_config import LlmConfig
from models.tokenizer import SENTENCEPIECE, SentencePieceTokenizer
from training.optimizers import muon_and_adamw, set_lr
from training.schedule import lr_scale
from training.translation.chunks import OFFLINE
from training.translation.corpus import read_references
from training.translation.data import WRITE, Batch, Encoder, Packed
from training.translation.loss import interleaved_loss
from training.translation.validate import Task, validate

logger = logging.getLogger(__name__)

LATENCIES_TO_VALIDATE = (OFFLINE, "medium")
_STARTS_FROM = "a run starts from the folder of a translator of our own family"


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a run; stored beside its checkpoint.

    Attributes:
        batch_ids: Padded ids of a batch.
        peak_lr: Learning rate between warm-up and decay.
        source_weight: Of the cross-entropy of the source.
        smoothing: Of the labels of what is written.
        ema: Decay of the average of the weights.
    """

    seed: int = 1
    batch_ids: int = 4096
    peak_lr: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    source_weight: float = 0.1
    smoothing: float = 0.1
    ema: float = 0.998


def translator_config(vocab_size: int, width: int, layers: int) -> LlmConfig:
    """The shape of the embedded model for a width of 256 and 8 layers; heads have 64 dimensions.

    Args:
        vocab_size: Ids.
        width: A multiple of 64.
        layers: Number of layers.
    """
    heads = width // 64
    return LlmConfig(
        vocab_size=vocab_size,
        d_model=width,
        d_ff=round(width * 8 / 3 / 64) * 64,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=64,
        max_positions=1024,
        name="en-esdefr-small",
    )


class Trainer:
    """Weights, optimisers and average of one run.

    Args:
        config: Shape of the model.
        recipe: How it is trained.
        end_of_read: Id of ``<|end-of-read|>``.
        device: ``cpu`` or ``cuda``.
        bf16: Whether matrix products run in bf16.
    """

    def __init__(self, config: LlmConfig, recipe: Recipe, end_of_read: int, device: str, *, bf16: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.end_of_read, self.device, self.bf16 = recipe, end_of_read, device, bf16
        self.net = Llm(config).to(device)
        initialise(self.net)
        self.optimizers = muon_and_adamw(self.net, recipe.peak_lr, recipe.weight_decay)
        self.average = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        self.step = 0

    def train_step(self, batch: Batch, lr_scale: float) -> dict[str, float]:
        """One optimiser step; returns the losses per id of their kind, in nats."""
        ids, kinds = batch.ids.to(self.device), batch.kinds.to(self.device)
        B, T = ids.shape
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            # Padding stands last, where a causal model's real positions do not see it.
            hidden, _ = self.net.hidden(ids, torch.full((B,), T), None)
        losses = interleaved_loss(
            hidden.float(),
            self.net.model.embed_tokens.weight,
            ids,
            kinds,
            self.end_of_read,
            source_weight=self.recipe.source_weight,
            smoothing=self.recipe.smoothing,
            bf16=self.bf16,
        )
        written = int((kinds == WRITE).sum())
        (losses.total / written).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip_norm)
        if torch.isfinite(norm):  # a step that overflowed is dropped, not averaged in
            set_lr(self.optimizers, self.recipe.peak_lr * lr_scale)
            for optimizer in self.optimizers:
                optimizer.step()
        self.net.zero_grad(set_to_none=True)
        self.step += 1
        self._update_average()
        sums = {"write": losses.write, "source": losses.source, "decision": losses.decision}
        return {name: value.item() / written for name, value in sums.items()} | {"norm": norm.item()}

    @torch.no_grad()
    def _update_average(self) -> None:
        # The average of a young run should forget its first steps.
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        state = self.net.state_dict()
        names = list(self.average)
        torch._foreach_lerp_([self.average[name] for name in names], [state[name] for name in names], 1 - keep)

    def averaged(self) -> Llm:
        """The model with the averaged weights, ready for inference."""
        net = Llm(self.net.config).to(self.device)
        net.load_state_dict(self.average)
        return net.freeze()

    def save(self, file: Path) -> None:
        """Writes everything that resuming needs; an interrupted write leaves the old file."""
        state = {
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "recipe": asdict(self.recipe),
            "config": self.net.config.to_dict(),
        }
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)

    def start_from(self, folder: Path) -> None:
        """Takes the weights of a model folder of the same shape; steps, optimisers and average start anew.

        Raises:
            DragomanError: ``model_not_found`` or ``bad_checkpoint``.
        """
        tensors = read_tensors(required_file(folder, WEIGHTS, _STARTS_FROM))
        require_fit(self.net.state_dict(), tensors)
        self.net.load_state_dict(tensors)
        self.average = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def load(self, file: Path) -> None:
        """Goes on from a file that :meth:`save` wrote."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.average = state["average"]
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        self.step = state["step"]


def initialise(net: Llm) -> None:
    """Makes the projections back into the residual stream smaller the more layers there are (GPT-2, §2.3)."""
    scale = (2 * net.config.n_layers) ** -0.5
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.mul_(scale)


def read_tasks(file: Path, languages: tuple[str, ...], limit: int) -> list[Task]:
    """The first sentences of a file of references, every other one as the recogniser would write it."""
    tasks = []
    for k, row in enumerate(read_references(file)[:limit]):
        text = row["en"][0]
        spoken = normalize_transcript(text) if k % 2 else None
        tasks += [Task(x, (spoken or text).split(), row[x]) for x in languages if row.get(x)]
    return tasks


def run(
    packed: Annotated[Path, typer.Option(help="Folder of training.translation.data.")],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model that it was made with.")],
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and logs.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps of the whole run.")] = 8000,
    decay_steps: Annotated[int, typer.Option(help="Steps over which the learning rate falls to zero.")] = 3000,
    valid: Annotated[Path | None, typer.Option(help="Sentences with references to validate on.")] = None,
    valid_sentences: int = 150,
    valid_every_steps: int = 1000,
    init: Annotated[Path | None, typer.Option(help="Model folder whose shape and weights a new run has.")] = None,
    width: Annotated[int, typer.Option(help="Of the model; a multiple of 64.")] = 256,
    layers: int = 8,
    batch_ids: Annotated[int, typer.Option(help="Padded ids of a batch.")] = Recipe.batch_ids,
    peak_lr: float = Recipe.peak_lr,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the batches.")] = Recipe.seed,
    threads: int = 2,
    device: str = "cpu",
    bf16: Annotated[bool, typer.Option(help="Matrix products in bf16.")] = False,
) -> None:
    """Trains, validates now and then, and leaves ``out/last.pt``."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    data, pieces = Packed(packed), SentencePieceTokenizer(tokenizer.read_bytes())
    data.require_tokenizer(tokenizer)
    recipe = Recipe(seed=seed, batch_ids=batch_ids, peak_lr=peak_lr)
    config = translator_config(pieces.size, width, layers) if init is None else _config_in(init, data)
    trainer = Trainer(config, recipe, Encoder(pieces).end_of_read, device, bf16=bf16)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "last.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        logger.info("resumed at step %d", trainer.step)
    elif init is not None:
        trainer.start_from(init)
        logger.info("started from %s", init)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    n_parameters = sum(p.numel() for p in trainer.net.parameters())
    logger.info("%d sequences, %d ids, %.1f M parameters", len(data), data.n_ids, n_parameters / 1e6)
    tasks = read_tasks(valid, ("es", "de", "fr"), valid_sentences) if valid else []
    batches = data.batches(recipe.batch_ids, recipe.seed, skip=trainer.step)
    scale = functools.partial(lr_scale, warmup_steps=recipe.warmup_steps, steps=steps, decay_steps=decay_steps)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped from outside: as by Ctrl-C
    try:
        _loop(trainer, batches, steps, scale, checkpoint, pieces, tasks, valid_every_steps)
    except KeyboardInterrupt:
        trainer.save(checkpoint)
        logger.info("stopped at step %d; the same command goes on from there", trainer.step)


def _config_in(folder: Path, data: Packed) -> LlmConfig:
    """The shape of the model in a folder, whose tokenizer the sequences must have been made with."""
    data.require_tokenizer(required_file(folder, SENTENCEPIECE, _STARTS_FROM))
    return LlmConfig.from_hf(read_object(required_file(folder, CONFIG, _STARTS_FROM)))


def _loop(
    trainer: Trainer,
    batches: Iterator[Batch],
    end: int,
    schedule: Callable[[int], float],
    checkpoint: Path,
    tokenizer: SentencePieceTokenizer,
    tasks: list[Task],
    valid_every_steps: int,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    sums: dict[str, float] = {}
    since, ids, begun = 0, 0, time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), transient=True) as progress:
        bar = progress.add_task("training", total=end, completed=trainer.step)
        while trainer.step < end:
            batch = next(batches)
            scale = schedule(trainer.step)
            for name, value in trainer.train_step(batch, scale).items():
                sums[name] = sums.get(name, 0.0) + value
            since, ids = since + 1, ids + batch.ids.numel()
            progress.update(bar, completed=trainer.step)
            if trainer.step % 50 == 0:
                figures = " ".join(f"{name} {value / since:.3f}" for name, value in sums.items())
                speed = ids / (time.monotonic() - begun)
                logger.info("step %d lr×%.2f %s %.0f ids/s", trainer.step, scale, figures, speed)
                sums, since, ids, begun = {}, 0, 0, time.monotonic()
            if trainer.step % valid_every_steps == 0 or trainer.step == end:
                trainer.save(checkpoint)
                if tasks:
                    for score in validate(trainer.averaged(), tokenizer, tasks, LATENCIES_TO_VALIDATE):
                        logger.info("step %d %s", trainer.step, score)
                begun = time.monotonic()


if __name__ == "__main__":
    typer.run(run)
