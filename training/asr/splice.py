"""Makes new sentences of old recordings: parts of what one speaker has said, cut between words and joined anew.

    python -m training.asr.splice --packed packed/real --model models/en-small

A model that hears ten hours of real speech many times learns their sentences by heart: errors of 9 % on them and of
50 % on other sentences of the same speakers. Parts joined at random are never heard twice. The idea is that of aligned
data augmentation (Lam et al., arXiv 2104.01393) without its dictionary over all speakers: here one voice in one room
stays one voice in one room.

The command writes into a packed set's index where the words of its utterances begin and end, `cuts_samples`; training
splices the utterances that have them (``--spliced-share``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch
import torchaudio
import typer
from numpy.typing import NDArray
from rich.progress import track

from models.checkpoint import load_recognizer
from models.config import FRAME_SAMPLES
from models.recognizer import Recognizer
from streaming.features import FrontEnd
from streaming.text import WORD_BOUNDARY
from training.asr.prepare import SAMPLE_RATE_HZ, read_index, write_index

__all__ = ["Splicer", "align", "cut_packed", "join", "word_cuts"]

_WINDOW_SAMPLES = SAMPLE_RATE_HZ // 50  # over which loudness is taken
_FADE_SAMPLES = SAMPLE_RATE_HZ // 200  # over which a part comes and goes
# CTC of a streaming model tells a word's first piece 0.07 to 0.3 s after the word begins, 0.17 s in the middle.
_BEFORE_PIECE_S = (0.3, 0.05)
_LIKELY_BEFORE_PIECE_S = 0.16
_OFF_S, _OFF_DB = 0.08, 6.0  # so far from there, a moment must be so much quieter
_QUIET_DB = -22.0  # a cut is made where it is so much quieter than the recording as a whole
_MAX_PART_WORDS = 6
_MIN_SPEAKER_WORDS = 40  # of fewer, every splice would have the same

Samples = NDArray[np.float32]


def word_cuts(samples: Samples, frames: Sequence[int], first_pieces: Sequence[int]) -> list[int]:
    """Where a recording begins, its words end and the next begin, and where it ends: one more than there are words.

    Args:
        samples: float32 [n] at 16 kHz.
        frames: Encoder frame of each piece as CTC places it, ascending.
        first_pieces: Number of the first piece of each word.

    Returns:
        Samples, ascending from 0 to n; -1 where two words run into one another and cannot be parted.
    """
    smooth = np.convolve(np.square(samples, dtype=np.float64), np.full(_WINDOW_SAMPLES, 1 / _WINDOW_SAMPLES), "same")
    loudness_db = 10 * np.log10(smooth + 1e-12)
    quiet_db = 10 * np.log10(smooth.mean() + 1e-12) + _QUIET_DB
    cuts = [0]
    for first in first_pieces[1:]:
        cut = _quietest(loudness_db, frames[first] * FRAME_SAMPLES)
        parted = loudness_db[cut] <= quiet_db and cut > max(cuts)
        cuts.append(cut if parted else -1)
    return [*cuts, len(samples)]


def _quietest(loudness_db: NDArray[np.float64], piece: int) -> int:
    """The sample before a word's first piece that is quiet, and not far from where words begin."""
    earliest, latest = (int(piece - s * SAMPLE_RATE_HZ) for s in _BEFORE_PIECE_S)
    at = np.arange(max(0, earliest), min(max(1, latest), len(loudness_db)))
    off = (at - piece + _LIKELY_BEFORE_PIECE_S * SAMPLE_RATE_HZ) / (_OFF_S * SAMPLE_RATE_HZ)
    return int(at[np.argmin(loudness_db[at] + _OFF_DB * np.square(off))]) if len(at) else 0


class Spoken(Protocol):
    """What is known of an utterance."""

    @property
    def text(self) -> str:
        """Its words, with spaces between."""

    @property
    def speaker(self) -> str:
        """Who speaks."""

    @property
    def cuts_samples(self) -> Sequence[int]:
        """See :func:`word_cuts`; empty if unknown."""


