"""One spelling for one value: canonical JSON, so that equal records have equal digests on every machine.

The rule is RFC 8785 (JSON Canonicalization Scheme, https://www.rfc-editor.org/rfc/rfc8785): UTF-8 without spaces,
object keys sorted by their UTF-16 code units, only the necessary escapes, and numbers as ECMAScript writes them (the
shortest digits that give the same double back: 1.0 is `1`, 1e-7 is `1e-7`; no locale has a say). NaN, infinities and
integers beyond 2**53 - 1 have no portable spelling as JSON numbers: `plain` turns them into strings first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from expunge.errors import BadData
from expunge.files import digest_bytes

_EXACT = 2**53 - 1


def canonical(value: Any) -> bytes:
    """The RFC 8785 bytes of a JSON value (mappings with string keys, sequences, strings, numbers, booleans, None)."""
    try:
        return _write(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadData("Expected text that UTF-8 can hold, found half a surrogate pair. Repair the text.") from error


def digest(value: Any) -> str:
    """SHA-256 of the canonical bytes of `plain(value)`, 64 hex digits."""
    return digest_bytes(canonical(plain(value)))


def digest_ids(ids: Iterable[int | str]) -> str:
    """SHA-256 of a set of ids: order and repetition do not matter."""
    return digest(sorted({str(int(i)) if not isinstance(i, str) else i for i in ids}))


def plain(value: Any) -> Any:
    """The same value in what JSON can say everywhere: tuples become lists, NaN, infinities and integers beyond
    2**53 - 1 become strings ("NaN", "Infinity", "-Infinity", digits), numpy scalars become Python's."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _EXACT else str(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=canonical)
    if hasattr(value, "tolist"):  # numpy and torch values, without importing either
        return plain(value.tolist())
    raise BadData(
        f"Expected a value that JSON can hold, found {type(value).__name__}. Record a number, text, list or dict."
    )


def _write(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        if abs(value) > _EXACT:
            raise BadData(f"Expected an integer within 2**53 - 1, found {value}. Write it as a string (see `plain`).")
        return str(value)
    if isinstance(value, float):
        return _write_float(value)
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise BadData(f"Expected strings as keys, found {wrong[0]!r}. Convert the keys first (see `plain`).")
        keys = sorted(value, key=lambda key: key.encode("utf-16-be", "surrogatepass"))
        return "{" + ",".join(f"{json.dumps(key, ensure_ascii=False)}:{_write(value[key])}" for key in keys) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_write, value)) + "]"
    raise BadData(f"Expected a JSON value, found {type(value).__name__}. Convert it first (see `plain`).")


def _write_float(value: float) -> str:
    """ECMAScript's Number::toString, from Python's shortest digits."""
    if not math.isfinite(value):
        raise BadData(f"Expected a finite number, found {value}. Write it as a string (see `plain`).")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    _, digits, exponent = Decimal(repr(abs(value))).normalize().as_tuple()
    text, point = "".join(map(str, digits)), len(digits) + int(exponent)
    if len(text) <= point <= 21:
        return sign + text + "0" * (point - len(text))
    if 0 < point <= 21:
        return f"{sign}{text[:point]}.{text[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{text}"
    mantissa = text if len(text) == 1 else f"{text[0]}.{text[1:]}"
    return f"{sign}{mantissa}e{'+' if point > 0 else '-'}{abs(point - 1)}"
