"""NeMo itself, as the witness: models of the published shapes with seeded random weights, or with a folder's own.

This is the only file that imports NeMo, and it does so inside functions because the import takes ten seconds.
No checkpoint is needed: two implementations that share a state dict must give the same numbers whatever the
weights are. NeMo's alignment here is its default one, in which streaming equals offline (its pad-and-drop
mode does not).

Install with the ``nemo`` extra; the numbers are for NeMo 3.0.0.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.config import DecoderConfig, EncoderConfig, FeatureConfig, ModelConfig

Kind = Literal["hybrid", "rnnt", "ctc"]
#: Past frames that attention sees; the chunk sizes 1, 2, 7 and 14 divide it.
LEFT_CONTEXT_FRAMES = 70
#: Look-aheads of the published multi-look-ahead models, NeMo's order: the first is the default.
LOOKAHEAD_FRAMES = (13, 6, 1, 0)
#: Mel frames that NeMo feeds again in front of every chunk but the first.
MEL_CACHE_FRAMES = 9


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; everything else is as in NeMo's streaming FastConformer recipe."""

    n_layers: int
    d_model: int
    n_heads: int
    mel_bins: int = 80
    vocab_size: int = 1024
    pred_hidden: int = 640
    pred_layers: int = 1
    use_bias: bool = True
    xscaling: bool = True
    subsampling_conv_channels: int = 256
    left_context_frames: int = LEFT_CONTEXT_FRAMES
    lookahead_frames: tuple[int, ...] = LOOKAHEAD_FRAMES


SHAPES = {
    "hybrid_large": Shape(n_layers=17, d_model=512, n_heads=8),
    "medium": Shape(n_layers=16, d_model=256, n_heads=4),
    "small": Shape(n_layers=16, d_model=176, n_heads=4, pred_hidden=320),
    "embedded": Shape(n_layers=6, d_model=256, n_heads=4, vocab_size=256, pred_hidden=256),
    "nemotron4": Shape(n_layers=4, d_model=1024, n_heads=8, mel_bins=128, pred_layers=2, use_bias=False),
    "nemotron4_unscaled": Shape(
        n_layers=4, d_model=1024, n_heads=8, mel_bins=128, pred_layers=2, use_bias=False, xscaling=False
    ),
    "tiny": Shape(n_layers=2, d_model=32, n_heads=4, vocab_size=64, pred_hidden=24),
    "tiny_128": Shape(n_layers=2, d_model=32, n_heads=4, mel_bins=128, vocab_size=64, pred_hidden=24),
}


