"""Labeling on a local Ray: the same log as without Ray, also if actors and the process are killed.

Run with `make test-integrations PYTEST_ARGS="-k ray"`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from moondream_cv.errors import MoondreamError
from moondream_cv.labeling import LabelingProgress, label
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.layout import LABELS
from moondream_cv.scenes import render_scene
from tests.helpers.processes import is_alive
from tests.helpers.waiting import until

ray = pytest.importorskip("ray", reason="needs ray (make test-integrations)")
pytestmark = pytest.mark.integrations

CLASSES = ["red circle", "blue square", "cat"]
NUM_IMAGES = 40


def actors(process: psutil.Process) -> list[psutil.Process]:
    """Return the labeling actors on the Ray that a process has started."""
    return [child for child in process.children(recursive=True) if is_alive(child, "_LabelingActor")]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A small local Ray, which `label` uses because it is connected."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered scenes, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(NUM_IMAGES):
        scene = render_scene(index, resolution_wh=(160, 120), names=CLASSES[index % 3 :], style="plain")
        Image.fromarray(scene.image).save(folder / f"{index:03}.png")
    (folder / "005-broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The log of a run without Ray."""
    result = label(images, CLASSES, tmp_path_factory.mktemp("expected") / "dataset", model="tiny", batch=2)
    assert sum(result.counts.values()) > NUM_IMAGES / 2
    return (result.folder / LABELS).read_bytes()


def test_two_actors_write_the_log_of_a_run_without_ray(
    local_ray: None, images: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the actors have another working directory
    running: set[int] = set()

    def observe(progress: LabelingProgress) -> None:
        running.update(actor.pid for actor in actors(psutil.Process()))

    result = label(images, CLASSES, "dataset", model="tiny", batch=2, ray="local", workers=2, on_progress=observe)
    assert (result.folder / LABELS).read_bytes() == expected
    assert result.num_failed == 1
    assert len(running) == 2


def test_batches_of_a_killed_actor_run_again(local_ray: None, images: Path, expected: bytes, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(progress: LabelingProgress) -> None:
        if progress.stage == "labels" and 0 < progress.done < NUM_IMAGES - 20 and not killed:
            victim = actors(psutil.Process())[0]
            victim.kill()
            killed.append(victim.pid)

    result = label(
        images, CLASSES, tmp_path / "dataset", model="tiny", batch=2, ray="local", workers=2, on_progress=kill
    )
    assert len(killed) == 1
    assert (result.folder / LABELS).read_bytes() == expected


@pytest.mark.slow
def test_killed_run_continues(local_ray: None, images: Path, expected: bytes, tmp_path: Path) -> None:
    # Kill a run on a Ray that it has started
    log = tmp_path / "dataset" / LABELS
    options = ["--model", "tiny", "--batch", "2", "--ray", "local", "--workers", "2", "-o", str(tmp_path / "dataset")]
    command = [sys.executable, "-m", "moondream_cv", "label", str(images), *CLASSES, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: process.poll() is not None or (log.is_file() and log.stat().st_size > 0))
    driver = psutil.Process(process.pid)
    driver.suspend()  # so that it writes no more batches
    started = actors(driver)
    process.kill()
    process.wait()
    assert 2 <= log.read_bytes().count(b"\n") < NUM_IMAGES
    assert len(started) == 2
    until(lambda: not any(map(is_alive, started)), message="actors are left")

    # Continue
    result = label(images, CLASSES, tmp_path / "dataset", model="tiny", batch=2, ray="local", workers=2)
    assert (result.folder / LABELS).read_bytes() == expected


def test_error_of_an_actor_is_reported(local_ray: None, images: Path, tmp_path: Path) -> None:
    adapter = str(tmp_path / "missing.safetensors")
    with pytest.raises(MoondreamError, match=r"labeling on Ray has failed: the adapter .* does not exist"):
        label(images, CLASSES, tmp_path / "dataset", model="tiny", adapter=adapter, ray="local")


def test_workers_need_ray(images: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelingError, match="workers needs ray"):
        label(images, CLASSES, tmp_path / "dataset", model="tiny", workers=2)
