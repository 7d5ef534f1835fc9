"""Components of the network on inputs with known outputs, and inconsistent configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import CheckpointError
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.layers import rotary_table, rotate
from moondream_cv.model.region import bin_to_coordinate, bin_to_size, size_to_bin
from moondream_cv.model.text import prefix_mask
from moondream_cv.model.vision import stitch


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2))
def test_stitch_inverts_overlapping_crops(rows: int, columns: int, margin: int) -> None:
    grid, window = 6, 6 - 2 * margin
    height, width = rows * window + 2 * margin, columns * window + 2 * margin
    whole = torch.arange(height * width, dtype=torch.float32).view(height, width, 1)
    tiles = [
        whole[r * window : r * window + grid, c * window : c * window + grid]
        for r in range(rows)
        for c in range(columns)
    ]
    assert torch.equal(stitch(torch.stack(tiles), rows, columns, margin), whole)


def test_stitch_crops_tiles_by_the_margin() -> None:
    tiles = torch.stack([torch.zeros(4, 4, 1), torch.ones(4, 4, 1)])
    assert stitch(tiles, 1, 2, 1)[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_rotary_embedding_keeps_norms_and_depends_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 64, generator=generator) for _ in range(2))

    def score(query_at: int, key_at: int) -> float:
        turned = [rotate(x, rotary_table(torch.tensor([[at]]), 32)) for x, at in ((q, query_at), (k, key_at))]
        assert float(turned[0].norm()) == pytest.approx(float(q.norm()), rel=1e-5)
        return float((turned[0] * turned[1]).sum())

    assert score(10, 3) == pytest.approx(score(107, 100), rel=1e-4)
    assert score(10, 3) != pytest.approx(score(10, 4), rel=1e-4)


def test_rotary_embedding_keeps_the_second_half_of_a_head() -> None:
    x = torch.randn(1, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotary_table(torch.arange(3)[None], 32))
    assert torch.equal(turned[..., 32:], x[..., 32:])
    assert torch.equal(rotate(x[:, :1], rotary_table(torch.zeros(1, 1), 32))[..., 0:32:2], x[:, :1, :, :16])


def test_prefix_mask_is_causal_after_the_prefix() -> None:
    assert prefix_mask(4, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_bins_and_sizes_are_inverses() -> None:
    bins = torch.arange(1024)
    torch.testing.assert_close(size_to_bin(bin_to_size(bins, 1024), 1024), bins.float(), atol=1e-2, rtol=0)
    assert float(bin_to_size(torch.tensor(1023), 1024)) == 1.0
    assert float(bin_to_size(torch.tensor(0), 1024)) == 2.0**-10
    assert float(bin_to_coordinate(torch.tensor(512), 1024)) == 0.5


def test_decoder_attends_within_the_prefix_and_causally_after_it(model: LocalModel) -> None:
    text = model.network.text
    x = torch.randn(1, 6, model.config.text.dim, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6)[None]
    changed = x.clone()
    changed[0, 4] *= -1  # a constant would be lost in the layer norm
    before = text(x, positions, prefix_mask(6, 3))
    after = text(changed, positions, prefix_mask(6, 3))
    torch.testing.assert_close(before[0, :4], after[0, :4])
    assert not torch.allclose(before[0, 5], after[0, 5])
    changed = x.clone()
    changed[0, 2] *= -1
    assert not torch.allclose(before[0, 0], text(changed, positions, prefix_mask(6, 3))[0, 0])


def test_network_has_no_buffers(model: LocalModel) -> None:
    assert not list(model.network.named_buffers())  # transformers 5 leaves non-persistent buffers uninitialized


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("text", {"dim": 130}, "text.dim 130 must be a multiple of 4"),
        ("text", {"n_kv_heads": 5}, "must be a multiple of text.n_kv_heads 5"),
        ("vision", {"crop_size": 380}, "vision.crop_size 380 must be a multiple"),
        ("vision", {"overlap_margin": 14}, "must leave a window in 27 patches"),
        ("vision", {"proj_out_dim": 7}, "must equal text.dim"),
        ("region", {"size_out_dim": 2047}, "must be even"),
        ("text", {"max_context": 700}, "must exceed the image prefix of 730"),
        ("text", {"n_layers": 0}, "text.n_layers must be positive, got 0"),
        ("text", {"n_layers": "3"}, "text.n_layers must be an integer, got '3'"),
        ("text", {"n_layer": 3}, "unknown keys in section 'text': n_layer"),
        ("tokenizer", {"eos_id": 51200}, r"vocabulary size of 51200, got \[51200\]"),
        ("tokenizer", {"templates": {"detect": {"prefix": "1"}}}, "must be a list of token IDs, got '1'"),
        ("vision", 3, "section 'vision' must be an object"),
    ],
)
def test_inconsistent_configs_raise(section: str, values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        MoondreamConfig.from_dict({section: values})


def test_config_round_trips_through_a_dict() -> None:
    config = MoondreamConfig()
    assert MoondreamConfig.from_dict(config.to_dict()) == config
    assert config.prefix_length == config.text.prefix_attn == 730
    assert (config.text.head_dim, config.text.rotary_dim) == (64, 32)
