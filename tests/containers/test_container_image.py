"""The image of docker/Dockerfile, started by compose.yaml, serves without a network and writes only to its volumes.

Podman builds and runs the image. The base image is made from Debian's packages, because registries of images are not
reachable everywhere. Packages come from pip's configured index; TORCH_INDEX is the index for torch, as in the Makefile.
"""

from __future__ import annotations

import ast
import configparser
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
import yaml

import moondream_cv
from moondream_cv.scenes import render_scene
from tests.helpers.waiting import until

pytestmark = pytest.mark.slow
ROOT = Path(moondream_cv.__file__).parents[1]
BASE = "localhost/debian-python"
PACKAGES = "ca-certificates,python3-pip,python3-venv"
LIMITS = "--ulimit=nofile=1024:1024 --ulimit=nproc=4096:4096"  # Podman's own limits need CAP_SYS_RESOURCE
if not (ROOT / "docker").exists():
    pytest.skip("the Dockerfile is not part of a source distribution", allow_module_level=True)


class Podman:
    """Podman with its own storage.

    Args:
        folder: Folder of the storage and of temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = {"driver": "", "graphroot": str(folder / "images"), "runroot": str(folder / "run")}
        lines = [f"{name} = {json.dumps(value)}" for name, value in storage.items()]
        (folder / "storage.conf").write_text("\n".join(["[storage]", *lines]))
        self.environment = os.environ | {"CONTAINERS_STORAGE_CONF": str(folder / "storage.conf")}
        runtime = "runc" if shutil.which("runc") else "crun"  # crun rejects some control groups
        self.options = ["--runtime", runtime, "--cgroup-manager", "cgroupfs"]

    def __call__(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of Podman."""
        return self._run(["podman", *self.options, *arguments], **options)

    def compose(self, file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of podman-compose with this compose file."""
        program = [sys.executable, "-m", "podman_compose", "--no-ansi", "-f", str(file)]
        limits = f"{LIMITS} --read-only-tmpfs=false"  # as Docker, without writable /run and /var/tmp
        options = [f"--podman-args={' '.join(self.options)}", f"--podman-run-args={limits}"]
        return self._run([*program, *options, *arguments])

    def _run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """Return a Podman that has the base image and that can run it."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root")
    for program in ("podman", "mmdebstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    pytest.importorskip("podman_compose", reason="needs podman-compose")

    with tempfile.TemporaryDirectory(prefix="moondream-cv-containers-") as name:
        folder = Path(name)
        running = Podman(folder)
        try:
            make_base(running, folder / "base.tar")
            yield running
        finally:
            running("rm", "--all", "--force", "--time", "0")
            subprocess.run(["umount", "--quiet", folder / "images" / "overlay"], check=False)


def make_base(podman: Podman, archive: Path) -> None:
    """Import Debian with Python as the base image; skip the tests if that or a container is impossible here."""
    made = subprocess.run(
        ["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", archive],
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        pytest.skip(f"Debian's packages are not reachable: {made.stderr[-300:]}")
    podman("import", str(archive), BASE, check=True)
    archive.unlink()
    tried = podman("run", "--rm", "--network=none", *LIMITS.split(), BASE, "true")
    if tried.returncode != 0:
        pytest.skip(f"Podman cannot run containers here: {tried.stderr[-300:]}")


@pytest.fixture(scope="module")
def container(podman: Podman) -> str:
    """Build the image, start the service `cpu` of compose.yaml with the tiny model, and wait until it is healthy."""
    # Adapt compose.yaml to this machine
    variables = {"MOONDREAM_CV_MODEL": "tiny", "TORCH_INDEX": os.environ.get("TORCH_INDEX", "")}
    podman.environment |= variables
    configured = podman.compose(ROOT / "compose.yaml", "config")
    assert configured.returncode == 0, configured.stderr
    document = yaml.safe_load(configured.stdout)
    service = document["services"]["cpu"]
    service["build"]["args"] = {**dict(a.split("=", 1) for a in service["build"]["args"]), "PYTHON_IMAGE": BASE}
    service["network_mode"] = "none"
    del service["ports"]
    file = podman.folder / "compose.yaml"
    file.write_text(yaml.safe_dump(document))

    # Build and start
    options = ["--isolation=chroot", "--network=host", "--format=docker", "--layers=false", *pip_volumes(podman.folder)]
    built = podman.compose(file, f"--podman-build-args={' '.join(options)}", "build", "cpu")
    assert built.returncode == 0, f"{built.stdout[-3000:]}{built.stderr[-3000:]}"
    started = podman.compose(file, "up", "--detach", "--no-build", "cpu")
    assert started.returncode == 0, started.stderr
    name = podman("ps", "--format={{.Names}}").stdout.strip()
    assert name, started.stderr

    # Wait until it is healthy
    def is_healthy() -> bool:
        state = podman("inspect", "--format={{.State.Status}}", name).stdout.strip()
        assert state == "running", podman("logs", name).stderr
        return podman("healthcheck", "run", name).returncode == 0

    until(is_healthy)
    return name


def pip_volumes(folder: Path) -> list[str]:
    """Return the volumes that give pip in a container the configuration that it has here."""
    environment = os.environ | {"PIP_QUIET": "0"}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    config, paths = configparser.RawConfigParser(), set()
    for line in sorted(listed, key=lambda line: line.startswith(":env:")):  # the environment overrides files
        name, _, value = line.partition("=")
        section, _, option = name.replace(":env:", "global").rpartition(".")
        if not config.has_section(section):
            config.add_section(section)
        config[section][option] = ast.literal_eval(value)
        for word in config[section][option].split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                paths.add(path.parent if word.startswith("file:") else path)  # indexes refer to their siblings
    with (folder / "pip.conf").open("w") as file:
        config.write(file)
    return [f"--volume={folder / 'pip.conf'}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in paths)]


def run_python(podman: Podman, container: str, code: str) -> Any:
    """Return the JSON that a program prints in the container."""
    result = podman("exec", "--interactive", container, "python3", "-", input=code)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_health_check_fails_without_a_server(podman: Podman, container: str) -> None:
    image = podman("inspect", "--format={{.Image}}", container).stdout.strip()
    check = json.loads(podman("image", "inspect", "--format={{json .HealthCheck.Test}}", image).stdout)
    assert check[0] == "CMD"
    options = ["--rm", "--network=none", *LIMITS.split(), f"--entrypoint={check[1]}"]
    result = podman("run", *options, image, *check[2:])
    assert result.returncode == 1
    assert "ConnectionRefusedError" in result.stderr


def test_server_detects_objects(podman: Podman, container: str) -> None:
    rgb = render_scene(105, resolution_wh=(320, 240), names=["car", "bus", "dog", "red circle"]).image
    encoded = cv2.imencode(".png", rgb[..., ::-1])[1].tobytes()
    command = ["moondream-cv", "detect", "-", "-c", "dog", "--json", "--model", "http://127.0.0.1:2020"]
    result = subprocess.run(
        ["podman", *podman.options, "exec", "--interactive", container, *command],
        env=podman.environment,
        input=encoded,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr.decode()
    ((dog,),) = (image["objects"] for image in json.loads(result.stdout)["images"])
    assert dog["class_name"] == "dog"
    assert dog["confidence"] > 0.5


def test_processes_have_no_privileges(podman: Podman, container: str) -> None:
    code = """
import json, os, pathlib
status = dict(line.split(":\\t") for line in open("/proc/1/status").read().splitlines() if ":\\t" in line)
writable = [path for path in ("/", "/etc", "/opt", "/opt/moondream-cv", "/root", "/run", "/usr", "/var", "/var/tmp")
            if os.access(path, os.W_OK)]
root = os.statvfs("/")
print(json.dumps({"ids": [os.getuid(), os.getgid()], "home": str(pathlib.Path.home()), "writable": writable,
                  "read_only": bool(root.f_flag & os.ST_RDONLY), "capabilities": int(status["CapBnd"], 16),
                  "no_new_privileges": status["NoNewPrivs"]}))
"""
    assert run_python(podman, container, code) == {
        "ids": [10001, 10001],
        "home": "/data",
        "writable": [],
        "read_only": True,
        "capabilities": 0,
        "no_new_privileges": "1",
    }


def test_finetunes_and_uploads_are_written_to_the_volumes(podman: Podman, container: str) -> None:
    code = """
import httpx, json, os
server = httpx.Client(base_url="http://127.0.0.1:2020", timeout=None)
created = server.post("/v1/tuning/finetunes", json={"name": "parts", "rank": 8}).raise_for_status().json()
upload = server.post("/v1/batch", params={"action": "mpu-create"}).raise_for_status().json()
part = {"action": "mpu-uploadpart", "partNumber": 1, "uploadId": upload["uploadId"]}
server.put(f"/v1/batch/{upload['fileId']}", params=part, content=b"{}").raise_for_status()
files = [os.path.join(folder, name) for folder, _, names in os.walk("/data") for name in names]
print(json.dumps({"finetune": created["finetune_id"], "files": files}))
"""
    written = run_python(podman, container, code)
    assert written["finetune"]
    assert "/data/finetunes/finetunes.sqlite" in written["files"]


def test_sigterm_ends_the_server_with_status_0_and_an_unchanged_root(podman: Podman, container: str) -> None:
    podman("stop", "--time=240", container, check=True)  # after `kill`, Podman would restart it
    assert podman("inspect", "--format={{.State.ExitCode}}", container).stdout.strip() == "0"
    assert podman("diff", container, check=True).stdout.split() == ["C", "/etc"]  # /etc/hosts, mounted by Podman
