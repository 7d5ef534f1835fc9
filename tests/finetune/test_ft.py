"""The methods of `ft(...)` on the tiny model: rollouts, training steps, checkpoints and their faults."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moondream.types import Base64EncodedImage
from PIL import Image
from safetensors.torch import load_file, save_file

from moondream_cv import Detect, Settings, load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import CheckpointError, ImageError
from moondream_cv.finetune import Finetune, ft
from moondream_cv.finetune.errors import (
    FinetuneConflict,
    FinetuneGone,
    FinetuneNotFound,
    FinetuneStoreError,
    FinetuneStoreLocked,
)
from moondream_cv.finetune.layout import SIGNING_KEY, state_file
from moondream_cv.finetune.service import MAX_TUNERS, TuningService
from moondream_cv.requests import DetectResult
from moondream_cv.scenes.render import render_scene

SCENE = render_scene(3, names=["dog", "dog", "red circle"], resolution_wh=(160, 120))
IMAGE = Image.fromarray(SCENE.image)
BOXES = [(np.array(o.xyxy) / (160, 120, 160, 120)).tolist() for o in SCENE.objects if o.name == "dog"]
TRUTH = {"boxes": BOXES}
ROLLOUTS = {"skill": "detect", "object": "dog", "image": IMAGE}
TARGET = {"mode": "sft", "request": {"skill": "detect", "object": "dog", "image": IMAGE}, "target": TRUTH}


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    with load("tiny", device="cpu") as loaded:
        loaded.show_progress = False
        yield loaded


@pytest.fixture
def finetune(model: LocalModel, tmp_path: Path) -> Iterator[Finetune]:
    with ft("parts", 8, model=model, root=tmp_path) as made:
        yield made


def rl_group(response: dict[str, Any], rewards: list[float] | None = None) -> dict[str, Any]:
    chosen = response["rewards"] if rewards is None else rewards
    return {"mode": "rl", "request": response["request"], "rollouts": response["rollouts"], "rewards": chosen}


def detect(finetune: Finetune, count: int = 3, **settings: Any) -> dict[str, Any]:
    return finetune.rollouts(
        "detect", image=IMAGE, object="dog", num_rollouts=count, settings=settings or None, ground_truth=TRUTH
    )


def test_life_cycle(model: LocalModel, tmp_path: Path) -> None:
    with ft("parts", 8, model=model, root=tmp_path) as first:
        assert (first.name, first.rank) == ("parts", 8)
        base = model.run([Detect(IMAGE, "dog")])[0]

        # Train with rollouts and targets
        response = detect(first)
        assert [set(one) for one in response["rollouts"]] == [set(response["rollouts"][0])] * 3
        assert all(0 <= reward <= 1 for reward in response["rewards"])
        reply = first.train_step([rl_group(response), TARGET], lr=1e-3)
        assert (reply["step"], reply["applied"], reply["kl"], reply["router_kl"]) == (1, True, 0.0, 0.0)
        for step in range(2, 6):
            assert first.train_step([TARGET], lr=5e-3)["step"] == step
        assert first.log_metrics(5, {"f1": 0.5, "loss": 2.0}) == {"ok": True, "step": 5, "logged_count": 2}

        # Save and use a checkpoint
        assert first.save_checkpoint()["checkpoint"]["step"] == 5
        name = first.model(5)
        assert name == f"moondream2/{first.finetune_id}@5"
        path = str(first.checkpoint(5))
        found = model.run([Detect(IMAGE, "dog", Settings(variant=path)), Detect(IMAGE, "dog")])
        assert found[0] != base
        assert isinstance(found[1], DetectResult)
        assert isinstance(base, DetectResult)
        for one, expected in zip(found[1].objects, base.objects, strict=True):  # the batch changes the order of sums
            assert astuple(one) == pytest.approx(astuple(expected), abs=1e-5)
        assert model.run([Detect(IMAGE, "dog")])[0] == base

    # Continue under the same name and by ID
    with ft("parts", 8, model=model, root=tmp_path) as again:
        assert again.finetune_id == first.finetune_id
        assert again.train_step([TARGET])["step"] == 6
    with ft(finetune_id=first.finetune_id, model=model, root=tmp_path) as by_id:
        assert (by_id.name, by_id.rank) == ("parts", 8)
        by_id.save_checkpoint()
        page = by_id.list_checkpoints(limit=1)
        assert (page["checkpoints"][0]["step"], page["has_more"]) == (6, True)
        page = by_id.list_checkpoints(limit=1, cursor=page["next_cursor"])
        assert (page["checkpoints"][0]["step"], page["has_more"]) == (5, False)
        by_id.delete_checkpoint(6)
        for call in (by_id.save_checkpoint, lambda: detect(by_id), lambda: by_id.train_step([TARGET])):
            with pytest.raises(FinetuneGone):
                call()
        by_id.delete()
        with pytest.raises(FinetuneNotFound):
            by_id.save_checkpoint()


def test_checkpoint_is_found_by_its_name(model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONDREAM_CV_FINETUNES", str(tmp_path))
    with ft("parts", 8, model=model) as made:
        made.train_step([TARGET], lr=1e-2)
        made.save_checkpoint()
        name = made.model(1)
    with load("tiny", device="cpu", adapter=name) as adapted:
        expected = model.run([Detect(IMAGE, "dog", Settings(variant=name))])[0]
        assert [o.x_min for o in adapted.run([Detect(IMAGE, "dog")])[0].objects] == [o.x_min for o in expected.objects]


def test_new_finetune_changes_no_output(model: LocalModel, finetune: Finetune) -> None:
    finetune.save_checkpoint()
    with load("tiny", device="cpu", adapter=finetune.checkpoint(0)) as adapted:
        requests = [Detect(IMAGE, name) for name in ("dog", "circle", "cat")]
        assert adapted.run(requests) == model.run(requests)


@pytest.mark.parametrize("reasoning", [False, True])
def test_text_rollouts_are_trained_on(finetune: Finetune, reasoning: bool) -> None:
    response = finetune.rollouts(
        "query", image=IMAGE, question="How many dogs are there?", num_rollouts=4, reasoning=reasoning
    )
    assert response["rewards"] is None
    for rollout in response["rollouts"]:
        assert rollout["has_answer_separator"] == reasoning
        assert ("reasoning" in rollout["output"]) == reasoning
        assert bool(rollout["thinking_tokens"]) == reasoning
    reply = finetune.train_step([rl_group(response, [0.0, 1.0, 0.0, 1.0])])
    assert reply["applied"]
    assert (reply["reward_mean"], reply["reward_std"], reply["sft_loss"]) == (0.5, 0.5, None)


def test_every_kind_of_target_is_learned(finetune: Finetune) -> None:
    asked = {"skill": "query", "question": "What is this?", "image": IMAGE, "spatial_refs": [[0.5, 0.5]]}
    reasoning = {"text": "I see dogs", "grounding": [{"start_idx": 6, "end_idx": 10, "points": [[0.2, 0.3]]}]}
    groups = [
        TARGET,
        {"mode": "sft", "request": {"skill": "point", "object": "dog", "image": IMAGE}, "target": TRUTH},
        {"mode": "sft", "request": asked, "targets": [{"answer": "two dogs"}, {"answer": "2"}]},
        {"mode": "sft", "request": {"skill": "query", "question": "How many?"}, "target": {"answer": "none"}},
        {
            "mode": "sft",
            "request": {"skill": "query", "question": "How many dogs?", "image": IMAGE},
            "target": {"answer": "2", "reasoning": reasoning},
        },
    ]
    losses = [finetune.train_step(groups, lr=5e-3)["sft_loss"] for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_stream_returns_each_context_and_keeps_its_adapter(finetune: Finetune) -> None:
    requests = [
        (index, {"skill": "point", "image": IMAGE, "object": "dog", "num_rollouts": 2, "ground_truth": TRUTH})
        for index in range(7)
    ]
    seen = []
    for context, response in finetune.rollout_stream(requests, max_concurrency=3):
        seen.append(context)
        finetune.train_step([rl_group(response, [0.0, 1.0]), TARGET])  # while others are decoding
    assert sorted(seen) == list(range(7))
    names = [name for name in finetune.service.model._adapters if "live" in name]
    assert len(names) <= 1


def test_log_probabilities_are_those_of_the_adapter_that_sampled(model: LocalModel, tmp_path: Path) -> None:
    found = []
    for name in ("trained meanwhile", "untouched"):
        with ft(name.replace(" ", "-"), 8, model=model, root=tmp_path) as made:
            service, request = made.service, {"skill": "detect", "object": "dog", "image": IMAGE}
            started = service.start_rollouts(made.finetune_id, request, 3)
            scheduler = model.scheduler()
            jobs = [scheduler.submit(one) for one in started.requests]
            while scheduler.step():
                pass
            if name == "trained meanwhile":
                assert made.train_step([TARGET], lr=5e-3)["applied"]
            response = service.finish_rollouts(started, jobs)
            found.append([rollout["log_probs"] for rollout in response["rollouts"]])
            assert made.train_step([rl_group({**response, "request": request}, [0.0, 0.5, 1.0])])["applied"]
    assert found[0] == found[1]


def test_stream_raises_the_errors_of_requests_and_of_the_iterable(finetune: Finetune) -> None:
    good = (0, {"skill": "detect", "image": IMAGE, "object": "dog"})
    with pytest.raises(ValueError, match=r"request\.skill"):
        list(finetune.rollout_stream([good, (1, {"skill": "segment", "image": IMAGE, "object": "dog"})]))

    def broken() -> Iterator[tuple[int, dict[str, Any]]]:
        yield good
        raise KeyError("the dataset is empty")

    with pytest.raises(KeyError, match="the dataset is empty"):
        list(finetune.rollout_stream(broken()))
    for options in ({"max_concurrency": 0}, {"buffer_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            finetune.rollout_stream([good], **options)
    assert detect(finetune)["rollouts"]


def test_equal_seeds_have_equal_results(model: LocalModel, tmp_path: Path) -> None:
    def run(folder: str, seed: int) -> list[Any]:
        with ft("parts", 8, model=model, root=tmp_path / folder, seed=seed) as made:
            results = []
            for _ in range(2):
                response = detect(made)
                results += [[r["coords"] for r in response["rollouts"]], made.train_step([rl_group(response)])]
            return results

    first = run("a", 1)
    assert run("b", 1) == first
    assert run("c", 2) != first


def test_samples_do_not_repeat_after_other_finetunes_were_used(model: LocalModel, tmp_path: Path) -> None:
    names = ["parts", *(f"other-{i}" for i in range(MAX_TUNERS))]
    with contextlib.ExitStack() as opened:
        handles = [opened.enter_context(ft(name, 8, model=model, root=tmp_path)) for name in names]
        service = handles[0].service
        first = service.rollouts(handles[0].finetune_id, ROLLOUTS)
        for handle in handles[1:]:
            service.rollouts(handle.finetune_id, ROLLOUTS)
        assert service.rollouts(handles[0].finetune_id, ROLLOUTS)["rollouts"] != first["rollouts"]


def test_answer_of_a_step_that_was_not_acknowledged_is_returned_again(finetune: Finetune) -> None:
    service, identity = finetune.service, finetune.finetune_id
    first = service.train_step(identity, [TARGET], 1e-3)
    assert service.train_step(identity, [TARGET], 1e-3) == first
    assert service.train_step(identity, [TARGET], 2e-3)["step"] == 2
    service.store.acknowledge(identity)
    assert service.train_step(identity, [TARGET], 2e-3)["step"] == 3


def test_rollouts_that_were_changed_or_borrowed_are_refused(model: LocalModel, finetune: Finetune) -> None:
    response = json.loads(json.dumps({k: v for k, v in detect(finetune).items() if k != "request"}))
    response["request"] = detect(finetune)["request"]
    for key, value in (("coords", [0.5, 0.5]), ("log_probs", []), ("signature", ""), ("finish_reason", "length")):
        changed = {**response, "rollouts": [{**response["rollouts"][0], key: value}, *response["rollouts"][1:]]}
        with pytest.raises(ValueError, match=r"groups\[0\]\.rollouts\[0\] was not returned by this finetune"):
            finetune.train_step([rl_group(changed)])
    other_image = {**response, "request": {**response["request"], "image": IMAGE.rotate(180)}}
    with pytest.raises(ValueError, match="was not returned by this finetune"):
        finetune.train_step([rl_group(other_image)])
    with (
        ft("other", 8, model=model, root=finetune.service.store.root) as other,
        pytest.raises(ValueError, match="was not returned by this finetune"),
    ):
        other.train_step([rl_group(response)])
    assert finetune.train_step([rl_group(response, [0.0, 0.5, 1.0])])["step"] == 1


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "groups"),
        ([TARGET] * 1000, "groups"),
        ([{**TARGET, "mode": "dpo"}], r"groups\[0\]\.mode"),
        ([{**TARGET, "target": {"boxes": [[0.5, 0.5, 0.4, 0.9]]}}], r"groups\[0\]\.target\.boxes\[0\]"),
        ([{**TARGET, "target": {"boxes": BOXES * 200}}], r"groups\[0\]\.target must take at most \d+ positions"),
    ],
)
def test_wrong_groups_apply_nothing(finetune: Finetune, groups: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finetune.train_step(groups)
    assert finetune.train_step([TARGET])["step"] == 1


@pytest.mark.parametrize("lr", [0, -1.0, math.nan, math.inf, "1", True, 2.0])
def test_wrong_learning_rates_are_refused(finetune: Finetune, lr: Any) -> None:
    with pytest.raises(ValueError, match="lr must be a number above 0"):
        finetune.train_step([TARGET], lr=lr)


def test_numbers_of_numpy_are_accepted(model: LocalModel, tmp_path: Path) -> None:
    with ft("parts", np.int64(8), model=model, root=tmp_path) as made:  # type: ignore[arg-type]
        assert made.train_step([TARGET], lr=np.float32(1e-3))["step"] == 1  # type: ignore[arg-type]
        assert type(made.rank) is int


@pytest.mark.parametrize(
    "rewards", [[0.0, 1.0], [0.0, 1.0, math.nan], [0.0, 1.0, "2"], [0.0, 0.0, 1e200], [1.7e308] * 3]
)
def test_wrong_rewards_are_refused(finetune: Finetune, rewards: list[Any]) -> None:
    response = detect(finetune)
    with pytest.raises(ValueError, match="rewards"):
        finetune.train_step([rl_group(response, rewards)])


def test_unreadable_image_is_refused(finetune: Finetune) -> None:
    with pytest.raises(ImageError):
        finetune.rollouts("detect", image=b"no image", object="dog")
    with pytest.raises(ImageError):
        finetune.train_step([{**TARGET, "request": {"skill": "detect", "object": "dog", "image": b"no image"}}])


def test_step_that_cannot_be_stored_is_not_applied(finetune: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune.train_step([TARGET])
    before = finetune.service._active(finetune.finetune_id).tuner.state()

    def full(*_: Any) -> None:
        raise FinetuneStoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(finetune.service.store, "commit_step", full)
        with pytest.raises(FinetuneStoreError):
            finetune.train_step([TARGET])
    after = finetune.service._active(finetune.finetune_id).tuner.state()
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert finetune.train_step([TARGET])["step"] == 2


def test_rollouts_finish_after_a_step_that_cannot_be_stored(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise FinetuneStoreError("the disk is full")

    requests = [(index, {"skill": "detect", "image": IMAGE, "object": "dog"}) for index in range(6)]
    stream = finetune.rollout_stream(requests, max_concurrency=2)
    contexts = [next(stream)[0]]
    with monkeypatch.context() as patch:
        patch.setattr(finetune.service.store, "commit_step", full)
        with pytest.raises(FinetuneStoreError):
            finetune.train_step([TARGET])
    contexts += [context for context, _ in stream]
    assert sorted(contexts) == list(range(6))
    assert finetune.train_step([TARGET])["step"] == 1


def test_encoded_images_are_accepted(model: LocalModel, finetune: Finetune) -> None:
    encoded = model.encode_image(IMAGE)
    response = finetune.rollouts("detect", image=encoded, object="dog", num_rollouts=2, ground_truth=TRUTH)
    request = {**TARGET["request"], "image": encoded}  # type: ignore[dict-item]
    assert finetune.train_step([rl_group(response, [0.0, 1.0]), {**TARGET, "request": request}])["applied"]


def test_arguments_of_ft_are_checked(model: LocalModel, tmp_path: Path) -> None:
    for arguments, message in (
        ({}, "needs either finetune_id or both name and rank"),
        ({"name": "a"}, "needs either finetune_id or both name and rank"),
        ({"name": "a", "rank": 8, "finetune_id": "0" * 26}, "cannot be combined"),
        ({"name": "a b", "rank": 8}, "name must have"),
        ({"name": "a", "rank": 9}, "rank must be one of 8, 16, 24, 32"),
        ({"name": "a", "rank": 8, "seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=message):
            ft(model=model, root=tmp_path, **arguments)  # type: ignore[arg-type]
    with ft("a", 8, model=model, root=tmp_path):
        with pytest.raises(FinetuneConflict):
            ft("a", 16, model=model, root=tmp_path)
        with pytest.raises(FinetuneNotFound):
            ft(finetune_id="0" * 26, model=model, root=tmp_path)


def test_model_that_cannot_be_loaded_creates_no_finetune(model: LocalModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        ft("parts", 8, model=tmp_path / "missing", root=tmp_path)
    with ft("parts", 8, model=model, root=tmp_path) as made:
        assert made.service.store.list_finetunes()[0][0].model == model.name


def test_finetune_of_another_base_model_is_refused(model: LocalModel, tmp_path: Path) -> None:
    with ft("parts", 8, model=model, root=tmp_path) as made:
        with pytest.raises(FinetuneConflict, match=r"has the base model 'tiny', got '.*other'"):
            ft(finetune_id=made.finetune_id, model=tmp_path / "other", root=tmp_path)
        other = TuningService(model, made.service.store, "other")
        for call in (
            lambda: other.train_step(made.finetune_id, [TARGET]),
            lambda: other.save_checkpoint(made.finetune_id),
        ):
            with pytest.raises(FinetuneConflict, match="has the base model 'tiny', got 'other'"):
                call()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_does_not_depend_on_the_mode_of_torch(finetune: Finetune, mode: Callable[[], Any]) -> None:
    for _ in range(2):
        with mode():
            response = detect(finetune)
            assert finetune.train_step([rl_group(response, [0.0, 0.5, 1.0]), TARGET])["applied"]
        assert finetune.train_step([rl_group(detect(finetune), [0.0, 0.5, 1.0]), TARGET])["applied"]


def test_state_that_does_not_fit_the_model_is_refused(model: LocalModel, tmp_path: Path) -> None:
    with ft("parts", 8, model=model, root=tmp_path) as made:
        made.train_step([TARGET])
        path = state_file(tmp_path, made.finetune_id, 1)
    for tensors in ({"other": torch.zeros(1)}, {name: torch.zeros(3) for name in load_file(path)}):
        save_file(tensors, path)
        with (
            ft(finetune_id=made.finetune_id, model=model, root=tmp_path) as again,
            pytest.raises(FinetuneStoreError, match="does not fit the base model 'tiny'"),
        ):
            again.train_step([TARGET])


def test_images_of_the_hosted_client_are_accepted(finetune: Finetune) -> None:
    content = io.BytesIO()
    IMAGE.save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    for image in ({"image_url": url}, Base64EncodedImage(image_url=url)):
        response = finetune.rollouts("detect", image=image, object="dog", num_rollouts=2)
        assert finetune.train_step([rl_group(response, [0.0, 1.0])])["applied"]


def test_deleted_checkpoints_leave_the_model(model: LocalModel, tmp_path: Path) -> None:
    with ft("parts", 8, model=model, root=tmp_path) as made:
        paths = []
        for _ in range(2):
            made.train_step([TARGET])
            paths.append(str(made.checkpoint(made.save_checkpoint()["checkpoint"]["step"])))
            model.get_adapter(paths[-1])
        made.delete_checkpoint(1)
        with pytest.raises(CheckpointError):
            model.get_adapter(paths[0])
        made.delete()
        with pytest.raises(CheckpointError):
            model.get_adapter(paths[1])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_key_of_signatures_is_private_from_the_start(
    model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, modes = os.replace, []

    def record(source: Path, target: Path) -> None:
        if Path(target).name == SIGNING_KEY:
            modes.append(Path(source).stat().st_mode & 0o777)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    with ft("parts", 8, model=model, root=tmp_path):
        assert modes == [0o600]


def test_two_handles_train_the_same_finetune(model: LocalModel, tmp_path: Path) -> None:
    requests = [(index, {"skill": "detect", "image": IMAGE, "object": "dog"}) for index in range(6)]
    with ft("parts", 8, model=model, root=tmp_path) as first:
        stream = first.rollout_stream(requests, max_concurrency=2)
        contexts = [next(stream)[0]]
        with ft("parts", 8, model=model, root=tmp_path) as second:
            steps = [one.train_step([TARGET])["step"] for one in (second, first, first, second, first)]
            detect(second)
        contexts += [context for context, _ in stream]
        assert steps == [1, 2, 3, 4, 5]
        assert sorted(contexts) == list(range(6))
        assert first.save_checkpoint()["checkpoint"]["step"] == 5


def test_another_process_gets_a_clear_error(finetune: Finetune) -> None:
    code = "import sys; from moondream_cv.finetune import ft; ft('x', 8, model='tiny', root=sys.argv[1])"
    root = finetune.service.store.root
    found = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert FinetuneStoreLocked.__name__ in found.stderr
