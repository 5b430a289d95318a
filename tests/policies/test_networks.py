"""The velocity networks: shapes, rows that don't touch, what they depend on, and that they learn."""

from __future__ import annotations

import pytest
import torch

from counterflow.flow import matching_loss
from counterflow.policies import MLPNetwork, TransformerNetwork

NETWORKS = [MLPNetwork(6, 4, 3, width=32, depth=2), TransformerNetwork(6, 4, 3, width=32, depth=2, heads=4)]


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
    return network


@pytest.mark.parametrize("network", NETWORKS, ids=["mlp", "transformer"])
class TestEveryNetwork:
    def test_rows_do_not_touch_and_every_input_matters(self, network: torch.nn.Module) -> None:
        network = randomised(network)
        features, x, t = torch.randn(5, 6), torch.randn(5, 4, 3), torch.rand(5)
        with torch.no_grad():
            together = network(features, x, t)
            assert together.shape == x.shape
            alone = torch.cat([network(features[i : i + 1], x[i : i + 1], t[i : i + 1]) for i in range(5)])
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
            for changed in ((features + 1, x, t), (features, x + 1, t), (features, x, t / 2)):
                assert (network(*changed) - together).abs().max() > 1e-3
            moved = x.clone()
            moved[:, -1] += 1  # the last action of a chunk matters to the first
            assert (network(features, moved, t) - together)[:, 0].abs().max() > 1e-3

    def test_the_order_of_the_actions_matters(self, network: torch.nn.Module) -> None:
        """A transformer that did not know which row is which would only shuffle its answer along."""
        network = randomised(network)
        features, x, t = torch.randn(5, 6), torch.randn(5, 4, 3), torch.rand(5)
        with torch.no_grad():
            assert (network(features, x.flip(1), t).flip(1) - network(features, x, t)).abs().max() > 1e-2

    def test_it_compiles_to_the_same_numbers(self, network: torch.nn.Module) -> None:
        network = randomised(network)
        inputs = torch.randn(3, 6), torch.randn(3, 4, 3), torch.rand(3)
        with torch.no_grad():
            graph = torch.export.export(network, inputs)
            torch.testing.assert_close(graph.module()(*inputs), network(*inputs))


@pytest.mark.parametrize("kind", [MLPNetwork, TransformerNetwork])
def test_it_learns_two_actions_from_two_observations(kind: type[torch.nn.Module]) -> None:
    """A flow from which the observation chooses the action: half of the variance can be explained, and is."""
    torch.manual_seed(0)
    network = kind(1, 2, 1, width=32, depth=2)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(300):
        features = torch.randint(0, 2, (128, 1)).float() * 2 - 1
        action = 2 * features[:, :, None].expand(128, 2, 1)
        noise, t = torch.randn(128, 2, 1), torch.rand(128)
        loss = matching_loss(lambda x, t, features=features: network(features, x, t), action, noise, t)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.15  # blind to the observation it could not get below about 1
