"""The heads of the recogniser: transducer predictor and joint, and CTC.

Parameters carry NeMo's names below ``decoder.``, ``joint.`` and ``ctc_decoder.``. The blank is the last id,
``vocab_size``; its embedding is the zero row that also starts a stream. Source: Graves, "Sequence Transduction
with Recurrent Neural Networks" (arXiv 1211.3711).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import DecoderConfig
from models.rows import parted


@dataclass
class PredictorState:
    """What the predictor remembers of the pieces emitted so far.

    Attributes:
        hidden: ``[layers, B, H]``, LSTM outputs.
        cell: ``[layers, B, H]``, LSTM cells.
        output: ``[B, joint_hidden]``, the last output, projected into the joint.
    """

    hidden: Tensor
    cell: Tensor
    output: Tensor

    @staticmethod
    def cat(states: list[PredictorState]) -> PredictorState:
        """One batch of the rows of several states."""
        return PredictorState(
            torch.cat([s.hidden for s in states], 1),
            torch.cat([s.cell for s in states], 1),
            torch.cat([s.output for s in states]),
        )

    def row(self, index: int) -> PredictorState:
        """A copy of one row, as a state of batch 1."""
        at = slice(index, index + 1)
        return PredictorState(self.hidden[:, at].clone(), self.cell[:, at].clone(), self.output[at].clone())

    def rows(self) -> list[PredictorState]:
        """Every row as a state of its own."""
        rows = zip(parted(self.hidden, 1), parted(self.cell, 1), parted(self.output, 0), strict=True)
        return [PredictorState(*row) for row in rows]

    def picked(self, index: Tensor) -> PredictorState:
        """Copies of the rows with these numbers."""
        return PredictorState(self.hidden[:, index], self.cell[:, index], self.output[index])

    def replaced(self, index: Tensor, rows: PredictorState) -> PredictorState:
        """The batch with other rows in the places of ``index``."""
        return PredictorState(
            self.hidden.index_copy(1, index, rows.hidden),
            self.cell.index_copy(1, index, rows.cell),
            self.output.index_copy(0, index, rows.output),
        )


class Transducer(nn.Module):
    """Predictor and joint. Children are named so that the state dict reads ``decoder.*`` and ``joint.*``."""

    def __init__(self, config: DecoderConfig, d_model: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.decoder = _Predictor(config, dropout)
        self.joint = _Joint(config, d_model, dropout)

    def init_state(self, batch: int) -> PredictorState:
        """The state of ``batch`` streams before their first piece."""
        like = self.joint.pred.weight
        zeros = like.new_zeros(self.config.pred_layers, batch, self.config.pred_hidden)
        start = torch.full((batch,), self.config.vocab_size, dtype=torch.int64, device=like.device)
        empty = PredictorState(zeros, zeros, like.new_zeros(batch, self.config.joint_hidden))
        return self.predict(start, empty)

    def predict(self, tokens: Tensor, state: PredictorState) -> PredictorState:
        """Takes one more piece in each row.

        Args:
            tokens: ``int64[B]``, piece ids; ``vocab_size`` stands for the start of the stream.
            state: The rows before.
        """
        lstm = self.decoder.prediction.dec_rnn.lstm
        x = F.embedding(tokens, self.decoder.prediction.embed.weight)
        hidden, cell = [], []
        for layer in range(self.config.pred_layers):
            w_ih, w_hh, b_ih, b_hh = lstm.all_weights[layer]
            x, c = torch.lstm_cell(x, (state.hidden[layer], state.cell[layer]), w_ih, w_hh, b_ih, b_hh)
            hidden.append(x)
            cell.append(c)
        return PredictorState(torch.stack(hidden), torch.stack(cell), self.joint.pred(x))

    def project(self, encoded: Tensor) -> Tensor:
        """Encoder frames ``[B, T, d_model]`` in the joint's space, ``[B, T, joint_hidden]``."""
        projected: Tensor = self.joint.enc(encoded)
        return projected

    def logits(self, projected: Tensor, predicted: Tensor) -> Tensor:
        """Scores ``[…, vocab_size + 1]`` of projected frames and predictor outputs that broadcast."""
        scores: Tensor = self.joint.joint_net(projected + predicted)
        return scores

    def lattice(self, encoded: Tensor, targets: Tensor) -> Tensor:
        """All scores of a batch for the loss, ``[B, T, U + 1, vocab_size + 1]``.

        Args:
            encoded: ``[B, T, d_model]``.
            targets: ``int64[B, U]``, padded with anything in range.
        """
        return self.logits(self.project(encoded)[:, :, None], self._predictions(targets)[:, None])

    def internal_lm(self, targets: Tensor) -> Tensor:
        """What the predictor alone expects, ``[B, U, vocab_size]``: scores of each target from those before it.

        It is the transducer with a silent encoder and without the blank (Meng et al., "Internal Language Model
        Training", arXiv 2102.01380), so text without audio can train it.

        Args:
            targets: ``int64[B, U]``, padded with anything in range.
        """
        scores: Tensor = self.joint.joint_net(self._predictions(targets)[:, :-1])
        return scores[..., :-1]

    def _predictions(self, targets: Tensor) -> Tensor:
        """The predictor's outputs before each target and after the last, ``[B, U + 1, joint_hidden]``."""
        start = targets.new_full((targets.shape[0], 1), self.config.vocab_size)
        embedded = F.embedding(torch.cat([start, targets], 1), self.decoder.prediction.embed.weight)
        # The blank's row starts every stream and has to stay zero while the rest of the table is trained.
        embedded = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, 1:]], 1)
        output, _ = self.decoder.prediction.dec_rnn.lstm(embedded)
        predicted: Tensor = self.joint.pred(self.decoder.drop(output))
        return predicted


class _Predictor(nn.Module):
    def __init__(self, c: DecoderConfig, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        embed = nn.Embedding(c.vocab_size + 1, c.pred_hidden)
        nn.init.zeros_(embed.weight[c.vocab_size])
        self.prediction = _Prediction(embed, _Recurrent(c))


class _Prediction(nn.Module):
    def __init__(self, embed: nn.Embedding, dec_rnn: _Recurrent) -> None:
        super().__init__()
        self.embed, self.dec_rnn = embed, dec_rnn


class _Recurrent(nn.Module):
    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.lstm = nn.LSTM(c.pred_hidden, c.pred_hidden, c.pred_layers, batch_first=True)


class _Joint(nn.Module):
    def __init__(self, c: DecoderConfig, d_model: int, dropout: float) -> None:
        super().__init__()
        self.enc = nn.Linear(d_model, c.joint_hidden)
        self.pred = nn.Linear(c.pred_hidden, c.joint_hidden)
        # Three entries so that the output layer is named joint_net.2, as in the published models.
        self.joint_net = nn.Sequential(nn.ReLU(), nn.Dropout(dropout), nn.Linear(c.joint_hidden, c.vocab_size + 1))


class CtcHead(nn.Module):
    """One score per piece and blank at every frame; parameters below ``ctc_decoder.``."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.decoder_layers = nn.Sequential(nn.Conv1d(d_model, vocab_size + 1, 1))

    def forward(self, encoded: Tensor) -> Tensor:
        """``[B, T, d_model]`` to scores ``[B, T, vocab_size + 1]``."""
        layer = self.decoder_layers[0]
        return F.linear(encoded, layer.weight[:, :, 0], layer.bias)  # type: ignore[arg-type,index]
