"""Voice activity: Silero VAD, asked about a stretch of audio at a time so that nobody has to keep its state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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
    """How probably somebody speaks in each window of 512 samples, counted from the end; ``float32[B, n // 512]``.

    Args:
        samples: ``float32[B, n]`` at 16 kHz, stretches of audio; nothing is known of what was before them.
    """
    B, windows = len(samples), samples.shape[1] // WINDOW_SAMPLES
    if not B * windows:
        return torch.zeros(B, windows)
    net, recurrent = _parts()
    audio = torch.from_numpy(samples[:, samples.shape[1] - windows * WINDOW_SAMPLES :])
    heard = F.pad(audio, (_CONTEXT_SAMPLES, 0)).unfold(1, _CONTEXT_SAMPLES + WINDOW_SAMPLES, WINDOW_SAMPLES)
    encoded = net.encoder(net.run_extractors(heard.flatten(0, 1)))[:, :, 0]
    hidden, _ = recurrent(encoded.view(B, windows, -1).transpose(0, 1))
    probabilities: Tensor = net.decoder.decoder(hidden.flatten(0, 1)[:, :, None]).mean((1, 2))
    return probabilities.view(windows, B).T


def are_silent(stretches: Sequence[np.ndarray]) -> list[bool]:
    """Whether nobody speaks in each of several stretches of audio.

    Args:
        stretches: ``float32[n]`` at 16 kHz each; an answer depends on its own samples alone. Fewer than 2,560 samples
            are too few to tell, and count as silent.
    """
    of_length: dict[int, list[int]] = defaultdict(list)
    for i, samples in enumerate(stretches):
        of_length[len(samples)].append(i)
    silent = [True] * len(stretches)
    for numbers in of_length.values():
        probabilities = speech_probabilities(np.stack([stretches[i] for i in numbers]))[:, WARM_UP_WINDOWS:]
        if probabilities.shape[1]:
            for i, probability in zip(numbers, probabilities.amax(1).tolist(), strict=True):
                silent[i] = probability < SPEECH_PROBABILITY
    return silent
