"""A steered policy inside LeRobot: found by its name, saved, loaded, and run by LeRobot's own commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import pytest
import torch

from counterflow.cli import main
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.policies import Normaliser
from counterflow.policies.lerobot import load_lerobot
from counterflow.reasoners import Direction
from counterflow.steering import ChunkRegressor, FlowReversal, RegressorConfig, SteeredPolicy, binding_of, steer_learned

Make = Callable[..., Any]
KINDS = ("smolvla", "pi05", "history")


def noise_policy(policy: Any, out: Path, seed: int = 0) -> ChunkRegressor:
    """An untrained one; what it says depends on the features all the same."""
    torch.manual_seed(seed)
    spec = policy.action_spec
    example = {name: torch.rand(1, *feature.shape) for name, feature in policy.policy.config.input_features.items()}
    width = policy.features(policy.encode({**example, "task": "push"})).shape[1]
    size = spec.horizon * spec.dim
    regressor = ChunkRegressor(
        RegressorConfig(members=2, width=16, depth=1),
        Normaliser(torch.zeros(width), torch.ones(width)),
        Normaliser(torch.zeros(size), torch.ones(size)),
        binding_of(policy, policy.steps, policy.solver),
    ).requires_grad_(False)
    regressor.save(out)
    return regressor


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, shared: Make, tmp_path: Path) -> tuple[Any, Path]:
    made = shared(request.param)
    return made, made.save(tmp_path / "base")


def loaded(folder: Path) -> tuple[Any, Any, Any]:
    """Open a folder as LeRobot's commands do."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    return policy, *make_pre_post_processors(config, pretrained_path=str(folder))


