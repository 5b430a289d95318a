"""From a folder of LeRobot's to a policy that can be steered; what can't be is refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import counterflow
from counterflow.errors import CheckpointError, InvalidInputError, MismatchError
from counterflow.policies import ActionLayout
from counterflow.policies import lerobot as adapter
from counterflow.policies.lerobot import LeRobotPolicy, load_lerobot
from counterflow.policies.lerobot_flows import FLOWS, NOT_FLOWS
from counterflow.steering import ChunkRegressor, SteeredPolicy, binding_of, steer

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(shared: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small policy on disk; tests that change it copy it."""
    return shared("multi_task_dit").save(tmp_path_factory.mktemp("saved") / "policy")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestFolder:
    def test_what_was_saved_acts_the_same(self, made: Any, tmp_path: Path) -> None:
        loaded = counterflow.load(f"lerobot:{made.save(tmp_path / 'policy')}")
        assert isinstance(loaded, LeRobotPolicy)
        original, observation = made.wrapped(), made.observation()
        plans = [SteeredPolicy(one, steps=3).act(observation, rng=1) for one in (loaded, original)]
        torch.testing.assert_close(plans[0].actions, plans[1].actions, atol=1e-5, rtol=1e-5)
        assert loaded.fingerprint == original.fingerprint
        assert not any(parameter.requires_grad for parameter in loaded.policy.parameters())

    def test_settings_are_taken(self, folder: Path) -> None:
        layout = ActionLayout((0, 1, 2), gripper=3)
        policy = load_lerobot(folder, layout=layout, low=(-1.0,) * 4, high=(1.0,) * 4, task="push the cube")
        assert policy.action_spec.layout == layout
        plan = steer(policy, "base").act({**_without_task(policy)}, rng=0)
        assert plan.actions.abs().max() <= 1

    def test_without_the_prefix_the_right_words_are_suggested(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match=f"say lerobot:{folder}"):
            counterflow.load(folder)

    @pytest.mark.parametrize(
        ("gone", "message"),
        [
            ("config.json", "has no config.json"),
            ("model.safetensors", "has no model.safetensors"),
            ("policy_preprocessor.json", "has no policy_preprocessor.json.*migration"),
            ("policy_postprocessor.json", "has no policy_postprocessor.json.*migration"),
        ],
    )
    def test_what_is_missing_is_named(self, copied: Path, gone: str, message: str) -> None:
        (copied / gone).unlink()
        with pytest.raises(CheckpointError, match=message):
            load_lerobot(copied)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null"])
    def test_a_damaged_config(self, copied: Path, text: str) -> None:
        (copied / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json can't be read"):
            load_lerobot(copied)

    def test_truncated_weights(self, copied: Path) -> None:
        weights = copied / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="multi_task_dit|truncated|can't load"):
            load_lerobot(copied)

    @pytest.mark.parametrize("kind", ["multi_task_dit", "smolvla", "pi05"])
    def test_weights_that_lack_a_tensor_never_become_random_ones(self, shared: Make, tmp_path: Path, kind: str) -> None:
        """LeRobot's loaders only log it, and pi0's only print it."""
        saved = shared(kind).save(tmp_path / "policy")
        tensors = load_file(saved / "model.safetensors")
        left_out = sorted(tensors)[-1]
        del tensors[left_out]
        save_file(tensors, saved / "model.safetensors")
        with pytest.raises(CheckpointError, match="1 tensors of the policy are missing"):
            load_lerobot(saved)

    def test_a_damaged_processor(self, copied: Path) -> None:
        (copied / "policy_postprocessor.json").write_text("{}")
        with pytest.raises(CheckpointError, match="LeRobot can't load"):
            load_lerobot(copied)

    def test_places_that_do_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no folder"):
            counterflow.load(f"lerobot:{tmp_path / 'nothing'}")
        with pytest.raises(CheckpointError, match=r"nobody/nothing is no folder.*can't be fetched from the hub"):
            counterflow.load("lerobot:nobody/nothing")
        with pytest.raises(InvalidInputError, match="names no policy"):
            counterflow.load("lerobot:")


