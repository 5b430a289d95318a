"""An ensemble as one network is its members side by side, and nothing passes between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterflow.errors import InvalidInputError
from counterflow.policies.ensemble import EnsembleMLP

MEMBERS, BATCH, INPUTS, OUTPUTS, WIDTH, DEPTH = 3, 7, 4, 2, 16, 2


@pytest.fixture
def ensemble() -> EnsembleMLP:
    torch.manual_seed(0)
    return EnsembleMLP(INPUTS, OUTPUTS, MEMBERS, WIDTH, DEPTH)


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(MEMBERS, BATCH, INPUTS, generator=torch.Generator().manual_seed(seed))


class Plain(nn.Module):
    """One member, written with torch's own layers."""

    def __init__(self, ensemble: EnsembleMLP, member: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight, bias in zip(ensemble.weights, ensemble.biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[2])
            layer.weight.data, layer.bias.data = weight.data[member].T.clone(), bias.data[member, 0].clone()
            self.layers.append(layer)
        self.norm = nn.LayerNorm(ensemble.width, elementwise_affine=False)
        self.activation = nn.GELU(approximate="tanh")

    def forward(self, hidden: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        for index, layer in enumerate(self.layers[:-1]):
            hidden = self.activation(self.norm(layer(hidden)))
            if masks:
                hidden = hidden * masks[index]
        out: Tensor = self.layers[-1](hidden)
        return out


def gradient(parameter: Any) -> Tensor:
    found: Tensor = parameter.grad
    return found


def test_it_equals_separate_networks(ensemble: EnsembleMLP) -> None:
    found = ensemble(inputs())
    assert found.shape == (MEMBERS, BATCH, OUTPUTS)
    expected = torch.stack([Plain(ensemble, member)(inputs()[member]) for member in range(MEMBERS)])
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], found[1])


def test_masks_multiply_what_the_hidden_layers_say(ensemble: EnsembleMLP) -> None:
    rng = torch.Generator().manual_seed(2)
    masks = tuple((torch.rand(MEMBERS, BATCH, WIDTH, generator=rng) < 0.5).float() * 2 for _ in range(DEPTH))
    expected = torch.stack(
        [Plain(ensemble, one)(inputs()[one], tuple(mask[one] for mask in masks)) for one in range(MEMBERS)]
    )
    torch.testing.assert_close(ensemble(inputs(), masks), expected)
    assert not torch.allclose(ensemble(inputs(), masks), ensemble(inputs()))


def test_a_batch_of_nothing_but_zeros_in_the_last_mask_leaves_the_last_bias(ensemble: EnsembleMLP) -> None:
    masks = (torch.ones(MEMBERS, BATCH, WIDTH), torch.zeros(MEMBERS, BATCH, WIDTH))
    torch.testing.assert_close(
        ensemble(inputs(), masks), ensemble.biases[-1].detach().expand(MEMBERS, BATCH, OUTPUTS), check_stride=False
    )


@pytest.mark.parametrize("member", range(MEMBERS))
def test_a_members_loss_moves_that_member_alone(ensemble: EnsembleMLP, member: int) -> None:
    ensemble(inputs())[member].square().sum().backward()
    for parameter in ensemble.parameters():
        for other in range(MEMBERS):
            assert bool(gradient(parameter)[other].any()) == (other == member)


def test_the_summed_loss_gives_each_member_the_gradient_of_its_own(ensemble: EnsembleMLP) -> None:
    ensemble(inputs()).square().mean((1, 2)).sum().backward()
    for member in range(MEMBERS):
        plain = Plain(ensemble, member)
        plain(inputs()[member]).square().mean().backward()
        for layer, weight, bias in zip(plain.layers, ensemble.weights, ensemble.biases, strict=True):
            torch.testing.assert_close(gradient(weight)[member], gradient(layer.weight).T)
            torch.testing.assert_close(gradient(bias)[member, 0], gradient(layer.bias))


def test_what_one_member_is_shown_does_not_matter_to_the_others(ensemble: EnsembleMLP) -> None:
    changed = inputs()
    changed[1] += 1
    before, after = ensemble(inputs()), ensemble(changed)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=0)
    assert not torch.allclose(after[1], before[1])


def test_members_begin_different_and_as_torchs_linear_layers_do(ensemble: EnsembleMLP) -> None:
    wide = EnsembleMLP(100, 1, 2, 400, 1)
    bound = 0.1  # 1 / sqrt(100)
    assert 0.99 * bound < float(wide.weights[0].detach().max()) <= bound
    assert -bound <= float(wide.weights[0].detach().min()) < -0.99 * bound
    assert not torch.equal(wide.weights[0][0], wide.weights[0][1])
    assert [tuple(weight.shape) for weight in ensemble.weights] == [(3, 4, 16), (3, 16, 16), (3, 16, 2)]


@pytest.mark.parametrize("name", ["inputs", "outputs", "members", "width", "depth"])
def test_sizes_out_of_range(name: str) -> None:
    sizes: dict[str, Any] = {"inputs": 2, "outputs": 2, "members": 2, "width": 2, "depth": 2, name: 0}
    with pytest.raises(
        InvalidInputError, match=rf"{name} of an ensemble of MLPs is 0; expected an integer of at least 1"
    ):
        EnsembleMLP(**sizes)
