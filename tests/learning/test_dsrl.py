"""SAC, DSRL's variants and anchors: known answers on small problems, seeds side by side, resumption."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

from counterflow.data import Recorded, Replay
from counterflow.data.replay import ReplayBatch
from counterflow.errors import CheckpointError, InvalidInputError, UnknownNameError
from counterflow.learning.bc import can_compile
from counterflow.learning.dsrl import AliasingLearner, AnchorsLearner, DSRLConfig, DSRLLearner, noise_critic_loss
from counterflow.learning.sac import (
    IMITATED_STD,
    INSIDE,
    ActionSizes,
    SACConfig,
    SACLearner,
    aggregated,
    divergence_loss,
    log_density,
    parameters,
    squash,
    temperature_loss,
)
from counterflow.policies.stacked import StackedMLP

LIMITS = torch.tensor([1.5, 0.3])
SIZES = ActionSizes(3, LIMITS, 2)
BEST = torch.tensor([0.8, -0.8])
SMALL = {"width": 12, "depth": 1, "batch_size": 8, "compile": False}
FAST = {**SMALL, "width": 24, "batch_size": 32, "learning_rate": 5e-3, "actor_learning_rate": 5e-3}


def decode(observations: Tensor, latents: Tensor, rest: Tensor | None = None) -> Tensor:
    """A flow whose chunk is the tanh of its noise, moved by the observation (and by what it draws itself)."""
    drawn = 0 if rest is None else 0.1 * rest.sum(1, keepdim=True)
    return torch.tanh(latents + 0.1 * observations[:, :2] + drawn)


def filled(seeds: int = 1, count: int = 200, prefilled: bool = False) -> Replay:
    """Decisions that end at once; the reward falls with the distance of the action from an optimum."""
    rng = torch.Generator().manual_seed(3)

    def some(n: int) -> dict[str, Tensor]:
        seen = torch.randn((n, 3), generator=rng)
        acted = LIMITS * (2 * torch.rand((n, 2), generator=rng) - 1)
        return {
            "observations": seen,
            "actions": acted,
            "executed": decode(seen, acted),
            "rewards": -(acted / LIMITS - BEST).square().sum(1),
            "discounts": torch.zeros(n),
            "next_observations": seen,
        }

    before = None
    if prefilled:
        before = Recorded(**some(10), episodes=torch.arange(10) // 5, success=torch.arange(10) < 5)
    replay = Replay((3, 2, 2), seeds, 1, 1000, before)
    for one in zip(*some(count).values(), strict=True):
        wide = [value.expand(seeds, 1, *value.shape) for value in one]
        replay.add(*wide, torch.ones(seeds, 1, dtype=torch.bool), torch.zeros(seeds, 1, dtype=torch.bool))
    return replay


def make(kind: str, seeds: list[int], **changes: Any) -> SACLearner:
    if kind == "sac":
        return SACLearner(SIZES, SACConfig(**{**SMALL, **changes}), seeds)
    config = DSRLConfig(**{**SMALL, "variant": kind if kind != "dsrl" else "sac", "distill_steps": 2, **changes})
    if kind == "aliasing":
        return AliasingLearner(SIZES, config, seeds, decode=decode)
    return {"dsrl": DSRLLearner, "anchors": AnchorsLearner}[kind](SIZES, config, seeds)


KINDS = ("sac", "dsrl", "aliasing", "anchors")


def test_a_squashed_gaussians_density_is_torchs() -> None:
    outputs, noise = torch.randn(4, 6, 4), torch.randn(4, 6, 2)
    actions, density = squash(outputs, noise, LIMITS)
    mean, log_std = parameters(outputs)
    law = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform(cache_size=0))
    unit = actions / LIMITS
    inside = (unit.abs() < INSIDE).all(-1)
    torch.testing.assert_close(density[inside], law.log_prob(unit)[inside], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_density(outputs, actions, LIMITS)[inside], density[inside], rtol=1e-3, atol=1e-3)
    assert torch.isfinite(squash(100 * outputs, noise, LIMITS)[1]).all()


def test_labels_at_the_bound_have_a_finite_density() -> None:
    outputs = torch.zeros(1, 1, 4)
    beyond = log_density(outputs, torch.tensor([[[9.0, -0.3]]]), LIMITS)
    assert torch.isfinite(beyond).all()
    torch.testing.assert_close(beyond, log_density(outputs, LIMITS * torch.tensor([[[INSIDE, -INSIDE]]]), LIMITS))


def test_aggregates_of_all_and_of_a_random_subset() -> None:
    values, order = torch.tensor([[[3.0], [1.0], [2.0]]]), torch.tensor([[0.2, 0.9, 0.1]])
    assert aggregated(values, SACConfig(members=3), order).item() == 1
    assert aggregated(values, SACConfig(members=3, aggregation="mean"), order).item() == 2
    assert aggregated(values, SACConfig(members=3, subset=2), order).item() == 2
    assert aggregated(values, SACConfig(members=3, subset=1), order).item() == 2


def test_the_temperature_rises_where_entropy_is_too_low() -> None:
    log_temperature = torch.zeros(2, requires_grad=True)
    temperature_loss(log_temperature, torch.tensor([[5.0], [-5.0]]), -1.0).sum().backward()
    assert log_temperature.grad is not None
    assert log_temperature.grad[0] < 0 < log_temperature.grad[1]


@pytest.mark.parametrize("kind", ["sac", "aliasing"])
def test_a_temperature_at_its_floor_rises_as_soon_as_it_is_asked_to(kind: str) -> None:
    """What lies beneath the floor does not wind up."""
    changes = {"temperature_floor": 0.5, "temperature_learning_rate": 0.1, "initial_temperature": 0.6}
    learner = make(kind, [0, 1], **changes, target_entropy=-1e3)
    replay = filled(2)
    learner.update(replay, 20)
    torch.testing.assert_close(learner.log_temperature.detach().exp(), torch.full((2,), 0.5))
    assert (learner.temperature >= 0.5).all()
    below = make(kind, [0, 1], **{**changes, "initial_temperature": 0.1, "learn_temperature": False})
    assert (below.temperature == 0.5).all()
    learner.target_entropy = 1e3
    learner.update(replay, 20)
    assert (learner.temperature > 0.55).all()


@pytest.mark.parametrize("kind", ["sac", "aliasing"])
def test_the_actor_finds_the_best_action(kind: str) -> None:
    learner = make(kind, [0, 1], **{**FAST, "initial_temperature": 0.05, "learn_temperature": False})
    learner.update(filled(2), 150)
    seen = torch.randn(2, 40, 3)
    acted = learner.act(seen, explore=False) / LIMITS
    assert (acted - BEST).abs().mean() < 0.3
    assert not torch.equal(acted[0], acted[1])
    drawn = learner.act(seen)
    assert not torch.equal(drawn, learner.act(seen))
    assert (drawn.abs() <= LIMITS).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_learns_the_same_alone_and_beside_others(kind: str) -> None:
    settings = {"bc_weight": 1.0, "bc_batch": 4, "subset": 1}
    together, alone = make(kind, [4, 9], **settings), make(kind, [9], **settings)
    both, one = (learner.update(filled(len(learner.seeds), prefilled=True), 8) for learner in (together, alone))
    for name in one:
        torch.testing.assert_close(both[name][1], one[name][0], rtol=1e-3, atol=1e-4)
        if name != "temperature":
            assert not torch.allclose(both[name][0], both[name][1])


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_gives_the_same_numbers(kind: str) -> None:
    replay = filled(2, prefilled=True)
    whole, first, second = (make(kind, [0, 1], bc_weight=0.5, bc_decay=20) for _ in range(3))
    whole.update(replay, 5)
    first.update(replay, 5)
    second.restore(first.state())
    assert second.step == 5
    wanted, found = whole.update(replay, 4), second.update(replay, 4)
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    for name, value in second.state().items():
        assert torch.equal(value, whole.state()[name]), name
    with pytest.raises(CheckpointError, match="does not fit"):
        make(kind, [0], width=5).restore(first.state())


def test_targets_lag_and_the_entropy_can_be_left_out_of_the_backup() -> None:
    replay = filled()
    learner = make("sac", [0])
    before = learner.networks["target_critic"].weights[0].clone()
    online = learner.networks["critic"].weights[0]
    learner.update(replay, 1)
    after = learner.networks["target_critic"].weights[0]
    torch.testing.assert_close(after, before + 0.005 * (online - before))
    values = {}
    for backup in (True, False):
        one = make("sac", [0], entropy_backup=backup, initial_temperature=50.0, learn_temperature=False)
        endless = filled()
        endless._columns["discounts"] += 0.9
        one.update(endless, 3)
        values[backup] = one.update(endless, 1)["critic_loss"].item()
    assert values[True] > 10 * values[False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("said", "known"), [(5.0, 1.0), (-5.0, 0.0)])
def test_a_target_takes_over_no_value_that_cannot_be(
    kind: str, said: float, known: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endlessly(gather: Callable[..., ReplayBatch], *asked: Any) -> ReplayBatch:
        batch = gather(*asked)
        return dataclasses.replace(batch, followed=torch.ones_like(batch.followed))  # anchors learn from no others

    losses = []
    for level, bounds in ((said, {"lowest_value": 0.0, "highest_value": 1.0}), (known, {}), (said, {})):
        learner = make(kind, [0], entropy_backup=False, **bounds)
        (target,) = {id(followed): followed for _, followed in learner.following()}.values()
        with torch.no_grad():
            target.weights[-1].zero_()
            target.biases[-1].fill_(level)
        endless = filled()
        endless._columns["discounts"] += 0.9
        monkeypatch.setattr(endless, "gather", partial(endlessly, endless.gather))
        losses.append(learner.update(endless, 1)["critic_loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[2] - losses[1]) > 0.1


def test_each_critic_of_the_noise_follows_its_own_critic_of_the_action() -> None:
    noise_critic, action_critic = (StackedMLP(5, 1, 2, 4, 1) for _ in range(2))
    with torch.no_grad():
        for network, levels in ((noise_critic, (0.0, 0.0)), (action_critic, (1.0, 3.0))):
            network.weights[-1].zero_()
            network.biases[-1].copy_(torch.tensor(levels)[:, None, None])
    seen, latents = torch.randn(1, 6, 3), torch.randn(1, 6, 2)
    loss = noise_critic_loss(noise_critic, action_critic, seen, latents, decode(seen[0], latents[0])[None], LIMITS)
    assert loss.item() == pytest.approx((1 + 9) / 2)
    loss.sum().backward()
    assert noise_critic.biases[-1].grad is not None
    assert noise_critic.biases[-1].grad.flatten().tolist() == pytest.approx([-1.0, -3.0])
    assert action_critic.biases[-1].grad is None


def test_random_latents_stay_within_the_bound() -> None:
    learner = make("aliasing", [0], distill_steps=3)
    drawn = learner.draw(torch.Generator().manual_seed(0), 4).extra
    assert drawn.shape == (4, 3, 8, 2)
    assert (drawn.abs() <= LIMITS).all()
    assert (drawn.abs() == LIMITS).any()


def test_doing_as_successes_did() -> None:
    replay = filled(prefilled=True)
    near, far = (make("dsrl", [0], **{**FAST, "bc_weight": weight}) for weight in (30.0, 0.0))
    examples = replay.gather(torch.arange(5)[None])
    losses = []
    for learner in (near, far):
        learner.update(replay, 120)
        losses.append(-log_density(learner.networks["actor"](examples.observations), examples.actions, LIMITS).mean())
    assert losses[0] < losses[1] - 0.5
    assert SACConfig(bc_weight=2.0, bc_decay=10).bc_weight_at(5) == 1.0
    assert SACConfig(bc_weight=2.0, bc_decay=10).bc_weight_at(50) == 0.0
    assert SACConfig(bc_weight=2.0).bc_weight_at(10**6) == 2.0


@pytest.mark.parametrize(("bound", "expected"), [(5.0, 0.96), (1.5, 0.76)])
def test_a_latent_begins_as_near_the_prior_as_its_bound_lets_it(bound: float, expected: float) -> None:
    learner = SACLearner(ActionSizes(3, torch.tensor([bound, 0.3])), SACConfig(**SMALL), [0])
    drawn = learner.act(torch.randn(1, 20_000, 3))
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    wanted = (bound * torch.tanh(noise / bound)).std().item()
    assert drawn[..., 0].std().item() == pytest.approx(wanted, rel=0.03)
    assert wanted == pytest.approx(expected, abs=0.03)
    assert (drawn[..., 1].std() / 0.3).item() == pytest.approx(torch.tanh(noise).std().item(), rel=0.03)


def teacher(observations: Tensor) -> Tensor:
    """A noise policy."""
    return LIMITS * torch.tanh(observations[..., :2])


def taught(kind: str = "dsrl", seeds: list[int] | None = None, **changes: Any) -> SACLearner:
    learner = make(kind, seeds or [0], **{**FAST, **changes})
    learner.teacher = teacher
    return learner


def test_an_actor_begins_as_an_imitation() -> None:
    learner = taught(seeds=[0, 1])
    seen = torch.randn(64, 3)
    first = learner.imitate(seen, 1)
    last = learner.imitate(seen, 200)
    assert (last < first - 0.5).all()
    assert (learner.act(seen.expand(2, -1, -1), explore=False) - teacher(seen)).abs().mean() < 0.25
    assert learner.step == 0


def test_an_imitation_keeps_a_deviation() -> None:
    learner = taught()
    seen = torch.randn(64, 3)
    learner.imitate(seen, 400)
    spread = parameters(learner.networks["actor"](seen[None]))[1].exp().mean((0, 1))
    torch.testing.assert_close(spread, torch.tensor([IMITATED_STD / 1.5, IMITATED_STD]), atol=0.04, rtol=0)


def test_the_divergence_from_a_teacher_is_torchs() -> None:
    actor = StackedMLP(3, 4, 2, 8, 1)
    seen = torch.randn(2, 5, 3)
    said = 0.9 * LIMITS * (2 * torch.rand(2, 5, 2) - 1)
    mean, log_std = parameters(actor(seen))
    wanted = Normal(torch.atanh(said / LIMITS), torch.tensor([IMITATED_STD / 1.5, IMITATED_STD]))
    expected = kl_divergence(wanted, Normal(mean, log_std.exp())).mean((1, 2))
    torch.testing.assert_close(divergence_loss(actor, seen, said, LIMITS), expected)
    assert torch.isfinite(divergence_loss(actor, seen, 9 * LIMITS.expand(2, 5, 2), LIMITS)).all()


@pytest.mark.parametrize("kind", ["dsrl", "aliasing"])
def test_a_taught_actor_stays_near_its_teacher_as_long_as_the_weight_says(kind: str) -> None:
    seen, far = torch.randn(256, 3), {}
    for weight in (0.01, 30.0):
        learner = taught(kind, bc_weight=weight, bc_from="teacher", bc_batch=32, distill_steps=1)
        learner.imitate(seen, 200)
        learner.update(filled(), 150)
        far[weight] = (learner.act(seen[None], explore=False) - teacher(seen)).abs().mean().item()
    assert far[30.0] < 0.2
    assert far[0.01] > 2 * far[30.0]


def test_the_entropy_that_is_aimed_at_is_the_teachers() -> None:
    law = Normal(torch.zeros(2), torch.tensor([IMITATED_STD / 1.5, IMITATED_STD]))
    assert make("dsrl", [0], bc_from="teacher").target_entropy == pytest.approx(law.entropy().sum().item(), abs=1e-5)
    assert make("dsrl", [0], bc_from="teacher", target_entropy=-7.0).target_entropy == -7
    assert make("dsrl", [0]).target_entropy == -1


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(4, [0, 2, 4, 6]), (8, list(range(8))), (3, [0, 2, 5]), (6, [0, 1, 2, 4, 5, 6]), (99, list(range(8)))],
)
def test_what_a_teacher_is_asked_about_is_spread_over_the_batch(asked: int, expected: list[int]) -> None:
    """Its prefilled decisions lie before those of the learner itself."""
    learner = make("dsrl", [0], bc_weight=1.0, bc_from="teacher", bc_batch=asked)
    rows = torch.arange(8.0).expand(1, 3, 8).mT
    assert learner._some(rows)[0, :, 0].tolist() == expected


def test_a_teacher_that_is_missing_is_named() -> None:
    learner = make("dsrl", [0], bc_weight=1.0, bc_from="teacher")
    with pytest.raises(InvalidInputError, match="there is none"):
        learner.update(filled(), 1)


@pytest.mark.parametrize("kind", ["sac", "dsrl", "aliasing"])
def test_an_actor_may_wait_for_the_critics(kind: str) -> None:
    learner, replay = make(kind, [0], actor_delay=4), filled()
    actor, critic = (learner.networks[name].weights[0] for name in ("actor", "critic"))
    first, judged, alpha = actor.clone(), critic.clone(), learner.temperature.clone()
    learner.update(replay, 4)
    assert torch.equal(actor, first)
    assert torch.equal(learner.temperature, alpha)
    assert not torch.equal(critic, judged)
    learner.update(replay, 1)
    assert not torch.equal(actor, first)
    assert not torch.equal(learner.temperature, alpha)


def test_an_actor_that_waits_imitates_meanwhile() -> None:
    learner = make("dsrl", [0], bc_weight=1.0, actor_delay=100)
    actor = learner.networks["actor"].weights[0]
    first = actor.clone()
    learner.update(filled(prefilled=True), 2)
    assert not torch.equal(actor, first)


def test_candidates_are_chosen_by_their_worth_and_by_the_reasoners_word() -> None:
    latents = torch.stack([LIMITS * share for share in (-0.5, 0.0, 0.5)]).expand(1, 4, 3, 2)
    scores = torch.tensor([0.0, 0.2, 0.1]).expand(1, 4, 3)
    best = make("anchors", [0]).choose(latents, scores)
    assert (best == 0).all()
    word = torch.tensor([1e-6, 1e-6, 1.0]).expand(1, 4, 3)
    torch.testing.assert_close(make("anchors", [0]).choose(latents, scores, word), latents[:, :, 2])
    average = make("anchors", [0], select="average", select_temperature=1e3).choose(latents, scores)
    torch.testing.assert_close(average, torch.zeros_like(average), atol=1e-3, rtol=0)
    wide = latents.repeat(1, 100, 1, 1)
    lot = make("anchors", [0], select="sample", select_temperature=1e3).choose(wide, scores.repeat(1, 100, 1))
    assert len(lot[0, :, 0].unique()) == 3


@pytest.mark.parametrize("judged", ["noise", "chunk"])
def test_anchors_learn_what_was_executed_is_worth(judged: str) -> None:
    learner = make("anchors", [0], **{**FAST, "judged": judged, "target_rate": 0.05})
    assert isinstance(learner, AnchorsLearner)
    learner.update(filled(), 300)
    seen = torch.zeros(1, 1, 3)
    latents = torch.stack([BEST * LIMITS, -BEST * LIMITS]).view(1, 1, 2, 2)
    executed = decode(seen.expand(1, 2, 3)[0], latents[0, 0]).view(1, 1, 2, 2)
    good, bad = learner.scores(seen, latents, executed)[0, 0].tolist()
    assert good == pytest.approx(0, abs=0.6)
    assert bad == pytest.approx(-2 * 1.6**2, abs=1.6)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"discount": 0.0}, InvalidInputError),
        ({"update_ratio": 0}, InvalidInputError),
        ({"subset": 3}, InvalidInputError),
        ({"bc_weight": math.nan}, InvalidInputError),
        ({"initial_temperature": 0.0}, InvalidInputError),
        ({"prefilled_share": 2.0}, InvalidInputError),
        ({"activation": "sine"}, UnknownNameError),
        ({"variant": "ppo"}, UnknownNameError),
        ({"select_temperature": 0.0}, InvalidInputError),
        ({"highest_value": 1.0}, InvalidInputError),
        ({"entropy_backup": False, "lowest_value": 1.0, "highest_value": 0.0}, InvalidInputError),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        dataclasses.replace(DSRLConfig(), **changes)


def test_a_squashed_policy_needs_limits() -> None:
    with pytest.raises(InvalidInputError, match="noise bound"):
        ActionSizes(3, torch.tensor([1.0, math.inf]))
    with pytest.raises(InvalidInputError, match="different"):
        make("sac", [1, 1])


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_update_gives_the_numbers_of_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise aliasing: every loss, and the flow inside, is compiled; several steps are one call.

    What is compiled is traced and differentiated as always; writing C++ of it, which takes minutes, is left out.
    """
    compile_as_always = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: compile_as_always(function, backend="aot_eager"))
    torch.compiler.reset()
    entered: list[bool] = []

    def watched(observations: Tensor, latents: Tensor, rest: Tensor) -> Tensor:
        entered.append(torch.compiler.is_compiling())
        return decode(observations, latents, rest)

    settings: dict[str, Any] = {**SMALL, "variant": "aliasing", "distill_steps": 2, "bc_weight": 0.5, "bc_batch": 4}
    settings |= {"temperature_floor": 1.0, "target_entropy": -1e3}
    found = []
    for compiled in (False, True):
        config = DSRLConfig(**{**settings, "compile": compiled})
        learner = AliasingLearner(SIZES, config, [0, 1], decode=watched if compiled else decode, rest=2)
        numbers = learner.update(filled(2, 30, prefilled=True), 3)
        found.append((numbers, learner.state()))
        assert (learner.log_temperature == 0).all()  # it would fall, and is held
    assert entered
    assert all(entered)  # the flow is nowhere asked outside of what is compiled
    for eager, compiled in zip(*found, strict=True):
        assert eager.keys() == compiled.keys()
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_what_the_flow_draws_of_the_prior_is_drawn_with_everything_else() -> None:
    settings: dict[str, Any] = {**SMALL, "variant": "aliasing", "distill_steps": 3}
    config = DSRLConfig(**settings)
    asked: list[Tensor] = []

    def listening(observations: Tensor, latents: Tensor, rest: Tensor) -> Tensor:
        asked.append(rest)
        return decode(observations, latents, rest)

    learner = AliasingLearner(SIZES, config, [0, 1], decode=listening, rest=5)
    learner.update(filled(2, 30), 1)
    assert [tuple(one.shape) for one in asked] == [(2 * 8, 5), (3 * 2 * 8, 5)]
    assert learner.decoded_rows == 4 * 8
    drawn = torch.cat(asked)
    assert len(drawn.flatten().unique()) == drawn.numel()
