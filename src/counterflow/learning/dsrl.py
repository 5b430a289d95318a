"""DSRL: reinforcement learning in the noise space of a frozen flow (arXiv 2506.15799), alone or begun from steered rollouts.

The action is the latent, clipped to [-b, b] by the squashing of the policy.

    sac        SAC whose action is the latent; the flow is part of the environment (`learning.sac`)
    aliasing   an action critic learns by TD from what was executed, a noise critic is regressed onto it, the actor follows that:

        action critic   L = E (Q_A(s, a) - y)^2,   y = r + d (agg Q_A'(s', flow(s', w')) - alpha log pi(w' | s')),   w' ~ pi(s')
        noise critic    L = E (Q_W,m(s, w) - Q_A,m(s, flow(s, w)))^2   for random w ~ N(0, I) within the bound, member by member
        actor           as in SAC, on Q_W

    anchors    no actor: candidates (flow-reversed references, and noises near them) are scored by a critic ensemble that learns
               by TD from what was executed (SARSA), and one of them, or their average, is used

DSRL + FRS (arXiv 2606.13675): the replay is prefilled with steered rollouts, and -lambda log pi over the latents of successful
ones is added to the actor's loss (`bc_weight`, with a schedule). Here lambda is per number of the latent: log pi is divided by
their count D (`sac.cloning_loss`), so that a weight means the same for every latent, and the paper preset's `bc_weight` of 1 is
1/D of the paper's. Where these were distilled into a noise policy (DSBC), the actor may begin as an imitation of it
(`SACLearner.imitate`), and the divergence from it take the place of that term (`bc_from="teacher"`). Unlike the released code,
noises are denoised once, the bound holds in both variants, and steps are counted as decisions everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from counterflow.checks import check_names
from counterflow.data.replay import ReplayBatch
from counterflow.errors import InvalidInputError
from counterflow.learning.sac import (
    ActionSizes,
    Losses,
    SACConfig,
    SACDraws,
    SACLearner,
    actor_loss,
    aggregated,
    backed_up,
    squash,
    temperature_loss,
    within,
)
from counterflow.policies.stacked import StackedMLP
from counterflow.steering.anchors import Judged, Select, choose

Variant = Literal["sac", "aliasing", "anchors"]
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The frozen flow: (observations (N, F), latents (N, D), draws of N(0, I) for what nobody decides on (N, R)) -> what is executed
(N, C). It has no effects beside that, so that it can be compiled."""


@dataclass(frozen=True)
class DSRLConfig(SACConfig):
    """Settings of DSRL; see `SACConfig` for the others.

    Attributes:
        variant: "sac", "aliasing" or "anchors".
        distill_steps: of noise aliasing, steps of the noise critic in an update.
        judged: of the anchors, whether critics look at the "noise" or at the "chunk" that it becomes.
        select: of the anchors, how a candidate is chosen by its scores: the best, by lot, or their average.
        select_temperature: of the last two, in units of the value.
        imitation: updates with which the actor begins as an imitation, where there is something to imitate.

    Raises:
        UnknownNameError: no such variant.
        InvalidInputError: a number is out of range.
    """

    variant: Variant = "sac"
    distill_steps: int = 10
    judged: Judged = "noise"
    select: Select = "argmax"
    select_temperature: float = 0.05
    imitation: int = 500

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_names(self, variant=Variant, select=Select, judged=Judged)
        if self.select_temperature == 0:
            raise InvalidInputError("select_temperature is 0; expected a positive number, or select 'argmax'.")


class DSRLLearner(SACLearner[DSRLConfig]):
    """The SAC variant: nothing but SAC on latents."""

    name: ClassVar[str] = "dsrl"


def action_critic_loss(
    critic: StackedMLP,
    target: StackedMLP,
    actor: StackedMLP,
    temperature: Tensor,
    decode: Decode,
    batch: ReplayBatch,
    draws: SACDraws,
    rest: Tensor,
    config: DSRLConfig,
    limits: Tensor,
) -> Losses:
    """Return the action critics' loss of every seed (S,); `rest` (S, B, R) is what `decode` draws of the prior."""
    with torch.no_grad():
        latent, density = squash(actor(batch.next_observations), draws.next_noise, limits)
        seen = batch.next_observations
        executed = decode(seen.flatten(0, 1), latent.flatten(0, 1), rest.flatten(0, 1)).view(*seen.shape[:2], -1)
        following = aggregated(target.ensemble(torch.cat([seen, executed], -1))[..., 0].float(), config, draws.order)
        following = backed_up(following, temperature, density, config)
        wanted = batch.rewards + batch.discounts * following
    values = critic.ensemble(torch.cat([batch.observations, batch.executed], -1))[..., 0].float()
    return (values - wanted[:, None]).square().mean((1, 2)), {"value": values.mean((1, 2))}