class TestRefused:
    def test_every_policy_of_lerobot_is_either_steered_or_refused_with_a_reason(self) -> None:
        import lerobot.policies
        from lerobot.configs.policies import PreTrainedConfig

        assert lerobot.policies  # registers them
        known = set(PreTrainedConfig.get_known_choices())
        assert {"act", "diffusion", "groot", "xvla", "smolvla", "pi05"} <= known
        assert not known - set(FLOWS) - set(NOT_FLOWS) - {"counterflow"}

    @pytest.mark.parametrize("kind", sorted(NOT_FLOWS))
    def test_the_reason_is_given_before_any_weight_is_read(self, copied: Path, kind: str) -> None:
        change_json(copied / "config.json", type=kind)
        (copied / "model.safetensors").unlink()
        with pytest.raises(MismatchError, match="can't be steered: ") as refused:
            load_lerobot(copied)
        assert NOT_FLOWS[kind] in str(refused.value)
        assert "smolvla" in str(refused.value)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"type": "crystal_ball"}, MismatchError, "'crystal_ball', which this adapter doesn't know"),
            ({"objective": "diffusion"}, MismatchError, "objective 'diffusion'.*no velocity"),
            ({"use_relative_actions": True}, MismatchError, "relative to the state"),
            ({"adapt_to_pi_aloha": True}, MismatchError, "formulas of its own"),
            ({"use_peft": True}, MismatchError, "Merge the two"),
            ({"normalization_mapping": {"ACTION": "LOG"}}, CheckpointError, "unknown mode 'LOG'; known: MEAN_STD"),
        ],
    )
    def test_settings_that_cannot_be_steered(
        self, copied: Path, changes: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        change_json(copied / "config.json", **changes)
        with pytest.raises(error, match=message):
            load_lerobot(copied)

    def test_real_policies_that_are_no_flows(self, make: Make) -> None:
        from lerobot.policies.act.configuration_act import ACTConfig
        from lerobot.policies.act.modeling_act import ACTPolicy

        made = make("multi_task_dit")
        config = ACTConfig(
            chunk_size=4, n_action_steps=4, dim_model=16, n_heads=2, dim_feedforward=16, n_encoder_layers=1,
            pretrained_backbone_weights=None, device="cpu",
            input_features=made.policy.config.input_features, output_features=made.policy.config.output_features,
        )  # fmt: skip
        with pytest.raises(MismatchError, match="'act', which can't be steered: it regresses actions"):
            LeRobotPolicy(ACTPolicy(config), made.preprocessor, made.postprocessor)
        with pytest.raises(MismatchError, match="objective 'diffusion'"):
            make("multi_task_dit", objective="diffusion").wrapped()
        with pytest.raises(MismatchError, match="relative to the state"):
            make("pi05", use_relative_actions=True).wrapped()
        with pytest.raises(InvalidInputError, match="use_cache = False"):
            make("smolvla", use_cache=False).wrapped()

    def test_a_base_model_without_statistics(self, make: Make) -> None:
        made = make("multi_task_dit", stats={})
        with pytest.raises(CheckpointError, match="without the actions' min and max.*fine-tune"):
            made.wrapped()

    def test_a_postprocessor_that_does_more(self, make: Make) -> None:
        made = make("evo1", postprocess_action_dim=4)
        for step in made.postprocessor.steps:
            if hasattr(step, "binarize_gripper"):
                step.binarize_gripper, step.gripper_index = True, 3
        with pytest.raises(MismatchError, match="does more to actions"):
            made.wrapped()


class TestFingerprint:
    def test_it_tells_policies_apart(self, make: Make) -> None:
        from .conftest import STATISTICS

        def weights(made: Any) -> Any:
            with torch.no_grad():
                next(made.policy.noise_predictor.parameters()).view(-1)[0].add_(1e-3)
            return made

        action = STATISTICS["action"]
        shifted = {**STATISTICS, "action": {**action, "max": action["max"] + 0.01}}
        state = STATISTICS["observation.state"]
        seen = {**STATISTICS, "observation.state": {**state, "max": state["max"] + 0.01}}
        policies = {
            "it": make("multi_task_dit"),
            "weights": weights(make("multi_task_dit")),
            "statistics of actions": make("multi_task_dit", stats=shifted),
            "statistics of states": make("multi_task_dit", stats=seen),
            "horizon": make("multi_task_dit", horizon=12),
            "normalisation": make("multi_task_dit", normalization_mapping=_mapping("MEAN_STD")),
            "history": make("history"),
        }
        found = {name: made.wrapped().fingerprint for name, made in policies.items()}
        assert len(set(found.values())) == len(found), found
        assert make("multi_task_dit").wrapped().fingerprint == found["it"]
        blank = policies["it"].wrapped(blank_cameras=("observation.images.top",))
        assert blank.fingerprint != found["it"]

    def test_it_does_not_depend_on_where_and_how_long_it_computes(self, make: Make) -> None:
        it = make("multi_task_dit").wrapped()
        other = make("multi_task_dit", num_integration_steps=20, n_action_steps=3, optimizer_lr=1.0).wrapped()
        assert other.fingerprint == it.fingerprint
        limited = make("multi_task_dit").wrapped(low=(-1.0,) * 4, high=(1.0,) * 4, task="push")
        assert limited.fingerprint == it.fingerprint

    def test_that_of_a_large_folder_is_remembered(
        self, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        small = load_lerobot(copied).fingerprint
        assert not (tmp_path / "cache").exists()
        monkeypatch.setattr(adapter, "LARGE_WEIGHTS", 1000)
        assert load_lerobot(copied).fingerprint == small
        with monkeypatch.context() as patched:
            patched.setattr(adapter, "fingerprint", _never)
            assert load_lerobot(copied).fingerprint == small
        weights = copied / "model.safetensors"
        tensors = load_file(weights)
        name = next(name for name in tensors if "noise_predictor" in name)
        tensors[name] = tensors[name] + 1.0
        save_file(tensors, weights)
        assert load_lerobot(copied).fingerprint != small  # other contents of the same name

    def test_a_remembered_one_that_is_damaged_is_computed_again(
        self, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(adapter, "LARGE_WEIGHTS", 1000)
        found = load_lerobot(copied).fingerprint
        (remembered,) = (tmp_path / "cache").rglob("*.json")
        remembered.write_text("{")
        assert load_lerobot(copied).fingerprint == found

    def test_noises_of_another_policy_are_refused_before_anything_moves(self, make: Make) -> None:
        first, second = make("smolvla"), make("smolvla")
        with torch.no_grad():
            second.policy.model.action_out_proj.bias.add_(0.1)
        with pytest.raises(MismatchError, match="another frozen policy"):
            binding_of(first.wrapped(), 5).check(binding_of(second.wrapped(), 5), "this noise policy")


class TestObservations:
    @pytest.fixture
    def policy(self, shared: Make) -> Any:
        return shared("smolvla").wrapped()

    @pytest.fixture
    def seen(self, shared: Make) -> dict[str, Any]:
        return dict(shared("smolvla").observation())

    CAMERA = "observation.images.top"

    def test_arrays_and_a_single_task_are_as_good(self, policy: Any, seen: dict[str, Any]) -> None:
        arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in seen.items()}
        expected = policy.encode({**seen, "task": ["push", "push"]}).features
        torch.testing.assert_close(policy.encode({**arrays, "task": "push"}).features, expected)
        assert torch.equal(SteeredPolicy(policy, steps=2).act({**arrays, "task": "push"}, rng=0).features, expected)

    def test_a_missing_camera(self, policy: Any, seen: dict[str, Any]) -> None:
        image = seen.pop(self.CAMERA)
        with pytest.raises(MismatchError, match=r"no camera observation\.images\.top; it has none.*blank_cameras"):
            policy.encode(seen)
        with pytest.raises(MismatchError, match=r"it has observation\.images\.wrist"):
            policy.encode({**seen, "observation.images.wrist": image})

    def test_a_camera_that_may_be_missing(self, make: Make, shared: Make) -> None:
        from lerobot.configs.types import FeatureType, PolicyFeature

        inputs = {
            "observation.state": PolicyFeature(FeatureType.STATE, (5,)),
            self.CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 32, 40)),
            "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 32, 40)),
        }
        made = make("pi05", input_features=inputs)
        seen = made.observation()
        with pytest.raises(MismatchError, match=r"no camera observation\.images\.wrist"):
            made.wrapped().encode(seen)
        policy = made.wrapped(blank_cameras=("observation.images.wrist",))
        plan = SteeredPolicy(policy, steps=policy.steps).act(seen, rng=0)
        torch.testing.assert_close(plan.actions, made.own_chunk(seen, plan.noise), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda image: (255 * image).to(torch.uint8),
                r"uint8.*expected float32 \(B, 3, H, W\).*image.float\(\) / 255",
            ),
            (lambda image: image.permute(0, 2, 3, 1), r"channels are last: image.permute\(0, 3, 1, 2\)"),
            (lambda image: image[0], "expected float32"),
            (lambda image: 255 * image, r"goes from .* to 2\d\d.*in \[0, 1\]"),
            (lambda image: 2 * image - 1, r"goes from -"),
            (lambda image: image * torch.nan, "goes from nan"),
            (lambda image: [1, 2, 3], "is a list; expected a torch tensor"),
        ],
    )
    def test_images_of_another_layout_type_or_range(
        self, policy: Any, seen: dict[str, Any], change: Callable[..., Any], message: str
    ) -> None:
        seen[self.CAMERA] = change(seen[self.CAMERA])
        with pytest.raises(InvalidInputError, match=message):
            policy.encode(seen)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda state: state[:, :4], MismatchError, r"sees \(B, 5\)"),
            (lambda state: state[0], MismatchError, r"sees \(B, 5\)"),
            (lambda state: state / 0, InvalidInputError, "NaN or infinite"),
            (lambda state: state[:1], MismatchError, r"state 1, .*top 2|top 2, .*state 1"),
        ],
    )
    def test_states_that_do_not_fit(
        self, policy: Any, seen: dict[str, Any], change: Callable[..., Any], error: type[Exception], message: str
    ) -> None:
        seen["observation.state"] = change(seen["observation.state"])
        with pytest.raises(error, match=message):
            policy.encode(seen)

    def test_a_missing_state_and_task(self, policy: Any, shared: Make, seen: dict[str, Any]) -> None:
        with pytest.raises(MismatchError, match=r"no observation\.state, which this smolvla policy sees"):
            policy.encode({name: value for name, value in seen.items() if "state" not in name})
        task = seen.pop("task")
        with pytest.raises(MismatchError, match="does not say what to do"):
            policy.encode(seen)
        with pytest.raises(MismatchError, match="2 rows and 3 tasks"):
            policy.encode({**seen, "task": ["push"] * 3})
        told = shared("smolvla").wrapped(task=task[0])
        torch.testing.assert_close(told.encode(seen).features[0], policy.encode({**seen, "task": task}).features[0])

    def test_states_alone_are_no_observation_of_a_policy_with_cameras(self, policy: Any) -> None:
        with pytest.raises(MismatchError, match=r"is a Tensor; this smolvla policy sees .*top.*takes a dictionary"):
            policy.encode(torch.zeros(2, 5))

    def test_a_state_of_the_flow_that_does_not_fit(self, policy: Any, seen: dict[str, Any]) -> None:
        with pytest.raises(MismatchError, match="4 dimensions of actions and 28 of padding"):
            policy.velocity(policy.encode(seen), torch.zeros(2, 10, 4), torch.zeros(2))

    def test_names_before_renaming(self, make: Make) -> None:
        made = make("multi_task_dit")
        rename = next(step for step in made.preprocessor.steps if hasattr(step, "rename_map"))
        rename.rename_map = {"observation.images.front": self.CAMERA}
        policy, seen = made.wrapped(), made.observation()
        assert policy.cameras == ("observation.images.front",)
        with pytest.raises(MismatchError, match=r"no camera observation\.images\.front"):
            policy.encode(seen)
        seen["observation.images.front"] = seen.pop(self.CAMERA)
        assert policy.encode(seen).features.shape[0] == 2

    def test_history(self, shared: Make) -> None:
        made = shared("history")
        policy, seen = made.wrapped(), made.observation()
        repeated = {
            name: value[:, None].expand(-1, 3, *value.shape[1:]) if isinstance(value, torch.Tensor) else value
            for name, value in seen.items()
        }
        torch.testing.assert_close(policy.encode(repeated).features, policy.encode(seen).features)
        repeated["observation.state"] = repeated["observation.state"].clone()
        repeated["observation.state"][:, 0] += 1.0
        assert (policy.encode(repeated).features - policy.encode(seen).features).abs().max() > 0.1
        with pytest.raises(MismatchError, match="sees 3 at a time"):
            policy.encode({**repeated, "observation.state": torch.zeros(2, 2, 5)})


