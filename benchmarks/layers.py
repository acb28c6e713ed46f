"""Whether a translator drafts for itself with some of its layers left out: what that would bring, and what it brings.

    python -m benchmarks.layers
    python -m benchmarks.layers --deep 24

The model translates a talk; upon what it has written, layers are left out one after another
(:func:`streaming.draft_model.search_layers`). For each number of layers stand the share of the model's own tokens that
it still chooses, what a forward then costs of a whole one, measured, and the gain that follows from both. The best set
then drafts another part of the talk, beside a token at a time.

With ``--deep``, the model has that many layers and random weights: what a forward costs is then that of a deep model;
how much it still chooses is not that of a trained one.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.speculation import TALK, talks_of, translate
from models.llm import Llm
from models.llm_config import LlmConfig
from models.translator import TranslationConfig, Translator, load_translator
from streaming.draft_model import DraftModel, Listener, Skipped, search_layers
from streaming.speculation import Speculation


def deepened(translator: Translator, layers: int) -> Translator:
    """A translator of random weights with the same tokenizer and so many layers, which writes after every word."""
    config = LlmConfig(**{**vars(translator.llm.config), "n_layers": layers, "windows": ()})
    torch.manual_seed(0)
    llm = Llm(config)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(0.0, config.d_model**-0.5)
    always = TranslationConfig(**{**vars(translator.config), "read_threshold": 0.0})
    return Translator(llm.freeze(), translator.tokenizer, always, name=f"{layers} random layers")


def forward_s(llm: Llm, *, keys: int = 128, repeats: int = 30) -> float:
    """Processor seconds of reading one token, the median."""
    cache = llm.init_state(1, capacity=keys + 16)
    cache.lengths += keys
    cache.next_positions += keys
    seconds, token, one = [], torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    for _ in range(repeats):
        begun = time.thread_time()
        llm.logits(llm.hidden(token, one, cache)[0]).argmax(-1).tolist()
        seconds.append(time.thread_time() - begun)
    return float(np.median(seconds))


def overhead(llm: Llm) -> float:
    """What of a forward does not go with its layers: from one with half of them."""
    n = llm.config.n_layers
    whole, half = forward_s(llm), forward_s(llm.without(range(n // 2)))
    return max(0.0, 1 - (whole - half) / whole * n / (n // 2))


def measure(translator: Translator, texts: list[str], *, target: str, words: int, tried_words: int) -> dict[str, Any]:
    """What the search finds, and what its best set brings.

    Args:
        translator: An interleaved one of three layers or more.
        texts: Sentences to read.
        target: Language to write.
        words: That the model translates for the search.
        tried_words: That are then drafted.
    """
    [talk] = talks_of(texts, 1, words + tried_words)
    how, listener = {"target": target, "latency": "medium"}, Listener(words)
    translate(translator, [talk[:words]], lambda: Speculation([listener], fixed=True), **how)
    found = search_layers(translator, listener.writes, overhead=overhead(translator.llm))
    best = max(found, key=lambda one: one.speedup)
    views: list[DraftModel] = []

    def drafted() -> Speculation:
        views.append(DraftModel(translator.llm.without(best.layers), translator, name="fewer layers"))
        return Speculation([views[-1]], max_tokens=max(1, best.tokens), fixed=True)

    plain = translate(translator, [talk[words:]], lambda: None, **how)
    run = translate(translator, [talk[words:]], drafted, **how)
    return {
        "model": translator.name,
        "layers": translator.llm.config.n_layers,
        "tokens": sum(len(one.tokens) - one.begin for one in listener.writes),
        "search": [vars(one) for one in found],
        "best": list(best.layers),
        "identical": run.ids == plain.ids,
        "forward_ratio": plain.forwards / run.forwards,
        "draft_forwards": views[-1].forwards / run.forwards,
        "cpu_ratio": plain.cpu_seconds / run.cpu_seconds,
        "load_average": os.getloadavg()[0],
    }


def report(found: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{found['model']}, {found['tokens']} tokens of its own",
        "left out  chosen still  cost  draft  tokens/time",
    ]
    for one in (Skipped(**fields) for fields in found["search"]):
        row = f"{len(one.layers):8} {one.matches:13.2f} {one.cost:5.2f} {one.tokens:6} {one.speedup:12.2f}"
        lines.append(f"{row}   {' '.join(map(str, one.layers))}")
    left_out = " ".join(map(str, found["best"]))
    lines.append(
        f"layers {left_out} left out, drafts of a fixed length: forwards {found['forward_ratio']:.2f} times fewer,"
        f" {found['draft_forwards']:.2f} of the draft's for each, processor time {found['cpu_ratio']:.2f} times less,"
        f" identical: {found['identical']}   load average {found['load_average']:.1f}"
    )
    return "\n".join(lines)


def main(
    translator: Annotated[Path | None, typer.Option(help="Model folder; the embedded one by default.")] = None,
    deep: Annotated[
        int, typer.Option(min=0, help="Layers of random weights in its place; 0 for the model itself.")
    ] = 0,
    to: Annotated[str, typer.Option(metavar="LANGUAGE", help="Language to write.")] = "es",
    words: Annotated[int, typer.Option(min=1, help="Words to translate for the search.")] = 150,
    tried_words: Annotated[int, typer.Option(min=1, help="Words to translate with the best set.")] = 150,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search the layers that a translator can draft without."""
    torch.set_num_threads(1)
    model = load_translator(translator)
    model = deepened(model, deep) if deep else model
    texts = TALK.read_text(encoding="utf-8").splitlines()
    found = measure(model, texts, target=to, words=words, tried_words=tried_words)
    typer.echo(json.dumps(found) if as_json else report(found))


if __name__ == "__main__":
    typer.run(main)
