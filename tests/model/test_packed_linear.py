"""Packed bfloat16 layers: equal outputs, and every way to copy, move and save them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moondream_cv import load
from moondream_cv.engine.model_fingerprint import fingerprint
from moondream_cv.model import packed_linear
from moondream_cv.model.checkpoints import load_network, save_checkpoint
from moondream_cv.model.layers import Linear, can_use_onednn
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.packed_linear import PackedLinear, pack_weights
from tests.helpers.small_checkpoint import byte_tokenizer, small_config

pytestmark = pytest.mark.skipif(
    not can_use_onednn(torch.zeros(1, dtype=torch.bfloat16), is_training=False),
    reason="oneDNN has no bfloat16 products on this CPU",
)


def layers(out: int = 96, width: int = 80, bias: bool = True) -> tuple[Linear, PackedLinear]:
    torch.manual_seed(0)
    plain = Linear(width, out, bias=bias).to(torch.bfloat16).requires_grad_(False)
    return plain, PackedLinear(plain.weight, plain.bias)


def exact(layer: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("shape", [(1, 80), (8, 80), (2, 3, 80), (729, 80)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layer_computes_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    plain, packed = layers(bias=bias)
    x = torch.randn(shape, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = exact(plain, x)
        torch.testing.assert_close(packed(x).double(), expected, rtol=2**-8, atol=1e-3)
        activated = nn.functional.gelu(expected, approximate="tanh")
        torch.testing.assert_close(packed.gelu(x).double(), activated, rtol=2**-8, atol=1e-3)
        assert torch.equal(packed.weight, plain.weight)


def test_gradients_reach_the_input() -> None:
    plain, packed = layers()
    x = torch.randn(4, 80, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(packed.gelu(x).sum(), x)
    (expected,) = torch.autograd.grad(nn.functional.gelu(plain(x), approximate="tanh").sum(), x)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_have_equal_weights(how: object) -> None:
    plain, packed = layers()
    copied = how(packed)  # type: ignore[operator]
    assert copied.weight.is_mkldnn is False
    assert torch.equal(copied.weight, plain.weight)
    assert torch.equal(copied.bias, plain.bias)


def test_converted_layer_computes_in_the_new_data_type() -> None:
    plain, packed = layers()
    x = torch.randn(3, 80)
    with torch.inference_mode():
        torch.testing.assert_close(packed.to(torch.float32)(x), plain.float()(x))
    assert packed.to("meta").weight.is_meta


def test_state_dict_is_that_of_the_plain_layer() -> None:
    plain, packed = layers()
    state = packed.state_dict()
    assert list(state) == list(plain.state_dict())
    assert torch.equal(state["weight"], plain.weight)
    other = PackedLinear(torch.zeros_like(plain.weight), nn.Parameter(torch.zeros_like(plain.bias), False))
    other.load_state_dict(state)
    assert torch.equal(other.weight, plain.weight)
    assert torch.equal(other.bias, plain.bias)


@pytest.fixture
def every_layer_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "MIN_VALUES", 0)


@pytest.mark.usefixtures("every_layer_is_packed")
def test_packed_network_has_the_fingerprint_and_the_files_of_the_plain_one(tmp_path: Path) -> None:
    config = small_config()
    network = MoondreamNetwork(config)
    network.initialize(torch.Generator().manual_seed(0))
    network = network.to(torch.bfloat16).eval().requires_grad_(False)
    before = fingerprint(network, None)
    save_checkpoint(network, config, byte_tokenizer(), tmp_path / "plain")
    pack_weights(network)
    assert sum(isinstance(module, PackedLinear) for module in network.modules()) > 10
    assert fingerprint(network, None) == before
    save_checkpoint(network, config, byte_tokenizer(), tmp_path / "packed")
    plain, packed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "packed"))
    assert plain == packed
    assert fingerprint(load_network(tmp_path / "packed", config, "cpu", torch.bfloat16), None) == before


@pytest.mark.usefixtures("every_layer_is_packed")
def test_loaded_model_packs_its_weights_and_answers() -> None:
    model = load("tiny", device="cpu", dtype="bfloat16")
    assert isinstance(model.network.text.blocks[0].mlp.fc1, PackedLinear)
    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    assert isinstance(model.caption(image, "short")["caption"], str)
    model.close()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param({}, r"Missing key\(s\) in state_dict: \"weight\"", id="missing"),
        pytest.param(
            {"weight": torch.zeros(8, 8)}, r"weight must have the shape \[64, 32\], got \[8, 8\]", id="wrong shape"
        ),
    ],
)
def test_state_without_the_weight_raises(state: dict[str, torch.Tensor], message: str) -> None:
    layer = PackedLinear(torch.ones(64, 32, dtype=torch.bfloat16), None)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight, torch.ones(64, 32, dtype=torch.bfloat16))
