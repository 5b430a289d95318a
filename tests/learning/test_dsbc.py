"""DSBC: the loss by hand, learning, held-out episodes, early stopping, and what can't be learned from."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from counterflow.binding import Binding
from counterflow.errors import DatasetError, InvalidInputError, MismatchError
from counterflow.learning import DSBCConfig, DSBCLearner, NoiseExamples, distil
from counterflow.learning.dsbc import Draws, join, regression_loss
from counterflow.learning.held_out import Progress, hold_out
from counterflow.policies import ActionSpec, FieldPolicy
from counterflow.policies.ensemble import EnsembleMLP
from counterflow.steering import ChunkRegressor, Intention, LatentShape, LearnedNoise, RegressorConfig, SteeringContext

BINDING = Binding("abc", "ogbench/x", 2, 3, 5)
INPUTS = 4
SMALL = RegressorConfig(members=2, width=32, depth=1)
CONFIG = DSBCConfig(
    SMALL, steps=400, batch_size=64, learning_rate=1e-2, dropout=0.0, input_noise=0.0, evaluate_every=20
)


def examples(count: int = 240, seed: int = 0, number: int = 12, **changes: Any) -> NoiseExamples:
    """Noises that are a linear function of the inputs, in units far from normalised ones."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((count, INPUTS)).astype(np.float32)
    linear = np.random.default_rng(99).standard_normal((INPUTS, 6)).astype(np.float32)
    arrays: dict[str, Any] = {
        "inputs": 50 + 20 * inputs,
        "targets": (0.3 + 0.4 * inputs @ linear).reshape(count, 2, 3),
        "episodes": np.arange(count, dtype=np.int64) * number // count,
        "binding": BINDING,
    }
    return NoiseExamples(**{**arrays, **changes})


class TestIntention:
    CONFIG = replace(CONFIG, regressor=replace(SMALL, intention=Intention(penalty=0.5)))

    def test_both_are_learned_from_the_same_examples(self) -> None:
        given = examples()
        chunks = 1 - 0.5 * given.targets
        made = distil(replace(given, chunks=chunks), self.CONFIG)
        assert made.intention is not None
        shown = torch.from_numpy(given.inputs)
        for regressor, wanted in ((made, given.targets), (made.intention, chunks)):
            missed = (regressor(shown) - torch.from_numpy(wanted)).square().mean().sqrt()
            assert missed < 0.2 * wanted.std()
        assert made.intention.config == RegressorConfig("action", members=2, width=32, depth=1, bound=None)
        assert same(weights(made), weights(distil(given, CONFIG)))  # the noise policy is the one without
        assert made.provenance["intention"]["examples"] == 240
        again = distil(replace(given, chunks=chunks), replace(self.CONFIG, steps=1), initial=made)
        assert again.intention is not None
        assert not same(weights(again.intention), weights(made.intention))
        missed = (again.intention(shown) - torch.from_numpy(chunks)).square().mean().sqrt()
        assert missed < 0.3 * chunks.std()  # it went on from what was learned

    def test_without_chunks_there_is_nothing_to_learn_it_from(self) -> None:
        with pytest.raises(DatasetError, match="no chunks to learn an intention from"):
            distil(examples(), replace(self.CONFIG, steps=1))
        with pytest.raises(DatasetError, match="chunks"):
            replace(examples(), chunks=np.zeros((240, 1, 3), np.float32))

    def test_lots_are_joined_with_their_chunks(self) -> None:
        lots = [replace(examples(20, seed, 2), chunks=examples(20, seed + 5, 2).targets) for seed in (0, 1)]
        joined = join(lots).chunks
        assert joined is not None
        np.testing.assert_array_equal(joined, np.concatenate([lot.chunks for lot in lots if lot.chunks is not None]))
        assert join([lots[0], examples(20, 1, 2)]).chunks is None


