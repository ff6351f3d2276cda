"""Values of kept columns: the types that the prompts table stores them in, and comparing them with what is asked for.

Numbers, booleans, text, dates, times of day, points in time and durations keep their type. A Decimal becomes a number
where a float64 holds every value of the shard exactly, else text. Bytes become text (hexadecimal digits if they are not
UTF-8), lists and dicts JSON text, everything else its plain text, and so do columns of mixed types. No text gets
quotation marks.

A value that is asked for is read as the column's type: "3" and 3 are the same in a column of numbers and in a column of
text, and the text "2024-05-01" is a date in a column of dates. In a column of points in time a bare date is its whole
day.
"""

import datetime as dt
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fisher_vmap.errors import UserError

_KINDS = (bool, int, float, str, Decimal, dt.datetime, dt.date, dt.time, dt.timedelta)  # a datetime is a date too


def kept_column(values: Sequence[Any]) -> pa.Array:
    """One shard's values of a kept column."""
    found = [_plain(value) for value in values]
    kinds = {_kind(value) for value in found if value is not None}
    if kinds - {bool, int, float, Decimal}:  # among other things, NaN is how pandas says that there is nothing
        found = [None if isinstance(value, float) and math.isnan(value) else value for value in found]
        kinds = {_kind(value) for value in found if value is not None}
    if Decimal in kinds and kinds <= {Decimal, int, float} and all(map(_is_exact, found)):
        found, kinds = [None if value is None else float(value) for value in found], {float}
    if len(kinds) == 1 and (kind := next(iter(kinds))) in (dt.datetime, dt.date, dt.time, dt.timedelta):
        # An error means what Arrow cannot hold, such as both with and without a time zone.
        with suppress(pa.ArrowException, OverflowError, ValueError, TypeError):
            return pa.array(found, _temporal(kind, [value for value in found if value is not None]))
    if kinds <= {bool, int, float, str}:
        # An error means text among numbers, or an integer beyond 64 bits.
        with suppress(pa.ArrowException, OverflowError):
            return pa.array([encodable(value) if isinstance(value, str) else value for value in found])
    return pa.array([_text(value) for value in found], pa.string())


def common_type(types: set[pa.DataType]) -> pa.DataType:
    """The type that holds a column's values of all shards: text if the shards' types differ."""
    types = types - {pa.null()}
    if len(types) <= 1:
        return next(iter(types), pa.string())
    return pa.float64() if types == {pa.int64(), pa.float64()} else pa.string()


def as_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column of one shard with the type that all shards' rows have."""
    if pa.types.is_temporal(column.type) and pa.types.is_string(kind):
        return pa.chunked_array([pa.array([_text(value) for value in column.to_pylist()], kind)])
    return column.cast(kind, safe=False)


def encodable(text: str | None) -> str | None:
    """Text without halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return text if text is None else text.encode("utf-8", "replace").decode()


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, NaT or pandas' NA."""
    pandas = sys.modules.get("pandas")
    if value is None or (pandas is not None and value is pandas.NA):
        return True
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    return isinstance(value, float | np.floating | Decimal | dt.datetime | dt.timedelta) and bool(value != value)


def _plain(value: Any) -> Any:
    """A value as one of `_KINDS`, or None; NaN stays a number."""
    if is_missing(value):
        return math.nan if isinstance(value, float | np.floating) else None
    if isinstance(value, np.datetime64 | np.timedelta64) and np.datetime_data(value.dtype)[0] in ("ns", "ps", "fs"):
        value = value.astype("M8[us]" if isinstance(value, np.datetime64) else "m8[us]")  # ns become plain integers
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data.hex()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple | Mapping):
        with suppress(TypeError):  # keys that are no text
            return json.dumps(value, ensure_ascii=False, default=_in_json)
    return value if isinstance(value, _KINDS) else str(value)


