"""Reads a NeMo archive without NeMo, and writes it as a model folder.

A ``.nemo`` file is a tar, in old releases compressed: ``model_config.yaml``, ``model_weights.ckpt`` (a
pickled state dict) and the tokenizer's files under names that the config mentions. Nothing in it is trusted:
members are read by name into memory, never extracted; the YAML is loaded as plain data; the pickle is read by
PyTorch's weights-only loader, which builds tensors and nothing else.

Only cache-aware streaming models can run here: what a frame sees must be bounded. Every other model is
refused with what was found, what is needed and what to do.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import yaml
from torch import Tensor

from models.checkpoint import save_checkpoint
from models.config import DecoderConfig, EncoderConfig, FeatureConfig, ModelConfig
from models.recognizer import RecognizerNet
from streaming.errors import DragomanError

CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
#: An archive whose members claim more than this is refused; the largest published model has 2.5 GB.
MAX_WEIGHTS_BYTES = 8 * 2**30
MAX_TEXT_BYTES = 32 * 2**20
#: NeMo's spellings of "no normalisation"; see ``_check_front_end``.
_NORMALIZATIONS = ("per_feature", "all_features")
_GET_ANOTHER = "choose a cache-aware streaming FastConformer, such as stt_en_fastconformer_hybrid_large_streaming_multi"

#: Key, NeMo's default when it is absent, values that the front end computes.
_FRONT_END = (
    ("sample_rate", 16000, (16000,)),
    ("window_size", 0.02, (0.025,)),
    ("window_stride", 0.01, (0.01,)),
    ("window", "hann", ("hann",)),
    ("n_fft", None, (None, 512)),
    ("preemph", 0.97, (0.97,)),
    ("log", True, (True,)),
    ("log_zero_guard_type", "add", ("add",)),
    ("log_zero_guard_value", 2**-24, (2**-24,)),
    ("mag_power", 2.0, (2.0,)),
    ("mel_norm", "slaney", ("slaney",)),
    ("lowfreq", 0, (0, None)),
    ("highfreq", None, (None, 8000)),
    ("exact_pad", False, (False,)),
    ("frame_splicing", 1, (1,)),
)
#: The same for the encoder.
_ENCODER = (
    ("subsampling", "striding", ("dw_striding",)),
    ("subsampling_factor", 4, (8,)),
    ("causal_downsampling", False, (True,)),
    ("self_attention_model", "rel_pos", ("rel_pos",)),
    ("att_context_style", "regular", ("chunked_limited", "regular")),
    ("conv_norm_type", "batch_norm", ("layer_norm",)),
    ("conv_context_style", "regular", ("regular",)),
    ("untie_biases", True, (True,)),
    ("reduction", None, (None,)),
    ("feat_out", -1, (-1, None)),
)
_DECODER = (("blank_as_pad", True, (True,)), ("normalization_mode", None, (None,)))
_JOINT = (("num_extra_outputs", 0, (0,)), ("jointnet.activation", "relu", ("relu",)))


def import_nemo(archive: Path, out: Path, *, source: str | None = None) -> ModelConfig:
    """Converts a NeMo archive of a cache-aware streaming model into a model folder.

    Args:
        archive: The ``.nemo`` file: hybrid, pure transducer or pure CTC, with a SentencePiece tokenizer.
        out: The folder to write; made if it is not there.
        source: Where the archive came from, for the record; its file name if None.

    Returns:
        The configuration that was written.

    Raises:
        DragomanError: ``model_not_found`` if there is no such file, ``bad_checkpoint`` if it is not an intact
            archive or its tensors do not fit its configuration, ``unsupported_model`` if the model is of
            another kind.
    """
    try:
        with _open(archive) as tar:
            members = _members(tar, archive)
            settings = _settings(_read(tar, members, CONFIG_MEMBER, archive), archive)
            _check_kind(settings)
            tokenizer = _read(tar, members, _tokenizer_member(settings), archive)
            weights = _weights(_read(tar, members, WEIGHTS_MEMBER, archive), archive)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DragomanError("bad_checkpoint", f"{archive} is damaged: {error}; download it again") from error
    origin = source or archive.name
    config = _model_config(settings, vocab_size=_piece_count(tokenizer, archive), name=archive.stem, source=origin)
    tensors = _rename(weights, config)
    try:
        with torch.device("meta"):
            RecognizerNet(config).load_checkpoint(tensors)
    except DragomanError as error:
        raise DragomanError("bad_checkpoint", f"{archive.name}: {error}") from error
    save_checkpoint(out, config, tensors, tokenizer, _card(config, archive))
    return config


# ------------------------------------------------------------------------------------------------ the archive


def _open(archive: Path) -> tarfile.TarFile:
    """Opens a plain or gzipped tar."""
    if not archive.is_file():
        raise DragomanError("model_not_found", f"{archive} is not a file; give the path of a .nemo archive")
    for mode in ("r:", "r:gz"):
        try:
            return tarfile.open(archive, mode)
        except (tarfile.ReadError, EOFError):
            continue
    raise DragomanError("bad_checkpoint", f"{archive} is not a tar archive, as a .nemo file is; download it again")


def _members(tar: tarfile.TarFile, archive: Path) -> dict[str, tarfile.TarInfo]:
    """The regular files of the archive by name, without a leading ``./``."""
    members = {}
    for member in tar:
        # Before the reader skips it: skipping decompresses it.
        if member.size > MAX_WEIGHTS_BYTES:
            raise DragomanError(
                "bad_checkpoint",
                f"{archive}: {member.name} claims {member.size} bytes, at most {MAX_WEIGHTS_BYTES} are read",
            )
        if member.isfile():
            members[member.name.removeprefix("./")] = member
    return members


def _read(tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], name: str, archive: Path) -> bytes:
    """The content of one member."""
    member = members.get(name)
    if member is None:
        raise DragomanError(
            "bad_checkpoint",
            f"{archive} has no {name}; it has {', '.join(sorted(members)[:8]) or 'no files'}; a NeMo archive"
            f" holds {CONFIG_MEMBER}, {WEIGHTS_MEMBER} and a tokenizer",
        )
    limit = MAX_WEIGHTS_BYTES if name == WEIGHTS_MEMBER else MAX_TEXT_BYTES
    if member.size > limit:
        raise DragomanError("bad_checkpoint", f"{archive}: {name} has {member.size} bytes, at most {limit} are read")
    stream = tar.extractfile(member)
    assert stream is not None  # _members keeps regular files only
    return stream.read()


def _settings(text: bytes, archive: Path) -> dict[str, Any]:
    """The model's configuration as plain data."""
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DragomanError("bad_checkpoint", f"{archive}: {CONFIG_MEMBER} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise DragomanError(
            "bad_checkpoint",
            f"{archive}: {CONFIG_MEMBER} holds a {type(settings).__name__}, a mapping is needed",
        )
    return settings