def weights(regressor: ChunkRegressor) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in regressor.network.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class TestLoss:
    def test_by_hand(self) -> None:
        """Numpy, one member and one example at a time: noise on the inputs, layer norm, GELU, dropout, mean square."""
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        network = EnsembleMLP(3, 2, members=2, width=5, depth=2)
        inputs = rng.standard_normal((7, 3)).astype(np.float32)
        targets = rng.standard_normal((7, 2)).astype(np.float32)
        chosen = np.array([[0, 6, 6], [2, 3, 4]])
        noise = rng.standard_normal((2, 3, 3)).astype(np.float32)
        masks = [(rng.random((2, 3, 5)) < 0.7).astype(np.float32) / 0.7 for _ in range(2)]
        draws = Draws(
            torch.from_numpy(chosen), torch.from_numpy(noise), tuple(torch.from_numpy(mask) for mask in masks)
        )
        found = regression_loss(network, torch.from_numpy(inputs), torch.from_numpy(targets), draws, 0.3)

        layers = [
            (w.detach().numpy(), b.detach().numpy()) for w, b in zip(network.weights, network.biases, strict=True)
        ]
        for member in range(2):
            errors = []
            for place, example in enumerate(chosen[member]):
                hidden = inputs[example] + 0.3 * noise[member, place]
                for depth in range(2):
                    hidden = hidden @ layers[depth][0][member] + layers[depth][1][member, 0]
                    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
                    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
                    hidden = hidden * masks[depth][member, place]
                said = hidden @ layers[2][0][member] + layers[2][1][member, 0]
                errors.append((said - targets[example]) ** 2)
            assert found[member].item() == pytest.approx(np.mean(errors), rel=1e-4)

    def test_what_is_drawn(self) -> None:
        """Each member draws from the examples that it does not hold out, evenly; masks keep the mean."""
        config = replace(CONFIG, batch_size=4000, dropout=0.25, held_out=0.5, regressor=replace(SMALL, depth=2))
        learner = DSBCLearner(examples(), config, seed=3)
        draws = learner.draw()
        held_out = hold_out(examples().episodes, 2, 0.5, 3)
        for member in range(2):
            drawn = np.bincount(draws.examples[member].numpy(), minlength=240)
            assert not drawn[held_out[member]].any()
            assert drawn[~held_out[member]].min() > 0
            assert drawn.max() < 70  # 33 on average
        assert len(draws.masks) == 2
        for mask in draws.masks:
            assert mask.unique().tolist() == pytest.approx([0, 1 / 0.75])
            assert mask.mean().item() == pytest.approx(1, abs=0.02)
        assert draws.input_noise.shape == (2, 4000, INPUTS)
        assert draws.input_noise.std().item() == pytest.approx(1, abs=0.02)
        assert DSBCLearner(examples(), CONFIG, 0).draw().masks == ()


