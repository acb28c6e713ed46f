"""G.711, in which telephones speak: a byte is a sample, finer where it is quiet."""

from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

Law = Literal["mulaw", "alaw"]

_BIAS: Final = 0x84


def to_s16le(data: bytes, law: Law) -> bytes:
    """Samples of one byte each as samples of two, in the order of `s16le`."""
    return _TABLES[law][np.frombuffer(data, np.uint8)].tobytes()


def _table(law: Law) -> npt.NDArray[Any]:
    """What each of the 256 bytes stands for: a sign, a power of two and a place between it and the next."""
    codes = np.arange(256, dtype=np.int32) ^ (0xFF if law == "mulaw" else 0x55)
    exponent, step = codes >> 4 & 7, codes & 15
    if law == "mulaw":
        magnitude = ((step << 3) + _BIAS << exponent) - _BIAS
        is_negative = codes & 0x80 != 0
    else:
        magnitude = np.where(exponent == 0, (step << 4) + 8, (step << 4) + 0x108 << np.maximum(exponent - 1, 0))
        is_negative = codes & 0x80 == 0
    return np.where(is_negative, -magnitude, magnitude).astype("<i2")


_TABLES: Final = {law: _table(law) for law in get_args(Law)}