def _in_json(value: Any) -> Any:
    """What stands for a value inside a list or dict that JSON does not know."""
    plain = value.tolist() if isinstance(value, np.ndarray) else _plain(value)
    return plain if plain is None or isinstance(plain, bool | int | float | list) else str(plain)


def _is_exact(value: Any) -> bool:
    """Whether a number is the same as a float64."""
    return not isinstance(value, Decimal | int) or Decimal(repr(float(value))) == value


def _kind(value: Any) -> type:
    return next(kind for kind in _KINDS if isinstance(value, kind))


def _temporal(kind: type, values: Sequence[Any]) -> pa.DataType:
    """The Arrow type of values of one kind; in nanoseconds only where one of them has any."""
    unit = "ns" if any(getattr(v, "nanosecond", 0) or getattr(v, "nanoseconds", 0) for v in values) else "us"
    if kind is dt.datetime:
        aware = {value.tzinfo is not None for value in values}
        if len(aware) > 1:
            raise ValueError("points in time with and without a time zone")
        return pa.timestamp(unit, pa.array(values[:1]).type.tz)
    return {dt.date: pa.date32(), dt.time: pa.time64("us"), dt.timedelta: pa.duration(unit)}[kind]


def _text(value: Any) -> str | None:
    """A value among others of another type, as text without quotation marks."""
    if value is None:
        return None
    return encodable(json.dumps(value) if isinstance(value, bool | int | float) else str(value))


class Wanted(NamedTuple):
    """What is asked for of one column: any of some values, of some whole days, or a missing value."""

    values: frozenset[Any]
    days: frozenset[dt.date]
    missing: bool

    def holds(self, found: Any) -> bool:
        """Whether a value of the column, as Arrow gives it, is one of these."""
        if is_missing(found):
            return self.missing
        return found in self.values or (bool(self.days) and found.date() in self.days)


def wanted(column: str, asked: Any, kind: pa.DataType) -> Wanted:
    """Read what is asked for as a column's type.

    Args:
        column: its name, for the errors.
        asked: a value, or several in a list, tuple, set, range, array, pandas Index or Series: any of them. None, NaN
            and NaT stand for a missing value.
        kind: the column's type.

    Raises:
        UserError: the column holds lists, or a value cannot be read as its type.
    """
    read = next((read for test, read in _READERS if test(kind)), None)
    if read is None:
        raise UserError(
            f"{column} holds lists, which no single value is equal to; choose by a function of the row: "
            f"where=lambda row: 'yes' in row[{column!r}]"
        )
    values, days, missing = set[Any](), set[dt.date](), False
    for item in several_of(asked):
        if is_missing(item):
            missing = True
            continue
        try:
            found = read(item.item() if isinstance(item, np.generic) and not _is_time(item) else item, kind)
        except (ValueError, TypeError, InvalidOperation, OverflowError) as error:
            what = f"{item!r:.60} ({type(item).__name__})"
            raise UserError(f"{column} holds {_CALLED[read]}, and {what} cannot be read as one of them") from error
        for value in found if isinstance(found, set) else {found}:
            is_day = pa.types.is_timestamp(kind) and not isinstance(value, dt.datetime)
            days.add(value) if is_day else values.add(value)
    return Wanted(frozenset(values), frozenset(days), missing)


def several_of(asked: Any) -> list[Any]:
    """The entries of something that holds several, or the one thing alone; scalars of arrays as Python's."""
    if isinstance(asked, pa.Scalar):
        return [asked.as_py()]
    if hasattr(asked, "to_pylist"):
        return list(asked.to_pylist())
    if hasattr(asked, "detach"):  # a torch tensor
        asked = asked.detach().cpu().numpy()
    if isinstance(asked, np.ndarray) and asked.ndim == 0:
        return [asked[()]]
    if isinstance(asked, str | bytes | bytearray | Mapping) or not isinstance(asked, Iterable):
        return [asked]
    return list(asked)


