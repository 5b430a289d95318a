"""Action spaces, and wrapping a module of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterflow.errors import InvalidInputError, MismatchError
from counterflow.policies import ActionLayout, ActionSpec, BasePolicy, FieldPolicy, Normaliser, bind, repeat_context


class Constant(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.speed = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        return self.speed * observation[:, None, None].expand_as(x)


class TestActionSpec:
    def test_units_and_limits(self) -> None:
        spec = ActionSpec(
            2, 2, (-1.0, -3.0), (1.0, 3.0), Normaliser(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        )
        chunk = torch.tensor([[[0.5, 2.0], [9.0, -9.0]]])
        assert torch.equal(spec.normalise(chunk), torch.tensor([[[0.5, 0.5], [9.0, -5.0]]]))
        assert torch.equal(spec.denormalise(spec.normalise(chunk)), chunk)
        assert torch.equal(spec.limit(chunk), torch.tensor([[[0.5, 2.0], [1.0, -3.0]]]))
        assert torch.equal(ActionSpec(1, 2).limit(chunk), chunk)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"horizon": 0, "dim": 1}, "0 x 1"),
            ({"horizon": 1, "dim": 2, "low": (0.0,)}, "low has 1 entries"),
            ({"horizon": 1, "dim": 1, "low": (1.0,), "high": (0.0,)}, "low below high"),
            ({"horizon": 1, "dim": 2, "layout": ActionLayout((0, 1, 2))}, "from 0 to 1"),
            ({"horizon": 1, "dim": 4, "layout": ActionLayout((0, 1, 2), gripper=2)}, "different ones"),
            ({"horizon": 1, "dim": 1, "normaliser": Normaliser(torch.zeros(2), torch.ones(2))}, "for 2 dimensions"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            ActionSpec(**arguments)  # type: ignore[arg-type]


class TestFieldPolicy:
    def test_it_is_a_base_policy(self) -> None:
        policy = FieldPolicy(Constant(), ActionSpec(3, 2), encode=lambda observation: observation + 1)
        assert isinstance(policy, BasePolicy)
        assert policy.device == torch.device("cpu")
        context = policy.encode(torch.tensor([0.0, 1.0]))
        velocity = bind(policy, context)(torch.zeros(2, 3, 2), torch.zeros(2))
        assert velocity[:, 0, 0].tolist() == [2.0, 4.0]

    def test_a_wrong_shape_is_named(self) -> None:
        policy = FieldPolicy(lambda x, t, o: x[:, :1], ActionSpec(3, 2))
        with pytest.raises(MismatchError, match=r"returned \(2, 1, 2\) for x of shape \(2, 3, 2\)"):
            policy.velocity(None, torch.zeros(2, 3, 2), torch.zeros(2))


def test_contexts_are_repeated_row_by_row_whatever_they_are_made_of() -> None:
    context = {"image": torch.arange(2), "cache": [(torch.arange(4).reshape(2, 2), "name")]}
    repeated = repeat_context(context, 3)
    assert repeated["image"].tolist() == [0, 0, 0, 1, 1, 1]
    assert repeated["cache"][0][0][:, 0].tolist() == [0, 0, 0, 2, 2, 2]
    assert repeated["cache"][0][1] == "name"
