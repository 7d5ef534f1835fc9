"""Checkpoints from a hub: by release, branch, commit and fine-tune; offline, interrupted, and to a folder."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from moondream_cv import load
from moondream_cv.cli import app
from moondream_cv.errors import CheckpointError
from moondream_cv.loading import download
from moondream_cv.model import hub as hub_module
from moondream_cv.model import sources
from moondream_cv.model.checkpoints import check_shapes
from moondream_cv.model.hub_requests import get_revision, read_safetensors_header
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.releases import MOONDREAM_2B, find_release
from moondream_cv.model.sources import hub_source
from tests.helpers.hub import Hub
from tests.helpers.published_hub import (
    EARLIER,
    EARLIER_TEMPLATES,
    FOUR_BIT,
    PUBLISHED_CONFIG,
    RELEASE,
    REPO,
    TOKENIZER_REPO,
    Published,
    packed,
    tokenizer_json,
    weights,
)
from tests.helpers.small_checkpoint import byte_tokenizer, small_config, write_small

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


def reply(model: Any) -> Any:
    return model.point(IMAGE, "dog", {"max_objects": 3})


@pytest.fixture
def expected(tmp_path: Path) -> Any:
    write_small(tmp_path / "expected")
    return reply(load(tmp_path / "expected", device="cpu"))


def go_offline(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()


# --- Names that load --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moondream2", REPO, f"{REPO}@{RELEASE}", f"{REPO}@main", "commit", "main commit"])
def test_release_loads_by_every_name(
    name: str, published: Published, expected: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = {"commit": f"{REPO}@{published.release}", "main commit": f"{REPO}@{published.main}"}.get(name, name)
    model = load(name, device="cpu")
    assert reply(model) == expected
    assert "does not contain the name of its release" not in caplog.text  # the same weights are the same release
    assert not published.hub.asked(r"\.py|README")
    go_offline(monkeypatch, published.hub)
    assert reply(load(name, device="cpu")) == expected
    assert not published.hub.requests


def test_an_earlier_release_is_recognized_by_its_commit(published: Published) -> None:
    release = find_release(REPO, EARLIER)
    published.hub.repos[REPO][published.earlier]["tokenizer.json"] = tokenizer_json()
    source = hub_source(REPO, published.earlier)
    assert source.release is release
    assert hub_source(REPO, EARLIER).release is release
    assert sorted(hub_source(REPO, published.earlier).config.tokenizer.templates) == sorted(EARLIER_TEMPLATES)


def test_a_fine_tune_with_the_published_config_loads_by_its_sizes(
    published: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = weights(5, tmp_path / "tuned")
    commit = published.hub.add("someone/tuned", {"config.json": PUBLISHED_CONFIG, "model.safetensors": tuned})
    expected = reply(load(tmp_path / "tuned", device="cpu"))
    for name in ("someone/tuned", "someone/tuned@main", f"someone/tuned@{commit}"):
        caplog.clear()
        assert reply(load(name, device="cpu")) == expected
        assert f"By its sizes, it is taken for {REPO}@{RELEASE}" in caplog.text
    go_offline(monkeypatch, published.hub)
    assert reply(load("someone/tuned", device="cpu")) == expected


def test_a_fine_tune_in_shards_loads(published: Published, tmp_path: Path) -> None:
    network = write_small(tmp_path / "shards")
    from moondream_cv.model.checkpoints import save_checkpoint

    save_checkpoint(network, small_config(), byte_tokenizer(), tmp_path / "shards", max_shard_size=20_000)
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    published.hub.add("someone/shards", files | {"config.json": PUBLISHED_CONFIG, "extra.safetensors": b"unused"})
    assert reply(load("someone/shards", device="cpu")) == reply(load(tmp_path / "shards", device="cpu"))
    assert not published.hub.asked("extra")


def test_a_repository_with_sections_in_its_config_loads(published: Published, tmp_path: Path) -> None:
    other = small_config(layers=3)
    write_small(tmp_path / "own", other)
    files = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    published.hub.add("someone/own", files, ["v1"])
    assert load("someone/own@v1", device="cpu").config == other


def test_four_bit_weights_get_the_prompts_of_the_release_in_their_name(published: Published, tmp_path: Path) -> None:
    content = packed(published.weights, tmp_path)
    published.hub.repos[REPO][published.earlier]["tokenizer.json"] = tokenizer_json()
    published.hub.add(FOUR_BIT, {"config.json": PUBLISHED_CONFIG, "model.safetensors": content})
    model = load(FOUR_BIT, device="cpu")
    assert model.config.tokenizer.templates == EARLIER_TEMPLATES
    weight = model.network.text.blocks[0].mlp.fc1.weight
    assert torch.equal(weight.unique(), torch.tensor([0.0, 0.01]))


def test_private_repositories_need_a_token(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    published.hub.private.add(REPO)
    with pytest.raises(CheckpointError, match=r"not on the hub, or private .* answered 401"):
        load("moondream2", device="cpu")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert load("moondream2", device="cpu").name == "moondream2"
    assert {asked.authorization for asked in published.hub.asked() if asked.host == published.hub.cdn_host} == {None}


def test_transformers_loads_from_the_hub(published: Published, expected: Any, tmp_path: Path) -> None:
    from moondream_cv.hf import MoondreamForCausalLM

    options = {"cache_dir": tmp_path / "other", "device_map": "cpu"}
    model = MoondreamForCausalLM.from_pretrained(REPO, revision=published.release, **options)
    assert reply(model) == expected
    assert not (tmp_path / "cache").exists()
    again = MoondreamForCausalLM.from_pretrained(REPO, revision=published.release, local_files_only=True, **options)
    assert reply(again) == expected


def test_models_from_a_branch_are_pickled_by_commit(published: Published, tmp_path: Path) -> None:
    files = {"config.json": PUBLISHED_CONFIG, "model.safetensors": weights(5, tmp_path / "tuned")}
    published.hub.add("someone/tuned", files)
    model = load("someone/tuned@main", device="cpu")
    pickled = pickle.dumps(model)
    published.hub.add("someone/tuned", {**files, "model.safetensors": published.weights})
    published.hub.requests.clear()
    again = pickle.loads(pickled)
    assert again.fingerprint() == model.fingerprint()
    assert again.name == "someone/tuned@main"
    assert not published.hub.requests


# --- Checks before the download ---------------------------------------------------------------------------------------


def test_unsupported_sizes_are_rejected_before_the_download(published: Published, tmp_path: Path) -> None:
    write_small(tmp_path / "other", small_config(dim=32))
    other = (tmp_path / "other" / "model.safetensors").read_bytes()
    published.hub.add("someone/other", {"config.json": PUBLISHED_CONFIG, "model.safetensors": other})
    with pytest.raises(CheckpointError, match=r"someone/other@main has no config\.json .*no known release has its"):
        load("someone/other")
    write_small(tmp_path / "deep", small_config(layers=3))
    deep = (tmp_path / "deep" / "model.safetensors").read_bytes()
    published.hub.add("someone/deep", {"config.json": PUBLISHED_CONFIG, "model.safetensors": deep})
    with pytest.raises(CheckpointError, match=r"someone/deep@main does not fit .*keys unexpected: text\.blocks\.2"):
        load("someone/deep")
    assert all(asked.range for asked in published.hub.asked() if asked.host == published.hub.cdn_host)
    assert not any((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"x"}, "it contains no weights"),
        ({"tokenizer.json": b"{}"}, "it contains a tokenizer and no weights"),
        ({"model.pt": b"x", "config.json": PUBLISHED_CONFIG}, r"PyTorch files, whose sizes cannot be read .*model\.pt"),
        ({"model.safetensors": b"x", "config.json": b"{"}, r"config\.json cannot be read as JSON"),
        ({"model.safetensors": b"x", "config.json": b"[]"}, r"config\.json must contain a JSON object, got list"),
        ({"model.safetensors": b"nothing of that kind"}, "something else .status 206. in place of model.safetensors"),
        ({"model.safetensors": struct.pack("<Q", 2**40)}, "something else .status 206. in place of model.safetensors"),
    ],
)
def test_repositories_without_usable_weights_raise(published: Published, files: dict[str, bytes], message: str) -> None:
    published.hub.add("someone/else", files)
    with pytest.raises(CheckpointError, match=f"someone/else@main.*{message}"):
        load("someone/else")


def test_the_header_of_a_full_size_checkpoint_is_read_with_one_small_request(published: Published) -> None:
    with torch.device("meta"):
        state = MoondreamNetwork(MOONDREAM_2B).state_dict()
    header, offset = {}, 0
    for name, tensor in state.items():
        size = tensor.numel() * 2
        header[f"model.{name}"] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    published.hub.add("someone/full", {"model.safetensors": struct.pack("<Q", len(text)) + text})
    remote = get_revision("someone/full", "main")
    shapes = read_safetensors_header(remote, "model.safetensors")
    source = sources._Header(Path("model.safetensors"), shapes)
    check_shapes("someone/full", [source], MOONDREAM_2B)
    assert len(shapes) == len(state)
    (asked,) = published.hub.asked("/cdn/")
    assert asked.range == "bytes=0-99999"


def test_long_headers_take_a_second_request(published: Published) -> None:
    content = bytes(save({"x": torch.zeros(1)}, metadata={"note": "n" * 200_000}))
    published.hub.add("someone/long", {"model.safetensors": content})
    assert read_safetensors_header(get_revision("someone/long", "main"), "model.safetensors") == {"x": (1,)}
    assert len(published.hub.asked("/cdn/")) == 2


# --- Download and offline use -----------------------------------------------------------------------------------------


def test_offline_advice_in_the_error_works(
    published: Published, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error about a missing tokenizer names a command, and the command works."""
    folder = tmp_path / "copied"
    folder.mkdir()
    (folder / "config.json").write_bytes(PUBLISHED_CONFIG)
    (folder / "model.safetensors").write_bytes(published.weights)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=f"`moondream-cv download {TOKENIZER_REPO}@main` once with a connection"):
        load(folder, device="cpu")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    result = CliRunner().invoke(app, ["download", f"{TOKENIZER_REPO}@main"])
    assert (result.exit_code, (Path(result.stdout.strip()) / "tokenizer.json").read_bytes()) == (0, tokenizer_json())
    go_offline(monkeypatch, published.hub)
    assert reply(load(folder, device="cpu")) == expected
    assert CliRunner().invoke(app, ["download", f"{TOKENIZER_REPO}@main"]).exit_code == 0
    assert not published.hub.requests


