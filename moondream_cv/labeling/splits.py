"""Assign images to the splits of a dataset: train, valid and test.

The order of the images depends on hashes of their names and of the seed, so the result does not depend on the order of
the inputs, and most images keep their split when others are added.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moondream_cv.arguments import check_probability
from moondream_cv.labeling.errors import LabelingError

SPLITS = ("train", "valid", "test")
"""Names of the splits, which are also the names of their folders."""


@dataclass(frozen=True)
class _Group:
    """Images that stay together, in the order of their hash."""

    order: bytes
    images: tuple[str, ...]


def check_split(split: Sequence[float]) -> tuple[float, float, float]:
    """Return the shares of the splits.

    Args:
        split: Shares of train, valid and test.

    Raises:
        ValueError: There are not three shares from 0 to 1 with the sum 1.
    """
    shares = tuple(check_probability("split", share) for share in split)
    if len(shares) != 3 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"split must have three shares with the sum 1, for train, valid and test, got {split!r:.100}")
    return shares[0], shares[1], shares[2]


def scale_shares(split: Sequence[float]) -> tuple[float, float, float]:
    """Check the shares of training, validation and test images, and scale them to a sum of 1.

    Args:
        split: One to three shares.

    Raises:
        ValueError: A share is negative, or the first is 0.
    """
    shares = [float(share) for share in split]
    if not 1 <= len(shares) <= 3 or any(not 0 <= share < float("inf") for share in shares) or not shares[0] > 0:
        raise ValueError(f"split must be one to three shares, the first above 0, such as 0.8,0.1,0.1; got {split}")
    first, second, third = (share / sum(shares) for share in [*shares, 0.0, 0.0][:3])
    return first, second, third


def choose_splits(
    images: Iterable[tuple[str, str | None, str | None]], shares: Sequence[float], seed: int
) -> dict[str, str]:
    """Return the split of each image.

    Images without a given split are divided by the shares, rounded by largest remainder. Images of a group stay
    together, so with large groups the shares are approximate. Each split with a share above 0 gets at least one image
    if there are enough images or groups.

    Args:
        images: Name, group and given split of each image. The group and the split may be None.
        shares: Shares of train, valid and test, with the sum 1.
        seed: Seed of the random order.

    Raises:
        LabelingError: A given split is not one of `SPLITS`.
        ValueError: The shares are invalid.
    """
    wanted = check_split(shares)

    # Keep the given splits
    found: dict[str, str] = {}
    members: dict[tuple[str, bool], list[str]] = {}
    given_of_group: dict[str, Counter[str]] = {}
    for name, group, given in images:
        if given is None:
            members.setdefault((name, False) if group is None else (group, True), []).append(name)
            continue
        if given not in SPLITS:
            raise LabelingError(f"the split of {name} must be train, valid or test, got {given!r}")
        found[name] = given
        if group is not None:
            given_of_group.setdefault(group, Counter())[given] += 1

    # Images of a group follow those that have a split
    groups = []
    for (key, is_group), names in members.items():
        if is_group and key in given_of_group:
            split = max(SPLITS, key=given_of_group[key].__getitem__)
            found.update(dict.fromkeys(names, split))
        else:
            order = hashlib.sha256(f"{seed}/{'group' if is_group else 'image'}/{key}".encode()).digest()
            groups.append(_Group(order, tuple(names)))

    # Divide the rest
    groups.sort(key=lambda group: group.order)
    present = {split for split in SPLITS if split in found.values()}
    for split, chosen in zip(SPLITS, _divided(groups, wanted, present), strict=True):
        found.update((name, split) for group in chosen for name in group.images)
    return found


def _divided(groups: list[_Group], shares: Sequence[float], present: set[str]) -> list[list[_Group]]:
    """Return the groups of each split: consecutive parts of the list."""
    total = sum(len(group.images) for group in groups)
    ends = list(itertools.accumulate(_rounded(total, shares)))
    parts: list[list[_Group]] = [[] for _ in SPLITS]
    start = 0
    for group in groups:
        middle = start + len(group.images) / 2
        start += len(group.images)
        parts[next(i for i, end in enumerate(ends) if middle < end)].append(group)
    for i, split in enumerate(SPLITS):
        if shares[i] and not parts[i] and split not in present:
            largest = max(parts, key=len)
            if len(largest) > 1:
                parts[i].append(largest.pop(min(range(len(largest)), key=lambda j: len(largest[j].images))))
    return parts


def _rounded(total: int, shares: Sequence[float]) -> list[int]:
    """Return integers with the sum `total`, rounded by largest remainder; on equal remainders, the first is larger."""
    exact = [round(total * share, 6) for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
