"""A generalist sees objects, not columns: their order doesn't count, those that aren't there don't count, names do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import counterflow
from counterflow.errors import CheckpointError, InvalidInputError, MismatchError
from counterflow.flow import denoise, reverse
from counterflow.layout import ActionLayout, ObjectEntry, ObservationLayout
from counterflow.policies import (
    ActionSpec,
    GeneralistConfig,
    GeneralistPolicy,
    Normaliser,
    TaskDescription,
    bind,
    repeat_context,
    save_generalist,
)
from counterflow.policies.generalist import fit_normalisers, pack
from counterflow.policies.text import embed_texts

SMALL = GeneralistConfig(width=16, encoder_depth=1, depth=2, heads=2, name_dim=8, sentence_dim=12, max_objects=4)
# Robot: 4 numbers; an object: 4, of which a goal has its position only.
CUP = ObjectEntry("red cup", (4, 5, 6, 7))
BOWL = ObjectEntry("black bowl", (8, 9, 10, 11))
GOAL = ObjectEntry("goal", (12, 13, 14, None))
LAYOUT = ObservationLayout((0, 1, 2, 3), (CUP, BOWL, GOAL))
SENTENCE = "put the red cup into the black bowl"


def make(seed: int = 0, config: GeneralistConfig = SMALL) -> GeneralistPolicy:
    torch.manual_seed(seed)
    spec = ActionSpec(horizon=3, dim=4, low=(-1.0,) * 4, high=(1.0,) * 4, layout=ActionLayout((0, 1, 2), gripper=3))
    ones = Normaliser(torch.zeros(7), torch.ones(7))
    policy = GeneralistPolicy(config, Normaliser(torch.zeros(4), torch.ones(4)), ones, spec, "kitchen")
    with torch.no_grad():  # the gates begin at zero: without this nothing would depend on what is seen
        for parameter in policy.network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy.requires_grad_(False).eval()


def velocity(policy: GeneralistPolicy, observation: torch.Tensor) -> torch.Tensor:
    rows = len(observation)
    x = torch.linspace(-1, 1, 12).reshape(1, 3, 4).expand(rows, 3, 4)
    return policy.velocity(policy.encode(observation), x, torch.full((rows,), 0.3))


@pytest.fixture
def observation() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, 15)).astype(np.float32))


class TestObjects:
    def test_their_order_changes_nothing(self, observation: torch.Tensor) -> None:
        policy = make()
        other = replace(LAYOUT, objects=(GOAL, BOWL, CUP))
        first = velocity(policy.for_task(SENTENCE, LAYOUT), observation)
        assert first.shape == (2, 3, 4)
        torch.testing.assert_close(velocity(policy.for_task(SENTENCE, other), observation), first)

    def test_names_and_the_sentence_count(self, observation: torch.Tensor) -> None:
        policy = make()
        first = velocity(policy.for_task(SENTENCE, LAYOUT), observation)
        swapped = replace(LAYOUT, objects=(replace(CUP, name="black bowl"), replace(BOWL, name="red cup"), GOAL))
        assert not torch.allclose(velocity(policy.for_task(SENTENCE, swapped), observation), first, atol=1e-4)
        turned = policy.for_task("put the black bowl into the red cup", LAYOUT)
        assert not torch.allclose(velocity(turned, observation), first, atol=1e-4)

    def test_every_number_that_is_told_counts(self, observation: torch.Tensor) -> None:
        policy = make().for_task(SENTENCE, LAYOUT)
        first = velocity(policy, observation)
        for column in range(15):
            changed = observation.clone()
            changed[:, column] += 1.0
            assert not torch.allclose(velocity(policy, changed), first, atol=1e-5), column

    def test_packed_with_tasks_of_more_objects_a_task_gives_the_same(self, observation: torch.Tensor) -> None:
        """Masking: rooms that are left empty have no influence."""
        policy = make()
        alone = ObservationLayout((0, 1, 2, 3), (CUP,))
        tasks = [TaskDescription(SENTENCE, LAYOUT), TaskDescription("lift the red cup", alone)]
        many = policy.for_tasks(tasks)
        rows = observation.numpy()
        packed = np.concatenate([pack(rows, 0, LAYOUT, 3), pack(rows, 1, alone, 3)])
        together = velocity(many, torch.from_numpy(packed))
        torch.testing.assert_close(together[:2], velocity(policy.for_task(SENTENCE, LAYOUT), observation))
        one = policy.for_task("lift the red cup", alone)
        assert one.observation_dim == 8
        torch.testing.assert_close(together[2:], velocity(one, observation[:, :8]))
        assert policy.tasks is None

    def test_features_have_one_size_for_all_tasks(self, observation: torch.Tensor) -> None:
        policy = make()
        alone = policy.for_task("lift", ObservationLayout((0, 1, 2, 3), (CUP,)))
        sizes = {
            one.features(one.encode(seen)).shape[1]
            for one, seen in ((policy.for_task(SENTENCE, LAYOUT), observation), (alone, observation[:, :8]))
        }
        assert sizes == {4 + 4 * 7 + 12}

    def test_normalisers_look_at_what_is_told_alone(self) -> None:
        rng = np.random.default_rng(1)
        rows = rng.normal(3.0, 2.0, (4000, 15)).astype(np.float32)
        robot, objects = fit_normalisers(pack(rows, 0, LAYOUT, 5), [TaskDescription(SENTENCE, LAYOUT)])
        assert (robot.dim, objects.dim) == (4, 7)
        torch.testing.assert_close(robot.offset, torch.full((4,), 3.0), atol=0.2, rtol=0)
        torch.testing.assert_close(objects.offset[:4], torch.full((4,), 3.0), atol=0.2, rtol=0)
        torch.testing.assert_close(objects.scale[:4], torch.full((4,), 2.0), atol=0.2, rtol=0)


class TestAsABasePolicy:
    def test_it_reverses_and_denoises(self, observation: torch.Tensor) -> None:
        policy = make().for_task(SENTENCE, LAYOUT)
        field = bind(policy, policy.encode(observation))
        chunk = denoise(field, torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), 50)
        back = denoise(field, reverse(field, chunk, 50), 50)
        assert (back - chunk).abs().mean() < 0.3

    def test_attention_as_it_is_compiled_is_the_same(
        self, observation: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = ObservationLayout((0, 1, 2, 3), (CUP,))
        policy = make().for_tasks([TaskDescription(SENTENCE, LAYOUT), TaskDescription("wait", alone)])
        packed = torch.from_numpy(pack(observation.numpy(), 1, alone, 3))  # two objects are masked
        plain = velocity(policy, packed)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            patch.setattr(functional, "scaled_dot_product_attention", None)
            torch.testing.assert_close(velocity(policy, packed), plain)

    def test_contexts_repeat(self, observation: torch.Tensor) -> None:
        policy = make().for_task(SENTENCE, LAYOUT)
        x, t = torch.ones(2, 3, 4), torch.full((2,), 0.5)
        context = policy.encode(observation)
        many = policy.velocity(repeat_context(context, 3), x.repeat_interleave(3, 0), t.repeat_interleave(3))
        torch.testing.assert_close(many[::3], policy.velocity(context, x, t))

    def test_without_a_task_it_says_how_to_give_one(self, observation: torch.Tensor) -> None:
        policy = make()
        with pytest.raises(MismatchError, match="for_task"):
            policy.encode(observation)
        with pytest.raises(MismatchError, match="which object"):
            policy.for_task(SENTENCE, None)

    def test_what_does_not_fit_is_refused(self, observation: torch.Tensor) -> None:
        policy = make()
        bound = policy.for_task(SENTENCE, LAYOUT)
        with pytest.raises(MismatchError, match=r"sees \(B, 15\)"):
            bound.encode(observation[:, :9])
        with pytest.raises(InvalidInputError, match="NaN"):
            bound.encode(observation * torch.nan)
        with pytest.raises(MismatchError, match="4 numbers of the robot|3 numbers of the robot"):
            policy.for_task(SENTENCE, replace(LAYOUT, robot=(0, 1, 2)))
        with pytest.raises(MismatchError, match="room for 4"):
            policy.for_task(SENTENCE, replace(LAYOUT, objects=(CUP,) * 5))
        with pytest.raises(InvalidInputError, match="divided among 3 heads"):
            GeneralistConfig(width=16, heads=3)


class TestFiles:
    def test_it_comes_back_the_same(self, observation: torch.Tensor, tmp_path: Path) -> None:
        policy = make()
        policy.provenance = {"seed": 3}
        path = save_generalist(policy.for_task(SENTENCE, LAYOUT), tmp_path / "generalist")
        loaded = counterflow.load(path)
        assert isinstance(loaded, GeneralistPolicy)
        assert (loaded.fingerprint, loaded.provenance) == (policy.fingerprint, {"seed": 3})
        torch.testing.assert_close(
            velocity(loaded.for_task(SENTENCE, LAYOUT), observation),
            velocity(policy.for_task(SENTENCE, LAYOUT), observation),
            rtol=0,
            atol=0,
        )
        assert make(1).fingerprint != policy.fingerprint

    def test_damage_is_noticed(self, tmp_path: Path) -> None:
        path = save_generalist(make(), tmp_path / "generalist")
        content = bytearray(path.read_bytes())
        content[-10] ^= 0xFF
        path.write_bytes(bytes(content))
        with pytest.raises(CheckpointError):
            counterflow.load(path)


class TestText:
    def test_texts_that_share_words_lie_near(self) -> None:
        bowl, other, cup = embed_texts(["black bowl", "white bowl", "red cup"], 64)
        assert torch.cosine_similarity(bowl, other, dim=0) > torch.cosine_similarity(bowl, cup, dim=0) + 0.2
        assert bowl.pow(2).mean() == pytest.approx(1.0, abs=1e-5)

    def test_order_counts_and_case_does_not(self) -> None:
        first, second, third = embed_texts(["bowl on plate", "plate on bowl", "Bowl, on plate!"], 32)
        assert not torch.allclose(first, second)
        torch.testing.assert_close(first, third)
        # The same on every machine: it is part of what a trained policy is.
        assert embed_texts(["bowl"], 4)[0].tolist() == pytest.approx(embed_texts(["bowl"], 4)[0].tolist())

    def test_unknown_encoders_are_refused(self) -> None:
        with pytest.raises(InvalidInputError, match="hashed"):
            embed_texts(["bowl"], 4, "word2vec")
        with pytest.raises(InvalidInputError, match="at least 1"):
            embed_texts(["bowl"], 0)
