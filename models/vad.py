"""Voice activity: Silero VAD, asked about a stretch of audio at a time so that nobody has to keep its state."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The only window length that Silero takes at 16 kHz.
WINDOW_SAMPLES = 512
#: Its recurrent state starts at zero; the first answers are not to be trusted.
WARM_UP_WINDOWS = 4
SPEECH_PROBABILITY = 0.5
#: Of the audio before a window, it hears so much again.
_CONTEXT_SAMPLES = 64


class _Parts(NamedTuple):
    """Silero's network for 16 kHz. Only the middle part has a past: the others take all windows at once."""

    net: Any
    recurrent: nn.LSTM


@cache
def _parts() -> _Parts:
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad

    torch.set_num_threads(threads)  # importing the package sets it to one for the whole process
    net = load_silero_vad()._model
    cell = dict(net.decoder.rnn.named_parameters())
    recurrent = nn.LSTM(cell["weight_ih"].shape[1], cell["weight_hh"].shape[1]).requires_grad_(False)
    recurrent.load_state_dict({f"{name}_l0": tensor for name, tensor in cell.items()})
    return _Parts(net, recurrent)


@torch.no_grad()
def speech_probabilities(samples: np.ndarray) -> Tensor:
    """How probably somebody speaks in each window of 512 samples, counted from the end; ``float32[n // 512]``.

    Args:
        samples: ``float32[n]`` at 16 kHz; nothing is known of what was before them.
    """
    windows = len(samples) // WINDOW_SAMPLES
    if not windows:
        return torch.zeros(0)
    net, recurrent = _parts()
    audio = torch.from_numpy(np.ascontiguousarray(samples[len(samples) - windows * WINDOW_SAMPLES :]))
    heard = F.pad(audio, (_CONTEXT_SAMPLES, 0)).unfold(0, _CONTEXT_SAMPLES + WINDOW_SAMPLES, WINDOW_SAMPLES)
    hidden, _ = recurrent(net.encoder(net.run_extractors(heard))[:, :, 0])
    probabilities: Tensor = net.decoder.decoder(hidden[:, :, None]).mean((1, 2))
    return probabilities


def is_silent(samples: np.ndarray) -> bool:
    """Whether nobody speaks in a stretch of audio.

    Args:
        samples: ``float32[n]`` at 16 kHz; the answer depends on these samples alone. Fewer than 2,560 samples
            are too few to tell, and count as silent.
    """
    probabilities = speech_probabilities(samples)[WARM_UP_WINDOWS:]
    return not len(probabilities) or float(probabilities.max()) < SPEECH_PROBABILITY
