"""Records of finetunes and checkpoints: IDs, checks of fields, cursors of lists, conversion from SQLite and to JSON."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

from moondream_cv.arguments import check_integer, check_text

RANKS = (8, 16, 24, 32)
MAX_LIMIT = 100  # entries of a page
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # base 32 in the order of ASCII, without I, L, O and U
_TIME_DIGITS, _RANDOM_DIGITS = 10, 16

_id_lock = threading.Lock()
_last_id_ms = 0


@dataclass(frozen=True)
class FinetuneRecord:
    """Metadata of a finetune.

    Attributes:
        finetune_id: 26 letters and digits. IDs sort by time of creation.
        name: Name, unique among the existing finetunes.
        rank: Rank of the adapter.
        model: Name of the base model.
        seed: Seed of the adapter and of sampling.
        step: Number of the last committed train step, 0 before the first.
        resumable: Whether training can continue; False after the latest checkpoint was deleted.
        created_at_ms: Time of creation in milliseconds since 1970.
        updated_at_ms: Time of the last change of steps or checkpoints in milliseconds since 1970.
    """

    finetune_id: str
    name: str
    rank: int
    model: str
    seed: int
    step: int
    resumable: bool
    created_at_ms: int
    updated_at_ms: int


@dataclass(frozen=True)
class CheckpointRecord:
    """Metadata of a saved checkpoint.

    Attributes:
        finetune_id: ID of the finetune.
        step: Train step of the adapter.
        created_at_ms: Time of saving in milliseconds since 1970.
    """

    finetune_id: str
    step: int
    created_at_ms: int


class LastStep(NamedTuple):
    """The last committed train step, to answer a retry of its request.

    Attributes:
        digest: Digest of the request.
        reply: Reply to the request.
        acknowledged: Whether `FinetuneStore.acknowledge` was called after the step.
    """

    digest: str
    reply: dict[str, Any]
    acknowledged: bool


def new_id() -> str:
    """Return a new ID: 26 letters and digits that sort by time of creation.

    The first 10 digits are the time in milliseconds, the other 16 are random (80 bits). IDs of one process sort in the
    order of the calls, also within a millisecond.
    """
    global _last_id_ms
    with _id_lock:
        _last_id_ms = max(now_ms(), _last_id_ms + 1)
        milliseconds = _last_id_ms
    return _base32(milliseconds, _TIME_DIGITS) + _base32(secrets.randbits(5 * _RANDOM_DIGITS), _RANDOM_DIGITS)


def now_ms() -> int:
    """Return the time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def check_name(name: object) -> str:
    """Return the name of a finetune.

    Args:
        name: Value to check.

    Raises:
        ValueError: The name does not consist of 1 to 64 letters, digits, '.', '-' and '_'.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name must have 1 to 64 letters, digits, '.', '-' and '_', got {name!r:.100}")
    return name


def check_rank(rank: object) -> int:
    """Return the rank of an adapter.

    Args:
        rank: Value to check.

    Raises:
        ValueError: The rank is not one of `RANKS`.
    """
    if isinstance(rank, bool) or not isinstance(rank, Integral) or rank not in RANKS:
        raise ValueError(f"rank must be one of {', '.join(map(str, RANKS))}, got {rank!r:.100}")
    return int(rank)


def check_limit(limit: object) -> int:
    """Return the maximum number of entries of a page.

    Args:
        limit: Value to check.

    Raises:
        ValueError: The limit is not an integer between 1 and `MAX_LIMIT`.
    """
    return check_integer("limit", limit, 1, MAX_LIMIT)


def check_metric(name: object, value: object) -> float:
    """Return the value of a metric.

    Args:
        name: Name of the metric.
        value: Value to check.

    Raises:
        ValueError: The name is empty, or the value is not a finite number.
    """
    check_text("the name of a metric", name)
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"the metric {name!r:.100} must be a finite number, got {value!r:.100}")
    return number


def encode_reply(reply: Mapping[str, Any]) -> str:
    """Return the JSON text of a reply.

    Args:
        reply: Reply to a request.

    Raises:
        ValueError: JSON cannot represent the reply.
    """
    try:
        return json.dumps(dict(reply), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reply must be a JSON object, got {reply!r:.100}: {error}") from None


def finetune_record(row: sqlite3.Row) -> FinetuneRecord:
    """Return the record of a row of the table `finetunes`.

    Args:
        row: All columns of the row.
    """
    return FinetuneRecord(
        finetune_id=row["id"],
        name=row["name"],
        rank=row["rank"],
        model=row["model"],
        seed=row["seed"],
        step=row["step"],
        resumable=bool(row["resumable"]),
        created_at_ms=row["created_at_ms"],
        updated_at_ms=row["updated_at_ms"],
    )


def checkpoint_record(row: sqlite3.Row) -> CheckpointRecord:
    """Return the record of a row of the table `checkpoints`.

    Args:
        row: All columns of the row.
    """
    return CheckpointRecord(row["finetune_id"], row["step"], row["created_at_ms"])


def encode_cursor(kind: str, last: str) -> str:
    """Return the cursor of the page after an entry. It stays valid when entries are added or deleted.

    Args:
        kind: Kind of the list.
        last: Sort key of the last entry of a page.
    """
    return base64.urlsafe_b64encode(f"{kind}:{last}".encode()).decode().rstrip("=")


def decode_cursor(kind: str, cursor: object, key: re.Pattern[str]) -> str:
    """Return the sort key in a cursor.

    Args:
        kind: Kind of the list.
        cursor: Cursor from `encode_cursor`.
        key: Pattern of the sort keys of this list.

    Raises:
        ValueError: The cursor is malformed or belongs to another kind of list.
    """
    malformed = ValueError(f"cursor must be the next_cursor of an earlier page, got {cursor!r:.100}")
    if not isinstance(cursor, str):
        raise malformed
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        found, _, last = base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii").partition(":")
    except (UnicodeError, binascii.Error):
        raise malformed from None
    if found != kind or not key.fullmatch(last) or encode_cursor(kind, last) != cursor:
        raise malformed
    return last


def _base32(number: int, digits: int) -> str:
    return "".join(_DIGITS[number >> 5 * place & 31] for place in reversed(range(digits)))