def _is_time(value: Any) -> bool:
    return isinstance(value, np.datetime64 | np.timedelta64)


def _as_text(item: Any, kind: pa.DataType) -> set[str]:
    """The spellings of a value that a column of text may have."""
    if callable(item):
        raise TypeError("a function")
    plain = _plain(item)
    if isinstance(plain, str):
        return {encodable(plain) or ""}
    spelt = {str(plain)}
    if isinstance(plain, bool | int | float):
        spelt.add(json.dumps(plain))
    if isinstance(plain, dt.datetime | dt.date | dt.time):
        spelt.add(plain.isoformat())
    if isinstance(plain, dt.datetime) and plain.time() == dt.time(0):
        spelt.add(str(plain.date()))
    return spelt


_BOOLEANS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _as_boolean(item: Any, kind: pa.DataType) -> bool:
    found = _BOOLEANS.get(str(item).strip().lower())
    if found is None:
        raise TypeError("not a boolean")
    return found


def _as_number(item: Any, kind: pa.DataType) -> int | float:
    if isinstance(item, str):
        item = Decimal(item.strip())
    if isinstance(item, Decimal):
        whole = item.is_finite() and abs(item) < 2**63 and item == item.to_integral_value()
        return int(item) if whole else float(item)
    if not isinstance(item, int | float):
        raise TypeError("not a number")
    return item


def _as_time(item: Any, kind: pa.DataType) -> dt.date:
    """A point in time, in the column's time zone if it has one and the value none; or a date."""
    plain = _plain(item)
    if isinstance(plain, str):
        text = plain.strip()
        with suppress(ValueError):
            return dt.date.fromisoformat(text)
        plain = dt.datetime.fromisoformat(text)
    if not isinstance(plain, dt.date):
        raise TypeError("neither a point in time nor a date")
    if not isinstance(plain, dt.datetime) or not pa.types.is_timestamp(kind):
        return plain
    zone = pa.scalar(0, kind).as_py().tzinfo
    if zone is None and plain.tzinfo is not None:
        raise TypeError("it has a time zone, and the column has none")
    if zone is None or plain.tzinfo is not None:
        return plain
    return zone.localize(plain) if hasattr(zone, "localize") else plain.replace(tzinfo=zone)


def _as_date(item: Any, kind: pa.DataType) -> dt.date:
    found = _as_time(item, kind)
    if not isinstance(found, dt.datetime):
        return found
    if found.time() != dt.time(0):
        raise TypeError("a point in time within a day")
    return found.date()


def _as_time_of_day(item: Any, kind: pa.DataType) -> dt.time:
    found = dt.time.fromisoformat(item.strip()) if isinstance(item, str) else item
    if not isinstance(found, dt.time):
        raise TypeError("not a time of day")
    return found


def _as_duration(item: Any, kind: pa.DataType) -> dt.timedelta:
    """A duration; text as pandas reads it, such as "1 days 02:30:00"."""
    plain = _plain(item)
    if isinstance(plain, str):
        import pandas as pd

        plain = pd.Timedelta(plain)
    if not isinstance(plain, dt.timedelta):
        raise TypeError("not a duration")
    return plain


_Reader = Callable[[Any, pa.DataType], Any]

_CALLED: dict[_Reader, str] = {
    _as_text: "text",
    _as_boolean: "booleans",
    _as_number: "numbers",
    _as_date: "dates",
    _as_time: "points in time",
    _as_time_of_day: "times of day",
    _as_duration: "durations",
}

_READERS: tuple[tuple[Callable[[pa.DataType], bool], _Reader], ...] = (
    (lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind), _as_text),
    (pa.types.is_boolean, _as_boolean),
    (lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind), _as_number),
    (pa.types.is_date, _as_date),
    (pa.types.is_timestamp, _as_time),
    (pa.types.is_time, _as_time_of_day),
    (pa.types.is_duration, _as_duration),
)
