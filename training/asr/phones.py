"""Writes down how packed sentences sound: a target for the lower layers, below spelling.

    python -m training.asr.phones --packed packed/real --packed packed/synth

A model that has heard ten hours of real speech many times knows its sentences by heart, yet ten hours are plenty to
learn forty sounds from. So training asks the middle of the encoder for the sounds (``--phone-weight``), as hierarchical
CTC does (Krishna et al., arXiv 1807.06234), and leaves how they are spelled to the layers above. The head that answers
is not a part of the model.

The command adds ``phones`` to each line of a packed set's index: the pronunciation of eSpeak NG's American English, one
symbol of `PHONES` a sound, whoever the speaker is.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Annotated, Final

import typer

from training.asr.kokoro import respell
from training.asr.prepare import read_index, write_index
from training.asr.voices import run_program

__all__ = ["PHONES", "phones_of", "pronounce", "pronounce_packed"]

#: Every sound that there is; its place is its number.
PHONES: Final = "pbtdkɡfvθðszʃʒhmnŋlɹwjʤʧiɪʊuɛɔɑæʌəɜIWAYO"
_COMMAND: Final = ("espeak-ng", "--ipa", "--tie=^", "-q", "-v", "en-us", "--stdin")
_TEXTS: Final = 500  # that one process of eSpeak NG reads
_SAME: Final = str.maketrans({"T": "t", "ᵊ": "ə", "e": "ɛ", "a": "æ", "o": "O", "ɒ": "ɑ", "y": "u"})


def phones_of(phonemes: str) -> str:
    """Phonemes of eSpeak NG as symbols of `PHONES`; stress, length and spaces are left out."""
    return "".join(x for x in respell(phonemes, british=False).translate(_SAME) if x in PHONES)


def pronounce(texts: Sequence[str]) -> list[str]:
    """The sounds of each text, symbols of `PHONES`.

    Args:
        texts: As `client.normalize.normalize_transcript` writes them: one clause each.

    Raises:
        SpeechError: eSpeak NG fails.
    """
    spoken = run_program(list(_COMMAND), "\n\n".join(f"{text}." for text in texts)).decode().splitlines()
    if len(spoken) == len(texts):
        return [phones_of(line) for line in spoken]
    if len(texts) == 1:
        return [phones_of(" ".join(spoken))]
    half = len(texts) // 2  # one of them was taken for two clauses
    return pronounce(texts[:half]) + pronounce(texts[half:])


def pronounce_packed(packed: Path, workers: int) -> int:
    """Writes sounds into the index of a packed set; returns how many utterances have them."""
    lines = read_index(packed)
    texts = sorted({line["text"] for line in lines})
    parts = [texts[i : i + _TEXTS] for i in range(0, len(texts), _TEXTS)]
    with ThreadPoolExecutor(workers) as pool:
        sounds = dict(zip(texts, chain.from_iterable(pool.map(pronounce, parts)), strict=True))
    for line in lines:
        line["phones"] = sounds[line["text"]]
    write_index(packed, lines)
    return sum(bool(line["phones"]) for line in lines)


def main(
    packed: Annotated[list[Path], typer.Option(help="Packed set; may be given several times.")], workers: int = 2
) -> None:
    """Notes how the sentences of packed speech sound."""
    for folder in packed:
        typer.echo(f"{folder}: {pronounce_packed(folder, workers)} utterances with their sounds")


if __name__ == "__main__":
    typer.run(main)