def noise_critic_loss(
    noise_critic: StackedMLP,
    action_critic: StackedMLP,
    observations: Tensor,
    latents: Tensor,
    executed: Tensor,
    limits: Tensor,
) -> Tensor:
    """Return the noise critics' loss of every seed (S,): each member regresses its own action critic.

    Args:
        noise_critic: of (observation, latent in units of its limits).
        action_critic: of (observation, executed).
        observations: (S, B, F).
        latents: (S, B, D) random ones.
        executed: (S, B, C) what the flow makes of them.
        limits: (D,).
    """
    with torch.no_grad():
        wanted = action_critic.ensemble(torch.cat([observations, executed], -1))[..., 0].float()
    values = noise_critic.ensemble(torch.cat([observations, latents / limits], -1))[..., 0].float()
    return (values - wanted).square().mean((1, 2))


class AliasingLearner(SACLearner[DSRLConfig]):
    """The noise-aliasing variant.

    Args:
        sizes, config, seeds, device: as for `SACLearner`; `sizes.executed` must be given.
        decode: the frozen flow.
        rest: R, how many draws of N(0, I) it wants for a latent; 0 where the latent decides on everything.
    """

    name: ClassVar[str] = "dsrl-aliasing"

    def __init__(
        self,
        sizes: ActionSizes,
        config: DSRLConfig,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        decode: Decode,
        rest: int = 0,
    ) -> None:
        self.decode, self.rest = decode, rest
        super().__init__(sizes, config, seeds, device)
        self._judging = self._compiled(self._cast(self.action_loss))
        self._decoding = self._compiled(self._cast(self.decoded))
        self._aliasing = self._compiled(self._cast(self.noise_loss))
        self._acting = self._compiled(self._cast(self.acting_loss))

    @property
    def decoded_rows(self) -> int:
        """How many latents of each seed the flow decodes in an update."""
        return self.config.batch_size * (1 + self.config.distill_steps)

    def build(self) -> dict[str, StackedMLP]:
        """Make the actor, both critics and the action critic's target."""
        seeds, sizes = len(self.seeds), self.sizes
        critics = seeds * self.config.members
        return {
            "actor": self.network(sizes.observation, 2 * sizes.action, seeds),
            "critic": self.network(self.judged_size, 1, critics),
            "action_critic": self.network(sizes.observation + sizes.executed, 1, critics),
            "target_action_critic": self.network(sizes.observation + sizes.executed, 1, critics),
        }

    def following(self) -> list[tuple[StackedMLP, StackedMLP]]:
        """The action critic's target."""
        return [(self.networks["action_critic"], self.networks["target_action_critic"])]

    def draw(self, rng: torch.Generator, updates: int) -> SACDraws:
        """Draw the random latents, too, and what the flow draws of the prior: for the next latents, then for those."""
        draws = super().draw(rng, updates)
        steps, batch = self.config.distill_steps, self.config.batch_size
        latents = torch.randn((updates, steps, batch, self.sizes.action), generator=rng, device=self.device)
        latents = latents.clamp(-self.limits, self.limits)
        rest = torch.randn((updates, 1 + steps, batch, self.rest), generator=rng, device=self.device)
        return SACDraws(draws.next_noise, draws.noise, draws.order, latents, rest)

    def action_loss(self, batch: ReplayBatch, draws: SACDraws, rest: Tensor) -> Losses:
        """Return the action critics' loss of every seed (S,)."""
        networks = self.networks
        return action_critic_loss(
            networks["action_critic"],
            networks["target_action_critic"],
            networks["actor"],
            self.temperature,
            self.decode,
            batch,
            draws,
            rest,
            self.config,
            self.limits,
        )

    @torch.no_grad()
    def decoded(self, observations: Tensor, latents: Tensor, rest: Tensor) -> Tensor:
        """Return what is executed (K, S, B, C) of random latents (K, S, B, D), at observations (S, B, F)."""
        wide = observations.expand(len(latents), -1, -1, -1)
        made = self.decode(wide.flatten(0, 2), latents.flatten(0, 2), rest.flatten(0, 2))
        return made.float().view(*latents.shape[:3], -1)

    def noise_loss(self, observations: Tensor, latents: Tensor, executed: Tensor) -> Tensor:
        """Return the noise critics' loss of every seed (S,)."""
        critics = self.networks["critic"], self.networks["action_critic"]
        return noise_critic_loss(*critics, observations, latents, executed, self.limits)

    def acting_loss(
        self, observations: Tensor, draws: SACDraws, shown: Tensor, acted: Tensor, cloning: Tensor
    ) -> Losses:
        """Return the loss of actor and temperature of every seed (S,)."""
        networks, config = self.networks, self.config
        acting, density = actor_loss(
            networks["critic"],
            networks["actor"],
            self.temperature,
            self.judge,
            observations,
            draws,
            config,
            self.limits,
        )
        numbers = {"actor_loss": acting, "entropy": -density.mean(1)}
        if config.learn_temperature:
            acting = acting + temperature_loss(self.log_temperature, density, self.target_entropy)
        total = self.listening * acting
        if config.bc_weight:
            copying = self.copying_loss(shown, acted)
            total, numbers["bc_loss"] = total + cloning * copying, copying
        return total, numbers

    def apply(
        self, batch: ReplayBatch, draws: SACDraws, shown: Tensor, acted: Tensor, cloning: Tensor
    ) -> dict[str, Tensor]:
        """Take one step of the action critic, several of the noise critic, one of the actor."""
        self.begin_step()
        seen = batch.observations
        latents, rest = draws.extra.movedim(1, 0), draws.rest.movedim(1, 0)  # (steps, S, B, ...)
        judging, numbers = self._judging(batch, draws, rest[0])
        self.optimise(judging)
        executed = self._decoding(seen, latents, rest[1:])
        for latent, made in zip(latents, executed, strict=True):
            aliasing = self._aliasing(seen, latent, made)
            self.optimise(aliasing)
        total, others = self._acting(seen, draws, shown, acted, cloning)
        self.optimise(total)
        self.follow()
        numbers = {
            "loss": judging,
            "critic_loss": judging,
            "noise_critic_loss": aliasing,
            "temperature": self.temperature,
            **numbers,
            **others,
        }
        return {name: value.detach().clone() for name, value in numbers.items()}


