"""The one exception that a user of Dragoman is meant to read."""


class DragomanError(ValueError):
    """What the caller gave cannot be used, in one sentence that says what to do about it.

    The command line prints the sentence and exits with 2; the service sends both in an `error` event.

    Attributes:
        code: Stable machine-readable name in snake_case, such as ``"audio_empty"``.
    """

    def __init__(self, code: str, message: str) -> None:
        """Make the error; `message` is one sentence for people, `code` one word for programs."""
        super().__init__(message)
        self.code = code
