"""Teaches a published language model to interpret: low-rank adapters, trained on interleaved sequences and merged.

    python -m training.translation.lora --base Qwen3-1.7B --aligned corpus/aligned.tsv --out models/qwen3-interpreter \
        --steps 3000 --device cuda --bf16

The sequences are those of ``training.translation.data``, in the published model's own ids, behind EAST's prompt in its
chat template. Two special tokens are added, ``<|end-of-read|>`` and ``<|end-of-write|>``; their rows of the embedding
and of the output matrix are the only ones that change. What leaves is a model folder that
:func:`models.translator.load_translator` reads, adapters merged.

Sources: Hu et al., "LoRA" (arXiv 2106.09685); Fu et al., EAST (arXiv 2504.09570), §3.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import peft
import tokenizers
import torch
import transformers
import typer
from torch import Tensor

from models.folder import CONFIG, read_object, required_file
from models.tokenizer import HUGGING_FACE, HuggingFaceTokenizer
from models.translator import EAST_PROMPT, END_OF_READ, END_OF_WRITE, NAMES, TranslationConfig
from streaming.errors import DragomanError
from training.schedule import lr_scale
from training.translation.data import (
    PROMPT,
    WRITE,
    Batch,
    Encoder,
    Interleaved,
    Mix,
    RecogniserErrors,
    Sentence,
    Writer,
    read_recognised,
    read_sentences,
)
from training.translation.loss import logits_loss

logger = logging.getLogger(__name__)

#: What a folder has beside the tokenizer and the weights that says how the model is talked to, and on what terms.
_COMPANIONS = ("tokenizer_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "NOTICE")
#: Batches are cut from so many sequences at a time, ordered by length.
_POOL = 2048


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a run.

    Attributes:
        rank: Of the adapters of all layers' matrices.
        alpha: They are scaled by ``alpha / rank``.
        batch_ids: Padded ids of a batch.
        source_weight: Of the cross-entropy of the source; what is written has 1.
        max_ids: Sequences are not longer, the prompt included.
    """

    seed: int = 1
    rank: int = 32
    alpha: int = 64
    dropout: float = 0.05
    batch_ids: int = 4096
    peak_lr: float = 1e-4
    warmup_steps: int = 50
    clip_norm: float = 1.0
    source_weight: float = 0.1
    max_ids: int = 400


# ------------------------------------------------------------------------------------------------- the two symbols


def add_symbols(base: Path, out: Path) -> HuggingFaceTokenizer:
    """Writes a model's tokenizer with the two symbols into a folder, with what says how the model is talked to.

    Raises:
        DragomanError: ``model_not_found`` without a ``tokenizer.json``; ``unsupported_model`` without a chat template.
    """
    file = required_file(base, HUGGING_FACE, "a published model is tuned with its tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(symbol, special=True, normalized=False) for symbol in (END_OF_READ, END_OF_WRITE)]
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / HUGGING_FACE))
    for name in _COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    made = HuggingFaceTokenizer(out)
    if made.chat is None:
        raise DragomanError(
            "unsupported_model", f"{base} has no chat template, which EAST's prompt goes into; take an instructed model"
        )
    return made


