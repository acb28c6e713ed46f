"""Word error rates of a network in training, read from a manifest in whole utterances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jiwer
import sentencepiece
import torch

from models.config import SUBSAMPLING_FACTOR
from models.recognizer import RecognizerNet
from streaming.features import FrontEnd
from streaming.transducer import CtcSearch, TransducerSearch
from training.asr.data import collate
from training.asr.prepare import read_audio
from training.asr.text import normalize_transcript


def word_error_rates(
    net: RecognizerNet,
    tokenizer: Path,
    manifest: Path,
    decoders: Sequence[str] = ("rnnt", "ctc"),
    *,
    limit: int | None = None,
    batch: int = 16,
) -> dict[str, float]:
    """Word error rates by decoder at the model's default look-ahead.

    Args:
        net: The network, in evaluation mode.
        tokenizer: Its SentencePiece model.
        manifest: JSON lines with ``audio`` (relative to the manifest) and ``text``.
        decoders: Which heads to score.
        limit: The first so many utterances only.
        batch: Utterances decoded together.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    items = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()][:limit]
    items.sort(key=lambda item: float(item["duration_s"]))
    kinds: dict[str, type[TransducerSearch | CtcSearch]] = {"rnnt": TransducerSearch, "ctc": CtcSearch}
    searches = {name: kinds[name](net) for name in decoders}
    front_end = FrontEnd(net.config.features)
    references: list[str] = []
    hypotheses: dict[str, list[str]] = {name: [] for name in searches}
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        audio = [read_audio(manifest.parent / item["audio"]).astype("float32") / 32768 for item in part]
        features = collate(audio, [[0]] * len(part), front_end)
        chunk = torch.full((len(part),), net.config.encoder.lookahead_frames[0] + 1)
        with torch.no_grad():
            encoded, _ = net.encoder.step(
                features.mel.to(next(net.parameters()).device), None, slots=features.slots, chunk_frames=chunk
            )
        lengths = (-(-features.slots // SUBSAMPLING_FACTOR)).tolist()
        references += [normalize_transcript(item["text"]) or "" for item in part]
        for name, search in searches.items():
            tokens, _ = search.step(encoded, lengths, search.init_state(len(part)))
            hypotheses[name] += [pieces.decode([token.piece for token in row]) for row in tokens]
    return {name: float(jiwer.wer(references, texts)) for name, texts in hypotheses.items()}
