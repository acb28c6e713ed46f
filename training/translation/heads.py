"""Trains the heads that draft for a translator, on what it writes itself.

    python -m training.translation.heads --pairs corpus/train.tsv --model models/en-esdefr-small

English sentences are joined to short talks, half of them as a recogniser writes them, and the translator interprets
them into its languages at its latencies: the heads have to guess what it would say, and no reference tells that. Its
hidden states are computed once. The heads learn on seven talks of ten; the head for acceptance then learns on two how
often they are right, and the tenth tells how well all that works.

Printed are, for each head, how often its guess is right, and how often if those before it are, which is what counts;
and beside what the head for acceptance says of guesses, how many of them are right.

``model`` gets the file ``heads.safetensors`` (:mod:`models.heads`), made for these weights and no others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from client.normalize import normalize_transcript
from models.heads import DraftHeads, save_heads
from models.llm import Llm
from models.translator import Direction, Translator, load_translator
from streaming.translation import Interleaved
from training.schedule import lr_scale
from training.translation.align import read_aligned

#: Words after which a talk has no further sentence, talks that are interpreted together, ids that are read at once.
_TALK_WORDS, _TALKS, _BATCH_IDS = 30, 64, 8192
_STEPS_OF_ACCEPTANCE = 200


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome.

    Attributes:
        tokens: That the translator has to write.
        heads: Tokens that are guessed.
        vocabulary: Tokens that can be guessed: those that are written most often.
        epochs: Over the places.
        batch: Places of a step.
        lr: Learning rate at its highest.
    """

    seed: int = 1
    tokens: int = 100_000
    heads: int = 3
    vocabulary: int = 2048
    epochs: int = 4
    batch: int = 256
    lr: float = 2e-3


@dataclass(frozen=True)
class Talk:
    """Words to interpret, and whether each ends a sentence."""

    direction: Direction
    words: list[tuple[str, bool]]


@dataclass(frozen=True)
class Places:
    """Where a guess could be made.

    Attributes:
        hidden: What the model made of each, ``float32[N, d_model]``.
        tokens: The token that was decided there, and those that were written behind it, ``int64[N, heads + 1]``; -1
            after the end of the write.
        talk: Index of the talk, ``int64[N]``.
    """

    hidden: Tensor
    tokens: Tensor
    talk: Tensor

    def of(self, which: Callable[[Tensor], Tensor]) -> Places:
        """Those of some talks."""
        mask = which(self.talk)
        return Places(self.hidden[mask], self.tokens[mask], self.talk[mask])


# ------------------------------------------------------------------------------------------------------ own output


def talks(translator: Translator, pairs: Path, rng: random.Random) -> Iterator[Talk]:
    """Talks of the English sentences, in random order, to be interpreted at random; no end."""
    sentences = sorted({pair.source for pair, _ in read_aligned(pairs)})
    config = translator.config
    while True:
        rng.shuffle(sentences)
        direction = translator.direction(rng.choice(config.targets), rng.choice(config.latencies))
        words, spoken = list[tuple[str, bool]](), rng.random() < 0.5
        for sentence in sentences:
            said = (normalize_transcript(sentence) if spoken else None) or sentence
            words += [(word, False) for word in said.split()]
            words[-1] = words[-1][0], True
            if len(words) >= _TALK_WORDS:
                yield Talk(direction, words)
                direction = translator.direction(rng.choice(config.targets), rng.choice(config.latencies))
                words, spoken = [], rng.random() < 0.5


def own_output(translator: Translator, some: Sequence[Talk]) -> list[list[tuple[int, bool]]]:
    """What the translator reads and writes in talks.

    Returns:
        For each its sequence from the prompt on: ids, and whether the model has decided each of them.
    """
    interpreter, states = Interleaved(translator), []
    for talk in some:
        state = interpreter.init_state([talk.direction])
        for word, closes in talk.words:
            state = interpreter.feed(state, [word], closes=closes)
        states.append(state)
    chunks, _ = interpreter.step(states, max_forwards=1 << 20)
    sequences = []
    for talk, found in zip(some, chunks, strict=True):
        sequence, start = [(token, False) for token in talk.direction.prompt], 0
        for chunk in found:
            for word, _ in talk.words[start : chunk.last_word + 1]:
                sequence += [(token, False) for token in translator.encode_word(word)]
            start = chunk.last_word + 1
            sequence += [(token, False) for token in translator.endpoint if chunk.endpoint]
            sequence += [(t, True) for t in (translator.end_of_read, *chunk.ids, translator.end_of_write)]
        sequences.append(sequence)
    return sequences