def _weights(data: bytes, archive: Path) -> dict[str, Tensor]:
    """The state dict; the loader refuses everything that is not a tensor or a plain container."""
    try:
        weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DragomanError(
            "bad_checkpoint", f"{archive}: {WEIGHTS_MEMBER} cannot be read as plain tensors: {reason}"
        ) from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DragomanError("bad_checkpoint", f"{archive}: {WEIGHTS_MEMBER} is not a state dict of tensors")
    return dict(weights)


def _tokenizer_member(settings: Mapping[str, Any]) -> str:
    """The name of the SentencePiece model inside the archive."""
    kind = _get(settings, "tokenizer.type")
    if kind != "bpe":
        raise _unsupported("tokenizer.type", kind, ("bpe",), "choose a model with one SentencePiece tokenizer")
    return str(_get(settings, "tokenizer.model_path", "tokenizer.model")).removeprefix("nemo:")


def _piece_count(tokenizer: bytes, archive: Path) -> int:
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        # The constructor would take an empty model without a word.
        pieces.LoadFromSerializedProto(tokenizer)
    except RuntimeError as error:
        raise DragomanError("bad_checkpoint", f"{archive}: its tokenizer is not a SentencePiece model") from error
    count: int = pieces.get_piece_size()
    return count


# -------------------------------------------------------------------------------------------- what can be run