class NemoReference:
    """One NeMo model in evaluation mode, fp32 on the CPU.

    Attributes:
        shape: Its sizes.
        kind: Which heads it has.
        model: The NeMo model (``EncDecHybridRNNTCTCBPEModel``, ``EncDecRNNTBPEModel`` or
            ``EncDecCTCModelBPE``).
    """

    def __init__(self, model: Any, shape: Shape, kind: Kind) -> None:
        """Wraps a NeMo model that is ready to run; see :func:`build`."""
        self.model = model
        self.shape = shape
        self.kind = kind

    def state_dict(self) -> dict[str, Tensor]:
        """The model's tensors under NeMo's names, without the front end's buffers."""
        return {name: value for name, value in self.model.state_dict().items() if not name.startswith("preprocessor.")}

    def config(self) -> ModelConfig:
        """The same model in our terms."""
        sizes = self.shape
        decoder = DecoderConfig(
            vocab_size=sizes.vocab_size,
            pred_hidden=sizes.pred_hidden,
            pred_layers=sizes.pred_layers,
            joint_hidden=sizes.pred_hidden,
        )
        return ModelConfig(
            features=FeatureConfig(mel_bins=sizes.mel_bins),
            encoder=EncoderConfig(
                n_layers=sizes.n_layers,
                d_model=sizes.d_model,
                n_heads=sizes.n_heads,
                subsampling_conv_channels=sizes.subsampling_conv_channels,
                use_bias=sizes.use_bias,
                xscaling=sizes.xscaling,
                left_context_frames=sizes.left_context_frames,
                lookahead_frames=sizes.lookahead_frames,
            ),
            vocab_size=sizes.vocab_size,
            decoder=None if self.kind == "ctc" else decoder,
            ctc=self.kind != "rnnt",
        )

    def config_dict(self) -> dict[str, Any]:
        """What NeMo writes into ``model_config.yaml``."""
        from omegaconf import OmegaConf

        config = OmegaConf.to_container(self.model.cfg, resolve=True)
        assert isinstance(config, dict)
        return {str(key): value for key, value in config.items()}

    @torch.inference_mode()
    def log_mel(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The whole-file log-mel.

        Args:
            samples: (batch, samples) 16 kHz in [-1, 1], zeros after each row's end.
            lengths: (batch,) samples of each row.

        Returns:
            (batch, mel_bins, frames), zeros after each row's end, and (batch,) frames of each row.
        """
        mel, mel_lengths = self.model.preprocessor(input_signal=samples, length=lengths)
        return mel, mel_lengths

    def set_lookahead(self, lookahead: int) -> None:
        """Sets the look-ahead in encoder frames; in NeMo it is one setting of the whole encoder."""
        self.model.encoder.set_default_att_context_size([self.shape.left_context_frames, lookahead])

    @torch.inference_mode()
    def encode_offline(self, mel: Tensor, lengths: Tensor, lookahead: int) -> tuple[Tensor, Tensor]:
        """The whole input at once.

        Args:
            mel: (batch, mel_bins, frames).
            lengths: (batch,) mel frames of each row.
            lookahead: Encoder frames.

        Returns:
            (batch, frames, d_model) and (batch,) encoder frames of each row.
        """
        self.set_lookahead(lookahead)
        encoded, encoded_lengths = self.model.encoder(audio_signal=mel, length=lengths)
        return encoded.transpose(1, 2), encoded_lengths

    @torch.inference_mode()
    def encode_streaming(self, mel: Tensor, lookahead: int) -> Tensor:
        """The same input step by step with NeMo's caches; rows of a batch must be equally long.

        Args:
            mel: (batch, mel_bins, frames).
            lookahead: Encoder frames.

        Returns:
            (batch, frames, d_model), nothing dropped at the end.
        """
        self.set_lookahead(lookahead)
        frames = mel.shape[2]
        stepper = NemoStepper(self, batch=mel.shape[0])
        pieces = []
        position = 0
        while position < frames:
            size = 1 + 8 * lookahead if position == 0 else 8 + 8 * lookahead
            cached = min(position, MEL_CACHE_FRAMES)
            chunk = mel[:, :, position - cached : position + size]
            position = min(position + size, frames)
            pieces.append(stepper.step(chunk, cached, last=position == frames))
        return torch.cat(pieces, dim=1)

    @torch.inference_mode()
    def rnnt_greedy(self, encoded: Tensor, lengths: Tensor) -> list[tuple[list[int], list[int]]]:
        """NeMo's own batched greedy transducer search.

        Args:
            encoded: (batch, frames, d_model).
            lengths: (batch,) frames of each row.

        Returns:
            For each row its piece ids and the encoder frame of each.
        """
        hypotheses = self.model.decoding.rnnt_decoder_predictions_tensor(
            encoder_output=encoded.transpose(1, 2), encoded_lengths=lengths, return_hypotheses=True
        )
        return [
            ([int(token) for token in hypothesis.y_sequence], [int(frame) for frame in hypothesis.timestamp])
            for hypothesis in hypotheses
        ]

    @torch.inference_mode()
    def ctc_greedy(self, encoded: Tensor, lengths: Tensor) -> list[list[int]]:
        """NeMo's own greedy CTC search: piece ids of each row, repeats and blanks removed.

        Args:
            encoded: (batch, frames, d_model).
            lengths: (batch,) frames of each row.
        """
        head, decoding = self._ctc()
        hypotheses = decoding.ctc_decoder_predictions_tensor(
            decoder_outputs=head(encoder_output=encoded.transpose(1, 2)),
            decoder_lengths=lengths,
            return_hypotheses=True,
        )
        blank = self.shape.vocab_size
        rows = []
        for hypothesis, length in zip(hypotheses, lengths.tolist(), strict=True):
            labels = [int(label) for label in hypothesis.y_sequence[:length]]
            # NeMo's hypothesis keeps one label a frame; its text has them merged.
            merged = [label for label, before in zip(labels, [blank, *labels], strict=False) if label != before]
            rows.append([label for label in merged if label != blank])
        return rows

    def save_nemo(self, path: Path) -> None:
        """Writes the archive as NeMo does: an uncompressed tar with ``./`` in front of the names."""
        with _quiet():
            self.model.save_to(str(path.resolve()))

    @cached_property
    def tokenizer_bytes(self) -> bytes:
        """The SentencePiece model."""
        serialized: bytes = self.model.tokenizer.tokenizer.serialized_model_proto()
        return serialized

    def _ctc(self) -> tuple[Any, Any]:
        """The CTC head and its search: hybrids keep them beside the transducer."""
        if self.kind == "hybrid":
            return self.model.ctc_decoder, self.model.ctc_decoding
        return self.model.decoder, self.model.decoding


class NemoStepper:
    """NeMo's caches and step for one batch of equally long streams, at the encoder's present look-ahead."""

    def __init__(self, reference: NemoReference, batch: int) -> None:
        """Starts ``batch`` streams with empty caches."""
        self.encoder = reference.model.encoder
        self.caches = self.encoder.get_initial_cache_state(batch_size=batch)

    @torch.inference_mode()
    def step(self, mel: Tensor, cached: int, *, last: bool = False) -> Tensor:
        """One step.

        NeMo's own buffer fills a short cache with zeros. At look-ahead 0 that makes encoder frame 1 differ
        from the offline one, because a zero mel frame is not the convolutions' zero padding; here the cache
        starts where the stream does.

        Args:
            mel: (batch, mel_bins, cached + chunk): the chunk behind the mel frames before it.
            cached: How many those are: 0 at the start, 1 in the second step at look-ahead 0, else 9.
            last: Whether the stream ends here, so that a short chunk's frames are kept.

        Returns:
            (batch, encoder frames, d_model).
        """
        encoded, lengths, *caches = self.encoder.cache_aware_stream_step(
            processed_signal=mel,
            processed_signal_length=torch.full((mel.shape[0],), mel.shape[2], dtype=torch.int64),
            cache_last_channel=self.caches[0],
            cache_last_time=self.caches[1],
            cache_last_channel_len=self.caches[2],
            keep_all_outputs=last,
            # The encoder frames that the cached mel frames would repeat.
            drop_extra_pre_encoded=-(-cached // 8),
        )
        self.caches = tuple(caches)
        frames: Tensor = encoded.transpose(1, 2)[:, : int(lengths[0])]
        return frames


def build(shape: str, seed: int, kind: Kind = "hybrid") -> NemoReference:
    """Makes a NeMo model with seeded random weights whose greedy searches emit something worth comparing.

    Args:
        shape: A key of :data:`SHAPES`.
        seed: Fixes weights and tokenizer; the global random state is left alone.
        kind: Hybrid, pure transducer or pure CTC.

    Raises:
        KeyError: If the shape is unknown.
    """
    sizes = SHAPES[shape]
    with _quiet(), torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        _train_tokenizer(Path(folder), sizes.vocab_size, seed)
        reference = _made(sizes, kind, Path(folder))
        _randomize(reference)
    return reference


def of_folder(model: Path) -> NemoReference:
    """Makes a NeMo model of a folder of ours, with its weights and its tokenizer.

    Args:
        model: Folder of a hybrid model that looks ahead in chunks, such as the embedded one.
    """
    config = ModelConfig.from_dict(json.loads((model / "config.json").read_text(encoding="utf-8")))
    encoder, decoder = config.encoder, config.decoder
    assert decoder is not None and config.ctc and not encoder.adaptive
    sizes = Shape(
        n_layers=encoder.n_layers,
        d_model=encoder.d_model,
        n_heads=encoder.n_heads,
        mel_bins=config.features.mel_bins,
        vocab_size=config.vocab_size,
        pred_hidden=decoder.pred_hidden,
        pred_layers=decoder.pred_layers,
        use_bias=encoder.use_bias,
        xscaling=encoder.xscaling,
        subsampling_conv_channels=encoder.subsampling_conv_channels,
        left_context_frames=encoder.left_context_frames,
        lookahead_frames=encoder.lookahead_frames,
    )
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
        _list_pieces(Path(folder))
        reference = _made(sizes, "hybrid", Path(folder))
    weights = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    missing, unknown = reference.model.load_state_dict(weights, strict=False)
    assert not unknown and all(name.startswith("preprocessor.") for name in missing), (missing, unknown)
    return reference


def _made(sizes: Shape, kind: Kind, tokenizer_folder: Path) -> NemoReference:
    import nemo.collections.asr as nemo_asr
    from omegaconf import OmegaConf

    model_class = {
        "hybrid": nemo_asr.models.EncDecHybridRNNTCTCBPEModel,
        "rnnt": nemo_asr.models.EncDecRNNTBPEModel,
        "ctc": nemo_asr.models.EncDecCTCModelBPE,
    }[kind]
    model = model_class(cfg=OmegaConf.create(_config(sizes, kind, str(tokenizer_folder))))
    model.eval()
    # The artifacts' folder goes away: NeMo must have its files for save_nemo().
    _keep_artifacts(model, tokenizer_folder)
    return NemoReference(model, sizes, kind)


def _keep_artifacts(model: Any, folder: Path) -> None:
    """Moves the tokenizer's files to a folder that lives as long as the model."""
    lasting = tempfile.TemporaryDirectory()
    model.dragoman_artifacts = lasting
    for artifact in model.artifacts.values():
        source = Path(artifact.path)
        if source.parent == folder.resolve() or source.parent == folder:
            target = Path(lasting.name) / source.name
            target.write_bytes(source.read_bytes())
            artifact.path = str(target)


def _config(sizes: Shape, kind: Kind, tokenizer_folder: str) -> dict[str, Any]:
    """The model's configuration in NeMo's terms."""
    config: dict[str, Any] = {
        "sample_rate": 16000,
        "model_defaults": {
            "enc_hidden": sizes.d_model,
            "pred_hidden": sizes.pred_hidden,
            "joint_hidden": sizes.pred_hidden,
        },
        "tokenizer": {"dir": tokenizer_folder, "type": "bpe"},
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000,
            "normalize": "NA",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": sizes.mel_bins,
            "n_fft": 512,
            "frame_splicing": 1,
            "dither": 0.0,
            "pad_to": 0,
        },
        "encoder": _encoder_config(sizes),
    }
    ctc_head = {
        "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
        "feat_in": sizes.d_model,
        "num_classes": -1,
        "vocabulary": [],
    }
    if kind == "ctc":
        return {**config, "decoder": ctc_head, "decoding": {"strategy": "greedy_batch"}}
    config |= _transducer_config(sizes)
    if kind == "hybrid":
        config["aux_ctc"] = {
            "ctc_loss_weight": 0.3,
            "decoder": ctc_head,
            "decoding": {"strategy": "greedy_batch"},
        }
    return config


