"""Test that packed questions match the engine's results for separate requests, and that targets match the examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moondream_cv.engine.crops import cut_crops
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.model.region import bin_to_coordinate
from moondream_cv.requests import Detect, Query, Settings
from moondream_cv.scenes.render import render_scene
from moondream_cv.scenes.world import short_caption
from moondream_cv.training.batches import Batch, Cells, Sample, cells_of, collate
from moondream_cv.training.losses import image_tokens, packed_hidden, text_losses
from moondream_cv.training.packing import IGNORE, Packer
from moondream_cv.training.prompts import Example, write_examples

BOXES = ((0.2, 0.4, 0.1, 0.2), (0.7, 0.5, 0.3, 0.1))


def batch_of(model: LocalModel, examples_of_images: list[list[Example]]) -> Batch:
    packer = Packer(model.tokenizer, model.config.tokenizer)
    samples = []
    for i, examples in enumerate(examples_of_images):
        scene = render_scene(i, resolution_wh=(200, 160), num_objects=2)
        crops = cut_crops(scene.image, model.config.vision)
        cells = cells_of(scene, model.config.vision.grid)
        samples.append(Sample(crops.pixels, crops.tiling, packer.pack(examples, 200), cells))
    return collate(samples)


def image_of(index: int) -> np.ndarray:
    return np.ascontiguousarray(render_scene(index, resolution_wh=(200, 160), num_objects=2).image[..., ::-1])


def test_packed_questions_match_the_engine(model: LocalModel) -> None:
    caption = Example("short", answer="A dog.")
    detect = Example("detect", "red circle", boxes=BOXES)
    point = Example("point", "dog", boxes=BOXES)
    query = Example("query", "How many dogs are there?", "2", refs=((0.25, 0.75),))
    batch = batch_of(model, [[caption, detect, point, query], [query, detect]])
    with torch.no_grad():
        hidden = packed_hidden(model.network, image_tokens(model.network, batch), batch, jitter=0.0)
        first_token = model.network.text.logits(hidden).argmax(-1)
        first_x = model.network.region.decode_coordinate(hidden).argmax(-1)
    greedy = Settings(temperature=0, max_tokens=1, max_objects=1)
    for index, numbers in ((0, {"detect": 1, "query": 3}), (1, {"detect": 1, "query": 0})):
        image, question = image_of(index), batch.question[index]
        # The position of each question from which its reply is predicted.
        replies = {
            skill: int(((question == number) & (batch.next_ids[index] != IGNORE)).nonzero()[0])
            for skill, number in numbers.items()
        }
        request = Query(image, "How many dogs are there?", spatial_refs=((0.25, 0.75),), settings=greedy)
        answer = model.run([request])[0].answer  # type: ignore[union-attr]
        assert answer == model.tokenizer.decode([int(first_token[index, replies["query"]])])
        found = model.run([Detect(image, "red circle", greedy)])[0].objects[0]  # type: ignore[union-attr]
        x = float(bin_to_coordinate(first_x[index, replies["detect"]], model.config.region.coord_out_dim))
        assert (found.x_min + found.x_max) / 2 == pytest.approx(x, abs=1e-6)


def test_questions_do_not_attend_to_each_other(model: LocalModel) -> None:
    question = Example("query", "What is this?", "dog", refs=((0.5, 0.5),))
    alone = batch_of(model, [[question]])
    second_of_two = batch_of(model, [[Example("detect", "dog", boxes=BOXES), question]])
    with torch.no_grad():
        first = packed_hidden(model.network, image_tokens(model.network, alone), alone, 0.0)
        second = packed_hidden(model.network, image_tokens(model.network, second_of_two), second_of_two, 0.0)
    length = len(first[0])
    torch.testing.assert_close(second[0, -length:], first[0], atol=1e-4, rtol=1e-4)


def test_detect_targets_are_the_boxes_and_the_end_token(model: LocalModel) -> None:
    packer, config = Packer(model.tokenizer, model.config.tokenizer), model.config.tokenizer
    packed = packer.pack([Example("detect", "dog", boxes=BOXES)], 100)
    coords = [c for c in packed.next_coords if not np.isnan(c)]
    assert coords == [0.2, 0.4, 0.7, 0.5]
    assert [s for s in packed.next_sizes if not np.isnan(s[0])] == [(0.1, 0.2), (0.3, 0.1)]
    assert [t for t in packed.next_ids if t != IGNORE] == [config.coord_id, config.coord_id, config.eos_id]
    empty = packer.pack([Example("detect", "dog")], 100)
    assert [t for t in empty.next_ids if t != IGNORE] == [config.eos_id]
    assert empty.next_ids[-1] == config.eos_id


def test_reasoning_targets_contain_the_grounded_points(model: LocalModel) -> None:
    config = model.config.tokenizer
    packer = Packer(model.tokenizer, config)
    packed = packer.pack([Example("reason", "How many dogs?", "2", BOXES, grounded=" dogs")], 100)
    targets = [t for t in packed.next_ids if t != IGNORE]
    start, end = targets.index(config.start_ground_points_id), targets.index(config.end_ground_id)
    assert targets[start + 2 : end] == [config.coord_id] * 4
    assert targets[end + 1] == config.answer_id
    assert model.tokenizer.decode(targets[end + 2 : -1]) == "2"
    assert targets[-1] == config.eos_id


def test_pack_drops_an_example_that_does_not_fit(model: LocalModel) -> None:
    packer = Packer(model.tokenizer, model.config.tokenizer)
    one = packer.pack([Example("detect", "dog", boxes=BOXES)], 100)
    two = packer.pack([Example("detect", "dog", boxes=BOXES)] * 2, len(one) + 3)
    assert two.ids == one.ids
    assert len(two.sizes) == len(two.question) == len(two.offsets) == len(one)


def test_losses_are_finite_and_reach_every_parameter_of_the_decoder(model: LocalModel) -> None:
    network = model.network
    examples = [
        [Example("detect", "dog", boxes=BOXES), Example("query", "What?", "dog", refs=((0.1, 0.2, 0.3, 0.4),))],
        [Example("point", "key")],  # no object, so no coordinate for this image
    ]
    batch = batch_of(model, examples)
    network.requires_grad_(True)
    try:
        losses = text_losses(network, image_tokens(network, batch), batch, sigma=5.0)
        torch.stack(list(losses.values())).sum().backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        without = [n for n, p in network.named_parameters() if p.grad is None and "_features" not in n]
        assert not without
    finally:
        network.zero_grad()
        network.requires_grad_(False)


@pytest.mark.parametrize("seed", range(20))
def test_examples_match_the_scene(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = render_scene(rng)
    for example in write_examples(scene, rng, 30):
        if example.skill in ("detect", "point") and example.prompt in {o.name for o in scene.objects}:
            assert len(example.boxes) == sum(o.name == example.prompt for o in scene.objects)
            assert list(example.boxes) == sorted(example.boxes, key=lambda b: b[0])
        if example.skill == "short":
            assert example.answer == short_caption(
                [o.name for o in sorted(scene.objects, key=lambda o: o.xyxy[0] + o.xyxy[2])]
            )


def test_cells_belong_to_the_object_around_them() -> None:
    scene = render_scene(3, resolution_wh=(320, 240), num_objects=3)
    cells: Cells = cells_of(scene, 8)
    assert len({tuple(b) for b in cells.box[cells.class_id != IGNORE]}) == len(scene.objects)
    for index in np.flatnonzero(cells.class_id != IGNORE):
        x, y, w, h = cells.box[index]
        column, row = index % 8, index // 8
        assert abs((column + 0.5) / 8 - x) <= max(w / 4, 0.5 / 8) + 1e-6
        assert abs((row + 0.5) / 8 - y) <= max(h / 4, 0.5 / 8) + 1e-6