def _check_kind(settings: Mapping[str, Any]) -> None:
    """Refuses every model that is not a cache-aware streaming FastConformer."""
    target = str(settings.get("target", ""))
    if "Prompt" in target or _get(settings, "model_defaults.initialize_prompt_feature"):
        raise _unsupported("target", target, ("a model without language prompts",), _GET_ANOTHER)
    _check_class(settings, "encoder", ("ConformerEncoder",))
    _check_class(settings, "decoder", ("RNNTDecoder", "ConvASRDecoder"))
    _check_front_end(settings)
    _check_all(settings, "encoder", _ENCODER)
    kernel = _get(settings, "encoder.conv_kernel_size", 31)
    found = _get(settings, "encoder.conv_context_size")
    if found not in ("causal", [_integer(kernel, "encoder.conv_kernel_size") - 1, 0]):
        raise _unsupported("encoder.conv_context_size", found, ("causal",), _GET_ANOTHER)
    if _is_ctc(settings):
        return
    _check_class(settings, "joint", ("RNNTJoint",))
    _check_all(settings, "decoder", _DECODER)
    _check_all(settings, "joint", _JOINT)


def _check_front_end(settings: Mapping[str, Any]) -> None:
    """Refuses every front end but the streaming models' log-mel."""
    _check_class(settings, "preprocessor", ("AudioToMelSpectrogramPreprocessor",))
    normalize = _get(settings, "preprocessor.normalize", "per_feature")
    # NeMo lets every other string pass and then does nothing; the published models say "NA".
    if isinstance(normalize, dict) or normalize in _NORMALIZATIONS:
        raise _unsupported(
            "preprocessor.normalize", normalize, ("NA",), f"it needs the whole recording; {_GET_ANOTHER}"
        )
    _check_all(settings, "preprocessor", _FRONT_END)


def _check_all(settings: Mapping[str, Any], section: str, table: tuple[tuple[str, Any, tuple[Any, ...]], ...]) -> None:
    """Compares a section with what can be computed."""
    for key, default, accepted in table:
        found = _get(settings, f"{section}.{key}", default)
        if found not in accepted:
            raise _unsupported(f"{section}.{key}", found, accepted, _GET_ANOTHER)


def _check_class(settings: Mapping[str, Any], section: str, accepted: tuple[str, ...]) -> None:
    """Compares the class that a section names with those that are known here."""
    found = str(_get(settings, f"{section}._target_", "nothing")).rpartition(".")[2]
    if found not in accepted:
        raise _unsupported(f"{section}._target_", found, accepted, _GET_ANOTHER)


def _unsupported(key: str, found: object, accepted: tuple[Any, ...], remedy: str) -> DragomanError:
    needed = " or ".join(str(value) for value in accepted)
    return DragomanError("unsupported_model", f"the model's {key} is {found}, this engine needs {needed}; {remedy}")


# ---------------------------------------------------------------------------------------------- configuration


def _model_config(settings: Mapping[str, Any], *, vocab_size: int, name: str, source: str) -> ModelConfig:
    """NeMo's configuration in our terms."""
    decoder = None
    if not _is_ctc(settings):
        greedy = _get(settings, "decoding.greedy") or {}
        cap = greedy.get("max_symbols", greedy.get("max_symbols_per_step"))
        decoder = DecoderConfig(
            vocab_size=vocab_size,
            pred_hidden=_number(settings, "decoder.prednet.pred_hidden"),
            pred_layers=_number(settings, "decoder.prednet.pred_rnn_layers", 1),
            joint_hidden=_number(settings, "joint.jointnet.joint_hidden"),
            max_symbols_per_frame=10 if cap is None else _integer(cap, "decoding.greedy.max_symbols"),
        )
    return ModelConfig(
        features=FeatureConfig(mel_bins=_number(settings, "preprocessor.features", 64)),
        encoder=_encoder_config(settings),
        vocab_size=vocab_size,
        decoder=decoder,
        ctc=decoder is None or "aux_ctc" in settings,
        name=name,
        source=source,
    )


