"""The code in README.md, the pages of docs and `--help` runs as printed.

The reader's files are rendered scenes with the names in the text. `SUBSTITUTES` and `LINE_SUBSTITUTES` replace the
names of models, servers and cameras. `NOT_RUN` lists code that only runs on the reader's machine, with the reason.

Each block of the README runs in a separate namespace, and the Python blocks of another page run in order in one
namespace. Each command line runs in a new copy of the reader's files. Walkthroughs (`is_walkthrough`) run from top to
bottom in one folder: Python and command lines together, and each text block is compared with the output of the block
before it.

Pages have their path in `docs` as their name: `cli.md`, `tutorials/video.md`. tests/roboflow/test_workflows_page.py
runs `docs/workflows.md`, tests/integrations/test_integrations_page.py runs `docs/integrations.md`, and
tests/test_notebooks.py runs the notebooks.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

import moondream_cv
from moondream_cv import load
from moondream_cv.cli import app
from moondream_cv.sam import SamMasks
from moondream_cv.scenes import render_clip, render_scene
from moondream_cv.video import Zones, annotate_video, track, track_streams
from moondream_cv.vision_model import VisionModel
from tests.helpers.certificates import make_certificates
from tests.helpers.clips import write_clip
from tests.helpers.labeled_scenes import CLASSES, write_dataset
from tests.helpers.remote_server import RemoteServer, Reply, remote_server
from tests.helpers.serve_process import free_port
from tests.helpers.served import served
from tests.helpers.tiny_sam import save_tiny_sam2
from tests.helpers.waiting import until

ROOT = Path(moondream_cv.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
if not (DOCS / "cli.md").exists():
    pytest.skip("the pages are not part of a source distribution", allow_module_level=True)


JSON_PAGE = "reference/json.md"  # its JSON blocks are the output of the block before


class Block(NamedTuple):
    """A fenced block of a page, without its indentation."""

    page: str
    line: int
    language: str
    code: str

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell block, without comments; a backslash continues a line."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [text for text in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if text]


class Line(NamedTuple):
    """A command line of a page or of a help text."""

    place: str
    text: str


def page_name(path: Path) -> str:
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def is_walkthrough(page: str) -> bool:
    return page in ("index.md", "install.md", JSON_PAGE) or page.startswith(("tutorials/", "how-to/"))


def blocks() -> Iterator[Block]:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```(\w*)[^\n`]*\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            yield Block(page_name(path), line, match[2], textwrap.dedent(match[3]))


BLOCKS = list(blocks())
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language in ("", "sh")]

SUBSTITUTES = (
    ('"moondream2"', '"tiny"'),
    ("facebook/sam2.1-hiera-small", "sam"),
    ("http://gpu-box:2020", "{server}"),
    ("http://localhost:2020", "{server}"),
    ("http://localhost:9001", "{server}"),
    ("https://example.com/street.jpg", "{files}/street.jpg"),
    ("cv2.VideoCapture(0)", 'cv2.VideoCapture("in.mp4")'),  # there is no camera here
    ("track(0, ", 'track("in.mp4", '),
    ("print(run_in_container(program))", "print(program)"),  # needs Docker and an image
)

LINE_SUBSTITUTES = (
    ("download moondream2", "download tiny"),
    ("facebook/sam2.1-hiera-small", "sam"),
    ("curl -s https://example.org/a.jpg", "cat street.jpg"),
    ("/tmp/demo", "other"),
)

NOT_RUN = {
    "class VisionModel(Protocol)": "an excerpt, compared with the class in a separate test",
    "video 0 cup --show": "needs a camera and a screen",
    "video rtsp://camera/stream": "needs a camera; tests/video/test_rtsp.py tests RTSP",
    "download vikhyatk/": "downloads 3.7 GB",
    "detect street.jpg -c person --model http://localhost:2020": "needs the server of the previous line",
    "cvat-cli ": "needs a CVAT server; tests/integrations/test_integrations_page.py parses the line",
    "pip install": "a separate test checks the extras",
    "pip download": "downloads the package and its requirements",
    "pip uninstall": "removes the package",
    "make ": "a separate test checks the targets",
    ".venv/bin/pre-commit": "tests/test_pre_commit.py tests the hooks",
    "export ": "sets a variable for docs/workflows.md",
    "find photos -name": "chooses some of the photos; sample.txt is among the files of the reader",
    "label-studio start": "starts Label Studio",
    "docker ": "needs Docker; tests/containers/ checks these lines, and builds and runs the image",
    "kubectl ": "needs a cluster; tests/containers/ checks the manifest",
    "sudo ": "changes the system; tests/containers/ checks the systemd unit",
    "openssl req": "writes a certificate; tests/helpers/certificates.py makes those of the tests",
    "journalctl ": "needs the systemd service of the previous line",
    "--merge project.json": "needs an export of Label Studio; tests/labeling/test_merge_review.py merges one",
    "--merge reviewed": "needs a labeled dataset and its review; tests/cli/test_label.py merges one",
    "--ray ": "needs Ray; make test-integrations runs it",
    "aerial/ car --slice": "needs large images; tests/labeling/test_labeler.py labels slices",
    "evaluate docvqa/": "needs DocVQA; tests/evaluation/test_benchmark_layouts.py reads its layouts",
    "yolo detect train": "needs Ultralytics",
    "from rfdetr import": "needs RF-DETR",
    " examples/": "tests/examples runs the examples, and checks their command lines",
    "01K5ZJ3W8Q4T7X2M9N6P1R0SVA": "needs the ID of a finetune; tests/cli/test_finetune.py uses one",
}

IMAGES = ("chart.png", "frame.png", "kitchen.jpg", "page.png", "parking.jpg", "photo.jpg", "photos/1.jpg", "plate.jpg")
IMAGES += ("receipt.jpg", "receipts/1.png", "screenshot.png", "shelf.jpg", "sign.jpg", "street.jpg", "tray.jpg")
IMAGES += ("frames/0001.png", "frames/0002.png")
ZONES = '{"normalized": true, "lines": [{"name": "door", "start": [0.1, 0.6], "end": [0.9, 0.6]}]}'


@pytest.fixture(scope="module")
def reader_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the pages use."""
    folder = tmp_path_factory.mktemp("reader")
    rgb = render_scene(105, resolution_wh=(320, 240), names=["car", "bus", "dog", "red circle"]).image
    for name in IMAGES:
        (folder / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / name), rgb[..., ::-1])
    clip = render_clip(1, num_frames=8, names=["dog", "red circle"], resolution_wh=(320, 240))
    write_clip(folder / "in.mp4", (rgb[..., ::-1] for rgb, _ in clip))
    for name in ("street.mp4", "shop.mp4", "drive.mp4"):
        shutil.copy(folder / "in.mp4", folder / name)
    if any(is_walkthrough(block.page) for block in BLOCKS):  # they start with `moondream-cv demo`
        result = CliRunner().invoke(app, ["demo", "-o", str(folder / "demo")])
        assert result.exit_code == 0, result.stderr
    (folder / "zones.json").write_text(ZONES)
    page = next(block for block in BLOCKS if block.page == "zones.md" and block.language == "json")
    (folder / "door.json").write_text(page.code)
    save_tiny_sam2(folder / "sam")
    (folder / "names.txt").write_text("dog\nred circle\n")
    (folder / "sample.txt").write_text("photos/1.jpg\n")
    (folder / "prompts.yaml").write_text("dog:\ncar: [car, bus]\n")
    write_dataset(folder / "parts", [render_scene(seed, names=["dog", "cat"]) for seed in range(8)], "yolo")
    names = [{"dog": "bolt", "cat": "nut"}.get(name, name) for name in CLASSES]
    (folder / "parts" / "data.yaml").write_text(f"names: {json.dumps(names)}")
    write_dataset(folder / "coco", [render_scene(seed, names=["dog", "cat"]) for seed in range(3)], "coco", "valid")
    certificates = make_certificates(folder)
    shutil.copy(certificates.certificate, folder / "cert.pem")
    shutil.copy(certificates.key, folder / "key.pem")
    return folder


