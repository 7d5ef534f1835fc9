"""Splits of datasets: shares, groups, given splits, and their stability."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.splits import SPLITS, check_split, choose_splits

SHARES = (0.8, 0.1, 0.1)

Images = list[tuple[str, str | None, str | None]]


def images_of(count: int) -> Images:
    """Return images without group and given split."""
    return [(f"image-{number}.jpg", None, None) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (1000, SHARES, (800, 100, 100)),
        (17, SHARES, (13, 2, 2)),
        (15, (0.5, 0.5, 0), (8, 7, 0)),
        (10, (1, 0, 0), (10, 0, 0)),
        (7, (1 / 3, 1 / 3, 1 / 3), (3, 2, 2)),
        (5, SHARES, (3, 1, 1)),  # each split gets an image
        (3, (0.98, 0.01, 0.01), (1, 1, 1)),
        (2, SHARES, (1, 1, 0)),
        (1, SHARES, (1, 0, 0)),
        (0, SHARES, (0, 0, 0)),
    ],
)
def test_shares_are_exact(count: int, shares: tuple[float, ...], expected: tuple[int, ...]) -> None:
    counts = Counter(choose_splits(images_of(count), shares, seed=3).values())
    assert tuple(counts[split] for split in SPLITS) == expected


def test_result_does_not_depend_on_the_order_but_on_the_seed() -> None:
    images = images_of(200)
    shuffled = random.Random(0).sample(images, len(images))
    assert choose_splits(images, SHARES, 0) == choose_splits(shuffled, SHARES, 0)
    assert choose_splits(images, SHARES, 0) != choose_splits(images, SHARES, 1)


def test_most_images_keep_their_split_when_others_are_added() -> None:
    before = choose_splits(images_of(1000), SHARES, 0)
    after = choose_splits(images_of(1500), SHARES, 0)
    moved = [name for name, split in before.items() if after[name] != split]
    assert len(moved) < 50


@given(
    images=st.dictionaries(
        st.text(max_size=6), st.tuples(st.sampled_from([None, "a", "b", "c"]), st.sampled_from([None, None, *SPLITS]))
    ),
    seed=st.integers(0, 9),
)
def test_groups_stay_together_and_given_splits_are_kept(
    images: dict[str, tuple[str | None, str | None]], seed: int
) -> None:
    found = choose_splits([(name, *values) for name, values in images.items()], SHARES, seed)
    assert found.keys() == images.keys()
    chosen: dict[str, set[str]] = {}
    for name, (group, split) in images.items():
        if split is not None:
            assert found[name] == split
        elif group is not None:
            chosen.setdefault(group, set()).add(found[name])
    for group, splits in chosen.items():
        assert len(splits) == 1
        given_splits = {split for other, split in images.values() if other == group and split is not None}
        assert not given_splits or splits <= given_splits


def test_frames_of_a_video_are_in_one_split() -> None:
    images: Images = [(f"{video}__{frame}.jpg", f"video-{video}", None) for video in range(20) for frame in range(9)]
    counts = Counter(choose_splits(images, SHARES, 0).values())
    assert {split: counts[split] for split in SPLITS} == {"train": 144, "valid": 18, "test": 18}


@pytest.mark.parametrize("split", [(0.8, 0.2), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)])
def test_invalid_shares_are_errors(split: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="split must"):
        check_split(split)


def test_unknown_given_splits_are_errors() -> None:
    with pytest.raises(LabelingError, match=r"the split of a.jpg must be train, valid or test, got 'dev'"):
        choose_splits([("a.jpg", None, "dev")], SHARES, 0)
