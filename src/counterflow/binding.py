"""What noises belong to: the frozen policy and the way of denoising that turn them into actions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from counterflow.errors import MismatchError


@dataclass(frozen=True)
class Binding:
    """The policy, action space and denoising that a noise belongs to; whoever learns from it or uses it must agree.

    Attributes:
        policy: fingerprint of the frozen base policy.
        family: the environments that share observations and actions, for example "ogbench/cube-single".
        horizon: H.
        dim: A.
        steps: K, the denoising steps with which the noise gives its chunk.
        solver: "euler", "midpoint" or "rk4".
        padding: trailing dimensions that the flow moves beyond those of an action.
    """

    policy: str
    family: str
    horizon: int
    dim: int
    steps: int
    solver: str = "euler"
    padding: int = 0

    @property
    def state_dim(self) -> int:
        """A + padding, the size of a row of a noise."""
        return self.dim + self.padding

    def check(self, other: Binding, what: str) -> None:
        """Raise `MismatchError` unless `other` is the same.

        Args:
            other: what is to be used now.
            what: what this binding is of, for the message, for example "the noise policy noise.safetensors".
        """
        mine, theirs = asdict(self), asdict(other)
        differing = [f"{name} {mine[name]!r}, not {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]
        if differing:
            raise MismatchError(
                f"{what} belongs to another frozen policy or another way of denoising: {'; '.join(differing)}. The same "
                "noise would become another action. Use the policy and the steps that it was made with, or make it anew "
                "with these."
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; padding only where there is some, so that what was written before it was known still fits."""
        content = asdict(self)
        if not self.padding:
            del content["padding"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Binding:
        """Read what `to_json` returned (KeyError or TypeError where it is something else)."""
        return cls(**content)
