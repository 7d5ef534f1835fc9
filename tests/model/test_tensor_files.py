"""Files of named tensors."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moondream_cv.model.tensor_files import SafetensorsFile


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill cannot send SIGINT on Windows")
def test_interrupted_read_raises_keyboard_interrupt_after_the_library_returned(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    library, returned = file._file, []

    class Interrupted:
        """Receives Ctrl-C inside the library, which turns exceptions of signal handlers into errors of its own."""

        def get_tensor(self, key: str) -> Tensor:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                tensor: Tensor = library.get_tensor(key)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape of object type") from None
            returned.append(tensor.shape)
            return tensor

    opened: Any = Interrupted()
    file._file = opened
    with pytest.raises(KeyboardInterrupt):
        file.read("weight")
    assert returned == [(2, 3)]


def test_interrupted_start_of_a_read_waits_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    library, start, returned = file._file, threading.Thread.start, []
    reading, interrupted = threading.Event(), threading.Event()

    class Library:
        def get_tensor(self, key: str) -> Tensor:
            reading.set()
            assert interrupted.wait(240)
            returned.append(library.get_tensor(key))
            return returned[0]

    def start_interrupted(thread: threading.Thread) -> None:
        start(thread)
        assert reading.wait(240)
        interrupted.set()
        raise KeyboardInterrupt

    opened: Any = Library()
    file._file = opened
    monkeypatch.setattr(threading.Thread, "start", start_interrupted)
    with pytest.raises(KeyboardInterrupt):
        file.read("weight")
    assert len(returned) == 1
