"""Policies come back from disk as they were, and what isn't one is refused in plain words."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from counterflow.errors import CheckpointError, StorageError, UnknownNameError
from counterflow.policies import (
    ActionLayout,
    ActionSpec,
    FlowPolicy,
    GeneralistPolicy,
    NetworkConfig,
    Normaliser,
    load,
    save,
    shipped_priors,
)


def policy(name: Any = "mlp", seed: int = 0) -> FlowPolicy:
    torch.manual_seed(seed)
    spec = ActionSpec(
        3,
        4,
        (-1.0,) * 4,
        (1.0,) * 4,
        Normaliser.fit(torch.randn(20, 4), "quantile"),
        ActionLayout((0, 1, 2), gripper=3),
    )
    made = FlowPolicy(NetworkConfig(name, 16, 2, 2), Normaliser.fit(torch.randn(20, 5)), spec, "ogbench/scene")
    with torch.no_grad():
        for parameter in made.network.parameters():  # a transformer begins as zero
            parameter.normal_(0, 0.2)
    made.provenance = {"data": {"file": "x.npz"}}
    return made


def velocity(of: FlowPolicy) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    observation = torch.randn(6, 5, generator=rng)
    with torch.no_grad():
        return of.velocity(of.encode(observation), torch.randn(6, 3, 4, generator=rng), torch.rand(6, generator=rng))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(policy(), tmp_path / "mine")


class TestRoundTrip:
    @pytest.mark.parametrize("name", ["mlp", "transformer"])
    def test_everything_comes_back(self, name: str, tmp_path: Path) -> None:
        original = policy(name)
        loaded = load(save(original, tmp_path / "mine.safetensors"))
        assert torch.equal(velocity(loaded), velocity(original))
        assert velocity(loaded).abs().max() > 0.01
        assert loaded.fingerprint == original.fingerprint
        assert loaded.action_spec.layout == original.action_spec.layout
        assert loaded.action_spec.low == (-1.0,) * 4
        chunk = torch.randn(2, 3, 4)
        assert torch.equal(loaded.action_spec.denormalise(chunk), original.action_spec.denormalise(chunk))
        assert loaded.provenance == original.provenance
        assert loaded.family == "ogbench/scene"

    def test_what_is_loaded_is_frozen(self, saved: Path) -> None:
        assert not any(parameter.requires_grad for parameter in load(saved).parameters())

    def test_every_way_to_name_it(self, saved: Path) -> None:
        run = saved.parent / "run" / "checkpoints"
        save(policy(), run / "policy")
        prints = {
            load(way).fingerprint for way in (saved, saved.with_suffix(""), saved.with_suffix(".json"), run.parent)
        }
        assert prints == {policy().fingerprint}

    def test_the_folder_that_one_stands_in(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(saved.parent)
        with pytest.raises(CheckpointError, match="holds no policy"):
            load(".")
        save(policy(), saved.parent / "checkpoints" / "policy")
        assert load(".").fingerprint == load("").fingerprint == policy().fingerprint

    def test_the_json_tells_a_reader_everything(self, saved: Path) -> None:
        content = json.loads(saved.with_suffix(".json").read_text())
        assert content["format_version"] == 1
        assert content["network"]["width"] == 16
        assert content["provenance"]["data"]["file"] == "x.npz"

    def test_the_weights_are_complete_without_it(self, saved: Path) -> None:
        saved.with_suffix(".json").unlink()
        assert load(saved).fingerprint == policy().fingerprint

    def test_fingerprints_tell_policies_apart(self) -> None:
        assert policy(seed=0).fingerprint == policy(seed=0).fingerprint != policy(seed=1).fingerprint


class TestShipped:
    @pytest.mark.parametrize("name", ["cube-single", "cube-double", "puzzle-3x3", "scene"])
    def test_priors(self, name: str) -> None:
        import counterflow.policies.checkpoint as checkpoint

        assert name in shipped_priors()
        prior = load(name)
        assert prior.family == f"ogbench/{name}"
        assert prior.action_spec.horizon == 5
        assert (checkpoint.PRIORS / f"{name}.safetensors").stat().st_size < 4_000_000
        assert prior.provenance["data"]["made_by"]["recipe"]["env"] == prior.family

    @pytest.mark.parametrize(("name", "tasks", "missing"), [("metaworld", 34, 0), ("libero", 53, 4)])
    def test_the_generalists(self, name: str, tasks: int, missing: int) -> None:
        import counterflow.policies.checkpoint as checkpoint

        prior = load(name)
        assert isinstance(prior, GeneralistPolicy)
        assert prior.family == name
        assert (len(prior.provenance["tasks"]), len(prior.provenance["without_demonstrations"])) == (tasks, missing)
        assert (checkpoint.PRIORS / f"{name}.safetensors").stat().st_size < 8_000_000

    def test_an_unknown_name_suggests_the_nearest(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'cube-single'"):
            load("cube-singel")


class TestRefusals:
    @pytest.mark.parametrize("size", [0, 4, 500, -1])
    def test_truncated(self, saved: Path, size: int) -> None:
        saved.write_bytes(saved.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"mine\.safetensors .*truncated, damaged"):
            load(saved)

    def test_foreign(self, tmp_path: Path) -> None:
        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match="FieldPolicy"):
            load(tmp_path / "other.safetensors")

    def test_newer(self, saved: Path) -> None:
        rewrite(saved, format_version=2, counterflow_version="9.0")
        with pytest.raises(CheckpointError, match=r"format 2 by Counterflow 9\.0.*Upgrade"):
            load(saved)

    def test_newer_json_beside(self, saved: Path) -> None:
        beside = saved.with_suffix(".json")
        beside.write_text(json.dumps({**json.loads(beside.read_text()), "format_version": 99}))
        with pytest.raises(CheckpointError, match="format 99"):
            load(saved)

    def test_numbers_changed_by_hand(self, saved: Path) -> None:
        with safe_open(saved, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        tensors["network.out.bias"] += 1
        save_file(tensors, saved, metadata)
        with pytest.raises(CheckpointError, match="fingerprint differs"):
            load(saved)

    @pytest.mark.parametrize("change", [{"family": 3, "action": {}}, {"network": {"name": "mlp", "width": 32}}])
    def test_a_description_that_is_not_the_weights(self, saved: Path, change: dict[str, Any]) -> None:
        rewrite(saved, **change)
        with pytest.raises(CheckpointError, match="does not hold the policy that it describes"):
            load(saved)

    def test_pairs_that_do_not_belong_together(self, saved: Path, tmp_path: Path) -> None:
        other = save(policy(seed=1), tmp_path / "other")
        other.with_suffix(".json").replace(saved.with_suffix(".json"))
        with pytest.raises(CheckpointError, match=r"describes another policy.*Delete it"):
            load(saved)

    @pytest.mark.parametrize(
        ("part", "change"),
        [("action", {"horizon": 99}), ("action", {"high": [2.0] * 4}), ("network", {"width": 32})],
    )
    def test_a_json_changed_by_hand_is_not_silently_ignored(
        self, saved: Path, part: str, change: dict[str, Any]
    ) -> None:
        beside = saved.with_suffix(".json")
        content = json.loads(beside.read_text())
        beside.write_text(json.dumps({**content, part: {**content[part], **change}}))
        with pytest.raises(CheckpointError, match="describes another policy"):
            load(saved)

    def test_notes_may_be_added_to_the_json(self, saved: Path) -> None:
        beside = saved.with_suffix(".json")
        content = json.loads(beside.read_text())
        beside.write_text(json.dumps({**content, "provenance": {"note": "the good one"}}, indent=4))
        assert load(saved).fingerprint == policy().fingerprint

    @pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"format": "counterflow/flow-policy"}', "\xff"])
    def test_a_json_that_is_no_description(self, saved: Path, text: str) -> None:
        saved.with_suffix(".json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match="can't be read"):
            load(saved)

    def test_another_kind_of_thing(self, saved: Path) -> None:
        rewrite(saved, format="counterflow/critic")
        with pytest.raises(CheckpointError, match=r"holds a 'counterflow/critic'"):
            load(saved)

    def test_a_description_without_a_fingerprint(self, saved: Path) -> None:
        rewrite(saved, drop=("fingerprint",))
        with pytest.raises(CheckpointError, match="without a fingerprint"):
            load(saved)

    def test_a_folder_without_a_policy(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds no policy"):
            load(tmp_path)


def test_a_full_disk_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        save(policy(seed=1), saved)
    assert load(saved).fingerprint == policy().fingerprint
    assert {path.name for path in saved.parent.iterdir()} == {"mine.safetensors", "mine.json"}


class TestInterruptions:
    @pytest.mark.parametrize("rename", [0, 1])
    def test_a_kill_before_either_rename_leaves_a_whole_policy(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, rename: int
    ) -> None:
        """The weights come first: without theirs it is still the old policy, without the json's already the new one."""

        class KilledError(BaseException):
            pass

        replace, renamed = Path.replace, []

        def kill(self: Path, target: Path) -> Path:
            if len(renamed) == rename:
                raise KilledError
            renamed.append(target)
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", kill)
        with pytest.raises(KilledError):
            save(policy(seed=1), saved)
        monkeypatch.undo()
        assert load(saved).fingerprint == policy(seed=rename).fingerprint
        save(policy(seed=2), saved)
        assert load(saved).fingerprint == policy(seed=2).fingerprint
        assert {path.name for path in saved.parent.iterdir()} == {"mine.safetensors", "mine.json"}

    @pytest.mark.parametrize("size", [100, 2000])  # no room for the json; room for it, but not for the weights
    def test_a_disk_that_is_really_full_leaves_the_old_one(
        self, saved: Path, largest_file: Callable[[int], AbstractContextManager[None]], size: int
    ) -> None:
        assert saved.with_suffix(".json").stat().st_size < 2000 < saved.stat().st_size
        with largest_file(size), pytest.raises(StorageError, match=r"can't write .*File too large.*untouched"):
            save(policy(seed=1), saved)
        assert load(saved).fingerprint == policy().fingerprint
        assert {path.name for path in saved.parent.iterdir()} == {"mine.safetensors", "mine.json"}

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(place=st.integers(0, 1_000_000), bit=st.integers(0, 7))
    def test_a_flipped_bit_never_changes_what_a_policy_does(self, saved: Path, place: int, bit: int) -> None:
        """It is refused in plain words, or it fell where nothing depends on it (notes on how the policy was made)."""
        whole = saved.read_bytes()
        damaged = bytearray(whole)
        damaged[place % len(whole)] ^= 1 << bit
        target = saved.with_name("damaged.safetensors")
        target.write_bytes(damaged)
        try:
            loaded = load(target)
        except CheckpointError:
            return
        assert torch.equal(velocity(loaded), velocity(policy()))
        assert loaded.action_spec.low == (-1.0,) * 4


def rewrite(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Change the description inside the weights' file, and drop the one beside it."""
    path.with_suffix(".json").unlink()
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(file.metadata()["counterflow"])
    content = {name: value for name, value in {**content, **changes}.items() if name not in drop}
    save_file(tensors, path, {"counterflow": json.dumps(content)})
