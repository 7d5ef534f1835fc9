"""A process that uses a `FinetuneStore` until it is killed; `test_store_faults.py` starts and kills it.

    python -m tests.finetune.store_worker ROOT

It reads JSON commands from standard input, and forks a child for each: `{"seed": 3}` runs random operations until the
child is killed, `{"kill_at": 120}` runs a fixed list of operations and kills the child at the 120th line of code of the
package `moondream_cv.finetune`. The child reports each operation to standard output before and after it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import moondream_cv.finetune
from moondream_cv.finetune.records import FinetuneRecord
from moondream_cv.finetune.store import FinetuneStore

NUMBERS = 200_000  # per state: writing them takes long enough to be interrupted
_CODE = str(Path(moondream_cv.finetune.__file__).parent)


def tensors_of(finetune_id: str, step: int) -> dict[str, Tensor]:
    """Return the tensors that the worker stores for a step."""
    generator = torch.Generator().manual_seed(zlib.crc32(digest_of(finetune_id, step).encode()))
    return {"a": torch.randn(NUMBERS, generator=generator, dtype=torch.float32), "b": torch.tensor(step)}


def digest_of(finetune_id: str, step: int) -> str:
    """Return the digest that the worker stores for a step."""
    return f"{finetune_id}/{step}"


class Worker:
    """Operations on a store, each reported before and after it."""

    def __init__(self, store: FinetuneStore) -> None:
        self.store = store

    def create(self, name: str) -> FinetuneRecord:
        """Create a finetune. It is unknown to the reader of the reports until it is complete."""
        record = self.store.create(name, 8, "tiny", 0)
        report(done="create", id=record.finetune_id, step=0)
        return record

    def commit(self, record: FinetuneRecord) -> None:
        """Commit the next step."""
        finetune_id, step = record.finetune_id, record.step + 1
        tensors, digest = tensors_of(finetune_id, step), digest_of(finetune_id, step)
        with_report("commit", finetune_id, step, lambda: self.store.commit_step(finetune_id, step, tensors, digest, {}))

    def save(self, record: FinetuneRecord) -> None:
        """Save a checkpoint of the last step."""
        finetune_id, step = record.finetune_id, record.step
        tensors, metadata = tensors_of(finetune_id, step), {"digest": digest_of(finetune_id, step)}
        with_report("save", finetune_id, step, lambda: self.store.save_checkpoint(finetune_id, step, tensors, metadata))

    def delete_checkpoint(self, record: FinetuneRecord, step: int) -> None:
        """Delete a checkpoint."""
        finetune_id = record.finetune_id
        with_report("delete_checkpoint", finetune_id, step, lambda: self.store.delete_checkpoint(finetune_id, step))

    def delete(self, record: FinetuneRecord) -> None:
        """Delete a finetune."""
        finetune_id = record.finetune_id
        with_report("delete", finetune_id, record.step, lambda: self.store.delete(finetune_id))

    def one_random(self, rng: random.Random) -> None:
        """Run a random operation on one of two finetunes."""
        records, _ = self.store.list_finetunes()
        if len(records) < 2:
            self.create(f"parts-{rng.getrandbits(40)}")
            return
        record = rng.choice(records)
        saved = [checkpoint.step for checkpoint in self.store.list_checkpoints(record.finetune_id)[0]]
        chance = rng.random()
        if chance < 0.08 or not record.resumable:
            self.delete(record)
        elif chance < 0.2 and saved:
            self.delete_checkpoint(record, rng.choice(saved))
        elif chance < 0.5 and record.step not in saved:
            self.save(record)
        else:
            self.commit(record)

    def every_operation(self) -> None:
        """Run each operation, with and without files of earlier ones to remove."""
        record = self.create(f"parts-{random.getrandbits(40)}")
        for _ in range(2):
            self.commit(record)
            record = self.store.get(record.finetune_id)
            self.save(record)
        self.delete_checkpoint(record, 1)
        self.delete_checkpoint(record, 2)
        other = self.create(f"parts-{random.getrandbits(40)}")
        self.commit(other)
        self.save(self.store.get(other.finetune_id))
        self.delete(other)


def with_report(operation: str, finetune_id: str, step: int, call: Callable[[], object]) -> None:
    """Run an operation, and report its begin and end."""
    report(begin=operation, id=finetune_id, step=step)
    call()
    report(done=operation, id=finetune_id, step=step)


def report(**values: Any) -> None:
    """Write a line at once: a pipe never contains half of it."""
    os.write(sys.stdout.fileno(), f"{json.dumps(values)}\n".encode())


def kill_at_line(number: int) -> None:
    """Kill this process when it reaches a line of code of the package.

    Args:
        number: Number of lines to execute before.
    """
    lines = iter(range(number))

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(_CODE):
            return None
        if event == "line" and next(lines, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def run_child(root: str, command: dict[str, int]) -> None:
    """Run the operations of a command."""
    if "kill_at" in command:
        kill_at_line(command["kill_at"])
    with FinetuneStore(root) as store:
        worker = Worker(store)
        report(opened=os.getpid())
        if "kill_at" in command:
            worker.every_operation()
            return
        rng = random.Random(command["seed"])
        while True:
            worker.one_random(rng)


def main(root: str, commands: Iterator[str]) -> None:
    """Fork a child per command, and report how it ended."""
    for line in commands:
        child = os.fork()
        if child == 0:
            run_child(root, json.loads(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        report(ended=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1], iter(sys.stdin.readline, ""))
