"""Fine-tuning steps: gradients against finite differences, passes, rollouts of earlier adapters, and states."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.prompts import write_prompt
from moondream_cv.model.packed_linear import PackedLinear
from moondream_cv.model.quantization import is_quantizable, quantize_int8
from moondream_cv.model.quantized_linear import Int8Linear
from moondream_cv.requests import Detect, Point, Query, Request, Settings
from moondream_cv.training.fine_tuner import FineTuner, Group, ReinforcementGroup, SupervisedGroup
from moondream_cv.training.lora import LoraParameters
from moondream_cv.training.policy import choice_log_probs, group_advantages, policy_loss
from moondream_cv.training.trajectories import Trajectory, pack_trajectories, region_trajectory, text_trajectory
from tests.helpers.models import random_model

FRAME = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def model() -> LocalModel:
    return random_model()


@pytest.fixture(scope="module")
def image(model: LocalModel) -> Tensor:
    return model.encode_image(FRAME).embedding


def parameters(model: LocalModel, changed: bool = True) -> LoraParameters:
    """An adapter, by default one that changes the outputs."""
    made = LoraParameters.initialize(model.config, 8, 0, model.device)
    if changed:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, tensor in made.tensors.items():
                if name.endswith(".B"):
                    tensor.normal_(0, 0.05, generator=generator)
    return made


def trajectories(model: LocalModel) -> dict[str, Trajectory]:
    """One trajectory of each kind."""
    config, ids = model.config, model.config.tokenizer

    def written(request: Request) -> object:
        return write_prompt(request, model.tokenizer, model.config.tokenizer)

    detect, point = written(Detect(FRAME, "dog")), written(Point(FRAME, "dog"))
    query = written(Query(FRAME, "what is this?", spatial_refs=((0.2, 0.3), (0.1, 0.1, 0.5, 0.6))))
    reason = written(Query(FRAME, "how many dogs?", reasoning=True))
    thinking = [40, ids.start_ground_points_id, 41, ids.coord_id, ids.coord_id, ids.end_ground_id]
    return {
        "detect": region_trajectory(detect, [(100, 200, 400, 500), (600, 300, 700, 650)], True, config),  # type: ignore[arg-type]
        "nothing": region_trajectory(detect, [], True, config),  # type: ignore[arg-type]
        "point, truncated": region_trajectory(point, [(100, 200), (700, 800)], False, config),  # type: ignore[arg-type]
        "query": text_trajectory(query, [50, 60, 70], True, config),  # type: ignore[arg-type]
        "reasoning": text_trajectory(reason, [50], True, config, thinking, [300, 400]),  # type: ignore[arg-type]
    }


def gradient(tuner: FineTuner, groups: Sequence[Group]) -> dict[str, Tensor]:
    """The gradient of a step, before clipping."""
    statistics = tuner.step(groups, lr=0.0)
    scale = max(1.0, statistics.grad_norm)
    return {name: tensor.grad * scale for name, tensor in tuner.parameters.tensors.items() if tensor.grad is not None}


def loss_of(tuner: FineTuner, group: Group) -> float:
    """The loss of a group, computed from its log-probabilities without the tuner."""
    network, adapter = tuner.network, tuner.parameters.adapter(tuner.network.dtype)
    if isinstance(group, SupervisedGroup):
        batch, temperature = pack_trajectories([[group.trajectory]], network.device), 1.0
    else:
        batch, temperature = pack_trajectories([group.trajectories], network.device), group.temperature
    arguments = group.image[None], batch, torch.tensor([temperature])  # type: ignore[index]
    chosen = batch.has_choice[0]
    new = choice_log_probs(network, adapter, *arguments)[0][chosen].double()
    if isinstance(group, SupervisedGroup):
        return float(-new.mean())
    reference = choice_log_probs(network, None, *arguments)[0][chosen].double()
    old = torch.tensor([v for values in group.log_probs for v in values], dtype=torch.float64)
    advantages = torch.tensor(group_advantages(group.rewards))[batch.numbers[0][chosen]]
    return float(policy_loss(new, old, reference, advantages, tuner.kl_weight)[0].mean())


def assert_gradient_is_right(tuner: FineTuner, group: Group) -> None:
    """Compare the gradient with central differences, along random directions in all tensors together."""
    computed = gradient(tuner, [group])
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        # A direction with a large component along the gradient, so that rounding matters little
        direction = {name: g / 3 + g.std() * torch.randn(g.shape, generator=generator) for name, g in computed.items()}
        norm = math.sqrt(sum(float(d.square().sum()) for d in direction.values()))
        step = 0.004 / norm
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, tensor in tuner.parameters.tensors.items():
                    tensor.add_(direction[name], alpha=sign * step)
                losses.append(loss_of(tuner, group))
                for name, tensor in tuner.parameters.tensors.items():
                    tensor.sub_(direction[name], alpha=sign * step)
        expected = sum(float((computed[name] * d).sum()) for name, d in direction.items())
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", ["detect", "nothing", "point, truncated", "query", "reasoning"])
def test_supervised_gradients_equal_finite_differences(model: LocalModel, image: Tensor, kind: str) -> None:
    tuner = FineTuner(model.network, parameters(model))
    assert_gradient_is_right(tuner, SupervisedGroup(image, trajectories(model)[kind]))


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["detect", "point, truncated", "reasoning"])
def test_policy_gradients_equal_finite_differences(
    model: LocalModel, image: Tensor, kind: str, kl_weight: float
) -> None:
    sampled = [trajectories(model)[kind], trajectories(model)["nothing"]]
    earlier = FineTuner(model.network, parameters(model, changed=False))
    old = earlier.log_probs(image, sampled, TEMPERATURE)
    tuner = FineTuner(model.network, parameters(model), kl_weight)
    assert_gradient_is_right(tuner, ReinforcementGroup(image, sampled, old, [0.2, 1.0], TEMPERATURE))


def test_group_is_packed_without_changing_its_log_probabilities(model: LocalModel, image: Tensor) -> None:
    tuner, every = FineTuner(model.network, parameters(model)), list(trajectories(model).values())
    together = tuner.log_probs(image, every, TEMPERATURE)
    for trajectory, found in zip(every, together, strict=True):
        assert len(found) == trajectory.num_choices
        assert found == pytest.approx(tuner.log_probs(image, [trajectory], TEMPERATURE)[0], abs=1e-4)


def test_log_probabilities_are_those_of_the_current_adapter(model: LocalModel, image: Tensor) -> None:
    wanted = trajectories(model)["detect"]
    changed, untouched = (FineTuner(model.network, parameters(model, changed=one)) for one in (True, False))
    (found,), (base,) = (tuner.log_probs(image, [wanted], 1.0) for tuner in (changed, untouched))
    assert np.mean(found) == pytest.approx(-loss_of(changed, SupervisedGroup(image, wanted)), abs=1e-4)
    assert found != pytest.approx(base, abs=0.01)
    (given,) = changed.log_probs(image, [wanted], 1.0, untouched.parameters.adapter(model.dtype))
    assert given == base


def test_passes_and_checkpointing_do_not_change_the_gradient(model: LocalModel, image: Tensor) -> None:
    every = trajectories(model)
    other = model.encode_image(FRAME[:, ::-1]).embedding
    asked = write_prompt(Query(None, "why?"), model.tokenizer, model.config.tokenizer)
    groups: list[Group] = [
        SupervisedGroup(image, every["detect"]),
        SupervisedGroup(None, text_trajectory(asked, [50, 60], True, model.config)),
        SupervisedGroup(other, every["query"]),
    ]
    sampled = [every["detect"], every["nothing"]]
    old = FineTuner(model.network, parameters(model)).log_probs(other, sampled, 1.0)
    groups.append(ReinforcementGroup(other, sampled, old, [1.0, 0.0], 1.0))
    expected = gradient(FineTuner(model.network, parameters(model)), groups)
    for options in ({"max_tokens": 1}, {"checkpointing": True}):
        found = gradient(FineTuner(model.network, parameters(model), **options), groups)  # type: ignore[arg-type]
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-5, rtol=1e-3), (options, name)


def test_log_probabilities_equal_those_of_the_engine(model: LocalModel) -> None:
    settings = Settings(temperature=0.0, max_tokens=12)
    request = Query(FRAME, "what is this?", settings=settings)
    scheduler = model.scheduler()
    job = scheduler.submit(request)
    while scheduler.step():
        pass
    tokens = job.sequence.answer_tokens  # type: ignore[union-attr]
    asked = write_prompt(request, model.tokenizer, model.config.tokenizer)
    ended = not job.result.truncated  # type: ignore[union-attr]
    trajectory = text_trajectory(asked, tokens, ended, model.config)
    tuner = FineTuner(model.network, parameters(model, changed=False))
    (found,) = tuner.log_probs(model.encode_image(FRAME).embedding, [trajectory], 1.0)
    assert np.mean(found) == pytest.approx(job.result.logprob, abs=1e-4)  # type: ignore[union-attr]


def test_new_adapter_has_no_divergence_and_the_ratio_is_one(model: LocalModel, image: Tensor) -> None:
    tuner = FineTuner(model.network, parameters(model, changed=False))
    sampled = [trajectories(model)[name] for name in ("detect", "nothing", "query")]
    old = tuner.log_probs(image, sampled, TEMPERATURE)
    statistics = tuner.step([ReinforcementGroup(image, sampled, old, [0.0, 0.5, 1.0], TEMPERATURE)], lr=1e-3)
    assert statistics.kl == 0.0
    assert statistics.applied
    assert (statistics.reward_mean, statistics.reward_std) == (0.5, pytest.approx(math.sqrt(1 / 6)))


@pytest.mark.parametrize("kind", ["int8", "packed bfloat16"])
def test_quantized_and_packed_weights_are_trained_on(kind: str) -> None:
    model = random_model()
    if kind == "int8":
        for name, layer in list(model.network.named_modules()):
            if isinstance(layer, torch.nn.Linear) and is_quantizable(f"{name}.weight", layer.weight.shape):
                model.network.set_submodule(name, Int8Linear(*quantize_int8(layer.weight), layer.bias))
    else:
        model.network.to(torch.bfloat16)
        for name, layer in list(model.network.text.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                model.network.text.set_submodule(name, PackedLinear(layer.weight, layer.bias))
    image, wanted = model.encode_image(FRAME).embedding, trajectories(model)["detect"]
    tuner = FineTuner(model.network, parameters(model, changed=False))
    old = tuner.log_probs(image, [wanted, trajectories(model)["nothing"]], 1.0)
    group = ReinforcementGroup(image, [wanted, trajectories(model)["nothing"]], old, [0.0, 1.0], 1.0)
    assert tuner.step([group], lr=1e-3).kl == 0.0
    losses = [tuner.step([SupervisedGroup(image, wanted)], lr=1e-2).sft_loss for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]  # type: ignore[operator]


def test_equal_rewards_have_no_gradient(model: LocalModel, image: Tensor) -> None:
    tuner, sampled = FineTuner(model.network, parameters(model, changed=False)), [trajectories(model)["detect"]] * 2
    before = {name: tensor.detach().clone() for name, tensor in tuner.parameters.tensors.items()}
    old = tuner.log_probs(image, sampled, 1.0)
    statistics = tuner.step([ReinforcementGroup(image, sampled, old, [0.7, 0.7], 1.0)], lr=1e-2)
    assert not statistics.applied
    assert statistics.grad_norm == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in tuner.parameters.tensors.items())


def test_gradient_that_is_not_finite_is_not_applied(model: LocalModel, image: Tensor) -> None:
    tuner = FineTuner(model.network, parameters(model))
    before = {name: tensor.detach().clone() for name, tensor in tuner.parameters.tensors.items()}
    statistics = tuner.step([SupervisedGroup(image * math.nan, trajectories(model)["detect"])], lr=1e-2)
    assert not statistics.applied
    assert all(torch.equal(before[name], tensor) for name, tensor in tuner.parameters.tensors.items())


def test_training_is_deterministic_and_continues_from_its_state(model: LocalModel, image: Tensor) -> None:
    group = SupervisedGroup(image, trajectories(model)["detect"])
    whole = FineTuner(model.network, parameters(model, changed=False))
    expected = [whole.step([group], lr=1e-3) for _ in range(4)]
    first = FineTuner(model.network, parameters(model, changed=False))
    found = [first.step([group], lr=1e-3) for _ in range(2)]
    state = first.state()
    second = FineTuner(model.network, LoraParameters.initialize(model.config, 8, 5, model.device))
    second.load_state(state)
    assert found + [second.step([group], lr=1e-3) for _ in range(2)] == expected
    assert all(torch.equal(tensor, whole.state()[name]) for name, tensor in second.state().items())


def test_advantages_are_relative_to_the_group() -> None:
    assert group_advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    assert group_advantages([0.0, 1.0]) == pytest.approx([-1.0, 1.0])
    assert group_advantages([1.0, 2.0, 3.0, 6.0]) == pytest.approx(np.array([-2, -1, 0, 3]) / math.sqrt(3.5))


def test_ratio_is_clipped_only_if_it_has_moved_too_far() -> None:
    old = torch.zeros(4)
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    losses, divergence = policy_loss(new, old, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.0)
    ratio = new.detach().exp()
    assert losses.tolist() == pytest.approx([-1.2, -float(ratio[1]), float(ratio[2]), 0.8])
    assert divergence.tolist() == pytest.approx([float(torch.exp(-x) - 1 + x) for x in new.detach()])
    losses.sum().backward()
    assert new.grad is not None
    assert [bool(value) for value in new.grad != 0] == [False, True, True, False]
