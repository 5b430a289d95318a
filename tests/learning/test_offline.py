"""Offline learners: seeds side by side, resumption, targets, what they hand on."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from counterflow.data.transitions import Chunks, Windows
from counterflow.errors import CheckpointError, InvalidInputError
from counterflow.learning.bc import can_compile
from counterflow.learning.fql import FQLConfig, FQLLearner
from counterflow.learning.ifql import IFQLConfig, IFQLLearner
from counterflow.learning.offline import BLOCK, OfflineLearner, Sizes, expectile_loss
from counterflow.learning.qgf import QGFConfig, QGFLearner
from counterflow.learning.rql import RQLConfig, RQLDraws, RQLLearner, RQLNetworks, pull_back
from counterflow.policies.networks import OfflineNetwork, sinusoidal
from counterflow.policies.stacked import StackedMLP

SIZES = Sizes(3, 2, 2)
SMALL = {"horizon": 2, "width": 8, "depth": 2, "batch_size": 4, "flow_steps": 3, "compile": False}
LEARNERS = {
    "rql": (RQLLearner, RQLConfig(members=3, rho=0.5, **SMALL)),
    "qgf": (QGFLearner, QGFConfig(**SMALL)),
    "fql": (FQLLearner, FQLConfig(**SMALL)),
    "ifql": (IFQLLearner, IFQLConfig(**SMALL)),
}
ROWS = 200


def make(name: str, seeds: list[int]) -> OfflineLearner:
    learner, config = LEARNERS[name]
    return learner(SIZES, config, seeds)


def draw_starts(count: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randint(ROWS - 3, (count,), generator=rng)


def batch_of(learner: OfflineLearner, starts: torch.Tensor) -> Windows | Chunks:
    """Gather from fixed data whose rewards and ends depend on the row."""
    rng = torch.Generator().manual_seed(7)
    observations, actions = torch.randn((ROWS, 3), generator=rng), torch.rand((ROWS, 2), generator=rng) * 2 - 1
    rewards, masks = -torch.rand(ROWS, generator=rng), (torch.rand(ROWS, generator=rng) > 0.2).float()
    if learner.batch_kind == "windows":
        rows = starts[..., None] + torch.arange(3)
        return Windows(observations[rows], actions[rows], rewards[rows], torch.zeros(rows.shape), masks[rows])
    rows = starts[..., None] + torch.arange(2)
    one = torch.ones(starts.shape)
    return Chunks(observations[starts], actions[rows], observations[starts + 2], rewards[starts], masks[starts], one)


def train(learner: OfflineLearner, updates: int) -> list[dict[str, torch.Tensor]]:
    numbers = []
    while len(numbers) < updates:
        block = learner.block(draw_starts)[: updates - len(numbers)]
        numbers.extend(learner.update(batch_of(learner, starts)) for starts in block)
    return numbers


@pytest.mark.parametrize("name", LEARNERS)
def test_a_seed_learns_the_same_alone_and_beside_others(name: str) -> None:
    together, alone = make(name, [4, 9, 1]), make(name, [9])
    for both, one in zip(train(together, 30), train(alone, 30), strict=True):
        for key in one:
            torch.testing.assert_close(both[key][1], one[key][0], rtol=1e-4, atol=1e-5)
    share = together.field().stack.part(1, 1)
    for mine, theirs in zip(share.parameters(), alone.field().stack.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_seeds_differ_from_one_another() -> None:
    numbers = train(make("rql", [0, 1]), 2)
    assert all(not torch.allclose(one["loss"][0], one["loss"][1]) for one in numbers)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("stop", [20, BLOCK, BLOCK + 7])
def test_resumed_training_gives_the_same_numbers(name: str, stop: int) -> None:
    whole = make(name, [0, 1])
    wanted = train(whole, BLOCK + 30)
    first = make(name, [0, 1])
    train(first, stop)
    second = make(name, [0, 1])
    second.restore(first.state())
    assert second.step == stop
    found = train(second, BLOCK + 30 - stop)
    for one, other in zip(found, wanted[stop:], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "device"), [("rql", "cpu"), *(pytest.param(name, "cuda", marks=GPU) for name in LEARNERS)]
)
def test_a_compiled_update_gives_the_same_numbers(name: str, device: str) -> None:
    """On a GPU the loss is a CUDA graph: numbers of earlier updates must survive the later ones."""
    learner, config = LEARNERS[name]
    eager, fast = (learner(SIZES, dataclasses.replace(config, compile=one), [0, 1], device) for one in (False, True))
    assert fast.compiled

    def draws_of(update: int) -> Any:
        made = eager.draw(torch.Generator(device).manual_seed(update), 2)  # a row a seed
        return type(made)(*(getattr(made, one.name) for one in dataclasses.fields(made)))

    starts = draw_starts(2 * config.batch_size, torch.Generator().manual_seed(0)).view(2, -1)
    made = batch_of(eager, starts)
    batch = type(made)(*(value if value is None else value.to(device) for value in vars(made).values()))
    numbers = [[one.apply(batch, draws_of(update)) for update in range(4)] for one in (eager, fast)]
    for found, expected in zip(*numbers, strict=True):
        for key, value in expected.items():
            torch.testing.assert_close(value, found[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LEARNERS)
def test_bfloat16_comes_near_float32(name: str) -> None:
    learner, config = LEARNERS[name]
    exact, rough = (
        learner(SIZES, dataclasses.replace(config, precision=kind), [0, 1]) for kind in ("float32", "bfloat16")
    )
    for one, other in zip(train(exact, 5), train(rough, 5), strict=True):
        assert one["loss"].dtype == other["loss"].dtype == torch.float32
        assert not torch.equal(one["loss"], other["loss"])
        torch.testing.assert_close(other["loss"], one["loss"], rtol=0.1, atol=0.05)
    assert all(weight.dtype == torch.float32 for weight in rough.field().stack.parameters())


def test_a_state_of_other_sizes_is_refused() -> None:
    other = RQLLearner(Sizes(4, 2, 2), LEARNERS["rql"][1], [0])
    with pytest.raises(CheckpointError, match="does not fit"):
        make("rql", [0]).restore(other.state())
    with pytest.raises(CheckpointError):
        make("rql", [0, 1]).restore(make("rql", [0]).state())


@pytest.mark.parametrize("name", LEARNERS)
def test_losses_fall_on_a_fixed_batch(name: str) -> None:
    learner = make(name, [0])
    starts = learner.block(draw_starts)[0]
    batch = batch_of(learner, starts)
    draws = learner.draw(torch.Generator().manual_seed(0), 1)
    draws = type(draws)(*(getattr(draws, one.name)[0][None] for one in dataclasses.fields(draws)))
    losses = [learner.apply(batch, draws)["bc_loss"].item() for _ in range(300)]
    assert losses[-1] < 0.7 * losses[0]


def test_targets_follow_with_the_parameters_before_the_step() -> None:
    learner = make("qgf", [0])
    train(learner, 1)
    # at the first step a target equals what it follows, so moving towards the old parameters moves nothing
    fresh = make("qgf", [0])
    for target, begun in zip(
        learner.networks["target_critic"].parameters(), fresh.networks["critic"].parameters(), strict=True
    ):
        torch.testing.assert_close(target, begun)
    assert not torch.equal(next(learner.networks["critic"].parameters()), next(fresh.networks["critic"].parameters()))


@pytest.mark.parametrize("name", LEARNERS)
def test_the_policy_handed_on_is_the_network_that_was_trained(name: str) -> None:
    learner = make(name, [0, 1])
    train(learner, 3)
    field = learner.field()
    network = OfflineNetwork(field.network.name, 3, 2, 2, 8, 2)
    network.stack.load_state_dict(field.stack.part(1, 1).state_dict())
    observations, x, t = torch.randn(5, 3), torch.randn(5, 2, 2), torch.rand(5)
    inputs = {
        "plain_mlp": [observations, x.flatten(1), t[:, None]],
        "normed_mlp": [observations, x.flatten(1), sinusoidal(t)],
        "one_step_mlp": [observations, x.flatten(1)],
    }[field.network.name]
    said = field.stack(torch.cat(inputs, 1).expand(2, -1, -1))[1].view(5, 2, 2)
    expected = said - x if field.network.name == "one_step_mlp" else said
    torch.testing.assert_close(network(observations, x, t), expected)


def test_pulling_back_covers_the_fraction_that_was_drawn() -> None:
    """With a constant velocity c the pulled-back chunk is x - d c, at f = 1 - d."""
    actor = StackedMLP(3 + 4 + 1, 4, 1, 8, 1)
    with torch.no_grad():
        actor.weights[-1].zero_()
        actor.biases[-1].copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    networks = RQLNetworks(actor, actor, actor, actor)
    chunks, reversal = torch.randn(1, 6, 4), torch.rand(1, 6)
    x = pull_back(networks, torch.randn(1, 6, 3), chunks, reversal, 5)
    torch.testing.assert_close(x, chunks - reversal[..., None] * actor.biases[-1][0])


def test_half_of_the_reversals_lie_on_the_grid() -> None:
    learner = make("rql", [0])
    draws = learner.draw(torch.Generator().manual_seed(0), 50)
    assert isinstance(draws, RQLDraws)
    steps = draws.reversal * 3
    on_grid = (steps - steps.round()).abs() < 1e-6
    assert on_grid[:, 2:].all()
    assert not on_grid[:, :2].any()
    assert set(steps[:, 2:].round().unique().tolist()) == {0, 1, 2, 3}


def test_expectiles_weigh_what_lies_above() -> None:
    torch.testing.assert_close(expectile_loss(torch.tensor([2.0, -2.0, 0.0]), 0.9), torch.tensor([3.6, 0.4, 0.0]))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"horizon": 0}, "horizon"),
        ({"discount": 1.5}, "discount"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"expectile": 1.0}, "expectile"),
        ({"rho": -1.0}, "rho"),
        ({"batch_size": 5}, "batch_size"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, float], what: str) -> None:
    with pytest.raises(InvalidInputError, match=what):
        dataclasses.replace(RQLConfig(), **changes)


def test_the_same_seed_twice_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="different"):
        make("rql", [1, 1])


def test_layers_may_have_different_widths() -> None:
    network = StackedMLP(3, 2, 4, [8, 5], norm="before", norm_last=False)
    assert [tuple(one.shape) for one in network.weights] == [(4, 3, 8), (4, 8, 5), (4, 5, 2)]
    assert len(network.scales) == 1
    part = network.part(1, 2)
    inputs = torch.randn(4, 6, 3)
    torch.testing.assert_close(part(inputs[1:3]), network(inputs)[1:3])


def test_a_seeds_weights_do_not_depend_on_the_others() -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    many, one = StackedMLP(3, 2, 6, 4, 1), StackedMLP(3, 2, 2, 4, 1)
    many.reset(generators(5, 6, 7))
    one.reset(generators(6))
    for wide, own in zip(many.weights, one.weights, strict=True):
        assert torch.equal(wide[2:4], own)
    bounds = [(6 / (a + b)) ** 0.5 for a, b in itertools.pairwise([3, 4, 2])]
    assert all(wide.abs().max() <= bound for wide, bound in zip(many.weights, bounds, strict=True))
