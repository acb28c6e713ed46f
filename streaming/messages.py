"""What a client can ask of a session, whatever it speaks, and why a session ends."""

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from streaming.audio import AudioFormat
from streaming.session import SessionConfig

DEFAULT_RATE_HZ: Final = 24_000
"""What a client of OpenAI's protocol means when it declares none."""

DEFAULTS: Final = SessionConfig(AudioFormat(sample_rate_hz=DEFAULT_RATE_HZ))
"""What a client has declared that begins with audio."""


class Command(Enum):
    """What a client can ask for beside settings and audio."""

    FLUSH = "session.input_audio_buffer.commit"
    CLOSE = "session.close"


@dataclass(frozen=True)
class LookaheadChange:
    """What a client may still change when its audio has begun; as in `SessionConfig`."""

    max_lookahead_ms: int | None


SessionMessage = SessionConfig | LookaheadChange | bytes | Command


@dataclass(frozen=True)
class Resume:
    """A client goes on with a session whose connection it has lost.

    Attributes:
        token: Secret that the client was told when the session began.
        seq: Number of the last event that it has; -1 for none.
    """

    token: str
    seq: int


ClientMessage = SessionMessage | Resume


class CloseCode(IntEnum):
    """Why a session ends, numbered as WebSocket numbers it (RFC 6455)."""

    NORMAL_CLOSURE = 1000
    GOING_AWAY = 1001
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    INTERNAL_ERROR = 1011
    TRY_AGAIN_LATER = 1013