@torch.no_grad()
def places(translator: Translator, sequences: Sequence[Sequence[tuple[int, bool]]], heads: int) -> Places:
    """Every place at which a token was decided behind which the write went on."""
    hidden, tokens, talk = list[Tensor](), list[list[int]](), list[int]()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    while order:
        n = max(1, _BATCH_IDS // len(sequences[order[-1]]))
        batch, order = order[-n:], order[:-n]
        states = _hidden(translator.llm, [[token for token, _ in sequences[i]] for i in batch])
        for state, i in zip(states, batch, strict=True):
            at, found = _windows(sequences[i], translator.end_of_write, heads + 1)
            hidden.append(state[at].float().cpu())
            tokens += found
            talk += [i] * len(at)
    return Places(torch.cat(hidden), torch.tensor(tokens), torch.tensor(talk))


def _hidden(llm: Llm, rows: Sequence[Sequence[int]]) -> Tensor:
    counts = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(counts.max()), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
    states, _ = llm.hidden(ids, counts, None)
    return states


def _windows(sequence: Sequence[tuple[int, bool]], end: int, size: int) -> tuple[list[int], list[list[int]]]:
    """The places before decided tokens, and for each that token and those behind it in its write."""
    at, found = list[int](), list[list[int]]()
    for i, (token, own) in enumerate(sequence[1:]):
        if own and token != end:
            window = [one for one, _ in sequence[i + 1 : i + 1 + size]]
            if end in window:
                window = window[: window.index(end) + 1]
            at.append(i)
            found.append(window + [-1] * (size - len(window)))
    return at, found


# -------------------------------------------------------------------------------------------------------- training


def train(llm: Llm, some: Places, recipe: Recipe) -> DraftHeads:
    """Heads that guess what stands at places; that for acceptance trusts their probabilities."""
    written = some.tokens[:, 1:]
    counts = torch.bincount(written[written >= 0])
    common = counts.argsort(descending=True)[: min(recipe.vocabulary, int((counts > 0).sum()))]
    heads = DraftHeads(llm, common.sort().values, recipe.heads)
    optimizer = torch.optim.AdamW([heads.weight], lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    draws = torch.Generator().manual_seed(recipe.seed)
    steps = max(1, recipe.epochs * len(some.hidden) // recipe.batch)
    order = torch.cat([torch.randperm(len(some.hidden), generator=draws) for _ in range(recipe.epochs)])
    for step in range(steps):
        drawn = order[step * recipe.batch :][: recipe.batch]
        optimizer.param_groups[0]["lr"] = recipe.lr * lr_scale(step, 20, steps, steps // 2)
        loss = heads.loss(some.hidden[drawn].to(llm.device), some.tokens[drawn].to(llm.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return heads


@dataclass(frozen=True)
class Guesses:
    """What one head guesses where those before it are right and the write goes on.

    Attributes:
        state: ``float32[M, d_model]``.
        log_probability: As the head sees it, ``float32[M]``.
        right: ``bool[M]``.
        alone: Share that is right of all its guesses, those before it right or not.
    """

    state: Tensor
    log_probability: Tensor
    right: Tensor
    alone: float

    def draw(self, n: int, draws: torch.Generator) -> Guesses:
        """Some of them, at random."""
        if not len(self.right):
            return self
        drawn = torch.randint(len(self.right), (n,), generator=draws).to(self.right.device)
        return Guesses(self.state[drawn], self.log_probability[drawn], self.right[drawn], self.alone)


@torch.no_grad()
def guesses(heads: DraftHeads, some: Places) -> list[Guesses]:
    """The guesses of each head, the tokens before them known."""
    device, found = heads.weight.device, []
    tokens = some.tokens.to(device)
    so_far = torch.ones(len(tokens), dtype=torch.bool, device=device)
    for k, state in enumerate(heads.states(some.hidden.to(device), tokens[:, :-1])):
        wanted = tokens[:, k + 1]
        guess, log_probability = heads.best(state)
        right, counts = guess == wanted, so_far & (wanted >= 0)
        alone = float(right[wanted >= 0].float().mean())
        found.append(Guesses(state[counts], log_probability[counts], right[counts], alone))
        so_far = counts & right
    return found


def train_acceptance(heads: DraftHeads, some: Places, recipe: Recipe) -> None:
    """Teaches the head for acceptance how often the other heads, which stay as they are, are right.

    Their own probabilities say most of it. So how far to trust them comes first, and what the states know beyond that
    only as long as it helps on the half of the places that is not learnt from. Unlike in SpecDec++ both mistakes weigh
    alike: a controller wants probabilities.
    """
    learnt, other = (guesses(heads, some.of(lambda talk, r=r: talk // 10 % 2 == r)) for r in (0, 1))  # type: ignore[misc]
    draws = torch.Generator().manual_seed(recipe.seed)
    for own, lr in (([heads.trust, heads.depth], 1e-2), ([heads.block, heads.sure], 1e-4)):
        optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=0.1)
        best, kept = acceptance_loss(heads, other), [one.detach().clone() for one in own]
        for step in range(1, _STEPS_OF_ACCEPTANCE + 1):
            loss = acceptance_loss(heads, [one.draw(recipe.batch, draws) for one in learnt])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 20 == 0 and (now := acceptance_loss(heads, other)) < best:
                best, kept = now, [one.detach().clone() for one in own]
        with torch.no_grad():
            for one, value in zip(own, kept, strict=True):
                one.copy_(value)


def acceptance_loss(heads: DraftHeads, found: Sequence[Guesses]) -> Tensor:
    """Cross-entropy of what the head for acceptance says of guesses, a mean over all of them."""
    said = [heads.acceptance(k, one.state, one.log_probability) for k, one in enumerate(found)]
    right = torch.cat([one.right for one in found]).float()
    return F.binary_cross_entropy_with_logits(torch.cat(said), right)


# ------------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def report(heads: DraftHeads, some: Places) -> str:
    """How often the heads are right, and whether that is what the head for acceptance says."""
    found, lines = guesses(heads, some), [f"{len(some.hidden)} held-out places, {len(heads.tokens)} tokens to guess"]
    for k, one in enumerate(found):
        share = float(one.right.float().mean())
        lines.append(f"head {k + 1}: {one.alone:.3f} right; {share:.3f} if those before it are ({len(one.right)})")
    said = torch.cat([heads.acceptance(k, one.state, one.log_probability) for k, one in enumerate(found)]).sigmoid()
    right = torch.cat([one.right for one in found]).float()
    own = torch.cat([one.log_probability for one in found]).exp()
    lines.append("said to be right   guesses   mean of it   are right")
    for tenths in range(0, 10, 2):
        if bool((mask := (said >= tenths / 10) & ((said < (tenths + 2) / 10) | (tenths == 8))).any()):
            mean, share, n = float(said[mask].mean()), float(right[mask].mean()), int(mask.sum())
            lines.append(f"{tenths / 10:.1f} to {(tenths + 2) / 10:.1f} {n:14} {mean:12.2f} {share:11.2f}")
    errors = (float(F.binary_cross_entropy(one.clamp(1e-4, 1 - 1e-4), right)) for one in (said, own))
    lines.append("cross-entropy of it, in nats: {:.3f}; of the heads' own probabilities {:.3f}".format(*errors))
    return "\n".join(lines)


def run(
    pairs: Annotated[Path, typer.Option(help="Pairs for training, aligned or not; only their sources are read.")],
    model: Annotated[Path, typer.Option(help="Folder of the translator, which gets the heads.")],
    tokens: Annotated[int, typer.Option(help="Tokens that the translator has to write.")] = Recipe.tokens,
    heads: Annotated[int, typer.Option(help="Tokens that are guessed.")] = Recipe.heads,
    vocabulary: Annotated[int, typer.Option(help="Tokens that can be guessed.")] = Recipe.vocabulary,
    epochs: Annotated[int, typer.Option(help="Over what it has written.")] = Recipe.epochs,
    seed: int = Recipe.seed,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Trains the heads of one translator, and says how good they are."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = Recipe(seed, tokens, heads, vocabulary, epochs)
    translator = load_translator(model, device=device)
    drawn, sequences, written = talks(translator, pairs, random.Random(seed)), list[list[tuple[int, bool]]](), 0
    while written < tokens:
        sequences += own_output(translator, [next(drawn) for _ in range(_TALKS)])
        written = sum(own for sequence in sequences for _, own in sequence)
        typer.echo(f"{written} tokens in {len(sequences)} talks")
    found = places(translator, sequences, heads)
    trained = train(translator.llm, found.of(lambda talk: talk % 10 < 7), recipe)
    train_acceptance(trained, found.of(lambda talk: (talk % 10 == 7) | (talk % 10 == 8)), recipe)
    typer.echo(report(trained, found.of(lambda talk: talk % 10 == 9)))
    save_heads(model, trained, translator.llm)


if __name__ == "__main__":
    typer.run(run)