class TestCommands:
    """A small policy on states, through the commands and OGBench's simulators."""

    @pytest.fixture(scope="class")
    def states(self, make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from lerobot.configs.types import FeatureType, PolicyFeature

        inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (28,))}
        outputs = {"action": PolicyFeature(FeatureType.ACTION, (5,))}
        stats = {
            "observation.state": {"min": torch.full((28,), -3.0), "max": torch.full((28,), 3.0)},
            "action": {"min": torch.full((5,), -1.0), "max": torch.full((5,), 1.0)},
        }
        made = make("multi_task_dit", input_features=inputs, output_features=outputs, stats=stats)
        return made.save(tmp_path_factory.mktemp("states") / "policy")

    def test_evaluate(self, states: Path, tmp_path: Path) -> None:
        from counterflow.cli import main

        out = tmp_path / "frs.json"
        arguments = ["eval", "ogbench/cube-single-task1", "--policy", f"lerobot:{states}", "--steer", "frs"]
        assert main([*arguments, "--episodes", "1", "--num-envs", "1", "--json", str(out)]) == 0
        found = json.loads(out.read_text())
        policy = load_lerobot(states)
        assert found["policy"] == policy.fingerprint
        assert found["ledger"]["field_evaluations"] == 10 * found["ledger"]["reasoner_queries"]
        # Of a chunk's 8 actions the policy's n_action_steps = 5 are executed.
        queries = found["ledger"]["reasoner_queries"]
        assert 5 * (queries - 1) < found["ledger"]["environment_steps"] <= 5 * queries

    def test_invert_distill_and_evaluate(self, states: Path, tmp_path: Path) -> None:
        from counterflow.cli import main
        from counterflow.data import EpisodeDataset

        rng = np.random.default_rng(0)
        episodes = [
            {
                "observations": rng.normal(size=(20, 28)).astype(np.float32),
                "actions": rng.uniform(-1, 1, (20, 5)).astype(np.float32),
            }
            for _ in range(2)
        ]
        EpisodeDataset.from_episodes(episodes).save(tmp_path / "demonstrations.npz")
        env, policy = ["--env", "ogbench/cube-single"], ["--policy", f"lerobot:{states}"]
        out, learned = tmp_path / "noises.npz", tmp_path / "noise-policy"
        arguments = [
            "invert",
            str(tmp_path / "demonstrations.npz"),
            *env,
            *policy,
            "--out",
            str(out),
            "--tolerance",
            "0.1",
        ]
        assert main(arguments) == 0
        assert main(["distill", str(out), "--out", str(learned), "--steps", "10"]) == 0
        assert ChunkRegressor.load(learned).binding == binding_of(load_lerobot(states), 5)
        arguments = ["eval", "ogbench/cube-single-task1", *policy, "--steer", "dsbc", "--noise-policy", str(learned)]
        assert main([*arguments, "--episodes", "1", "--num-envs", "1", "--json", str(tmp_path / "dsbc.json")]) == 0

    def test_drive_by_hand(self, states: Path, tmp_path: Path) -> None:
        from counterflow.cockpit.session import Session, SessionSettings
        from counterflow.cockpit.targets import LocalTarget
        from counterflow.data import SteeringDataset
        from counterflow.envs import describe

        first, second = "ogbench/cube-single-task1", "ogbench/cube-single-task2"
        session = Session(SessionSettings(first, tmp_path, policy=f"lerobot:{states}", size=64, workers=0))
        try:
            for task in (first, second):
                if task != first:
                    session.go_to(task)
                assert isinstance(session.target, LocalTarget)
                assert session.target.policy.task == describe(task).task  # type: ignore[attr-defined]
                session.resume()
                for tick in range(10):
                    session.control.report(["up"], 0.05 * tick)
                    assert session.advance(0.05 * tick)
                # Of a chunk's 8 actions the policy's n_action_steps = 5 are executed.
                assert [len(one.step_actions) for one in session.episode.decisions] == [5, 5]
                session._finish()
                session.keep()
                session.advance(0.0)
            assert [note["kind"] for note in session.notes] == ["done", "done"], session.notes
            session.target.policy.task = "what another task's sentence was"
            session.go_to(first)
            assert session.target.policy.task == describe(first).task  # type: ignore[attr-defined]
            assert SteeringDataset.load(tmp_path / "recordings").binding == binding_of(load_lerobot(states), 5)
        finally:
            session.close()

    def test_a_policy_with_cameras_is_refused_there(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from counterflow.cli import main

        arguments = ["eval", "ogbench/cube-single-task1", "--policy", f"lerobot:{folder}", "--episodes", "1"]
        assert main([*arguments, "--num-envs", "1"]) == 2
        assert "4 dimensions and ogbench/cube-single-task1 expects 5" in " ".join(capsys.readouterr().err.split())

    def test_cameras_are_named(self, make: Make) -> None:
        from lerobot.configs.types import FeatureType, PolicyFeature

        from counterflow.envs import describe
        from counterflow.experiments.sight import check_fit

        outputs = {"action": PolicyFeature(FeatureType.ACTION, (5,))}
        stats = {"action": {"min": torch.full((5,), -1.0), "max": torch.full((5,), 1.0)}}
        policy = make("multi_task_dit", output_features=outputs, stats=stats).wrapped()
        with pytest.raises(MismatchError, match=r"1 cameras \(observation\.images\.top\).*no images"):
            check_fit(policy, describe("ogbench/cube-single-task1"))


def _without_task(policy: LeRobotPolicy) -> dict[str, Any]:
    shapes = {name: feature.shape for name, feature in policy.policy.config.input_features.items()}
    return {name: torch.rand(2, *shape) for name, shape in shapes.items()}


def _mapping(mode: str) -> dict[str, Any]:
    from lerobot.configs.types import NormalizationMode

    return {name: NormalizationMode(mode) for name in ("VISUAL", "STATE", "ACTION")}


def _never(*_: Any) -> str:
    raise AssertionError("computed again")
