"""Turns a training checkpoint into a model folder with a card whose scores were measured on what is in the folder.

python -m training.asr.export --run runs/first --tokenizer tokenizer.model --notes training/asr/CARD.md \
        --manifest dev/kokoro.jsonl --manifest dev/libri_other.jsonl --out models/en-small
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from client.evaluate import read_sets, score, session_configs
from client.report import draw_curve, markdown_table, require_curve
from models.checkpoint import load_recognizer, save_checkpoint
from models.config import ModelConfig
from models.folder import WEIGHTS, read_tensors, require_fit
from models.recognizer import RecognizerNet
from training.asr.train import CHUNK_LOOKAHEADS

CURVE = "curve.svg"
SCORES_MARK = "<!-- scores -->"


def averaged(run: Path, *, chunked: bool = False) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The shape of a run's model and its averaged weights, under the network's own names.

    Args:
        run: Folder of a training run.
        chunked: Whether a model with gates does without them and looks ahead in chunks, as it was trained to with
            ``--chunked-share``.
    """
    state = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
    config, weights = ModelConfig.from_dict(state["config"]), state["average"]
    if not chunked:
        return config, weights
    encoder = replace(config.encoder, gate_frames=0, lookahead_frames=CHUNK_LOOKAHEADS)
    return replace(config, encoder=encoder), {n: tensor for n, tensor in weights.items() if ".lookahead." not in n}


class Other(NamedTuple):
    """A model whose weights are averaged with those of a run, and its share of the mean, 0 to 1.

    Weights between those that a run began with and those that it ended with can be better than either (Wortsman et al.,
    "Robust fine-tuning of zero-shot models", arXiv 2109.01903, §3).
    """

    folder: Path
    share: float


def export(
    run: Path, tokenizer: Path, out: Path, card: str, *, chunked: bool = False, other: Other | None = None
) -> None:
    """Writes the averaged weights of ``run/last.pt`` in bf16.

    Args:
        run: Folder of a training run.
        tokenizer: The SentencePiece model that it was trained with.
        out: The model folder.
        card: Its model card, Markdown.
        chunked: As in :func:`averaged`.
        other: What to average them with.

    Raises:
        DragomanError: ``bad_checkpoint`` if the other model is of another shape.
    """
    config, average = averaged(run, chunked=chunked)
    net = RecognizerNet(config)
    net.load_state_dict(average)
    weights = net.checkpoint()
    if other is not None:
        theirs = read_tensors(other.folder / WEIGHTS)
        require_fit(weights, theirs, f"the weights in {other.folder}")
        weights = {name: tensor.lerp(theirs[name].to(tensor), other.share) for name, tensor in weights.items()}
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_checkpoint(out, config, weights, tokenizer.read_bytes(), card)


def run_export(
    run: Annotated[Path, typer.Option(help="Folder of a training run.")],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model that it was trained with.")],
    notes: Annotated[Path, typer.Option(help=f"Text of the card; {SCORES_MARK} becomes the table of scores.")],
    out: Annotated[Path, typer.Option(help="The model folder.")],
    manifest: Annotated[list[Path], typer.Option(help="What to score; may be given several times.")],
    chunked: Annotated[bool, typer.Option(help="Leave gates out and look ahead in chunks.")] = False,
    mean_with: Annotated[Path | None, typer.Option(help="Model folder to average the weights with.")] = None,
    mean_share: Annotated[float, typer.Option(min=0, max=1, help="Its share.")] = 0.5,
    threads: int = 2,
) -> None:
    """Exports, scores every manifest with both heads, the transducer at every look-ahead, and writes card and curve.

    A recording that cannot be read is named, and leaves the card without scores.
    """
    require_curve(out.parent / CURVE)
    torch.set_num_threads(threads)
    other = None if mean_with is None else Other(mean_with, mean_share)
    export(run, tokenizer, out, notes.read_text(encoding="utf-8"), chunked=chunked, other=other)
    recognizer = load_recognizer(out)
    configs = session_configs(recognizer, ["ctc"])
    configs += session_configs(recognizer, ["rnnt"], recognizer.lookaheads_ms)
    scores = [score(recognizer, speech, config) for speech in read_sets(manifest) for config in configs]
    if problems := sorted({problem for s in scores for problem in s.problems}):
        typer.echo("\n".join(problems), err=True)
        raise typer.Exit(2)
    (run / "scores.json").write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n", encoding="utf-8")
    draw_curve(scores, recognizer.name, out / CURVE)
    table = markdown_table(scores)
    card = (out / "README.md").read_text(encoding="utf-8").replace(SCORES_MARK, table)
    (out / "README.md").write_text(card, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    typer.run(run_export)
