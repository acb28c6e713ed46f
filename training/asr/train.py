"""Trains a recogniser: hybrid transducer and CTC loss on packed speech.

The look-ahead is drawn per utterance from a few chunk sizes, or, with ``--gates``, chosen by the layers themselves
under a cost of the delay with which words are told (see :mod:`models.lookahead`).

    python -m training.asr.train --train packed/real --train packed/synth --tokenizer tokenizer.model \
        --valid dev.jsonl --out run --steps 6000

The run goes on where it stopped if ``--out`` holds a checkpoint. The learning rate warms up, stays, and falls to
zero over the last ``--decay-steps``; a run that was stopped in its flat part may be given other ``--steps``.
Weights are averaged exponentially; the average is what is validated and exported. Under ``torchrun`` several processes
share a run, each with batches of its own.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from client.evaluate import read_sets, score, session_configs
from client.report import percent
from models.adaptive import encode_whole
from models.config import SUBSAMPLING_FACTOR, DecoderConfig, EncoderConfig, FeatureConfig, ModelConfig
from models.recognizer import Recognizer, RecognizerNet
from streaming.session import Decoder
from streaming.text import WORD_BOUNDARY
from training.asr.augment import Augmenter
from training.asr.data import Batch, TrainingBatches, read_packed, text_batches
from training.asr.loss import transducer_loss
from training.asr.phones import PHONES
from training.asr.synthesize import usable_sentences
from training.optimizers import muon_and_adamw, set_lr
from training.schedule import lr_scale

logger = logging.getLogger(__name__)

#: Log-mel of speech is about -11 ± 4 without normalisation; the first convolution starts out undoing that.
MEL_MEAN, MEL_SCALE = -11.0, 4.0
#: Look-aheads of a model without gates; every one's chunk divides the left context.
CHUNK_LOOKAHEADS = (6, 3, 1, 0)


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a run; stored beside its checkpoint.

    Attributes:
        batch_s: Padded seconds of audio in a batch.
        peak_lr: Learning rate between warm-up and decay.
        easy_steps: The run begins with so many steps on short, unaltered utterances at the largest look-ahead:
            CTC finds its first alignments there, which it hardly does among long ones.
        easy_s: What is short.
        easy_batch_s: ``batch_s`` of that time.
        flat_steps: So long the CTC loss is helped by a flat start: cross-entropy against the pieces spread evenly
            over the utterance's louder part.
        rnnt_from_step: The transducer loss joins here; before, CTC alone shapes the encoder.
        rnnt_cells: The transducer loss is taken on so many rows of a batch, drawn at random, that their lattices
            have about this many cells; all of them would cost more than the encoder.
        ctc_weight: Share of the CTC loss once both are there.
        text_weight: Of the cross-entropy of the predictor on text alone, which shows it more sentences than are spoken.
        text_rows: Texts in a step.
        altered_share: Share of the utterances that are augmented; a young model learns little from hard ones.
        spliced_share: Share of the utterances with cuts that are spliced (see :mod:`training.asr.splice`).
        phone_weight: Of the CTC loss on the sounds that a middle layer is asked for (see :mod:`training.asr.phones`).
        misled_share: Share of the predictor's history that is replaced by pieces drawn at random, so that sounds are
            needed even where a sentence is known.
        short_memory_share: Share of the utterances in which a frame sees few frames before its chunk, evenly drawn from
            2 … ``longest_short_memory``: a layer that remembers a second cannot know a sentence.
        longest_short_memory: Frames.
        latency_weight: What a frame of delay costs where a word is told, in nats (see
            :func:`training.asr.loss.transducer_loss`).
        latency_from_step: Until here gates are as likely open as their sigmoids say, and the delay costs nothing.
        hardening_steps: Over so many steps from there on, the noise on the gates' scores falls from 1 to
            ``least_noise``, and the cost of the delay rises to its weight.
        least_noise: With which training sees nearly the gates of inference.
        capped_share: Share of the utterances under a cap on the reach, drawn evenly from 0 … ``largest_cap``.
        largest_cap: Frames.
        chunked_share: Of a model with gates, the share of the utterances that are encoded in chunks all the same, so
            that one set of weights can be compared with itself.
        freq_masks, freq_width: SpecAugment in mel bins (Park et al. 2019).
        time_masks, time_share: SpecAugment in time, each at most this share of the utterance.
    """

    seed: int = 1
    batch_s: float = 45.0
    peak_lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    dropout: float = 0.0
    ema: float = 0.997
    easy_steps: int = 1800
    easy_s: float = 2.6
    easy_batch_s: float = 40.0
    flat_steps: int = 250
    rnnt_from_step: int = 2600
    rnnt_cells: int = 40_000
    ctc_weight: float = 0.3
    text_weight: float = 0.2
    text_rows: int = 24
    altered_share: float = 0.6
    spliced_share: float = 0.0
    phone_weight: float = 0.0
    misled_share: float = 0.0
    short_memory_share: float = 0.0
    longest_short_memory: int = 10
    latency_weight: float = 0.0
    latency_from_step: int = 2600
    hardening_steps: int = 3000
    least_noise: float = 0.1
    capped_share: float = 0.4
    largest_cap: int = 14
    chunked_share: float = 0.0
    freq_masks: int = 2
    freq_width: int = 16
    time_masks: int = 2
    time_share: float = 0.05


