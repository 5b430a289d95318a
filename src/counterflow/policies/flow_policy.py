"""`FlowPolicy`: a velocity network together with the normalisation of what goes in and comes out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from counterflow.checks import COUNT, check_name
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.flow.field import inspectable
from counterflow.policies.base import ActionSpec
from counterflow.policies.described import fingerprint
from counterflow.policies.networks import MLPNetwork, OfflineNetwork, TransformerNetwork
from counterflow.policies.normalisation import Normaliser

NetworkName = Literal["mlp", "transformer", "plain_mlp", "normed_mlp", "one_step_mlp"]

# Far outside the data a network extrapolates wildly; what is further off than this looks the same to it.
LARGEST_OBSERVATION = 10.0


@dataclass(frozen=True)
class NetworkConfig:
    """The velocity network's architecture.

    Attributes:
        name: "mlp" over the flattened chunk, or "transformer" over its rows; the others are those of the offline learners (see
            `OfflineNetwork`).
        width: neurons of a hidden layer, or size of a token.
        depth: hidden layers, or blocks.
        heads: attention heads of the transformer.

    Raises:
        UnknownNameError: no such network.
        InvalidInputError: a size is not positive.
    """

    name: NetworkName = "mlp"
    width: int = 512
    depth: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        """Check name and sizes."""
        check_name("network", self.name, NetworkName)
        for size in ("width", "depth", "heads"):
            value = getattr(self, size)
            COUNT.check(f"network {size}", value, written=True)


class FlowPolicy(nn.Module):
    """A base policy on state observations.

    Args:
        network: the architecture.
        observation_normaliser: from observations (O,) as the environment gives them to what the network sees.
        action_spec: the action space, with the actions' normaliser.
        family: the environments that it was made for, for example "ogbench/cube-single"; "" if unknown.

    Raises:
        InvalidInputError: the action space is padded, reaches into the past, or has another prior than the Gaussian.
    """

    def __init__(
        self,
        network: NetworkConfig,
        observation_normaliser: Normaliser,
        action_spec: ActionSpec,
        family: str = "",
    ) -> None:
        if not action_spec.is_plain or action_spec.prior != "gaussian":
            raise InvalidInputError(
                f"this policy's flow moves its chunk and nothing else, from Gaussian noise; padding is {action_spec.padding}, "
                f"past {action_spec.past}, prior {action_spec.prior!r}. Expected 0, 0 and 'gaussian'."
            )
        super().__init__()
        self.config, self.action_spec, self.family = network, action_spec, family
        self.observation_normaliser = observation_normaliser
        self.action_normaliser = (
            action_spec.normaliser
        )  # registered here, so that it moves between devices with the rest
        sizes = (observation_normaliser.dim, action_spec.horizon, action_spec.dim)
        self.network: nn.Module
        if network.name == "mlp":
            self.network = MLPNetwork(*sizes, network.width, network.depth)
        elif network.name == "transformer":
            self.network = TransformerNetwork(*sizes, network.width, network.depth, network.heads)
        else:
            self.network = OfflineNetwork(network.name, *sizes, network.width, network.depth)
        # What else was recorded about its making (data, seed, steps, losses); travels with the checkpoint.
        self.provenance: dict[str, Any] = {}

    @property
    def observation_dim(self) -> int:
        """O, how many numbers it sees."""
        return self.observation_normaliser.dim

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    # What `features` returns is all that `velocity` needs: whoever keeps features can denoise from them.
    features_are_context = True

    @property
    def has_flow(self) -> bool:
        """Whether it can be stopped on the way, reversed and guided; a policy of one step can't."""
        return self.config.name != "one_step_mlp"

    def encode(self, observation: Tensor | npt.NDArray[Any]) -> Tensor:
        """Normalise observations (B, O), on the policy's device.

        Raises:
            MismatchError: the shape is not (B, O).
            InvalidInputError: (on the CPU) values are NaN or infinite.
        """
        given = torch.as_tensor(np.asarray(observation) if isinstance(observation, list) else observation)
        if given.ndim != 2 or given.shape[1] != self.observation_dim:
            raise MismatchError(
                f"observations have shape {tuple(given.shape)}; this policy sees (B, {self.observation_dim}). "
                f"It was made for {self.family or 'another environment'}; one observation needs a batch dimension."
            )
        if inspectable(given) and not bool(torch.isfinite(given).all()):
            raise InvalidInputError("observations hold NaN or infinite values; look for them where they were recorded.")
        normalised = self.observation_normaliser.normalise(given.to(self.device, torch.float32))
        if self.observation_normaliser.kind == "none":
            return normalised
        return normalised.clamp(-LARGEST_OBSERVATION, LARGEST_OBSERVATION)

    def features(self, context: Tensor) -> Tensor:
        """Return what small networks may learn from (B, F): here the normalised observations themselves."""
        return context

    def velocity(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, H, A) at state x (B, H, A) and time t (B,), for encoded observations (B, O)."""
        velocity: Tensor = self.network(context, x, t)
        return velocity

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values: network, action space, normalisation, family."""
        return {
            "family": self.family,
            "network": asdict(self.config),
            "observation": {"dim": self.observation_dim, "normalisation": self.observation_normaliser.kind},
            "action": self.action_spec.description(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return every number that makes the policy what it is, by name, on the CPU."""
        found = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        found |= self.observation_normaliser.tensors("observation") | self.action_spec.tensors()
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    @property
    def fingerprint(self) -> str:
        """A short name for exactly this policy: whatever depends on it (noises, critics) can refuse another."""
        return fingerprint(self.description(), self.tensors())