class AnchorsLearner(SACLearner[DSRLConfig]):
    """Critics without an actor: the candidates are given."""

    name: ClassVar[str] = "anchors"

    @property
    def judged_size(self) -> int:
        """The observation, and the noise or what it becomes."""
        own = self.sizes.action if self.config.judged == "noise" else self.sizes.executed
        return self.sizes.observation + own

    def build(self) -> dict[str, StackedMLP]:
        """Make the critics and their targets."""
        count = len(self.seeds) * self.config.members
        return {name: self.network(self.judged_size, 1, count) for name in ("critic", "target_critic")}

    def looked_at(self, observations: Tensor, latents: Tensor, executed: Tensor) -> Tensor:
        """Return what critics look at."""
        own = latents / self.limits if self.config.judged == "noise" else executed
        return torch.cat([observations, own], -1)

    def loss(
        self,
        batch: ReplayBatch,
        draws: SACDraws,
        shown: Tensor,  # noqa: ARG002 - there is no actor to imitate with
        acted: Tensor,  # noqa: ARG002
        cloning: Tensor,  # noqa: ARG002
    ) -> Losses:
        """Return the critics' loss of every seed (S,), on decisions whose successor is known."""
        with torch.no_grad():
            following = self.networks["target_critic"].ensemble(
                self.looked_at(batch.next_observations, batch.next_actions, batch.next_executed)
            )
            next_values = aggregated(following[..., 0].float(), self.config, draws.order)
            wanted = batch.rewards + batch.discounts * within(next_values, self.config)
        values = self.networks["critic"].ensemble(self.looked_at(batch.observations, batch.actions, batch.executed))[
            ..., 0
        ]
        errors = (values.float() - wanted[:, None]).square() * batch.followed[:, None]
        losses = errors.mean((1, 2))
        return losses, {"critic_loss": losses, "value": values.float().mean((1, 2))}

    @torch.no_grad()
    def scores(self, observations: Tensor, latents: Tensor, executed: Tensor) -> Tensor:
        """Return what candidates are worth, (S, E, N).

        Args:
            observations: (S, E, F).
            latents: (S, E, N, D) the candidates.
            executed: (S, E, N, C) what they become.
        """
        count = latents.shape[2]
        seen = observations[:, :, None].expand(-1, -1, count, -1)
        looked = self.looked_at(seen, latents, executed).flatten(1, 2)
        order = torch.zeros((len(self.seeds), self.config.members), device=self.device)
        values = self.networks["critic"].ensemble(looked)[..., 0].float()
        full = values if not self.config.subset else values[:, : self.config.subset]
        scores: Tensor = aggregated(full, self.config, order).unflatten(1, (-1, count))
        return scores

    @torch.no_grad()
    def choose(self, latents: Tensor, scores: Tensor, weights: Tensor | None = None, *, explore: bool = True) -> Tensor:
        """Return the latent that is used, (S, E, D).

        Args:
            latents: (S, E, N, D) the candidates.
            scores: (S, E, N).
            weights: (S, E, N) how much somebody, a reasoner for example, thinks of each; None: all alike.
            explore: draw, where the settings say so; else the best.
        """
        config = self.config
        rngs = self._rngs if explore else None
        return choose(latents, scores, weights, config.select, config.select_temperature, rngs)