def make_rows(model: Any, symbols: tuple[int, ...], seed: int) -> None:
    """Gives the symbols rows of their own, drawn around the mean of the others and as far from it as those are.

    Rows that are alike would make two symbols that mean the opposite start out as the same.
    """
    if (needed := max(symbols) + 1) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(needed, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for matrix in matrices.values():
        known = matrix.data[: min(symbols)].float()
        noise = torch.randn(len(symbols), matrix.shape[1], generator=generator).to(known.device)
        matrix.data[list(symbols)] = (known.mean(0) + known.std(0) * noise).to(matrix.dtype)


# ------------------------------------------------------------------------------------------------------- sequences


def endless(sentences: dict[str, list[Sentence]], writer: Writer, seed: int) -> Iterator[Interleaved]:
    """Sequences of all languages in turn, pass after pass, each drawn anew."""
    for k in itertools.count():
        passes = [
            writer.one_pass(some, random.Random(f"{seed} {k} {language}")) for language, some in sentences.items()
        ]
        while passes:
            for one in list(passes):
                if (sequence := next(one, None)) is None:
                    passes.remove(one)
                else:
                    yield sequence


def batched(sequences: Iterable[Interleaved], batch_ids: int, rng: random.Random) -> Iterator[Batch]:
    """Batches of sequences of similar length, of at most so many padded ids, or of one sequence."""
    stream = iter(sequences)
    while pool := sorted(itertools.islice(stream, _POOL), key=lambda sequence: len(sequence.ids)):
        batches: list[list[Interleaved]] = [[]]
        for sequence in pool:
            if batches[-1] and (len(batches[-1]) + 1) * len(sequence.ids) > batch_ids:
                batches.append([])
            batches[-1].append(sequence)
        rng.shuffle(batches)
        yield from map(_padded, batches)


def _padded(rows: list[Interleaved]) -> Batch:
    length = max(len(row.ids) for row in rows)
    ids = [row.ids + [0] * (length - len(row.ids)) for row in rows]
    kinds = [row.kinds + [PROMPT] * (length - len(row.kinds)) for row in rows]
    return Batch(torch.tensor(ids), torch.tensor(kinds, dtype=torch.uint8))


# -------------------------------------------------------------------------------------------------------- training


class Tuner:
    """A published model with adapters, and their optimiser.

    Args:
        base: Its folder, in Hugging Face's layout with safetensors.
        tokenizer: From :func:`add_symbols`.
        recipe: How it is trained.
        device: ``cpu`` or ``cuda``.
        bf16: Whether weights are kept, and products made, in bf16.
    """

    def __init__(self, base: Path, tokenizer: HuggingFaceTokenizer, recipe: Recipe, device: str, *, bf16: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device, self.bf16 = recipe, device, bf16
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16 if bf16 else torch.float32, use_safetensors=True, local_files_only=True
        )
        end_of_read, end_of_write = tokenizer.id_of(END_OF_READ), tokenizer.id_of(END_OF_WRITE)
        assert end_of_read is not None and end_of_write is not None, "add_symbols has added them"
        self.end_of_read, symbols = end_of_read, (end_of_read, end_of_write)
        make_rows(model, symbols, recipe.seed)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        self.model: Any = peft.get_peft_model(
            model.to(device),
            peft.LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.alpha,
                lora_dropout=recipe.dropout,
                target_modules="all-linear",
                trainable_token_indices={
                    name: list(symbols) for name in ("embed_tokens", *(() if tied else ("lm_head",)))
                },
                task_type="CAUSAL_LM",
            ),
        )
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=recipe.peak_lr, weight_decay=0.0)
        self.step = 0

    def logits(self, ids: Tensor) -> Tensor:
        """``[B, T, vocab_size]`` of ``int64[B, T]``."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            # Padding stands last, where a causal model's real positions do not see it.
            logits: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    def train_step(self, batch: Batch, lr_scale: float) -> dict[str, float]:
        """One optimiser step; returns the losses for each id that is written, in nats."""
        self.model.train()
        kinds = batch.kinds.to(self.device)
        losses = logits_loss(
            self.logits(batch.ids),
            batch.ids.to(self.device),
            kinds,
            self.end_of_read,
            source_weight=self.recipe.source_weight,
            smoothing=0.0,
        )
        written = int((kinds == WRITE).sum())
        (losses.total / written).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.clip_norm)
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.peak_lr * lr_scale
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        sums = {"write": losses.write, "source": losses.source, "decision": losses.decision}
        return {name: value.item() / written for name, value in sums.items()}

    def save(self, out: Path, translation: TranslationConfig, base: str) -> None:
        """Merges the adapters, after which there is nothing left to train, and writes the model."""
        merged: Any = self.model.merge_and_unload()
        merged.save_pretrained(out)
        config = {**read_object(out / CONFIG), "name": out.name, "translation": translation.to_dict()}
        (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        languages = " and ".join(NAMES[language] for language in translation.targets)
        card = _CARD.format(
            name=out.name, base=base, languages=languages, steps=self.step, recipe=json.dumps(asdict(self.recipe))
        )
        (out / "README.md").write_text(card, encoding="utf-8")


_CARD = """# {name}