class TestLearning:
    def test_a_linear_map_on_inputs_that_were_never_seen(self) -> None:
        fresh = examples(seed=1)
        config = replace(CONFIG, input_noise=0.05, dropout=0.02)
        said = distil(examples(), config)(torch.from_numpy(fresh.inputs)).numpy()
        spread = fresh.targets.std(0)
        assert (np.sqrt(np.square(said - fresh.targets).mean(0)) < 0.25 * spread).all()

    def test_behaviour_cloning_is_the_same_recipe_with_other_targets(self) -> None:
        noise, action = (
            distil(examples(), replace(CONFIG, steps=30, regressor=replace(SMALL, target=target)))
            for target in ("noise", "action")
        )
        assert action.config.target == "action"
        assert same(weights(noise), weights(action))

    def test_units_are_those_of_the_data(self) -> None:
        """The normalisers are fitted to all examples, and the best constant is the mean of the targets."""
        made = distil(examples(), replace(CONFIG, steps=1))
        torch.testing.assert_close(made.input_normaliser.offset, torch.from_numpy(examples().inputs.mean(0)))
        torch.testing.assert_close(
            made.output_normaliser.offset, torch.from_numpy(examples().targets.reshape(240, -1).mean(0))
        )

    def test_weight_decay_and_noise_on_the_inputs_hold_the_network_back(self) -> None:
        def reach(**changes: Any) -> float:
            made = distil(examples(), replace(CONFIG, held_out=0.0, steps=150, **changes))
            return float(torch.stack([weight.square().sum() for weight in weights(made)]).sum())

        def slope(**changes: Any) -> float:
            made = distil(examples(), replace(CONFIG, held_out=0.0, steps=150, **changes))
            inputs = torch.from_numpy(examples().inputs)
            return float((made(inputs + 1) - made(inputs)).square().mean())

        assert reach(weight_decay=20.0) < 0.7 * reach(weight_decay=0.0)
        assert slope(input_noise=3.0) < 0.5 * slope(input_noise=0.0)

    def test_a_bound_is_kept_however_large_the_targets(self) -> None:
        far = examples(targets=np.full((240, 2, 3), 7.0, np.float32))
        config = replace(CONFIG, steps=1, regressor=replace(SMALL, bound=3.0))
        assert distil(far, config)(torch.full((1, INPUTS), 50.0)).abs().max() == 3.0

    def test_the_learning_rate_falls_along_a_cosine(self) -> None:
        learner = DSBCLearner(examples(), replace(CONFIG, steps=10, learning_rate=0.4), 0)
        rates = []
        for _ in range(10):
            learner.update()
            rates.append(learner._optimiser.param_groups[0]["lr"])
        assert (rates[0], rates[5]) == (pytest.approx(0.4), pytest.approx(0.2))
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < 0.011

    def test_what_comes_out_is_frozen_and_says_how_it_went(self) -> None:
        made = distil(examples(), replace(CONFIG, steps=40))
        assert not made.training
        assert not any(parameter.requires_grad for parameter in made.parameters())
        assert (made.provenance["updates"], made.provenance["examples"]) == (40, 240)
        assert len(made.provenance["held_out_loss"]) == 2
        assert made.binding == BINDING

    def test_progress(self) -> None:
        told: list[Progress] = []
        distil(examples(), replace(CONFIG, steps=50), on_progress=told.append)
        assert [one.step for one in told] == [20, 40, 50]
        assert told[-1].loss < told[0].loss
        assert told[-1].held_out_loss <= told[0].held_out_loss < 2
        told.clear()
        distil(examples(), replace(CONFIG, steps=20, held_out=0.0), on_progress=told.append)
        assert np.isnan(told[0].held_out_loss)


class TestSeeds:
    def test_the_same_seed_gives_the_same_weights(self) -> None:
        config = replace(CONFIG, steps=25, dropout=0.1, input_noise=0.1)
        torch.manual_seed(1)
        first = weights(distil(examples(), config, seed=4))
        torch.manual_seed(2)
        before = torch.random.get_rng_state()
        assert same(weights(distil(examples(), config, seed=4)), first)
        assert torch.equal(torch.random.get_rng_state(), before)  # and the caller's own draws are not touched
        assert not same(weights(distil(examples(), config, seed=5)), first)

    @pytest.mark.parametrize("seed", [-1, 2**31, 1.5])
    def test_seeds_out_of_range(self, seed: Any) -> None:
        with pytest.raises(InvalidInputError, match="seed is"):
            distil(examples(), CONFIG, seed=seed)


def noisy() -> NoiseExamples:
    """Targets that have nothing to do with the inputs: all that can be learned of them is learned by heart."""
    rng = np.random.default_rng(5)
    return examples(60, targets=rng.standard_normal((60, 2, 3)).astype(np.float32))


