"""Voice activity: Silero VAD, asked about one window at a time so that nobody has to keep its state."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import torch

#: The only window length that Silero takes at 16 kHz.
WINDOW_SAMPLES = 512
#: Its recurrent state starts at zero; the first answers are not to be trusted.
WARM_UP_WINDOWS = 4
SPEECH_PROBABILITY = 0.5
_lock = threading.Lock()


@cache
def _model() -> Any:
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad

    torch.set_num_threads(threads)  # importing the package sets it to one for the whole process
    return load_silero_vad()


def is_silent(samples: np.ndarray) -> bool:
    """Whether nobody speaks in a stretch of audio.

    Args:
        samples: ``float32[n]`` at 16 kHz; the answer depends on these samples alone. Fewer than 2,560 samples
            are too few to tell, and count as silent.
    """
    with _lock, torch.no_grad():
        model = _model()
        model.reset_states()
        windows = len(samples) // WINDOW_SAMPLES
        audio = torch.from_numpy(np.ascontiguousarray(samples[len(samples) - windows * WINDOW_SAMPLES :]))
        probabilities = [float(model(window, 16000)) for window in audio.view(windows, WINDOW_SAMPLES)]
    return max(probabilities[WARM_UP_WINDOWS:], default=0.0) < SPEECH_PROBABILITY
