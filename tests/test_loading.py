"""`load`: names, devices, data types and error messages."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moondream_cv import loading
from moondream_cv.engine.calibration import Calibration, Curve
from moondream_cv.errors import CheckpointError
from moondream_cv.loading import check_name, choose_device, choose_dtype, download, load, quantize
from moondream_cv.model import hardware
from moondream_cv.model.adapters import load_adapter
from moondream_cv.model.hardware import Cpu
from moondream_cv.model.quantized_linear import quantization_of, weight_bytes
from moondream_cv.model.releases import MOONDREAM_2B, RELEASES
from moondream_cv.model.sources import local_source
from moondream_cv.requests import Detect, Point, Settings
from tests.helpers.small_checkpoint import byte_tokenizer, small_config, write_small

GOLDEN = Path(__file__).parent / "data" / "golden"
TINY = Path(loading.__file__).parent / "tiny" / "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_local_folder_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in (folder, str(folder), "./checkpoint", "checkpoint", "~/checkpoint", folder / "model.safetensors"):
        model = load(name, device="cpu")
        assert model.config == small_config()
        assert (model.device.type, model.dtype) == ("cpu", torch.float32)
        assert model.name == str(name)
    assert download("checkpoint") == Path("checkpoint")


@pytest.mark.parametrize("layout", ["top", "nested", "with model_type"])
def test_every_config_layout_loads(folder: Path, layout: str) -> None:
    values = small_config().to_dict()
    values = {"top": values, "nested": {"config": values}, "with model_type": values | {"model_type": "moondream1"}}[
        layout
    ]
    (folder / "config.json").write_text(json.dumps(values))
    assert load(folder, device="cpu").config == small_config()


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_golden_sets_load_and_answer(name: str) -> None:
    model = load(GOLDEN / name, device="cpu", adapter=GOLDEN / name / "adapter.pt")
    assert model.adapter is not None
    settings = {"max_objects": 1}
    assert len(model.detect(Image.new("RGB", (40, 30)), "dog", settings=settings)["objects"]) <= 1


def test_variant_setting_accepts_an_adapter_file() -> None:
    image, settings = Image.open(GOLDEN / "mha" / "images" / "4_50x40.png"), {"max_objects": 2}
    variant = settings | {"variant": str(GOLDEN / "mha" / "adapter.pt")}
    plain, adapted = (
        load(GOLDEN / "mha", device="cpu"),
        load(GOLDEN / "mha", device="cpu", adapter=str(GOLDEN / "mha" / "adapter.pt")),
    )
    expected = adapted.point(image, "dog", settings=settings)
    assert plain.point(image, "dog", settings=variant) == expected
    assert plain.point(image, "dog", settings=settings) != expected


@pytest.mark.skipif(not TINY.is_file(), reason="the embedded weights are not in this tree yet")
def test_tiny_logs_its_purpose_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_has_logged_tiny", False)
    with caplog.at_level(logging.INFO, logger="moondream_cv"):
        load("tiny", device="cpu")
        load("tiny", device="cpu")
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("tiny is")]
    assert told == ["tiny is a demonstration model, trained on rendered shapes and icons and not on photographs"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moondrem2", "there is no model 'moondrem2'; did you mean 'moondream2'"),
        ("tinny", "did you mean 'tiny'"),
        ("resnet50", "use 'moondream2', 'tiny', a repository on the hub"),
        ("", "must not be empty"),
        ("  ", "must not be empty"),
        ("./missing", "there is no model './missing'"),
        ("/missing/folder", "there is no model '/missing/folder'"),
        ("~nobody-here/x", "there is no model"),
        ("x" * 5000, "there is no model 'xxx"),
        ("a\0b", "there is no model"),
        ("missing/../folder", "there is no model"),
        (
            "models/missing",
            "there is no folder 'models/missing', so the hub was searched for the name: models/missing@main",
        ),
        ("moondream2", "vikhyatk/moondream2@2025-06-21 is not in the cache.*moondream-cv download"),
        ("moondream2@2025-03-27", "vikhyatk/moondream2@2025-03-27 is not in the cache"),
        ("moondream2@2023-01-01", "supported releases: vikhyatk/moondream2@2025-06-21"),
        ("vikhyatk/moondream2", "vikhyatk/moondream2@2025-06-21 is not in the cache"),
        ("vikhyatk/moondream2@2024-08-26", "supported releases: vikhyatk/moondream2@2025-06-21"),
        (Path("nowhere"), "there is no model 'nowhere'"),
    ],
)
def test_invalid_names_raise(name: str | Path, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(name)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "moondream2",
        "moondream2@2025-03-27",
        "vikhyatk/moondream2@main",
        "models/missing",
        "checkpoint",
        "http://localhost:9001",
    ],
)
def test_check_name_accepts_valid_names(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    check_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moondrem2", "there is no model 'moondrem2'; did you mean 'moondream2'"),
        ("", "must not be empty"),
        ("./missing", "there is no model './missing'"),
        ("moondream2@2023-01-01", "supported releases: vikhyatk/moondream2@2025-06-21"),
        ("checkpoint@2023-01-01", "unknown release '2023-01-01' in 'checkpoint@2023-01-01'"),
        (".", "no weights"),
        ("http://localhost:x", "'http://localhost:x' has no valid host and port"),
        ("ftp://localhost", "must begin with http:// or https://"),
    ],
)
def test_check_name_rejects_invalid_names(
    name: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises((CheckpointError, ValueError), match=message):
        check_name(name)


@pytest.mark.parametrize("name", [None, 3])
def test_names_of_a_wrong_type_raise(name: object) -> None:
    with pytest.raises(TypeError):
        load(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["http://localhost:9001", "HTTPS://api.moondream.ai/v1"])
def test_load_rejects_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r"must be a folder or repo@revision, got the URL .*connect\(url\)"):
        load(url)


def test_empty_folders_and_damaged_checkpoints_raise(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is empty"):
        load(tmp_path / "empty")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load(folder)
    byte_tokenizer([]).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(small_config(layers=3).to_dict()))
    with pytest.raises(CheckpointError, match=r"keys missing: text\.blocks\.2"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no known release has its sizes"):
        load(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load(folder)


def test_folder_name_may_include_the_release(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "moondream1"}')
    with pytest.raises(CheckpointError, match=r"unknown release '2024-01-01' in"):
        load(f"{folder}@2024-01-01")
    # The release is accepted; loading finds that the weights do not fit it.
    source = local_source(folder, RELEASES[0])
    assert source.config == MOONDREAM_2B
    with pytest.raises(CheckpointError, match=r"ID 50256 must be a control token .* got None"):
        load(f"{folder}@2025-04-14")


def test_adapters_that_do_not_fit_raise(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit|is not an adapter"):
        load(folder, device="cpu", adapter=GOLDEN / "mha" / "adapter.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load(folder, device="cpu", adapter="missing.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_adapter(Path("missing"), small_config(), "cpu", torch.float32)


@pytest.mark.parametrize("value", ["int3", "", 8])
def test_unknown_quantization_raises(folder: Path, value: object) -> None:
    with pytest.raises(ValueError, match=f"quantize must be one of int8, int4 or None, got {value!r}"):
        load(folder, quantize=value)  # type: ignore[arg-type]


def test_choose_device_returns_available_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_devices", lambda: ["cuda", "cuda:0", "cuda:1", "cpu"])
    assert choose_device(None) == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device(torch.device("cpu", 0)) == torch.device("cpu:0")
    for name in ("cuda:2", "mps", "meta", "gpu", "cuda:-1", "", 3.5):
        with pytest.raises(ValueError, match="available devices: cuda, cuda:0, cuda:1, cpu"):
            choose_device(name)  # type: ignore[arg-type]
    monkeypatch.setattr(loading, "_devices", lambda: ["mps", "cpu"])
    assert choose_device(None) == torch.device("mps")
    assert choose_device("mps:0") == torch.device("mps:0")
    with pytest.raises(ValueError, match="there is no device 'cuda'; available devices: mps, cpu"):
        choose_device("cuda")


def test_choose_dtype_depends_on_device_and_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, small = torch.device("cpu"), small_config()
    assert choose_dtype(None, cpu, small) == torch.float32
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(hardware, "probe_cpu", lambda value=has_bfloat16: Cpu(value, None, 2, 2, 2))
        assert choose_dtype(None, cpu, MOONDREAM_2B) == expected
    assert choose_dtype("bfloat16", cpu, small) == choose_dtype(torch.bfloat16, cpu, small) == torch.bfloat16
    for bad in ("int8", torch.int8, torch.float64, "half", 3):
        with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got"):
            choose_dtype(bad, cpu, small)  # type: ignore[arg-type]
    assert load(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_weights_are_quantized_if_they_do_not_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_small(tmp_path, small_config(dim=640, layers=1))
    monkeypatch.setattr(hardware, "probe_cpu", lambda: Cpu(False, 1_000_000, 2, 2, 2))
    model = load(tmp_path, device="cpu")
    assert (model.dtype, quantization_of(model.network)) == (torch.float32, "int8")
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "quantized to int8" in warning
    assert "1 MB are free; dtype='float32' loads them in full precision" in warning
    assert quantization_of(pickle.loads(pickle.dumps(model)).network) == "int8"
    assert quantization_of(load(tmp_path, device="cpu", dtype="float32").network) is None
    folder = quantize(tmp_path, tmp_path / "int4", "int4")
    assert quantization_of(load(folder, device="cpu").network) == "int4"


def test_load_logs_device_memory_and_speed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_small(tmp_path, small_config(dim=640, layers=1))
    with caplog.at_level(logging.INFO, logger="moondream_cv"):
        model = load(tmp_path, device="cpu", dtype="float32", quantize="int8")
    (line,) = [record.message for record in caplog.records if " on cpu: " in record.message]
    size = f"{weight_bytes(model.network) / 1e6:.0f} MB"
    assert line.startswith(f"{tmp_path} on cpu: float32, int8 weights, {size}, about ")
    assert line.endswith(" s for a class with 3 objects")


def test_load_warns_once_of_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "_has_warned_of_threads", False)
    monkeypatch.setattr(hardware, "probe_cpu", lambda: Cpu(False, None, 1, 8, 8))
    write_small(tmp_path, small_config(dim=640, layers=1))
    for _ in range(2):
        load(tmp_path, device="cpu")
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["PyTorch runs 8 threads, but this process may use 1 of 8 cores; set OMP_NUM_THREADS=1"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_load_directly_to_the_gpu(folder: Path) -> None:
    model = load(folder)
    assert model.device.type == "cuda"
    assert model.dtype in (torch.bfloat16, torch.float16)
    assert load(folder, device="cuda:0", dtype="float32").network.device == torch.device("cuda:0")


def test_calibration_next_to_the_weights_is_loaded(folder: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    plain = load(folder, device="cpu")
    assert not plain.calibrated
    Calibration({"point": Curve((0.0, 1.0), (0.25, 0.75))}).write(folder / "calibration.json")
    model = load(folder, device="cpu")
    assert model.calibrated
    for kind, list_of in ((Point, "points"), (Detect, "objects")):
        (before,), (after,) = (m.run([kind(image, "dog", Settings(max_objects=3))]) for m in (plain, model))
        scores = [item.confidence for item in getattr(before, list_of)]
        expected = [0.25 + score / 2 for score in scores] if kind is Point else scores
        assert [item.confidence for item in getattr(after, list_of)] == pytest.approx(expected)
    (folder / "calibration.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"calibration\.json is not a valid calibration"):
        load(folder, device="cpu")


@pytest.mark.slow
def test_model_with_adapter_is_not_calibrated() -> None:
    adapter = GOLDEN / "mha" / "adapter.pt"
    model = load(GOLDEN / "mha", device="cpu")
    model.calibration = Calibration({"point": Curve((0.0, 1.0), (0.25, 0.75))})
    image = GOLDEN / "mha" / "images" / "1_640x480.png"
    requests = [Point(image, "dog", Settings(max_objects=2, variant=v)) for v in (None, str(adapter))]
    with_it, without = model.run(requests)
    assert min(p.confidence for p in with_it.points) >= 0.25  # type: ignore[union-attr]
    other = load(GOLDEN / "mha", device="cpu", adapter=adapter)
    other.calibration = model.calibration
    assert not other.calibrated
    (expected,) = other.run([Point(image, "dog", Settings(max_objects=2))])
    scores = [p.confidence for p in without.points]  # type: ignore[union-attr]
    # The requests are in one batch, so sums have another order.
    assert scores == pytest.approx([p.confidence for p in expected.points], rel=1e-4)  # type: ignore[union-attr]


def test_unknown_adapter_raises_before_the_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONDREAM_CV_FINETUNES", str(tmp_path))
    checkpoint = "01K5ZJ3W8Q4T7X2M9N6P1R0SVA@200"
    for name, adapter in ((f"moondream2/{checkpoint}", None), ("moondream2", checkpoint)):
        with pytest.raises(CheckpointError, match="there is no finetune '01K5ZJ3W8Q4T7X2M9N6P1R0SVA'"):
            load(name, adapter=adapter, device="cpu")
    with pytest.raises(ValueError, match="adapter must be None for the checkpoint of a finetune"):
        load(f"moondream2/{checkpoint}", adapter="other.pt", device="cpu")