def _encoder_config(sizes: Shape) -> dict[str, Any]:
    """The cache-aware FastConformer."""
    return {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": sizes.mel_bins,
        "feat_out": -1,
        "n_layers": sizes.n_layers,
        "d_model": sizes.d_model,
        "use_bias": sizes.use_bias,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "subsampling_conv_channels": sizes.subsampling_conv_channels,
        "causal_downsampling": True,
        "ff_expansion_factor": 4,
        "self_attention_model": "rel_pos",
        "n_heads": sizes.n_heads,
        "att_context_size": [[sizes.left_context_frames, lookahead] for lookahead in sizes.lookahead_frames],
        "att_context_style": "chunked_limited",
        "xscaling": sizes.xscaling,
        "untie_biases": True,
        "pos_emb_max_len": 5000,
        "conv_kernel_size": 9,
        "conv_norm_type": "layer_norm",
        "conv_context_size": "causal",
        "dropout": 0.1,
        "dropout_pre_encoder": 0.1,
        "dropout_emb": 0.0,
        "dropout_att": 0.1,
    }


def _transducer_config(sizes: Shape) -> dict[str, Any]:
    """Predictor, joint, search and loss."""
    return {
        "decoder": {
            "_target_": "nemo.collections.asr.modules.RNNTDecoder",
            "normalization_mode": None,
            "random_state_sampling": False,
            "blank_as_pad": True,
            "prednet": {
                "pred_hidden": sizes.pred_hidden,
                "pred_rnn_layers": sizes.pred_layers,
                "t_max": None,
                "dropout": 0.2,
            },
        },
        "joint": {
            "_target_": "nemo.collections.asr.modules.RNNTJoint",
            "log_softmax": None,
            "preserve_memory": False,
            "fuse_loss_wer": False,
            "fused_batch_size": -1,
            "jointnet": {"joint_hidden": sizes.pred_hidden, "activation": "relu", "dropout": 0.2},
        },
        "decoding": {"strategy": "greedy_batch", "greedy": {"max_symbols": 10}},
        "loss": {"loss_name": "default"},
    }


