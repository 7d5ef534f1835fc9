"""Padded linear layers. Run with `pytest tests/model/test_padded_linear.py`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.model_fingerprint import fingerprint
from moondream_cv.model.padded_linear import MULTIPLE, PaddedLinear


@pytest.mark.parametrize("width", [1, 16, 588])
@torch.inference_mode()
def test_padding_does_not_change_the_output(width: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(width, 24), torch.randn(2, 5, width)
    padded = PaddedLinear(layer)
    assert padded.padded_weight.shape[1] % MULTIPLE == 0
    torch.testing.assert_close(padded(x), layer(x))
    assert padded.to(torch.float64).padded_weight.dtype == torch.float64


def test_padded_network_is_saved_and_identified_like_the_original(model: LocalModel) -> None:
    network = copy.deepcopy(model.network)
    network.vision.set_submodule("patch_emb", PaddedLinear(network.vision.patch_emb))
    state, expected = network.state_dict(), model.network.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert fingerprint(network, None) == fingerprint(model.network, None)
    padded = LocalModel(network, model.tokenizer)
    frame = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy()
    torch.testing.assert_close(padded.encode_image(frame).embedding, model.encode_image(frame).embedding)