def _encoder_config(settings: Mapping[str, Any]) -> EncoderConfig:
    left, lookaheads = _contexts(settings)
    channels = _number(settings, "encoder.subsampling_conv_channels", -1)
    d_model = _number(settings, "encoder.d_model")
    return EncoderConfig(
        n_layers=_number(settings, "encoder.n_layers"),
        d_model=d_model,
        n_heads=_number(settings, "encoder.n_heads", 4),
        ff_expansion_factor=_number(settings, "encoder.ff_expansion_factor", 4),
        subsampling_conv_channels=d_model if channels == -1 else channels,
        conv_kernel_size=_number(settings, "encoder.conv_kernel_size", 31),
        use_bias=bool(_get(settings, "encoder.use_bias", True)),
        xscaling=bool(_get(settings, "encoder.xscaling", True)),
        left_context_frames=left,
        lookahead_frames=lookaheads,
    )


def _contexts(settings: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Left context and trained look-aheads, in encoder frames, the default first."""
    found = _get(settings, "encoder.att_context_size") or [-1, -1]
    style = _get(settings, "encoder.att_context_style", "regular")
    try:
        lefts, rights = zip(*([found] if isinstance(found[0], int) else found), strict=True)
    except (TypeError, ValueError, KeyError) as error:
        raise DragomanError(
            "bad_checkpoint", f"the model's encoder.att_context_size is {found!r}, pairs of frames are needed"
        ) from error
    if min(lefts) < 0 or min(rights) < 0:
        raise _unsupported("encoder.att_context_size", found, ("a bounded one, such as [70, 13]",), _GET_ANOTHER)
    if style == "regular" and max(rights) > 0:
        raise _unsupported(
            "encoder.att_context_size",
            f"{found} in regular style, in which look-ahead adds up over the layers",
            ("chunked_limited style, or a look-ahead of 0",),
            _GET_ANOTHER,
        )
    if len(set(lefts)) > 1:
        raise _unsupported("encoder.att_context_size", found, ("one left context for all look-aheads",), _GET_ANOTHER)
    return lefts[0], rights


def _is_ctc(settings: Mapping[str, Any]) -> bool:
    """Whether the only decoder is a CTC head."""
    return str(_get(settings, "decoder._target_")).endswith("ConvASRDecoder")


def _get(settings: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path, or the default where a part of it is absent."""
    value: Any = settings
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def _number(settings: Mapping[str, Any], path: str, default: int | None = None) -> int:
    return _integer(_get(settings, path, default), path)


def _integer(value: object, path: str) -> int:
    if not isinstance(value, int):
        raise DragomanError("bad_checkpoint", f"the model's {path} is {value!r}, a whole number is needed")
    return value


# ---------------------------------------------------------------------------------------------------- weights


def _rename(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names of the tensors; the front end's constants are left out because they follow from the config.

    A pure CTC model calls its head ``decoder``, and a joint trained without dropout counts one entry less.
    """
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("preprocessor."):
            continue
        if config.decoder is None and name.startswith("decoder.decoder_layers."):
            name = f"ctc_{name}"
        elif name.startswith("joint.joint_net.1."):
            name = name.replace("joint_net.1.", "joint_net.2.")
        renamed[name] = tensor
    return renamed


def _card(config: ModelConfig, archive: Path) -> str:
    """The model card: where the weights came from and what they are."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    encoder = config.encoder
    heads = [name for name, there in (("transducer", config.decoder is not None), ("CTC", config.ctc)) if there]
    lookaheads = ", ".join(str(frames * 80) for frames in encoder.lookahead_frames)
    return f"""# {config.name}

A cache-aware streaming FastConformer, imported from a NeMo archive. The weights are unchanged and stay under
the licence of their publisher.

| | |
|---|---|
| source | {config.source} |
| archive | {archive.name}, sha256 {digest} |
| encoder | {encoder.n_layers} layers of {encoder.d_model}, {config.features.mel_bins} mel bins |
| heads | {" and ".join(heads)}, {config.vocab_size} pieces |
| left context | {encoder.left_context_frames * 80} ms |
| look-ahead | {lookaheads} ms |
"""
