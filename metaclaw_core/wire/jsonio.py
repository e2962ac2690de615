"""JSON as the wire has it: faithful in, ASCII out.

Design: the standard library's json, not orjson: it keeps 23-digit integers and lone surrogates
(`"\\ud800"`, which Node emits), both of which orjson changes or rejects. Output is ASCII, so a lone
surrogate survives and any text column can hold it.
"""

from __future__ import annotations

import json

from metaclaw_core.errors import WireError
from metaclaw_core.model import Json

_compact = json.JSONEncoder(separators=(",", ":")).encode  # `json.dumps` would make one at each call
_sorted = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


def loads(data: bytes | str, what: str) -> Json:
    """Parse JSON; `what` names the thing in the error ("request body").

    Raises WireError for anything that is not one JSON text in UTF-8 (UTF-16/32 are accepted too).
    """
    try:
        return json.loads(data)
    except UnicodeDecodeError as e:
        raise WireError(f"{what} is not valid UTF-8 (byte {e.start})") from e
    except RecursionError as e:
        raise WireError(f"{what} is nested too deeply") from e
    except json.JSONDecodeError as e:
        raise WireError(f"{what} is not JSON: {e.msg} at {e.pos}") from e
    except ValueError as e:  # an integer longer than sys.get_int_max_str_digits()
        raise WireError(f"{what} is not JSON that can be held: {e}") from e


def loads_object(data: bytes | str, what: str) -> dict[str, Json]:
    """The same, and WireError unless it is an object."""
    value = loads(data, what)
    if not isinstance(value, dict):
        raise WireError(f"{what} is JSON, but {type(value).__name__} and not an object")
    return value


def dumps(value: Json) -> str:
    """Compact ASCII JSON in the given key order. Raises WireError for what is nested too deeply."""
    try:
        return _compact(value)
    except RecursionError as e:
        raise WireError("the value is nested too deeply for JSON") from e


def canonical(value: Json) -> str:
    """Compact ASCII JSON with sorted keys: equal values, equal text. Raises WireError like `dumps`."""
    try:
        return _sorted(value)
    except RecursionError as e:
        raise WireError("the value is nested too deeply for JSON") from e