def small_model_config(gates: int = 0, width: int = 256, lookaheads: Sequence[int] = ()) -> ModelConfig:
    """The shape of the embedded model: 10.6 M parameters, and 0.1 M more with gates over the next ``gates`` frames.

    A ``width`` of 176 makes 5.5 M. ``lookaheads`` stand in the place of the embedded model's; both are for comparisons.
    """
    encoder = EncoderConfig(
        n_layers=6,
        d_model=width,
        n_heads=4,
        subsampling_conv_channels=64,
        xscaling=False,
        left_context_frames=56,
        lookahead_frames=tuple(lookaheads) or ((12, *CHUNK_LOOKAHEADS) if gates else CHUNK_LOOKAHEADS),
        gate_frames=gates,
    )
    decoder = DecoderConfig(vocab_size=256, pred_hidden=256, joint_hidden=256)
    return ModelConfig(FeatureConfig(), encoder, vocab_size=256, decoder=decoder, name="en-small")


class Trainer:
    """Weights, optimiser and average of one run.

    Args:
        config: Shape of the model.
        recipe: How it is trained.
        device: ``cpu`` or ``cuda``.
        autocast: Whether matrix products run in bf16.
        telling: ``bool[vocab_size]``, the pieces whose delay costs. A word is told when the next one begins, so these
            are the ones that begin a word; None for all.
    """

    def __init__(
        self, config: ModelConfig, recipe: Recipe, device: str, *, autocast: bool, telling: Tensor | None = None
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.telling = torch.ones(config.vocab_size, dtype=torch.bool) if telling is None else telling
        self.recipe, self.device, self.autocast = recipe, device, autocast
        self.net = RecognizerNet(config, dropout=recipe.dropout).to(device)
        _initialise(self.net)
        self.phone_head = PhoneHead(config.encoder.d_model).to(device)
        self.trained = nn.ModuleList([self.net, self.phone_head])
        self.optimizers = muon_and_adamw(self.trained, recipe.peak_lr, recipe.weight_decay)
        self.average = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        self.step = 0

    def train_step(self, batch: Batch, lr_scale: float, text: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
        """One optimiser step on speech and, once the transducer learns, on text; returns the losses per piece."""
        self.net.train()
        set_lr(self.optimizers, self.recipe.peak_lr * lr_scale)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            losses = self._losses(batch)
            if text is not None and "rnnt" in losses:
                losses["text"] = self._text_loss(*text)
        total = losses["ctc"] + losses.get("flat", 0.0)
        if "rnnt" in losses:
            total = self.recipe.ctc_weight * losses["ctc"] + (1 - self.recipe.ctc_weight) * losses["rnnt"]
        if "phones" in losses:
            total = total + self.recipe.phone_weight * losses["phones"]
        if "text" in losses:
            total = total + self.recipe.text_weight * losses["text"]
        self.trained.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        if torch.distributed.is_initialized():
            _average_gradients(self.trained)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.recipe.clip_norm)
        if torch.isfinite(norm):  # a step that overflowed is dropped, not averaged in
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        self._update_average()
        return {name: loss.item() for name, loss in (losses | {"norm": norm}).items()}

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        recipe, net = self.recipe, self.net
        easy = self.step < recipe.easy_steps
        mel = (batch.mel if easy else spec_augment(batch.mel, batch.slots, recipe)).to(self.device)
        layers: list[Tensor] = []
        encoded, reach = self._encode(mel, batch.slots, easy=easy, layers=layers)
        frames = -(-batch.slots // SUBSAMPLING_FACTOR)
        targets, lengths = batch.targets.to(self.device), batch.target_lengths
        pieces = lengths.sum()
        assert net.ctc_decoder is not None and net.transducer is not None
        scores = net.ctc_decoder(encoded).float().log_softmax(-1).transpose(0, 1)
        blank = net.config.vocab_size
        ctc = F.ctc_loss(scores, targets, frames, lengths, blank, reduction="sum", zero_infinity=True) / pieces
        losses = {"ctc": ctc}
        if recipe.phone_weight and layers:
            middle = layers[(len(layers) - 1) // 2]
            losses["phones"] = self.phone_head.loss(middle, frames, batch.phones.to(self.device), batch.phone_lengths)
        if self.step < recipe.flat_steps:
            aligned = flat_alignment(batch, blank).to(self.device)
            flat = F.nll_loss(scores.permute(1, 2, 0), aligned, ignore_index=-1)
            return losses | {"flat": flat}
        if self.step < recipe.rnnt_from_step:
            return losses
        cells = int(frames.max()) * (int(lengths.max()) + 1)
        part = torch.randperm(len(frames))[: max(1, recipe.rnnt_cells // cells)]
        frames, lengths = frames[part], lengths[part]
        targets = targets[part, : int(lengths.max())]
        misled = torch.rand(targets.shape, device=targets.device) < recipe.misled_share
        history = torch.where(misled, torch.randint_like(targets, blank), targets)
        lattice = net.transducer.lattice(encoded[part, : int(frames.max())], history)
        frames, lengths = frames.to(self.device), lengths.to(self.device)
        delay = self._delay(reach[part, : int(frames.max())], targets, frames, lengths)
        cost = recipe.latency_weight * self._hardness() * delay
        rnnt = transducer_loss(lattice, targets, frames, lengths, blank, cost=cost)
        return losses | {"rnnt": rnnt / lengths.sum(), "reach": self._mean_reach(reach, batch.slots)}

    def _delay(self, reach: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor) -> Tensor:
        """Of telling a word by each target at each frame: frames of audio by then, ``[B, T, U]``.

        They are counted from where an even spread of the targets would have it, so that what is left is small; that
        is the same for all alignments and changes no gradient.
        """
        order = torch.arange(1, targets.shape[1] + 1, device=targets.device)
        even = order * (frames / (lengths + 1))[:, None]
        return (reach[:, :, None] - even[:, None, :]) * self.telling.to(targets.device)[targets][:, None, :]

    def _text_loss(self, targets: Tensor, lengths: Tensor) -> Tensor:
        assert self.net.transducer is not None
        targets, real = targets.to(self.device), torch.arange(targets.shape[1]) < lengths[:, None]
        scores = self.net.transducer.internal_lm(targets).float()
        wanted = targets.masked_fill(~real.to(self.device), -1)
        return F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=-1)

    def _encode(
        self, mel: Tensor, slots: Tensor, *, easy: bool, layers: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encoder frames, and the reach of each, with gradients in an adaptive model: ``float[B, T]``.

        ``layers`` takes what each layer makes, in a model without gates.
        """
        if not self.net.encoder.config.adaptive:
            return self._encode_chunks(mel, slots, self.net.encoder.config.lookahead_frames, easy=easy, layers=layers)
        chunked = torch.rand(len(mel)) < self.recipe.chunked_share
        parts = []
        if chunked.any():
            parts.append(self._encode_chunks(mel[chunked], slots[chunked], CHUNK_LOOKAHEADS, easy=easy))
        if not chunked.all():
            parts.append(self._encode_adaptive(mel[~chunked], slots[~chunked], easy=easy))
        order = torch.cat([chunked.nonzero()[:, 0], (~chunked).nonzero()[:, 0]]).argsort()
        encoded, reach = (torch.cat(both)[order] for both in zip(*parts, strict=True))
        return encoded, reach

    def _encode_adaptive(self, mel: Tensor, slots: Tensor, *, easy: bool) -> tuple[Tensor, Tensor]:
        recipe, encoder, B = self.recipe, self.net.encoder, len(mel)
        caps = torch.full((B,), encoder.config.n_layers * encoder.config.gate_frames)
        if not easy:
            capped = torch.rand(B) < recipe.capped_share
            caps = torch.where(capped, torch.randint(recipe.largest_cap + 1, (B,)), caps)
        noise = recipe.least_noise ** self._hardness()
        whole = encode_whole(encoder, mel, slots=slots, max_lookahead_frames=caps, noise=noise)
        return whole.encoded, whole.soft_reach

    def _encode_chunks(
        self, mel: Tensor, slots: Tensor, lookaheads: Sequence[int], *, easy: bool, layers: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        chunks = torch.tensor(lookaheads[:1] if easy else lookaheads) + 1
        chunk_frames = chunks[torch.randint(len(chunks), (len(mel),))]
        encoded, _ = self.net.encoder.step(
            mel, None, slots=slots, chunk_frames=chunk_frames, left_frames=self._memory(len(mel)), outputs=layers
        )
        frame, chunk = torch.arange(encoded.shape[1]), chunk_frames[:, None]
        last = -(-slots // SUBSAMPLING_FACTOR)[:, None] - 1
        return encoded, torch.minimum(frame // chunk * chunk + chunk - 1, last).float().to(self.device)

    def _memory(self, rows: int) -> Tensor:
        """How many frames before its chunk a frame sees, ``int64[rows]``."""
        short = torch.rand(rows) < self.recipe.short_memory_share
        drawn = torch.randint(2, self.recipe.longest_short_memory + 1, (rows,))
        return torch.where(short, drawn, self.net.encoder.config.left_context_frames)

    def _mean_reach(self, reach: Tensor, slots: Tensor) -> Tensor:
        """Mean look-ahead of the frames, for the log."""
        frame = torch.arange(reach.shape[1])
        real = (frame < -(-slots // SUBSAMPLING_FACTOR)[:, None]).to(reach.device)
        return ((reach.detach() - frame.to(reach.device)) * real).sum() / real.sum()

    def _hardness(self) -> float:
        """From 0, when the gates are as random as can be, to 1."""
        since = self.step - self.recipe.latency_from_step
        return min(1.0, max(0.0, since / self.recipe.hardening_steps))

    @torch.no_grad()
    def _update_average(self) -> None:
        # The average of a young run forgets its random start quickly.
        keep = min(self.recipe.ema, self.step / (self.step + 10))
        for name, tensor in self.net.state_dict().items():
            self.average[name].lerp_(tensor, 1 - keep)

    def averaged(self) -> RecognizerNet:
        """A copy of the network with the averaged weights, for validation and export."""
        net = RecognizerNet(self.net.config).to(self.device)
        net.load_state_dict(self.average)
        net.eval().requires_grad_(False)
        return net

    def save(self, file: Path) -> None:
        """Writes everything that resuming needs; an interrupted write leaves the old file."""
        state = {
            "net": self.net.state_dict(),
            "phone_head": self.phone_head.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "recipe": asdict(self.recipe),
            "config": self.net.config.to_dict(),
        }
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)

    def start_from(self, model: Path) -> None:
        """Takes the weights of a model folder; the optimiser starts anew, behind the recipe's first stages."""
        tensors = load_file(model / "model.safetensors")
        gates = {name: tensor for name, tensor in self.net.checkpoint().items() if ".lookahead." in name}
        self.net.load_checkpoint(gates | tensors)  # a model without gates gets new ones
        self.average = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        self.step = max(self.recipe.easy_steps, self.recipe.rnnt_from_step)

    def load(self, file: Path) -> None:
        """Goes on from a file that :meth:`save` wrote."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.phone_head.load_state_dict(state["phone_head"])
        self.average = state["average"]
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        self.step = state["step"]


class PhoneHead(nn.Module):
    """Hears sounds in a layer's frames; a frame of 80 ms has room for four.

    Args:
        width: Of the layer.
    """

    _PER_FRAME = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, self._PER_FRAME * (len(PHONES) + 1))

    def loss(self, layer: Tensor, frames: Tensor, phones: Tensor, phone_lengths: Tensor) -> Tensor:
        """CTC loss a sound.

        Args:
            layer: ``[B, T, width]``.
            frames: ``int64[B]`` on the host, real frames.
            phones: ``int64[B, V]``, zero-padded.
            phone_lengths: ``int64[B]`` on the host; rows of 0 do not count.
        """
        blank = len(PHONES)
        scores = self.scores(self.norm(layer)).float().view(len(layer), -1, blank + 1).log_softmax(-1).transpose(0, 1)
        slots = self._PER_FRAME * frames
        losses = F.ctc_loss(scores, phones, slots, phone_lengths, blank, reduction="none", zero_infinity=True)
        noted = (phone_lengths > 0).to(losses.device)
        return (losses * noted).sum() / phone_lengths.sum().clamp(min=1)


def word_beginnings(tokenizer: Path) -> Tensor:
    """``bool[vocab_size]``: which pieces of a SentencePiece model begin a word."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return torch.tensor([pieces.id_to_piece(i).startswith(WORD_BOUNDARY) for i in range(pieces.get_piece_size())])


def _average_gradients(net: nn.Module) -> None:
    """Makes the gradients of all processes the same; one message for all of them."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def _initialise(net: RecognizerNet) -> None:
    """Lets the input through at the start.

    PyTorch's default initialisation shrinks a signal at every convolution and adds random constants, until speech
    is a hundredth of what leaves the sub-sampling; the search for first alignments then takes many times as long.
    Here the sub-sampling keeps the variance (He et al. 2015), and its first layer starts as if its input were
    standardised.
    """
    front = net.encoder.pre_encode
    for module in front.conv:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(front.out.weight, nonlinearity="linear")
    nn.init.zeros_(front.out.bias)
    first = front.conv[0]
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    first.weight.div_(MEL_SCALE)
    first.bias.sub_(MEL_MEAN * first.weight.sum((1, 2, 3)))


def spec_augment(mel: Tensor, slots: Tensor, recipe: Recipe) -> Tensor:
    """Replaces bands of frequency and time by each utterance's mean; returns a copy."""
    mel = mel.clone()
    B, S, bins = mel.shape
    for row in range(B):
        real = mel[row, : int(slots[row])]
        mean = real.mean()
        for _ in range(recipe.freq_masks):
            width = int(torch.randint(recipe.freq_width + 1, ()))
            start = int(torch.randint(bins - width + 1, ()))
            real[:, start : start + width] = mean
        for _ in range(recipe.time_masks):
            width = int(torch.randint(int(recipe.time_share * len(real)) + 1, ()))
            start = int(torch.randint(len(real) - width + 1, ()))
            real[start : start + width] = mean
    return mel


def flat_alignment(batch: Batch, blank: int) -> Tensor:
    """A first guess at which piece each frame belongs to, ``int64[B, T]``; -1 in the padding.

    The pieces share the frames between the first and the last loud one evenly; the rest is blank. This is the
    flat start of hidden-Markov recognisers (Young et al., The HTK Book, §3.2.2).
    """
    B, S, _ = batch.mel.shape
    aligned = torch.full((B, S // SUBSAMPLING_FACTOR), -1)
    for row in range(B):
        frames = -(-int(batch.slots[row]) // SUBSAMPLING_FACTOR)
        level = batch.mel[row, : frames * SUBSAMPLING_FACTOR].mean(1).view(frames, -1).mean(1)
        loud = (level > (level.amax() + level.amin()) / 2).nonzero()[:, 0]
        first, last = (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (0, frames)
        pieces = int(batch.target_lengths[row])
        position = torch.arange(last - first) * pieces // (last - first)
        aligned[row, :frames] = blank
        aligned[row, first:last] = batch.targets[row, :pieces][position] if pieces else blank
    return aligned


def run(
    train: Annotated[list[Path], typer.Option(help="Packed set; may be given several times.")],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model with the config's number of pieces.")],
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and logs.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps of the whole run.")] = 6000,
    decay_steps: Annotated[int, typer.Option(help="Steps over which the learning rate falls to zero.")] = 1500,
    valid: Annotated[list[Path] | None, typer.Option(help="Manifest to validate on.")] = None,
    valid_every_steps: int = 500,
    sentences: Annotated[
        list[Path] | None, typer.Option(help="Text for the predictor, as synthesize's --pairs.")
    ] = None,
    exclude: Annotated[list[Path] | None, typer.Option(help="File whose sentences are left out of the text.")] = None,
    noise: Annotated[Path | None, typer.Option(help="Manifest of noises and impulse responses.")] = None,
    init: Annotated[Path | None, typer.Option(help="Model folder whose weights a new run starts from.")] = None,
    gates: Annotated[int, typer.Option(help="Next frames that each layer may wait for; 0: fixed chunks.")] = 0,
    width: Annotated[int, typer.Option(help="Width of the encoder; a multiple of 4.")] = 256,
    lookahead_frames: Annotated[
        list[int] | None, typer.Option(help="Look-aheads of a model for comparison; may be given several times.")
    ] = None,
    latency_from_step: Annotated[int, typer.Option(help="Step from which delay costs and gates harden.")] = 2600,
    latency_weight: Annotated[float, typer.Option(help="Nats that a frame of delay costs where a word is told.")] = 0.0,
    chunked_share: Annotated[float, typer.Option(help="Share of utterances encoded in chunks; with gates.")] = 0.0,
    hardening_steps: Annotated[int, typer.Option(help="Steps in which gates become hard; with gates.")] = 3000,
    batch_s: Annotated[float, typer.Option(help="Padded seconds of audio in a batch.")] = Recipe.batch_s,
    peak_lr: Annotated[float, typer.Option(help="Learning rate between warm-up and decay.")] = Recipe.peak_lr,
    altered_share: Annotated[
        float, typer.Option(help="Share of utterances that are augmented.")
    ] = Recipe.altered_share,
    spliced_share: Annotated[
        float, typer.Option(help="Share of utterances with cuts that are spliced.")
    ] = Recipe.spliced_share,
    phone_weight: Annotated[
        float, typer.Option(help="Of the loss on the sounds that a middle layer is asked for; see training.asr.phones.")
    ] = Recipe.phone_weight,
    misled_share: Annotated[
        float, typer.Option(help="Share of the predictor's history that is drawn at random.")
    ] = Recipe.misled_share,
    short_memory_share: Annotated[
        float, typer.Option(help="Share of utterances whose frames see few frames before them.")
    ] = Recipe.short_memory_share,
    masks: Annotated[int, typer.Option(help="SpecAugment's masks in time, and in frequency.")] = Recipe.time_masks,
    threads: int = 2,
    device: str = "cpu",
    bf16: Annotated[bool, typer.Option(help="Matrix products in bf16.")] = False,
) -> None:
    """Trains, validates now and then, and leaves ``out/last.pt``."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    if "RANK" in os.environ:  # several processes under torchrun
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    recipe = Recipe(
        latency_weight=latency_weight,
        latency_from_step=latency_from_step,
        hardening_steps=hardening_steps,
        chunked_share=chunked_share,
        batch_s=batch_s,
        peak_lr=peak_lr,
        altered_share=altered_share,
        spliced_share=spliced_share,
        phone_weight=phone_weight,
        misled_share=misled_share,
        short_memory_share=short_memory_share,
        freq_masks=masks,
        time_masks=masks,
    )
    config = small_model_config(gates, width, lookahead_frames or ())
    trainer = Trainer(config, recipe, device, autocast=bf16, telling=word_beginnings(tokenizer))
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "last.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        logger.info("resumed at step %d", trainer.step)
    elif init is not None:
        trainer.start_from(init)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    entries = read_packed(train)
    logger.info("%d utterances, %.1f h", len(entries), sum(e.length for e in entries) / 16000 / 3600)
    if phone_weight and (gates or not any(entry.phones for entry in entries)):
        raise typer.BadParameter("needs a model without gates, and sets with sounds: run training.asr.phones first")
    augmenter = Augmenter(noise)

    text = None
    if sentences:
        usable = usable_sentences(sentences, exclude or [])
        text = text_batches(usable, tokenizer, rows=recipe.text_rows, seed=recipe.seed + trainer.step + rank)
        logger.info("%d sentences of text", len(usable))

    def loader(*, easy: bool) -> DataLoader[Batch]:
        batches = TrainingBatches(
            [e for e in entries if e.length <= recipe.easy_s * 16000] if easy else entries,
            tokenizer,
            config.features,
            None if easy else augmenter,
            batch_s=recipe.easy_batch_s if easy else recipe.batch_s,
            seed=recipe.seed + trainer.step + 1_000_003 * rank,
            altered_share=recipe.altered_share,
            spliced_share=0.0 if easy else recipe.spliced_share,
        )
        return DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=8, worker_init_fn=_quiet_worker)

    scale = functools.partial(lr_scale, warmup_steps=recipe.warmup_steps, steps=steps, decay_steps=decay_steps)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped from outside: as by Ctrl-C
    try:
        for easy, end in ((True, min(recipe.easy_steps, steps)), (False, steps)):
            if trainer.step < end:
                every = valid_every_steps if rank == 0 else None  # one process saves and validates
                _loop(trainer, loader(easy=easy), text, end, scale, checkpoint, tokenizer, valid or [], every)
    except KeyboardInterrupt:
        if rank == 0:
            trainer.save(checkpoint)
        logger.info("stopped at step %d; the same command goes on from there", trainer.step)


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)


def _loop(
    trainer: Trainer,
    loader: DataLoader[Batch],
    text: Iterator[tuple[Tensor, Tensor]] | None,
    end: int,
    schedule: Callable[[int], float],
    checkpoint: Path,
    tokenizer: Path,
    valid: list[Path],
    valid_every_steps: int | None,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    sums: dict[str, list[float]] = {}
    heard_s, begun = 0.0, time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), transient=True) as progress:
        bar = progress.add_task("training", total=end, completed=trainer.step)
        for batch in loader:
            if trainer.step >= end:
                break
            scale = schedule(trainer.step)
            for name, value in trainer.train_step(batch, scale, next(text) if text else None).items():
                sums.setdefault(name, []).append(value)
            heard_s += batch.audio_s
            progress.update(bar, completed=trainer.step)
            if trainer.step % 50 == 0:
                figures = " ".join(f"{name} {np.mean(values):.3f}" for name, values in sums.items())
                speed = heard_s / (time.monotonic() - begun)
                logger.info("step %d lr×%.2f %s %.0f× real time", trainer.step, scale, figures, speed)
                sums, heard_s, begun = {}, 0.0, time.monotonic()
            if valid_every_steps and (trainer.step % valid_every_steps == 0 or trainer.step == end):
                trainer.save(checkpoint)
                _validate(trainer, tokenizer, valid)
                begun = time.monotonic()


def _validate(trainer: Trainer, tokenizer: Path, manifests: list[Path]) -> None:
    """Logs the word error rates of the averaged weights."""
    if not manifests:
        return
    # The heads are scored through the sessions that serve people; a young transducer has nothing to say yet.
    heads: tuple[Decoder, ...] = ("rnnt", "ctc")
    heads = heads if trainer.step > trainer.recipe.rnnt_from_step else heads[1:]
    recognizer = Recognizer(trainer.averaged(), tokenizer.read_bytes())
    for speech in read_sets(manifests, limit=80):
        scores = [score(recognizer, speech, config) for config in session_configs(recognizer, heads)]
        figures = " ".join(f"{s.decoder} {percent(s.errors.wer)}%" for s in scores)
        logger.info("step %d WER on %s: %s", trainer.step, speech.name, figures)
        for problem in scores[0].problems:
            logger.warning("left out: %s", problem)


if __name__ == "__main__":
    typer.run(run)