def test_lerobot_finds_it_by_its_distribution() -> None:
    code = (
        "from lerobot.utils.import_utils import register_third_party_plugins as r; r()\n"
        "from lerobot.configs.policies import PreTrainedConfig as c\n"
        "from lerobot.policies.factory import get_policy_class as g\n"
        "assert 'counterflow' in c.get_known_choices(); print(g('counterflow').__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "CounterflowPolicy"


class TestExport:
    def test_without_steering_it_is_the_base_policy(self, saved: tuple[Any, Path], tmp_path: Path) -> None:
        made, base = saved
        assert main(["lerobot", "export", str(base), "--out", str(tmp_path / "out")]) == 0
        policy, before, after = loaded(tmp_path / "out")
        observation = made.observation()
        with mock.patch("counterflow.steering.start._fresh") as fresh:
            spec = policy._base.action_spec
            noise = torch.randn(2, spec.horizon, spec.state_dim)
            fresh.return_value = noise
            actions = [after(policy.select_action(before(dict(observation)))) for _ in range(policy.executed)]
        own = made.own_chunk(observation, noise)[:, : policy.executed]
        torch.testing.assert_close(torch.stack(actions, 1), own, atol=1e-4, rtol=1e-4)

    def test_a_noise_policy_goes_along(self, saved: tuple[Any, Path], tmp_path: Path) -> None:
        made, base = saved
        frozen = load_lerobot(base)
        regressor = noise_policy(frozen, tmp_path / "noise-policy")
        out = tmp_path / "out"
        arguments = ["lerobot", "export", str(base), "--noise-policy", str(tmp_path / "noise-policy")]
        assert main([*arguments, "--out", str(out)]) == 0
        (tmp_path / "noise-policy.safetensors").unlink()
        config = json.loads((out / "config.json").read_text())
        assert config["type"] == "counterflow"
        assert config["fingerprint"] == frozen.fingerprint
        policy, before, _ = loaded(out)
        observation = made.observation()
        expected = steer_learned(frozen, regressor).act(observation, rng=0)
        torch.testing.assert_close(policy.predict_action_chunk(before(dict(observation))), expected.actions)

    def test_another_base_in_its_place_is_refused(self, saved: tuple[Any, Path], tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        _, base = saved
        assert main(["lerobot", "export", str(base), "--out", str(tmp_path / "out")]) == 0
        tensors = load_file(base / "model.safetensors")
        name = next(name for name in sorted(tensors) if "action_out_proj.bias" in name or "noise_predictor" in name)
        tensors[name] = tensors[name] + 0.1
        save_file(tensors, base / "model.safetensors")
        with pytest.raises(MismatchError, match="this steered policy was made for"):
            loaded(tmp_path / "out")

    def test_a_noise_policy_of_another_base_is_refused(self, make: Make, tmp_path: Path, capsys: Any) -> None:
        first, second = make("smolvla"), make("smolvla")
        with torch.no_grad():
            second.policy.model.action_out_proj.bias.add_(0.1)
        noise_policy(second.wrapped(), tmp_path / "noise-policy")
        base = first.save(tmp_path / "base")
        arguments = ["lerobot", "export", str(base), "--noise-policy", str(tmp_path / "noise-policy")]
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert "another frozen policy" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()


class TestPolicy:
    def make(self, base: Path, **settings: Any) -> Any:
        from lerobot_policy_counterflow import CounterflowConfig
        from lerobot_policy_counterflow.modeling_counterflow import CounterflowPolicy

        return CounterflowPolicy(CounterflowConfig(base=str(base), device="cpu", **settings))

    def test_chunks_are_used_up_before_it_decides_again(self, saved: tuple[Any, Path]) -> None:
        made, base = saved
        policy = self.make(base, n_action_steps=3)
        batch = made.observation()
        with mock.patch.object(policy, "predict_action_chunk", wraps=policy.predict_action_chunk) as decide:
            actions = [policy.select_action(dict(batch)) for _ in range(7)]
            assert decide.call_count == 3
            policy.reset()
            policy.select_action(dict(batch))
            assert decide.call_count == 4
        assert actions[0].shape == (2, 4)
        assert not torch.equal(actions[0], actions[3])

    def test_history_is_kept_for_a_base_that_sees_several_moments(self, shared: Make, tmp_path: Path) -> None:
        made = shared("history")
        base = made.save(tmp_path / "base")
        policy = self.make(base, n_action_steps=1)
        moments = [made.observation(seed=seed) for seed in range(4)]
        seen = []
        with mock.patch.object(policy._base, "encode", wraps=policy._base.encode) as encode:
            for moment in moments:
                policy.select_action(dict(moment))
                seen.append(encode.call_args.args[0]["observation.state"])
        states = [moment["observation.state"] for moment in moments]
        torch.testing.assert_close(seen[0], torch.stack([states[0]] * 3, 1))
        torch.testing.assert_close(seen[3], torch.stack(states[1:], 1))

    def test_hints_are_reversed(self, saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        made, base = saved
        told: list[Any] = []

        def reasoner(batch: dict[str, Any]) -> list[Direction]:
            told.append(sorted(batch))
            return [Direction((1, 0, 0)), Direction(defer=True)]

        monkeypatch.setattr(sys.modules[__name__], "reasoner", reasoner, raising=False)
        sys.modules["a_reasoner"] = sys.modules[__name__]
        policy = self.make(base, reasoner="a_reasoner:reasoner", translation=(0, 1, 2), gripper=3, reversal_steps=4)
        spec = policy._base.action_spec
        with mock.patch.object(policy._steered, "act", wraps=policy._steered.act) as act:
            policy.predict_action_chunk(made.observation())
        reference = act.call_args.args[1]
        assert "observation.state" in told[0]
        assert reference.active.tolist() == [True, False]
        wanted = spec.denormalise(reference.chunk)[0, spec.past :, 0]
        torch.testing.assert_close(wanted, torch.full_like(wanted, 0.7), atol=1e-4, rtol=0)
        assert isinstance(policy._steered.start, FlowReversal)

    def test_a_chunk_in_the_robots_units_is_a_hint_too(self, saved: tuple[Any, Path]) -> None:
        made, base = saved
        policy = self.make(base)
        spec = policy._base.action_spec
        policy.reasoner = lambda batch: torch.full((2, spec.horizon, spec.dim), 0.25)
        policy._steered = SteeredPolicy(policy._base, start=FlowReversal(4), steps=4)
        reference = policy._reference(made.observation())
        torch.testing.assert_close(
            spec.denormalise(reference.within(spec).chunk), torch.full((2, spec.horizon, spec.dim), 0.25)
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"base": ""}, "needs a base"),
            ({"n_action_steps": 99}, "n_action_steps is 99"),
            ({"reasoner": "nowhere:function"}, "'nowhere:function' can't be found"),
            ({"reasoner": "json:nothing"}, "can't be found"),
            ({"reasoner": "json:__name__"}, "is a str; expected a function"),
            ({"noise_policy": "x", "reasoner": "json:loads"}, "expected one of them"),
        ],
    )
    def test_settings_that_cannot_be(
        self, shared: Make, tmp_path: Path, settings: dict[str, Any], message: str
    ) -> None:
        base = shared("smolvla").save(tmp_path / "base")
        with pytest.raises(InvalidInputError, match=message):
            self.make(**{"base": base, **settings})

    def test_an_environment_with_other_actions_is_refused(self, shared: Make, tmp_path: Path) -> None:
        from lerobot.configs.types import FeatureType, PolicyFeature

        base = shared("smolvla").save(tmp_path / "base")
        with pytest.raises(MismatchError, match=r"takes actions of shape \(7,\) and .* acts in 4 dimensions"):
            self.make(base, output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))})

    def test_it_is_not_trained_here(self, shared: Make, tmp_path: Path) -> None:
        policy = self.make(shared("smolvla").save(tmp_path / "base"))
        with pytest.raises(InvalidInputError, match="counterflow distill"):
            policy.forward({})
        with pytest.raises(InvalidInputError, match="counterflow distill"):
            policy.config.get_optimizer_preset()
        assert not policy.train().training
        assert not any(parameter.requires_grad for parameter in policy.parameters())


