"""Build the distributions and check them as a user would install them.

    python scripts/release_check.py            # or: make release-check
    python scripts/release_check.py --publish  # also refuses placeholder addresses; used by the release workflow

Builds an sdist, and the wheel from it, into dist/. Checks their metadata with twine, that the links of the description
on PyPI are absolute, and that the sdist contains only files of the repository. Then installs the wheel into a new
virtual environment for each of Python 3.10 to 3.13 on this machine, and runs `moondream-cv demo` and a smoke test
there. Versions of dependencies are those of constraints/default.txt. On Linux without a GPU, TORCH_INDEX avoids the
CUDA libraries of torch (see the Makefile).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
CONSTRAINTS = ROOT / "constraints" / "default.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLACEHOLDER = "example.com/moondream-cv"
BUILT_ONLY = {"PKG-INFO", ".gitignore"}  # written by the build

SMOKE_TEST = """
import sys
from importlib.metadata import metadata, version

import moondream_cv
import moondream_cv_blocks  # the plugin for Roboflow Workflows
from moondream_cv import Detector, load
from moondream_cv.scenes import render_scene

assert version("moondream-cv") == moondream_cv.__version__ == sys.argv[1], moondream_cv.__version__
assert metadata("moondream-cv")["License-Expression"] == "Apache-2.0"
scene = render_scene(105, names=["dog", "red circle"])
detections = Detector(load("tiny"))(scene.image[..., ::-1], ["dog", "red circle"])
assert sorted(detections.data["class_name"]) == ["dog", "red circle"], detections
"""


def main() -> None:
    """Build and check. Exits with status 1 and a message if a check fails."""
    parser = argparse.ArgumentParser(description="Build the distributions and check them as a user would install them.")
    parser.add_argument("--publish", action="store_true", help="Refuse placeholder addresses.")
    publish = parser.parse_args().publish
    version = read_version()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_versions(version)
        check_addresses(publish)
        wheel = build(folder, version)
        pythons = list(find_pythons())
        if not pythons:
            sys.exit(f"found none of Python {', '.join(PYTHONS)}, so the wheel cannot be installed; install one")
        for index, python in enumerate(pythons):
            check_installed(wheel, python, version, folder / str(index))
    print(f"dist/: version {version} passed all checks with {', '.join(pythons)}")


def read_version() -> str:
    """Return the version in the source of the package."""
    source = (ROOT / "moondream_cv" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert match, "moondream_cv/__init__.py has no __version__"
    return match[1]


def check_versions(version: str) -> None:
    """Check that the changelog and the citation name the version."""
    for name, expected in (("CHANGELOG.md", f"## [{version}]"), ("CITATION.cff", f"version: {version}")):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        if not any(line == expected or line.startswith(f"{expected} ") for line in lines):
            sys.exit(f"{name} has no line with {expected!r}, but the version of the package is {version}; add it")


def check_addresses(publish: bool) -> None:
    """Report files with placeholder addresses of the repository. Exits with status 1 if `publish` is set."""
    named = ("pyproject.toml", "CITATION.cff")
    names = [name for name in named if PLACEHOLDER in (ROOT / name).read_text(encoding="utf-8")]
    if names:
        message = f"{', '.join(names)}: {PLACEHOLDER} is a placeholder; replace it with the address of the repository"
        sys.exit(message) if publish else print(f"not yet ready to publish: {message}")


def build(folder: Path, version: str) -> Path:
    """Build both distributions into dist/, check them, and return the path of the wheel."""
    tools = create_environment(sys.executable, folder / "tools")
    run([tools, "-m", "pip", "install", "-q", "build", "twine"])
    shutil.rmtree(DIST, ignore_errors=True)
    run([tools, "-m", "build", "--outdir", DIST, ROOT])
    source, wheel = DIST / f"moondream_cv-{version}.tar.gz", DIST / f"moondream_cv-{version}-py3-none-any.whl"
    run([tools, "-m", "twine", "check", "--strict", source, wheel])
    check_source_files(source)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        check_description(archive.read(name).decode(), version)
    return wheel


def check_description(metadata: str, version: str) -> None:
    """Check that all links of the description are absolute, and that those into the repository name existing files."""
    for link in re.findall(r"\]\(([^)#][^)]*)\)", metadata.partition("\n\n")[2]):
        inside = re.match(rf"https://[^ ]+/(?:raw|blob)/v{re.escape(version)}/([^#]+)", link)
        if not re.match("https?://", link):
            sys.exit(f"the description has the relative link {link}; PyPI cannot resolve it")
        if inside and not (ROOT / inside[1]).exists():
            sys.exit(f"the description links to {inside[1]}, which does not exist")


def check_source_files(source: Path) -> None:
    """Check that an sdist contains nothing but files of the repository."""
    # Without -z, git quotes names that are not ASCII
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(source) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    foreign = sorted(names - set(os.fsdecode(listed).split("\0")) - BUILT_ONLY)
    if foreign:
        sys.exit(f"{source.name} contains {len(foreign)} files that are not in the repository, such as {foreign[0]}")


def find_pythons() -> Iterable[str]:
    """Yield a working interpreter of each supported Python version on this machine."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in PYTHONS:
        candidates = [sys.executable, shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python{version}")]
        python = next((str(path) for path in candidates if path and has_version(path, version)), None)
        if python:
            yield python
        else:
            print(f"python{version} is not installed: not checked")


def has_version(python: str | Path, version: str) -> bool:
    """Return whether an interpreter runs and has a version such as "3.12"."""
    command = [python, "-c", "import ensurepip, sys; print('{}.{}'.format(*sys.version_info))"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() == version


def check_installed(wheel: Path, python: str, version: str, folder: Path) -> None:
    """Install the wheel into a new virtual environment, and run the demo and the smoke test outside the checkout."""
    print(f"== {python}", flush=True)
    installed = create_environment(python, folder)
    if index := os.environ.get("TORCH_INDEX"):
        run([installed, "-m", "pip", "install", "-q", "--no-deps", "--index-url", index, "-c", CONSTRAINTS, "torch"])
    run([installed, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, wheel])
    run([installed, "-m", "pip", "check"])
    run([installed.parent / "moondream-cv", "demo"], folder)
    run([installed, "-I", "-c", SMOKE_TEST, version], folder)
    shutil.rmtree(folder)


def create_environment(python: str, folder: Path) -> Path:
    """Create a virtual environment and return the path of its interpreter."""
    run([python, "-m", "venv", folder])
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def run(command: list[str | Path], folder: Path | None = None) -> None:
    """Run a command, without modules of PYTHONPATH. Exits with status 1 if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    completed = subprocess.run(command, cwd=folder, env=environment)
    if completed.returncode:
        sys.exit(f"failed with status {completed.returncode}: {' '.join(map(str, command))[:200]}")


if __name__ == "__main__":
    main()
