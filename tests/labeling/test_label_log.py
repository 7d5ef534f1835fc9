"""The log of a run: batches are complete or absent, in order, and written once."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.label_log import LabelLog
from moondream_cv.labeling.layout import LABELS

BATCHES = [range(3), range(3, 6), range(6, 7), range(7, 10)]


def lines(number: int) -> list[str]:
    return [f'{{"image": "{index}ü"}}\n' for index in BATCHES[number]]


COMPLETE = "".join(itertools.chain(*map(lines, range(4)))).encode()


def write_missing(folder: Path) -> None:
    with LabelLog(folder, BATCHES) as log:
        for number in log.missing:
            log.write(number, lines(number))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_batches_are_in_order_however_they_are_written(tmp_path: Path, order: tuple[int, ...]) -> None:
    with LabelLog(tmp_path, BATCHES) as log:
        assert log.missing == [0, 1, 2, 3]
        for place, number in enumerate(order):
            log.write(number, lines(number))
            log.write(number, ["ignored\n"])
            assert log.missing == sorted(order[place + 1 :])
    assert (tmp_path / LABELS).read_bytes() == COMPLETE
    assert not list((tmp_path / ".labeling").rglob("*.jsonl"))


def test_log_that_is_cut_anywhere_continues_to_the_same_content(tmp_path: Path) -> None:
    for position in range(len(COMPLETE) + 1):
        (tmp_path / LABELS).write_bytes(COMPLETE[:position])
        with LabelLog(tmp_path, BATCHES) as log:
            kept = (tmp_path / LABELS).read_bytes()
            assert COMPLETE.startswith(kept)
            assert kept.count(b"\n") == log.num_lines
            assert log.num_lines in (0, 3, 6, 7, 10)
        write_missing(tmp_path)
        assert (tmp_path / LABELS).read_bytes() == COMPLETE


def test_batches_that_wait_survive_a_restart(tmp_path: Path) -> None:
    rng = random.Random(0)
    order = rng.sample(range(4), 4)
    for number in order:
        with LabelLog(tmp_path, BATCHES) as log:
            log.write(number, lines(number))
    with LabelLog(tmp_path, BATCHES) as log:
        assert log.missing == []
    assert (tmp_path / LABELS).read_bytes() == COMPLETE


def test_waiting_batch_that_is_already_in_the_log_is_not_appended_twice(tmp_path: Path) -> None:
    with LabelLog(tmp_path, BATCHES) as log:
        log.write(1, lines(1))
        waiting = tmp_path / ".labeling" / "batches" / "00000001.jsonl"
        content = waiting.read_bytes()
        log.write(0, lines(0))
    waiting.write_bytes(content)  # a crash between appending and removing it
    write_missing(tmp_path)
    assert (tmp_path / LABELS).read_bytes() == COMPLETE
    assert not waiting.exists()


def test_log_with_more_lines_than_images_is_rejected_and_kept(tmp_path: Path) -> None:
    (tmp_path / LABELS).write_bytes(COMPLETE)
    with pytest.raises(LabelingError, match="more lines than there are images, 10"):
        LabelLog(tmp_path, BATCHES[:2])
    assert (tmp_path / LABELS).read_bytes() == COMPLETE