class Tiny(gymnasium.Env[dict[str, Any], Any]):
    """An environment as LeRobot's are: pixels and the robot's state."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - gymnasium's way
    task_description = "push the cube"
    _max_episode_steps = 12

    def __init__(self, **_: Any) -> None:
        self.observation_space = gymnasium.spaces.Dict(
            {
                "pixels": gymnasium.spaces.Box(0, 255, (48, 64, 3), np.uint8),
                "agent_pos": gymnasium.spaces.Box(-10, 10, (5,), np.float32),
            }
        )
        self.action_space = gymnasium.spaces.Box(-9, 9, (4,), np.float32)
        self.render_mode = "rgb_array"

    def _seen(self) -> dict[str, Any]:
        return {
            "pixels": self.np_random.integers(0, 255, (48, 64, 3), dtype=np.uint8),
            "agent_pos": self.np_random.normal(size=5).astype(np.float32),
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._seen(), {"is_success": False}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        assert action.shape == (4,)
        self.steps += 1
        done = self.steps >= 12
        return self._seen(), float(action.sum()), done, False, {"is_success": done}

    def render(self) -> Any:
        return np.zeros((48, 64, 3), np.uint8)


def test_lerobot_eval_runs_it(shared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot's own command, from --policy.path to eval_info.json."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.envs.configs import EnvConfig
    from lerobot.scripts import lerobot_eval
    from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

    if "tiny" not in EnvConfig.get_known_choices():
        shapes = {
            ACTION: PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (5,)),
            "pixels": PolicyFeature(FeatureType.VISUAL, (48, 64, 3)),
        }
        names = {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels": OBS_IMAGE}
        # LeRobot's parser wants types, not their names, so this can't be a class in a file of postponed annotations.
        config = make_dataclass(
            "TinyConfig",
            [
                ("task", str | None, "Push-v0"),
                ("features", dict[str, PolicyFeature], field(default_factory=lambda: dict(shapes))),
                ("features_map", dict[str, str], field(default_factory=lambda: dict(names))),
            ],
            bases=(EnvConfig,),
            namespace={"gym_kwargs": property(lambda self: {})},
        )
        EnvConfig.register_subclass("tiny")(config)
        gymnasium.register("gym_tiny/Push-v0", Tiny, max_episode_steps=12)

    made = shared("smolvla")
    base = made.save(tmp_path / "base")
    noise_policy(load_lerobot(base), tmp_path / "noise-policy")
    arguments = ["lerobot", "export", str(base), "--noise-policy", str(tmp_path / "noise-policy")]
    assert main([*arguments, "--out", str(tmp_path / "steered")]) == 0
    out = tmp_path / "eval"
    command = [
        "lerobot-eval",
        f"--policy.path={tmp_path / 'steered'}",
        "--env.type=tiny",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
        "--eval.use_async_envs=false",
        f"--output_dir={out}",
        '--rename_map={"observation.image": "observation.images.top"}',
    ]
    monkeypatch.setattr(sys, "argv", command)
    with mock.patch.object(SteeredPolicy, "act", autospec=True, side_effect=SteeredPolicy.act) as act:
        lerobot_eval.eval_main()
    info = json.loads((out / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2
    assert info["overall"]["pc_success"] == 100.0
    assert act.call_count == 2  # twelve steps, eight actions a decision


def test_the_engine_of_lerobot_rollout_runs_it(shared: Make, tmp_path: Path) -> None:
    """What lerobot-rollout does at every tick of a robot, without the robot."""
    from lerobot.rollout.inference.sync import SyncInferenceEngine

    made = shared("smolvla")
    base = made.save(tmp_path / "base")
    assert main(["lerobot", "export", str(base), "--out", str(tmp_path / "steered")]) == 0
    policy, before, after = loaded(tmp_path / "steered")
    names = ["x", "y", "z", "gripper"]
    features = {"action": {"dtype": "float32", "shape": (4,), "names": names}}
    engine = SyncInferenceEngine(policy, before, after, features, names, "push the cube", "cpu", "tiny")
    engine.reset()
    rng = np.random.default_rng(0)
    frame = {
        "observation.state": rng.normal(size=5).astype(np.float32),
        "observation.images.top": rng.integers(0, 255, (48, 64, 3), dtype=np.uint8),
    }
    actions = torch.stack([engine.get_action(frame) for _ in range(9)])
    assert actions.shape == (9, 4)
    assert torch.isfinite(actions).all()