class Splicer:
    """Draws splices: other words of an utterance's speaker, about as many as the utterance has.

    Args:
        utterances: All that there are. Who has said fewer than 40 words in those with cuts is not spliced.
    """

    def __init__(self, utterances: Sequence[Spoken]) -> None:
        of_speaker: dict[str, list[int]] = defaultdict(list)
        for number, utterance in enumerate(utterances):
            if utterance.cuts_samples:
                of_speaker[utterance.speaker].append(number)
        self._words = [utterance.text.split() for utterance in utterances]
        self._cuts = [utterance.cuts_samples for utterance in utterances]
        self._pools: dict[int, list[int]] = {}
        for pool in of_speaker.values():
            if sum(len(self._words[number]) for number in pool) >= _MIN_SPEAKER_WORDS:
                self._pools |= dict.fromkeys(pool, pool)

    def __contains__(self, number: int) -> bool:
        return number in self._pools

    def draw(self, number: int, rng: np.random.Generator) -> tuple[str, list[tuple[int, slice]]]:
        """A text, and its parts: the number of an utterance, and which of its samples.

        Args:
            number: Of the utterance in whose place the splice is.
            rng: Source of every choice.
        """
        pool, missing = self._pools[number], len(self._words[number])
        text, parts = list[str](), list[tuple[int, slice]]()
        while missing > 0:
            source = pool[rng.integers(len(pool))]
            cuts = self._cuts[source]
            first, end = self._part(cuts, rng)
            text += self._words[source][first:end]
            parts.append((source, slice(cuts[first], cuts[end])))
            missing -= end - first
        return " ".join(text), parts

    @staticmethod
    def _part(cuts: Sequence[int], rng: np.random.Generator) -> tuple[int, int]:
        """Numbers of two cuts where words can be parted, with a few words between them if there are such."""
        places = [i for i, cut in enumerate(cuts) if cut >= 0]
        first = int(rng.integers(len(places) - 1))
        wanted = places[first] + int(rng.integers(1, _MAX_PART_WORDS + 1))
        return places[first], next((place for place in places[first + 1 :] if place >= wanted), places[-1])


def join(parts: Sequence[Samples]) -> Samples:
    """Puts recordings end to end; around each joint 5 ms fade out and in, so that it does not click."""
    faded = []
    for i, part in enumerate(parts):
        part, n = part.copy(), min(_FADE_SAMPLES, len(part) // 2)
        ramp = np.linspace(0.0, 1.0, n, dtype=np.float32)
        if i > 0:
            part[:n] *= ramp
        if i < len(parts) - 1:
            part[len(part) - n :] *= ramp[::-1]
        faded.append(part)
    return np.concatenate(faded)


@torch.inference_mode()
def align(recognizer: Recognizer, samples: Samples, text: str) -> list[int] | None:
    """The cuts of an utterance, by CTC at the model's largest look-ahead; None if CTC has no room for the text.

    Args:
        recognizer: A model with a CTC head that looks ahead in chunks.
        samples: float32 [n] at 16 kHz.
        text: What is said, in the model's spelling.
    """
    config, net, pieces = recognizer.config, recognizer.net, recognizer.tokenizer.encode(text)
    assert net.ctc_decoder is not None
    front_end = FrontEnd(config.features)
    mel, slots, _ = front_end.step(samples, front_end.init_state(), last=True)
    chunk_frames = torch.tensor([max(config.encoder.lookahead_frames) + 1])
    encoded, _ = net.encoder.step(mel.flatten(0, 1)[None], None, slots=torch.tensor([slots]), chunk_frames=chunk_frames)
    scores = net.ctc_decoder(encoded).float().log_softmax(-1)
    repeats = sum(a == b for a, b in zip(pieces, pieces[1:], strict=False))
    if not pieces or len(pieces) + repeats > scores.shape[1]:
        return None
    blank = config.vocab_size
    path, of_path = torchaudio.functional.forced_align(scores, torch.tensor([pieces]), blank=blank)
    frames = [span.start for span in torchaudio.functional.merge_tokens(path[0], of_path[0], blank=blank)]
    begins = [i for i, id_ in enumerate(pieces) if recognizer.tokenizer.id_to_piece(id_).startswith(WORD_BOUNDARY)]
    return word_cuts(samples, frames, begins)


def cut_packed(packed: Path, recognizer: Recognizer) -> int:
    """Writes cuts into the index of a packed set; returns how many utterances have them."""
    lines, audio = read_index(packed), np.memmap(packed / "audio.i16", np.int16, "r")
    for line in track(lines, description=f"aligning {packed.name}"):
        begin = line["offset_samples"]
        samples = audio[begin : begin + line["n_samples"]].astype(np.float32) / np.float32(32768)
        cuts = align(recognizer, samples, line["text"])
        line["cuts_samples"] = cuts if cuts is not None and len(cuts) == len(line["text"].split()) + 1 else []
    write_index(packed, lines)
    return sum(bool(line["cuts_samples"]) for line in lines)


def main(
    packed: Annotated[list[Path], typer.Option(help="Packed set to cut; may be given several times.")],
    model: Annotated[Path, typer.Option(help="Folder of a model with a CTC head that knows the recordings.")],
    threads: int = 2,
) -> None:
    """Finds where the words of packed speech begin and end."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    recognizer = load_recognizer(model)
    for folder in packed:
        typer.echo(f"{folder}: {cut_packed(folder, recognizer)} utterances cut")


if __name__ == "__main__":
    typer.run(main)