class TestEarlyStopping:
    def test_each_member_keeps_the_weights_of_its_best_evaluation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = replace(CONFIG, steps=200, evaluate_every=10, patience=1000)
        held_out = torch.from_numpy(hold_out(noisy().episodes, 2, 0.2, 7))
        seen: list[list[Tensor]] = []
        losses: list[Tensor] = []
        evaluate = DSBCLearner.evaluate

        def watch(learner: DSBCLearner) -> bool:
            seen.append(weights(learner.regressor))
            with torch.no_grad():
                said = learner.regressor.network(
                    learner.regressor.prepare(torch.from_numpy(noisy().inputs)).expand(2, -1, -1)
                )
                wanted = learner.regressor.output_normaliser.normalise(torch.from_numpy(noisy().targets).flatten(1))
            losses.append(torch.stack([(said[m] - wanted)[held_out[m]].square().mean() for m in range(2)]))
            return evaluate(learner)

        monkeypatch.setattr(DSBCLearner, "evaluate", watch)
        made = distil(noisy(), config, seed=7)
        assert len(seen) == 20
        best = torch.stack(losses).argmin(0).tolist()
        assert max(best) < 19  # learning by heart made it worse
        for place, weight in enumerate(weights(made)):
            for member in range(2):
                assert torch.equal(weight[member], seen[best[member]][place][member])
        assert made.provenance["held_out_loss"] == pytest.approx(torch.stack(losses).amin(0).tolist(), abs=1e-5)

    def test_it_stops_when_no_member_gets_better(self) -> None:
        config = replace(CONFIG, steps=5000, evaluate_every=10, patience=3)
        told: list[Progress] = []
        made = distil(noisy(), config, on_progress=told.append)
        assert made.provenance["updates"] < 1000
        assert [one.held_out_loss for one in told[-4:]] == [told[-1].held_out_loss] * 4
        assert told[-5].held_out_loss > told[-4].held_out_loss

    def test_without_held_out_episodes_it_goes_to_the_end(self) -> None:
        for data, changes in ((noisy(), {"held_out": 0.0}), (examples(60, number=1), {})):
            made = distil(data, replace(CONFIG, steps=45, patience=1, evaluate_every=10, **changes))  # type: ignore[arg-type]
            assert made.provenance["updates"] == 45
            assert made.provenance["held_out_loss"] == []

    def test_no_member_ever_learns_from_what_it_holds_out(self) -> None:
        """Changing the targets of a member's held-out episodes changes the other member alone."""
        config = replace(CONFIG, steps=20, evaluate_every=20)
        held_out = hold_out(examples().episodes, 2, 0.2, 0)
        assert not (held_out[0] & held_out[1]).any()
        swapped = examples().targets.copy()
        swapped[held_out[0]] = swapped[held_out[0]][::-1]  # the normalisers stay as they were, to rounding
        first, second = (weights(distil(data, config)) for data in (examples(), examples(targets=swapped)))
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=0)
        assert not torch.allclose(first[0][1], second[0][1], atol=1e-4)


def lot(episodes: list[int], value: float) -> NoiseExamples:
    count = len(episodes)
    inputs = np.full((count, INPUTS), value, np.float32)
    return NoiseExamples(inputs, np.full((count, 2, 3), value, np.float32), np.array(episodes, np.int64), BINDING)


class TestJoin:
    @given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=5), st.data())
    def test_order_is_kept_and_episodes_are_kept_apart(self, lots: list[list[int]], data: Any) -> None:
        parts = [lot(episodes, float(index)) for index, episodes in enumerate(lots)]
        parts += [parts[index] for index in data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=3))]
        joined = join(parts)
        np.testing.assert_array_equal(joined.inputs, np.concatenate([part.inputs for part in parts]))
        np.testing.assert_array_equal(joined.targets, np.concatenate([part.targets for part in parts]))
        # A pair is of the same episode exactly where it was of the same episode of the same lot.
        came_from = [
            (int(inputs[0]), int(name))
            for part in parts
            for inputs, name in zip(part.inputs, part.episodes, strict=True)
        ]
        pairs = set(zip(came_from, joined.episodes.tolist(), strict=True))
        assert len(pairs) == len({before for before, _ in pairs}) == len({after for _, after in pairs})

    def test_other_policies_and_other_inputs_are_refused_by_name(self) -> None:
        other = replace(lot([0], 0.0), binding=replace(BINDING, steps=10))
        with pytest.raises(MismatchError, match=r"a \(compared with b\) belongs to another.*steps 5, not 10"):
            join([lot([0], 0.0), other], ["a", "b"])
        wide = replace(lot([0], 0.0), inputs=np.zeros((1, 7), np.float32))
        with pytest.raises(MismatchError, match=r"the data 0 has inputs of 4 numbers, the data 1 of 7"):
            join([lot([0], 0.0), wide])


