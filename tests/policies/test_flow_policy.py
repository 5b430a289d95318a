"""The policy on state observations: what goes in, what it is called, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.policies import ActionLayout, ActionSpec, BasePolicy, FlowPolicy, NetworkConfig, Normaliser

OBSERVATIONS = Normaliser(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5]))


def policy(family: str = "ogbench/scene", spec: ActionSpec | None = None) -> FlowPolicy:
    torch.manual_seed(0)
    return FlowPolicy(NetworkConfig(width=8, depth=1), OBSERVATIONS, ActionSpec(3, 4) if spec is None else spec, family)


class TestObservations:
    @pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
    def test_they_are_normalised_whatever_holds_them(self, kind: Any) -> None:
        encoded = policy().encode(kind([[3.0, -1.0], [1.0, -2.0]]))
        assert encoded.dtype == torch.float32
        assert encoded.tolist() == [[1.0, 2.0], [0.0, 0.0]]

    def test_what_is_far_outside_the_data_is_brought_nearer(self) -> None:
        assert policy().encode(torch.tensor([[1e6, -1e6]])).tolist() == [[10.0, -10.0]]

    @pytest.mark.parametrize("shape", [(2, 3), (2,), (1, 1, 2)])
    def test_another_shape_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(MismatchError, match=r"sees \(B, 2\).*ogbench/scene"):
            policy().encode(torch.zeros(shape))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_refused(self, value: float) -> None:
        with pytest.raises(InvalidInputError, match="NaN or infinite"):
            policy().encode(torch.tensor([[0.0, value]]))


class TestWhatItIs:
    def test_it_is_a_base_policy_of_its_sizes(self) -> None:
        made = policy()
        assert isinstance(made, BasePolicy)
        assert made.observation_dim == 2
        velocity = made.velocity(made.encode(torch.zeros(6, 2)), torch.zeros(6, 3, 4), torch.zeros(6))
        assert velocity.shape == (6, 3, 4)

    def test_a_fingerprint_depends_on_every_setting_and_every_number(self) -> None:
        def changed(change: Any) -> FlowPolicy:
            made = policy()
            with torch.no_grad():
                change(made)
            return made

        unit = Normaliser(torch.zeros(4), torch.ones(4))
        policies = [
            policy(),
            policy(family="ogbench/cube-single"),
            policy(spec=ActionSpec(3, 4, low=(-1.0,) * 4)),
            policy(spec=ActionSpec(3, 4, low=(-2.0,) * 4)),
            policy(spec=ActionSpec(3, 4, high=(1.0,) * 4)),
            policy(spec=ActionSpec(3, 4, normaliser=unit)),
            policy(spec=ActionSpec(3, 4, normaliser=Normaliser(torch.zeros(4), torch.ones(4), "quantile"))),
            policy(spec=ActionSpec(3, 4, layout=ActionLayout((0, 1, 2)))),
            policy(spec=ActionSpec(3, 4, layout=ActionLayout((0, 1, 2), gripper=3))),
            policy(spec=ActionSpec(3, 4, layout=ActionLayout((0, 1, 2), gripper=3, gripper_close_sign=-1))),
            *[
                changed(lambda made, index=index: list(made.network.parameters())[index].view(-1)[-1].add_(1e-3))
                for index in range(4)
            ],
        ]
        assert len({made.fingerprint for made in policies}) == len(policies)
        assert policy().fingerprint == policy().fingerprint


@pytest.mark.parametrize("change", [{"width": 0}, {"depth": True}, {"heads": 1.5}])
def test_network_sizes_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="expected an integer of at least 1"):
        NetworkConfig(**change)


def test_networks_that_cannot_be_made() -> None:
    with pytest.raises(UnknownNameError, match="transformer"):
        NetworkConfig("transfromer")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="divided among 3 heads"):
        FlowPolicy(NetworkConfig("transformer", 16, 1, 3), OBSERVATIONS, ActionSpec(1, 1))