`{base}`, tuned to interpret from English into {languages} while it reads. The licence is that of `{base}`.

Recipe: `training.translation.lora`, {steps} steps, `{recipe}`. The sequences were made of sentence pairs of Tatoeba
(CC BY 2.0 FR, tatoeba.org and manythings.org/anki), if the corpus is that of `training/translation/README.md`.
"""


def run(
    base: Annotated[Path, typer.Option(help="Folder of the published model, with a chat template.")],
    aligned: Annotated[Path, typer.Option(help="aligned.tsv of training.translation.align.")],
    out: Annotated[Path, typer.Option(help="The model folder.")],
    steps: int = 3000,
    decay_steps: Annotated[int, typer.Option(help="Steps over which the learning rate falls to zero.")] = 1000,
    recognised: Annotated[Path | None, typer.Option(help="Recogniser output, JSON lines: text, recognised.")] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs to read, to try things out.")] = None,
    rank: int = Recipe.rank,
    batch_ids: Annotated[int, typer.Option(help="Padded ids of a batch.")] = Recipe.batch_ids,
    peak_lr: float = Recipe.peak_lr,
    seed: int = Recipe.seed,
    threads: int = 2,
    device: str = "cpu",
    bf16: Annotated[bool, typer.Option(help="Weights and products in bf16.")] = False,
) -> None:
    """Trains, merges and writes the folder; a run that is stopped writes what it has learnt so far."""
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe(seed=seed, rank=rank, alpha=2 * rank, batch_ids=batch_ids, peak_lr=peak_lr)
    sentences, words = read_sentences(aligned, limit)
    if not sentences:
        raise DragomanError("bad_corpus", f"{aligned} has no sentence pairs; make it with training.translation.align")
    translation = TranslationConfig(prompt=EAST_PROMPT, targets=tuple(sorted(sentences)))
    tokenizer = add_symbols(base, out)
    writer = Writer(
        Encoder(tokenizer, translation),
        Mix(max_ids=recipe.max_ids),
        RecogniserErrors(words),
        read_recognised(recognised) if recognised else {},
    )
    tuner = Tuner(base, tokenizer, recipe, device, bf16=bf16)
    batches = batched(endless(sentences, writer, seed), batch_ids, random.Random(seed))
    scale = functools.partial(lr_scale, warmup_steps=recipe.warmup_steps, steps=steps, decay_steps=decay_steps)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped from outside: as by Ctrl-C
    try:
        _loop(tuner, batches, steps, scale)
    except KeyboardInterrupt:
        logger.info("stopped at step %d", tuner.step)
    tuner.save(out, translation, base.name)
    logger.info("%s is written; score it with dragoman eval --translator %s", out, out)


def _loop(tuner: Tuner, batches: Iterator[Batch], steps: int, schedule: Callable[[int], float]) -> None:
    sums: dict[str, float] = {}
    since = 0
    while tuner.step < steps:
        for name, value in tuner.train_step(next(batches), schedule(tuner.step)).items():
            sums[name] = sums.get(name, 0.0) + value
        since += 1
        if tuner.step % 20 == 0 or tuner.step == steps:
            logger.info("step %d %s", tuner.step, " ".join(f"{name} {v / since:.3f}" for name, v in sums.items()))
            sums, since = {}, 0


if __name__ == "__main__":
    typer.run(run)