def test_the_tokenizer_can_be_written_to_a_folder(published: Published, tmp_path: Path) -> None:
    assert download(f"{TOKENIZER_REPO}@main", to=tmp_path / "to") == tmp_path / "to"
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("name", ["moondream2", f"{REPO}@main", "tuned", FOUR_BIT, "folder"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_folder_from_download_loads_on_another_machine(
    name: str, is_cached: bool, published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier_tokenizer = {"tokenizer.json": tokenizer_json()}
    published.hub.repos[REPO][published.earlier] |= earlier_tokenizer
    published.hub.add("someone/tuned", {"config.json": PUBLISHED_CONFIG, "model.safetensors": published.weights})
    four_bit = {"config.json": PUBLISHED_CONFIG, "model.safetensors": packed(published.weights, tmp_path)}
    published.hub.add(FOUR_BIT, four_bit)
    if name == "folder":
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "model.safetensors").write_bytes(published.weights)
    name = {"tuned": "someone/tuned", "folder": str(tmp_path / "folder")}.get(name, name)
    original = load(name, device="cpu") if is_cached else None
    result = CliRunner().invoke(app, ["download", name, "--to", str(tmp_path / "to")])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'to'}\n")
    original = original or load(name, device="cpu")
    # Another machine: another folder, no network and an empty cache
    shutil.copytree(tmp_path / "to", tmp_path / "copied")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    go_offline(monkeypatch, published.hub)
    copied = load(tmp_path / "copied", device="cpu")
    assert copied.config == original.config
    assert reply(copied) == reply(original)
    names = {path.name for path in (tmp_path / "to").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_folder_keeps_the_calibration_and_no_pointer_to_code(published: Published, tmp_path: Path) -> None:
    calibration = b'{"schema": 1, "skills": {}}'
    published.hub.repos[REPO][published.release]["calibration.json"] = calibration
    download("moondream2", to=tmp_path / "to")
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["model_type"] == "moondream1"
    assert (tmp_path / "to" / "calibration.json").read_bytes() == calibration


def test_a_guessed_release_can_still_be_named(published: Published, tmp_path: Path) -> None:
    published.hub.add("someone/tuned", {"config.json": PUBLISHED_CONFIG, "model.safetensors": published.weights})
    download("someone/tuned", to=tmp_path / "to")
    assert load(f"{tmp_path / 'to'}@{EARLIER}", device="cpu").config.tokenizer.templates == EARLIER_TEMPLATES
    download("moondream2", to=tmp_path / "release")
    assert load(f"{tmp_path / 'release'}@{EARLIER}", device="cpu").config.tokenizer.templates == EARLIER_TEMPLATES


def test_download_to_a_folder_twice_and_over_other_weights(published: Published, tmp_path: Path) -> None:
    to = tmp_path / "to"
    download("moondream2", to=to)
    published.hub.requests.clear()
    download("moondream2", to=to)
    assert all(asked.range for asked in published.hub.asked("/cdn/"))  # the header only
    tuned = weights(5, tmp_path / "tuned")
    (to / "model.safetensors").write_bytes(tuned)
    for name in ("moondream2", str(tmp_path / "new")):
        with pytest.raises(
            CheckpointError, match=r"to already contains other weights, model\.safetensors; give an empty"
        ):
            download(name, to=to)
    assert (to / "model.safetensors").read_bytes() == tuned
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file; give a folder"):
        download("moondream2", to=tmp_path / "file")


@pytest.mark.parametrize("to_folder", [False, True])
def test_an_interrupted_download_continues(
    to_folder: bool, published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # less than the whole file
    half = len(published.weights) // 2 // 1024 * 1024
    to = tmp_path / "to" if to_folder else None
    cut = published.hub.fail("/cdn/", method="GET", range="^$", cut=half)
    expired = published.hub.fail("/cdn/", status=403, method="GET", range="bytes=[1-9]")
    with pytest.raises(CheckpointError, match=rf"{published.hub.cdn_host} denies access \(status 403\)"):
        download("moondream2", to=to)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="not in the cache" if to is None else "contains no weights"):
        load(to or "moondream2", device="cpu")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    cut.times = expired.times = 0
    published.hub.requests.clear()
    # Another process continues
    subprocess.run(
        [sys.executable, "-c", _DOWNLOAD, *([] if to is None else [str(to)])],
        check=True,
        timeout=120,
        capture_output=True,
    )
    ranges = [asked.range for asked in published.hub.asked("/cdn/", "GET")]
    assert ranges == ["bytes=0-99999", f"bytes={half}-"]
    assert next((to or tmp_path / "cache").rglob("model.safetensors")).read_bytes() == published.weights
    assert not list((to or tmp_path / "cache").rglob("*.part"))


_DOWNLOAD = """
import sys
from pathlib import Path
from moondream_cv.model import releases, sources
from moondream_cv.model.export import download_from_hub
from moondream_cv.model.releases import Release
from tests.helpers.small_checkpoint import small_config
known = (Release("vikhyatk/moondream2", "2025-06-21", small_config(), "moondream/starmie-v1"),)
releases.RELEASES = sources.RELEASES = known
download_from_hub("vikhyatk/moondream2", None, *map(Path, sys.argv[1:]))
"""


@pytest.mark.parametrize("times", [1, 3])
def test_broken_connections_are_retried_within_a_download(
    times: int, published: Published, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    published.hub.fail("/cdn/", method="GET", range="^$|bytes=[1-9]", cut=len(published.weights) // 4, times=times)
    assert reply(load("moondream2", device="cpu")) == expected
    ranges = [str(asked.range) for asked in published.hub.asked("/cdn/", "GET")]
    assert len(ranges) == 2 + times
    assert all(later.startswith("bytes=") and later.endswith("-") for later in ranges[2:])


def test_the_cache_is_used_without_a_request(published: Published, expected: Any) -> None:
    load("moondream2", device="cpu")
    published.hub.requests.clear()
    assert reply(load("moondream2", device="cpu")) == expected
    assert reply(load(f"{REPO}@{published.release}", device="cpu")) == expected
    assert not published.hub.requests
    download("moondream2")
    assert published.hub.asked("/api/models/")


def test_a_branch_follows_the_hub_and_falls_back_to_the_cache(
    published: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"config.json": PUBLISHED_CONFIG, "model.safetensors": published.weights}
    published.hub.add("someone/tuned", files)
    first = load("someone/tuned", device="cpu").fingerprint()
    published.hub.add("someone/tuned", {**files, "model.safetensors": weights(5, tmp_path / "tuned")})
    second = load("someone/tuned", device="cpu").fingerprint()
    assert first != second
    published.hub.fail(status=503)
    with caplog.at_level(logging.WARNING):
        assert load("someone/tuned", device="cpu").fingerprint() == second
    assert "(status 503): try again later" in caplog.text
    assert "The files in the cache are used instead" in caplog.text


def test_a_branch_points_to_complete_commits_only(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": PUBLISHED_CONFIG, "model.safetensors": published.weights}
    published.hub.add("someone/tuned", files)
    first = load("someone/tuned", device="cpu").fingerprint()
    published.hub.add("someone/tuned", {**files, "model.safetensors": weights(5, tmp_path / "tuned")})
    published.hub.fail("/resolve/.*safetensors", status=404, method="HEAD")
    with pytest.raises(CheckpointError, match="someone/tuned@main cannot be fetched"):
        load("someone/tuned", device="cpu")
    go_offline(monkeypatch, published.hub)
    assert load("someone/tuned", device="cpu").fingerprint() == first


# --- Names and places -------------------------------------------------------------------------------------------------


def test_uncached_names_raise_with_advice_when_offline(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch, published.hub)
    expected = (
        rf"{REPO}@{RELEASE} is not in the cache.*`moondream-cv download {REPO}@{RELEASE}`.*--to FOLDER.*--model tiny"
    )
    with pytest.raises(CheckpointError, match=expected):
        load("moondream2")
    with pytest.raises(CheckpointError, match=r"'tokenizer\.json' of moondream/starmie-v1@main is not in the cache"):
        hub_module.fetch_file(TOKENIZER_REPO, "main", "tokenizer.json")
    assert not published.hub.requests


def test_unsupported_revision_raises_without_a_request(published: Published) -> None:
    with pytest.raises(
        CheckpointError, match=rf"moondream2@2024-08-26 is not supported; supported releases: {REPO}@{RELEASE}"
    ):
        load(f"{REPO}@2024-08-26")
    assert not published.hub.requests


@pytest.mark.parametrize("repo", ["a/b/c", "a//b", "-", "a/b--c", "-a/b", "a/b.", "a/..", "a" * 200 + "/b"])
def test_invalid_repository_names_raise(repo: str) -> None:
    with pytest.raises(CheckpointError, match="is not the name of a repository"):
        hub_source(repo, "main")


def test_hub_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub_module.hub_cache() == Path("~/.cache/huggingface/hub").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert hub_module.hub_cache() == tmp_path / "x" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "h"))
    assert hub_module.hub_cache() == tmp_path / "h" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "c"))
    assert hub_module.hub_cache() == tmp_path / "c"


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("YES", True), ("0", False), ("", False)])
def test_is_offline_follows_the_environment(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub_module.is_offline() is offline