@pytest.fixture
def folder(reader_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new copy of the reader's files, which is the current folder."""
    shutil.copytree(reader_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOONDREAM_CV_FINETUNES", str(tmp_path / "finetunes"))
    return tmp_path


@pytest.fixture(scope="module")
def files(reader_files: Path) -> Iterator[RemoteServer]:
    with remote_server() as running:
        running.on("/street.jpg", Reply((reader_files / "street.jpg").read_bytes(), kind="image/jpeg"))
        yield running


@pytest.fixture(scope="module")
def server(files: RemoteServer, reader_files: Path) -> Iterator[str]:
    model = load("tiny", device="cpu")
    load_masks = partial(SamMasks, reader_files / "sam", device="cpu")
    with served(model, name="moondream2", private_urls=True, load_masks=load_masks) as running:
        until(lambda: running.service.ready, message="the segmentation model was not loaded")
        yield running.url
    model.close()


def reason_not_to_run(code: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if start in code), None)


def substituted(code: str, server: str, files: str) -> str:
    for printed, here in SUBSTITUTES:
        code = code.replace(printed, here.replace("{server}", server).replace("{files}", files))
    return code


# --- Python ----------------------------------------------------------------------------------------------------------


class Screen:
    """Replace OpenCV's window: record the frames, and return Esc after three of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[np.ndarray] = []
        monkeypatch.setattr(cv2, "imshow", lambda title, image: self.shown.append(image))
        monkeypatch.setattr(cv2, "waitKey", lambda delay: 27 if len(self.shown) >= 3 else -1)


README_BLOCKS = [block for block in PYTHON if block.page == "README.md"]


@pytest.mark.parametrize("block", README_BLOCKS, ids=[f"line {block.line}" for block in README_BLOCKS])
def test_readme_blocks_run_separately(
    block: Block, folder: Path, server: str, files: RemoteServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen(monkeypatch)
    run_python(block, {"__name__": "reader"}, server, files.url)
    assert bool(screen.shown) == ("imshow" in block.code)
    assert all(image.shape == (240, 320, 3) for image in screen.shown)


ELSEWHERE = {"integrations.md", "workflows.md", "tutorials/workflows.md"}  # they need other environments
OTHER_PAGES = sorted({block.page for block in PYTHON if not is_walkthrough(block.page)} - {"README.md", *ELSEWHERE})


@pytest.mark.parametrize("page", OTHER_PAGES)
def test_blocks_of_a_page_run_in_order(
    page: str, folder: Path, server: str, files: RemoteServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace: dict[str, Any] = {"__name__": "reader"}
    for block in PYTHON:
        if block.page == page and reason_not_to_run(block.code) is None:
            run_python(block, namespace, server, files.url)


def run_python(block: Block, namespace: dict[str, Any], server: str, files: str) -> str:
    """Run a block, and return its output."""
    code = "\n" * block.line + substituted(block.code, server, files)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        for function in map(inspect.unwrap, (annotate_video, track, track_streams)):
            assert function.__kwdefaults__["model"] == "moondream2"
            patch.setitem(function.__kwdefaults__, "model", "tiny")
        exec(compile(code, block.page, "exec"), namespace)
    return output.getvalue()


def test_excerpt_of_vision_model_matches_the_class() -> None:
    (block,) = (block for block in PYTHON if "class VisionModel(Protocol)" in block.code)
    printed = {*re.findall(r"^    (?:def )?(\w+)[:(]", block.code, re.MULTILINE)}
    assert printed == {"skills", "has_scores", "run", "close"}
    assert printed <= {*VisionModel.__annotations__, *vars(VisionModel)}


# --- command lines ---------------------------------------------------------------------------------------------------


def lines() -> Iterator[Line]:
    for block in SHELL:
        for text in block.commands:
            if "moondream-cv " in text and not is_walkthrough(block.page):
                yield Line(f"{block.page} line {block.line}", text)
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for text in re.findall(r"^ *\$ (.*)$", command.help or "", re.MULTILINE):
            yield Line(f"{name} --help", text.replace("\\[", "["))


LINES = list(lines())
RUN_LINES = [line for line in LINES if reason_not_to_run(line.text) is None]


def with_tiny_model(text: str) -> str:
    """Use the tiny model in commands that use the real model, and a free port for servers."""
    for printed, here in LINE_SUBSTITUTES:
        text = text.replace(printed, here)
    if text.endswith("moondream-cv download"):
        return f"{text} tiny"
    if "moondream-cv quantize " in text:
        return text.replace(" moondream2 ", " tiny ")
    if re.search(r"moondream-cv finetune (train )?\./", text):
        return f"{re.sub(r' --steps [0-9]+', '', text)} --model tiny --steps 1 --batch 2"
    command = re.search(r"moondream-cv (\w+)", text)
    assert command is not None
    if command[1] == "serve":
        text = f"{re.sub(r' --port [0-9]+', '', text)} --port {free_port()}"
    if (
        command[1] in ("detect", "point", "query", "caption", "video", "label", "evaluate", "serve")
        and "--model" not in text
    ):
        text = f"{text[: command.end()]} --model tiny{text[command.end() :]}"
    return text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("line", RUN_LINES, ids=[f"{line.place}: {line.text[:60]}" for line in RUN_LINES])
def test_command_lines_run(line: Line, folder: Path) -> None:
    run_command(line.text)


def run_command(printed: str) -> str:
    """Run a command line with the tiny model, and return its output."""
    text = with_tiny_model(printed) if "moondream-cv " in printed else printed
    if re.match(r"moondream-cv (?!serve)[^|>]*$", text):  # faster than a shell
        result = CliRunner().invoke(app, shlex.split(text)[1:])
        status, output, log = result.exit_code, result.stdout, result.stderr
    else:
        status, output, log = run_in_shell(text)
    assert status == 0, f"{text}\n{log}"
    assert "Traceback" not in log
    for target in re.findall(r"(?:-o|--json|--mot|--save-txt|--to|>) ([\w./]+)", text):
        assert Path(target).exists(), f"{text} did not write {target}"
    return output + log


def run_in_shell(text: str) -> tuple[int, str, str]:
    """Run a command line, stopping servers as soon as they are ready.

    Returns:
        Exit status, standard output and standard error.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MOONDREAM")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    is_server = "moondream-cv serve" in text
    if is_server:  # exec, so that the signal goes to the server instead of the shell
        variables, _, command = text.rpartition("moondream-cv serve")
        text = f"{f'export {variables};' if variables else ''} exec moondream-cv serve{command}"
    output, log = Path("stdout.txt"), Path("stderr.txt")
    with output.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", text], env=environment, stdout=stdout, stderr=stderr
        )
    try:
        if is_server:
            wait_for(process, log, "Serving tiny at ")
            process.send_signal(signal.SIGTERM)
        return process.wait(timeout=240), output.read_text(), log.read_text()
    finally:
        process.kill()