class TestGoingOn:
    def test_one_step_leads_not_far_from_where_it_began(self) -> None:
        first = distil(examples(), replace(CONFIG, steps=100))
        before = weights(first)
        after = distil(examples(), replace(CONFIG, steps=1, learning_rate=1e-3), seed=1, initial=copy.deepcopy(first))
        change = max(float((one - other).abs().max()) for one, other in zip(before, weights(after), strict=True))
        assert 0 < change < 3e-3
        anew = weights(distil(examples(), replace(CONFIG, steps=1, learning_rate=1e-3), seed=1))
        assert max(float((one - other).abs().max()) for one, other in zip(before, anew, strict=True)) > 0.1

    def test_units_stay_those_of_the_beginning(self) -> None:
        first = distil(examples(), replace(CONFIG, steps=1))
        other = examples(targets=examples().targets + 1)
        again = distil(other, replace(CONFIG, steps=1), initial=copy.deepcopy(first))
        assert torch.equal(again.output_normaliser.offset, first.output_normaliser.offset)

    def test_another_policys_is_refused(self) -> None:
        first = distil(examples(), replace(CONFIG, steps=1))
        other = examples(binding=replace(BINDING, policy="other"))
        with pytest.raises(MismatchError, match="the noise policy to go on from belongs to another"):
            distil(other, CONFIG, initial=first)

    def test_what_it_goes_on_from_stays_as_it_is(self) -> None:
        first = distil(examples(), replace(CONFIG, steps=5))
        before = weights(first)
        distil(examples(), replace(CONFIG, steps=5), initial=first)
        assert same(weights(first), before)

    @pytest.mark.parametrize("changes", [{"members": 3}, {"target": "action"}])
    def test_one_of_other_settings_is_refused(self, changes: dict[str, Any]) -> None:
        first = distil(examples(), replace(CONFIG, steps=1))
        with pytest.raises(MismatchError):
            distil(examples(), replace(CONFIG, steps=1, regressor=replace(SMALL, **changes)), initial=first)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"inputs": np.zeros((0, 4), np.float32)}, r"shape \(0, 4\); expected \(N, F\)"),
            ({"inputs": np.zeros((240, 0), np.float32)}, r"shape \(240, 0\)"),
            ({"inputs": np.zeros((240, 2, 2), np.float32)}, r"shape \(240, 2, 2\)"),
            ({"targets": np.zeros((240, 3, 2), np.float32)}, r"targets \(240, 3, 2\).*expected \(240, 2, 3\)"),
            ({"targets": np.zeros((239, 2, 3), np.float32)}, r"don't fit 240 inputs"),
            ({"episodes": np.zeros(239, np.int64)}, r"episodes \(239,\)"),
        ],
    )
    def test_shapes(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(DatasetError, match=words):
            examples(**changes)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("name", ["inputs", "targets"])
    def test_values_that_are_not_finite_are_named(self, name: str, value: float) -> None:
        array: npt.NDArray[np.float32] = getattr(examples(), name).copy()
        array[171].reshape(-1)[2] = value
        with pytest.raises(DatasetError, match=rf"{name} hold NaN .*first in example 171 \(episode 8\)"):
            replace(examples(), **{name: array})  # type: ignore[arg-type]

    def test_a_loss_that_runs_away(self) -> None:
        extreme = examples(targets=examples().targets.copy())
        learner = DSBCLearner(extreme, replace(CONFIG, steps=20), 0)
        learner.regressor.network.biases[-1].data.fill_(1e30)
        with pytest.raises(DatasetError, match=r"the loss is inf at update 20. Lower the learning rate"):
            learner.fit()

    @pytest.mark.parametrize(
        "changes",
        [
            {"steps": 0},
            {"batch_size": True},
            {"evaluate_every": 1.5},
            {"patience": 0},
            {"learning_rate": 0.0},
            {"learning_rate": float("nan")},
            {"dropout": 1.0},
            {"held_out": -0.1},
            {"held_out": 0.95},
            {"input_noise": float("nan")},
            {"weight_decay": -1.0},
        ],
    )
    def test_settings_out_of_range(self, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match=f"{next(iter(changes))} is .*expected"):
            DSBCConfig(**changes)


def test_the_prior_is_not_needed() -> None:
    """In a process where no velocity network can be made, and none can be evaluated."""
    code = """
import numpy as np
import counterflow.policies.flow_policy as flow_policy
import counterflow.policies.networks as networks
from counterflow.binding import Binding
from counterflow.learning import DSBCConfig, NoiseExamples, distil

def refuse(*_, **__):
    raise AssertionError("a flow policy was touched")

flow_policy.FlowPolicy.__init__ = networks.MLPNetwork.__init__ = networks.TransformerNetwork.__init__ = refuse
flow_policy.FlowPolicy.velocity = refuse
rng = np.random.default_rng(0)
examples = NoiseExamples(
    rng.standard_normal((40, 3)).astype(np.float32),
    rng.standard_normal((40, 2, 2)).astype(np.float32),
    np.arange(40) // 10,
    Binding("abc", "x", 2, 2, 5),
)
distil(examples, DSBCConfig(steps=3))
try:
    flow_policy.FlowPolicy(None, None, None)
except AssertionError:
    print("done")
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "done\n"


@pytest.mark.parametrize(
    "shape", [LatentShape("repeated"), LatentShape("low_rank", 2), LatentShape("low_rank", 2, "zero")]
)
def test_a_part_of_the_noise_is_learned_and_the_rest_is_the_priors(shape: LatentShape, tmp_path: Path) -> None:
    """What the network says is expanded; a low-rank latent's rest is drawn, a repeated one is the mean over time."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(64, 3)).astype(np.float32)
    coefficients = np.stack([inputs[:, :2]] * 4, 1) * np.linspace(0.5, 1, 4, dtype=np.float32)[:, None]
    binding = Binding("p", "f", 4, 2, 5)
    shown = NoiseExamples(inputs, coefficients.astype(np.float32), np.arange(64), binding)
    config = DSBCConfig(
        RegressorConfig(members=1, width=32, depth=1, latent=shape), steps=300, dropout=0.0, input_noise=0.0
    )
    regressor = distil(shown, config)
    said = regressor(torch.from_numpy(inputs))
    wanted = shape.expand(shape.project(torch.from_numpy(shown.targets)), 4)
    assert (said - wanted).abs().mean() < 0.25
    assert ChunkRegressor.load(regressor.save(tmp_path / "x")).config.latent == shape
    spec = ActionSpec(4, 2)
    base = FieldPolicy(lambda x, t, _: -x, spec, encode=lambda seen: seen)
    context = SteeringContext(None, 64, observation=torch.from_numpy(inputs))
    regressor.config = replace(regressor.config, inputs="observation")
    noises = [LearnedNoise(regressor)(base, context, torch.Generator().manual_seed(seed))[0] for seed in (0, 1)]
    assert torch.equal(*noises) == (shape.rest == "zero" or shape.kind == "repeated")
    torch.testing.assert_close(shape.project(noises[0]), shape.project(said), atol=1e-5, rtol=1e-5)
