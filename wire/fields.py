"""Fields of JSON that a client has sent, and the sentences about those that are wrong."""

import json
from typing import Any

from streaming.errors import DragomanError


def section(value: object, path: str, *keys: str) -> dict[str, Any]:
    """A JSON object with none but these keys; left out or null, an empty one.

    Raises:
        DragomanError: ``invalid_value`` or ``unknown_field``.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DragomanError("invalid_value", f"{path} is {shown(value)}: it must be an object")
    for key in value:
        if key not in keys:
            raise DragomanError("unknown_field", f"{path} has no field {shown(key)}: it takes {', '.join(keys)}")
    return value


def value_at(fields: dict[str, Any], path: str, kind: type, default: Any) -> Any:
    """The value at the last key of `path`, of the type `kind`; left out or null, the default.

    Raises:
        DragomanError: ``invalid_value``.
    """
    value = fields.get(path.rpartition(".")[2])
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {str: "a string", int: "a whole number"}[kind]
        raise DragomanError("invalid_value", f"{path} is {shown(value)}: it must be {wanted}")
    return value


def shown(value: object) -> str:
    """A value of the client's, short enough to be repeated to it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def json_object(text: str) -> dict[str, Any]:
    """A message of a client that is a JSON object.

    Raises:
        DragomanError: ``invalid_json``.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DragomanError("invalid_json", f"the message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DragomanError("invalid_json", f"the message is {shown(value)}: it must be a JSON object")
    return value