def _train_tokenizer(folder: Path, vocab_size: int, seed: int) -> None:
    """Trains a SentencePiece model of exactly this many pieces on seeded nonsense words."""
    import sentencepiece

    letters = random.Random(seed)
    syllables = [c + v + e for c in "bdfghklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "st")]
    lines = [
        " ".join("".join(letters.choices(syllables, k=letters.randint(1, 4))) for _ in range(12)) for _ in range(900)
    ]
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="unigram",
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    _list_pieces(folder)


def _list_pieces(folder: Path) -> None:
    """Writes the plain list of pieces that NeMo keeps beside a tokenizer, and without which it refuses to start."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(names))


def _randomize(reference: NemoReference) -> None:
    """Moves every parameter that NeMo starts at 0 or 1, and makes both heads speak.

    At its initial values a mistaken or forgotten bias or norm would not show. The output layers are scaled
    up, so that the best piece changes from frame to frame, and the blank's bias is set to win about two
    frames of three.
    """
    model = reference.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias") or "pos_bias" in name or "dec_rnn.lstm.bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith(("linear_q.weight", "linear_k.weight", "linear_pos.weight")):
                # Attention that is nearly uniform would forgive a wrong mask or position.
                parameter.mul_(2.0)
        frames = _sample_frames(reference)
        if reference.kind != "ctc":
            _spread_transducer(model, frames)
        if reference.kind != "rnnt":
            head, _ = reference._ctc()
            layer = head.decoder_layers[0]
            _center(layer, layer(frames.transpose(1, 2)).transpose(1, 2), scale=3.0)
            layer.bias[-1] += _blank_lead(layer(frames.transpose(1, 2)).transpose(1, 2), share=0.5)


def _sample_frames(reference: NemoReference) -> Tensor:
    """Encoder frames (1, frames, d_model) of log-mel-like noise."""
    mel = 2.0 * torch.randn(1, reference.shape.mel_bins, 1600) - 8.0
    frames, _ = reference.encode_offline(mel, torch.tensor([1600]), lookahead=LOOKAHEAD_FRAMES[0])
    return frames.clone()


def _spread_transducer(model: Any, frames: Tensor) -> None:
    """Makes the joint's choice depend on the frame and on the last piece alike."""
    joint = model.joint
    # The predictor's outputs after its transient, one random piece after another; each frame meets one of
    # them.
    pieces = torch.randint(joint.num_classes_with_blank - 1, (1, frames.shape[1] - 1))
    predicted, *_ = model.decoder.predict(pieces, add_sos=True)
    _center(joint.enc, joint.enc(frames), scale=1.0)
    _center(joint.pred, joint.pred(predicted), scale=1.5)
    hidden = torch.relu(joint.enc(frames) + joint.pred(predicted))
    output = joint.joint_net[-1]
    _center(output, output(hidden), scale=3.0)
    output.bias[-1] += _blank_lead(output(hidden), share=0.75)


def _center(layer: Any, outputs: Tensor, scale: float) -> None:
    """Changes a layer with a bias so that these outputs (..., features) of it have mean 0 and this spread."""
    flat = outputs.flatten(0, -2)
    factor = scale / (flat - flat.mean(dim=0)).std()
    layer.weight.mul_(factor)
    layer.bias.sub_(flat.mean(dim=0)).mul_(factor)


def _blank_lead(logits: Tensor, share: float) -> Tensor:
    """What the last logit, the blank, needs to win ``share`` of the rows of (..., pieces + 1)."""
    lead = logits[..., :-1].amax(dim=-1) - logits[..., -1]
    return lead.flatten().quantile(share)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps NeMo's log lines and deprecation warnings off the terminal while it builds or saves."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