def wait_for(process: subprocess.Popen[bytes], log: Path, text: str) -> None:
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue


WALKTHROUGHS = sorted({block.page for block in BLOCKS if is_walkthrough(block.page)} - ELSEWHERE)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("page", WALKTHROUGHS)
def test_walkthroughs_run_from_top_to_bottom(
    page: str, folder: Path, server: str, files: RemoteServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Screen(monkeypatch)
    namespace: dict[str, Any] = {"__name__": "reader"}
    output = ""
    for block in BLOCKS:
        if block.page != page:
            continue
        if block.language == "text":
            assert_prints(block, output)
        elif block.language == "json" and page == JSON_PAGE:
            assert_same_layout(block, output)
        elif block in SHELL:
            # The files of the reader include the folder that `moondream-cv demo` writes
            commands = [t for t in block.commands if t != "moondream-cv demo" and reason_not_to_run(t) is None]
            output = "".join(run_command(substituted(text, server, files.url)) for text in commands)
        elif block.language == "python" and reason_not_to_run(block.code) is None:
            output = run_python(block, namespace, server, files.url)


def assert_prints(block: Block, output: str) -> None:
    """Check that the lines of a text block are in an output, in order; "..." stands for anything, also within a line.

    White space is not compared, because tables have the width of the terminal.
    """
    printed, position = " ".join(output.split()), 0
    for part in filter(None, (" ".join(part.split()) for part in re.split(r"\.\.\.|\n", block.code))):
        found = printed.find(part, position)
        assert found >= 0, f"{block.page} line {block.line}: not printed: {part}\n{output}"
        position = found + len(part)


def assert_same_layout(block: Block, output: str) -> None:
    """Check that JSON documents have the keys and types of a block, at all levels; it may show fewer lines."""
    printed, real = json_documents(block.code), json_documents(output)
    assert 0 < len(printed) <= len(real), f"{block.page} line {block.line}: {output}"
    for expected, document in zip(printed, real, strict=False):
        assert layout(document) == layout(expected), f"{block.page} line {block.line}"


def json_documents(text: str) -> list[Any]:
    """Return the JSON objects at the start of a text; messages on standard error follow."""
    found, rest = [], text.lstrip()
    while rest.startswith("{"):
        document, end = json.JSONDecoder().raw_decode(rest)
        found.append(document)
        rest = rest[end:].lstrip()
    return found


def layout(value: Any) -> Any:
    """Return JSON with the types in place of the values; lists of numbers keep their lengths."""
    if isinstance(value, dict):
        return {key: layout(item) for key, item in value.items()}
    if isinstance(value, list):
        return [layout(item) for item in value]
    return type(value).__name__


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_batch_example_of_the_server_page(folder: Path, server: str, files: RemoteServer) -> None:
    (block,) = (block for block in SHELL if "/v1/batch" in block.code)
    result = subprocess.run(["bash", "-c", substituted(block.code, server, files.url)], capture_output=True, text=True)
    first, second, third = map(json.loads, result.stdout.splitlines())
    assert [answer["custom_id"] for answer in (first, second, third)] == ["a", "b", "c"]
    assert "objects" in first["result"]
    assert "answer" in second["result"]
    assert "error" in third


# --- completeness ----------------------------------------------------------------------------------------------------


def test_shell_lines_run_or_have_a_reason_not_to() -> None:
    for block in SHELL:
        if is_walkthrough(block.page):
            continue  # all of their lines run
        text = re.sub(r"<<'LINES'\n.*?\nLINES\n", "\n", block.code, flags=re.DOTALL)
        for line in block._replace(code=text).commands:
            assert "moondream-cv " in line or "/v1/batch" in line or reason_not_to_run(line), f"{block.page}: {line}"


def test_languages_of_blocks_have_a_test() -> None:
    languages = {"", "sh", "python", "json", "text", "yaml", "ini", "js", "dockerfile"}
    assert [
        f"{block.page} line {block.line}: {block.language}" for block in BLOCKS if block.language not in languages
    ] == []
    fences = {page_name(path): len(re.findall(r"^ *```", path.read_text("utf-8"), re.MULTILINE)) for path in PAGES}
    assert fences == {page: 2 * sum(block.page == page for block in BLOCKS) for page in fences}


def test_reasons_and_substitutes_refer_to_printed_code() -> None:
    printed = "\n".join([*(block.code for block in BLOCKS), *(line.text for line in LINES)])
    assert [start for start in NOT_RUN if start not in printed] == []
    assert [start for start, _ in SUBSTITUTES if start not in printed] == []


def test_extras_and_make_targets_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shell = "\n".join(block.code for block in SHELL)
    assert {name for found in re.findall(r"moondream-cv\[([\w,]+)\]", shell) for name in found.split(",")} <= {*extras}
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", shell, re.MULTILINE)
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_links_lead_to_files_and_headings() -> None:
    pages = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "benchmarks" / "README.md"]
    missing = []
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", without_code(page)):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            generated = "reference" in target.parts  # `mkdocs build --strict` checks its anchors
            if not target.exists() or (anchor and not generated and anchor not in anchors(target)):
                missing.append(f"{page_name(page)}: {link}")
    assert missing == []


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub generates them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=lambda b: f"{b.page} line {b.line}")
def test_json_blocks_are_valid(block: Block, tmp_path: Path) -> None:
    if block.page == "zones.md":
        (tmp_path / "zones.json").write_text(block.code)
        assert Zones.read(tmp_path / "zones.json").counts()["zones"]
        return
    documents = (
        [json.loads(block.code)] if block.code.startswith("{\n") else list(map(json.loads, block.code.splitlines()))
    )
    assert all(isinstance(document, dict) for document in documents)
