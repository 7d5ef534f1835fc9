"""The transformers integration. Run in each environment of the test matrix."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moondream_cv import hf
from moondream_cv.engine.calibration import Calibration, Curve
from moondream_cv.errors import CheckpointError
from moondream_cv.loading import load
from moondream_cv.vision_model import VisionModel
from tests.helpers.small_checkpoint import small_config, write_small

pytestmark = pytest.mark.compat
GOLDEN = Path(__file__).parent / "data" / "golden" / "gqa"
PUBLISHED = {
    "model_type": "moondream1",
    "architectures": ["HfMoondream"],
    "auto_map": {"AutoConfig": "hf_moondream.HfConfig", "AutoModelForCausalLM": "hf_moondream.HfMoondream"},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.4",
}
GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    hf.register()
    hf.register()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint as published: with references to code, and the sizes under `config`."""
    folder = tmp_path_factory.mktemp("published")
    write_small(folder)
    sizes = small_config().to_dict()
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, "config": sizes}))
    (folder / "hf_moondream.py").write_text("raise AssertionError('code from the checkpoint was executed')\n")
    return folder


@pytest.fixture(scope="module")
def image() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))


def answers(model: Any, image: Image.Image) -> list[Any]:
    return [
        model.detect(image, "dog", settings={"max_objects": 2}),
        model.point(image, "dog", settings={"max_objects": 2}),
        model.query(image, "what?", settings=GREEDY),
        model.caption(image, settings=GREEDY),
        "".join(model.caption(image, stream=True, settings=GREEDY)["caption"]),
        model.detect_gaze(image, eye=(0.5, 0.25)),
    ]


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "cpu", torch.device("cpu"), {"": torch.device("cpu")}])
def test_from_pretrained_returns_this_implementation(published: Path, image: Image.Image, device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(published, device_map=device_map, dtype=torch.float32)
    assert isinstance(model, hf.MoondreamForCausalLM)
    assert isinstance(model, VisionModel)
    assert (model.device.type, model.dtype, model.training) == ("cpu", torch.float32, False)
    encoded = model.encode_image(image)
    ours = load(published, device="cpu")
    settings = {"max_objects": 2}
    assert model.detect(encoded, "dog", settings=settings) == ours.detect(image, "dog", settings=settings)


def test_from_pretrained_gives_golden_answers(tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    sizes = json.loads((GOLDEN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | sizes))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.float32)
    name = "4_50x40.png"
    expected = json.loads((GOLDEN / "expected.json").read_text())["images"][name]
    image = model.encode_image(GOLDEN / "images" / name)
    points = model.point(image, "dog", settings={"max_objects": 8})["points"]
    assert [{"x": p["x"], "y": p["y"]} for p in points] == expected["point"]["dog"]
    text = {"temperature": 0, "max_tokens": 24}
    assert model.caption(image, "short", settings=text)["caption"] == expected["caption"]["short"]


def test_saved_model_loads_again(published: Path, image: Image.Image, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(published), dtype=torch.float32)
    expected = answers(model, image)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    for folder in (tmp_path / "single", tmp_path / "shards"):
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert answers(again, image) == expected
        assert answers(load(folder, device="cpu"), image) == expected
        assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_calibration_is_saved_and_loaded_with_the_weights(image: Image.Image, tmp_path: Path) -> None:
    write_small(tmp_path / "checkpoint")
    Calibration({"point": Curve((0.0, 1.0), (0.25, 0.75))}).write(tmp_path / "checkpoint" / "calibration.json")
    expected = load(tmp_path / "checkpoint", device="cpu").point(image, "dog")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", device_map="cpu")
    assert model.point(image, "dog") == expected
    model.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again", device="cpu").point(image, "dog") == expected
    model.calibration = None
    assert model.point(image, "dog") != expected


def test_copies_give_the_same_answers(published: Path, image: Image.Image) -> None:
    model = AutoModelForCausalLM.from_pretrained(published)
    expected = answers(model, image)
    assert answers(copy.deepcopy(model), image) == expected


def test_no_code_from_the_checkpoint_is_run(published: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(published), hf.MoondreamHfConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(published), hf.MoondreamForCausalLM)


def test_state_dict_contains_only_weights(published: Path) -> None:
    """`from_pretrained` would leave non-persistent buffers uninitialized."""
    model = AutoModelForCausalLM.from_pretrained(published)
    assert not list(model.named_buffers())
    assert set(model.state_dict()) == set(load_file(published / "model.safetensors"))


def test_dtype_argument_sets_the_dtype(published: Path, tmp_path: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(published).dtype == torch.bfloat16  # as in its config.json
    assert AutoModelForCausalLM.from_pretrained(published, dtype="auto").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(published, dtype="float32").dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(published, torch_dtype=torch.float16).dtype == torch.float16
    write_small(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"torch_dtype": "float16"}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32  # on a CPU
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16


def test_model_answers_after_moving_to_another_dtype(published: Path, image: Image.Image) -> None:
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.bfloat16)
    expected = answers(model, image)
    engine = model.engine
    assert model.engine is engine
    model.to(torch.float32)
    assert model.engine is not engine
    assert model.engine.dtype == torch.float32
    answers(model, image)
    model.to(torch.bfloat16)  # the weights still have bfloat16 precision
    assert answers(model, image) == expected


def test_older_key_names_and_pt_files_load(tmp_path: Path) -> None:
    network = write_small(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        {k.replace("model.text.blocks", "text_model.transformer.h"): v for k, v in state.items()}, tmp_path / "a.pt"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.model.text.blocks[1].mlp.fc1.weight, network.text.blocks[1].mlp.fc1.weight)


def test_mismatched_checkpoints_raise(tmp_path: Path) -> None:
    write_small(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.text.wte"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 key missing: text\.wte"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "config": {}}))
    with pytest.raises(CheckpointError, match="no known release has its sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_config_argument_overrides_the_checkpoint(tmp_path: Path) -> None:
    write_small(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moondream1"}))
    config = hf.MoondreamHfConfig(**small_config().to_dict())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert model.model.config == small_config()


def test_model_can_be_created_from_a_config() -> None:
    model = AutoModelForCausalLM.from_config(hf.MoondreamHfConfig(**small_config().to_dict()))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert 0.4 < float(model.model.text.wte.detach().std()) < 0.6
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        model.caption(Image.new("RGB", (8, 8)))


def test_output_loading_info_has_no_missing_keys(published: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(published, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": {"": "cuda:77"}}, "there is no device 'cuda:77'"),
        ({"device_map": {"model.vision": "cpu", "model.text": "meta"}}, "must name a single device"),
        ({"device_map": {}}, "must name a single device"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"max_memory": {0: "1GB"}}, "max_memory"),
        ({"subfolder": "x"}, "subfolder|config"),
    ],
)
def test_unsupported_arguments_raise(published: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        AutoModelForCausalLM.from_pretrained(published, **arguments)


def test_uncached_repository_raises_when_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = hf.MoondreamHfConfig(**small_config().to_dict())
    with pytest.raises(CheckpointError, match="vikhyatk/moondream2@2025-06-21 is not in the cache"):
        hf.MoondreamForCausalLM.from_pretrained("vikhyatk/moondream2", config=config, cache_dir=tmp_path)
