"""What a dialect is: the events of one protocol, on their way in and out."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

from streaming.events import Event
from streaming.messages import ClientMessage

Frame = str | bytes
"""What one message of a transport holds: text, or binary."""


class Dialect(Protocol):
    """How one client and the service speak with each other: one object for each session.

    It knows no transport and computes nothing.
    """

    PATH: ClassVar[str]
    """Where the service speaks it."""

    RESUMABLE: ClassVar[bool] = False
    """Whether a client may go on with a session on a new connection; then it has ways to say so, and each frame that
    is said of an event has the number of the frames before it."""

    resumes: str | None = None
    """The session to go on with, if the address asks for that; the first frame is then taken to be a `Resume`."""

    @classmethod
    def begin(cls, query: Mapping[str, str]) -> Self:
        """The dialect of a session that has just begun.

        Raises:
            DragomanError: The query of the address cannot be used; it is refused with HTTP 400 and this sentence.
        """

    def greeting(self, session_id: str, defaults: dict[str, Any]) -> list[Frame]:
        """What is said when the connection is open, about a session with these settings and models.

        A session that may be resumed has ``resume`` among them: the ``token``, and ``within_s``.
        """

    def opening(self) -> list[ClientMessage]:
        """What the address alone has asked for."""

    def take(self, frame: Frame) -> list[ClientMessage]:
        """What a frame of the client asks for.

        Raises:
            DragomanError: With a code, and a sentence that says what to do. The client is told, and the session
                goes on as if the frame had not come, or ends if it has not been declared.
        """

    def say(self, event: Event) -> list[Frame]:
        """What the client is told of an event, which has no number yet; nothing, perhaps."""
