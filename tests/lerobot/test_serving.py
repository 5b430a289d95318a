"""LeRobot's policies behind openpi's protocol: bytes from cameras, a prompt, padded noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.serving import ServedPolicy
from counterflow.steering import SteeredPolicy, steer

CAMERA, STATE = "observation.images.top", "observation.state"


def message(made: Any, row: int = 0) -> dict[str, Any]:
    """What a robot with openpi's client sends: images as bytes, channels last, and a prompt."""
    seen = made.observation()
    sent = {STATE: seen[STATE][row].numpy(), "prompt": seen["task"][row]}
    if CAMERA in seen:
        sent[CAMERA] = (seen[CAMERA][row].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return sent


def ask(served: ServedPolicy, *messages: dict[str, Any]) -> list[Any]:
    session = served.session()
    answers = served.act([served.complete(served.read(one), session) for one in messages])
    for one in answers:
        if isinstance(one, Exception):
            raise one
    return answers


def test_a_robots_message_becomes_the_policys_own_actions(made: Any) -> None:
    policy = made.wrapped()
    spec = policy.action_spec
    served = ServedPolicy(SteeredPolicy(policy, steps=policy.steps, solver=policy.solver))
    noise = torch.rand(spec.horizon, spec.state_dim, generator=torch.Generator().manual_seed(4)) * 1.8 - 0.9
    sent = message(made)
    (answer,) = ask(served, {**sent, "noise": noise.numpy()})
    observation = {STATE: torch.from_numpy(sent[STATE])[None], "task": [sent["prompt"]]}
    if CAMERA in sent:
        observation[CAMERA] = torch.from_numpy(sent[CAMERA]).permute(2, 0, 1)[None].float() / 255
    own = made.own_chunk(observation, noise[None])[0]
    np.testing.assert_allclose(answer.actions[: len(own)], own.numpy(), atol=1e-3)
    np.testing.assert_allclose(answer.noise, noise.numpy(), atol=1e-4)
    assert answer.actions.shape == (served.metadata["actions"]["horizon"], spec.dim)


def test_two_robots_in_a_batch_get_what_they_would_get_alone(made: Any) -> None:
    policy = made.wrapped()
    shape = (policy.action_spec.horizon, policy.action_spec.state_dim)
    noise = np.full(shape, 0.3, np.float32)
    served = ServedPolicy(SteeredPolicy(policy, steps=policy.steps, solver=policy.solver))
    first, second = ({**message(made, row), "noise": noise} for row in (0, 1))
    first["prompt"] = second["prompt"]  # sentences of the same length share their padding
    together = ask(served, first, second)
    for one, alone in zip(together, [*ask(served, first), *ask(served, second)], strict=True):
        np.testing.assert_allclose(one.actions, alone.actions, atol=1e-3)


def test_steered_by_a_chunk_with_and_without_a_mask(made: Any) -> None:
    policy = made.wrapped()
    spec = policy.action_spec
    served = ServedPolicy(steer(policy, "frs"))
    chunk = np.full((spec.horizon, spec.dim), 0.2, np.float32)
    mask = np.zeros(chunk.shape, bool)
    mask[:, 0] = True
    sent = message(made)
    answers = ask(served, {**sent, "steer": chunk}, {**sent, "steer": {"chunk": chunk, "steered": mask}}, sent)
    assert len({one.actions.tobytes() for one in answers}) == 3


def test_other_names_and_what_can_not_be_right(shared: Any) -> None:
    made = shared("smolvla")
    policy = made.wrapped()
    served = ServedPolicy(policy, names={"observation/image": CAMERA})
    sent = message(made)
    image = sent.pop(CAMERA)
    (answer,) = ask(served, {**sent, "observation": {"image": image}})
    assert np.isfinite(answer.actions).all()
    assert served.metadata["observation"][CAMERA]["dtype"] == "image"
    with pytest.raises(InvalidInputError, match="lacks"):
        served.read(sent)
    with pytest.raises(MismatchError, match="bytes"):
        served.read({**sent, CAMERA: image[..., :2]})
    with pytest.raises(MismatchError, match="bytes"):
        served.read({**sent, CAMERA: "a picture"})
    with pytest.raises(InvalidInputError, match="expected 0 to 1"):
        served.read({**sent, CAMERA: image.transpose(2, 0, 1).astype(np.float32)})
    chunk = np.zeros((policy.action_spec.horizon, policy.action_spec.dim), np.float32)
    with pytest.raises(MismatchError, match="with padding"):
        served.read({**sent, CAMERA: image, "noise": chunk})
    with pytest.raises(UnknownNameError, match="observation entry"):
        ServedPolicy(policy, names={"image": "observation.images.topp"})


def test_the_uniform_prior_of_evo1_takes_noise_in_its_range(shared: Any) -> None:
    made = shared("evo1")
    policy = made.wrapped()
    served = ServedPolicy(SteeredPolicy(policy, steps=policy.steps))
    shape = (policy.action_spec.horizon, policy.action_spec.state_dim)
    with pytest.raises(InvalidInputError, match="uniform"):
        served.read({**message(made), "noise": np.full(shape, 1.2, np.float32)})
