"""`CounterflowPolicy`: one of LeRobot's flow policies, steered, as a policy of LeRobot's."""

from __future__ import annotations

import importlib
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from counterflow.errors import CheckpointError, InvalidInputError, MismatchError
from counterflow.files import replacing
from counterflow.layout import ActionLayout
from counterflow.policies.described import weights_path
from counterflow.policies.lerobot import LeRobotPolicy, load_lerobot
from counterflow.random import generator
from counterflow.reasoners import to_reference
from counterflow.steering import ChunkRegressor, FlowReversal, Reference, SteeredPolicy, steer_learned
from lerobot_policy_counterflow.configuration_counterflow import CounterflowConfig

Reasoner = Callable[[dict[str, Any]], Any]
NOISE_POLICY = "noise_policy.safetensors"


class CounterflowPolicy(PreTrainedPolicy):
    """A frozen flow policy whose noise is chosen by a noise policy, by the reversal of hints, or by nobody.

    Args:
        config: what is steered, and how.
        folder: what a relative `noise_policy` is relative to.
        base: the frozen policy, where it is loaded already.

    Raises:
        MismatchError: the base policy isn't the one that this was made for, or its actions don't fit the robot.
        CheckpointError, InvalidInputError: something can't be read, or a setting is out of range.
    """

    config_class = CounterflowConfig
    name = "counterflow"

    def __init__(
        self,
        config: CounterflowConfig,
        folder: Path | str | None = None,
        base: LeRobotPolicy | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        layout = None
        if config.translation:
            layout = ActionLayout(
                tuple(config.translation), tuple(config.rotation), config.gripper, config.gripper_close_sign
            )
        if base is None:
            if not config.base:
                raise InvalidInputError("a steered policy needs a base: --policy.base=OWNER/NAME, or a folder.")
            base = load_lerobot(
                config.base, config.device or "cpu", revision=config.base_revision, layout=layout, task=config.task
            )
        if config.fingerprint is not None and config.fingerprint != base.fingerprint:
            raise MismatchError(
                f"{config.base or 'the base policy'} has the fingerprint {base.fingerprint}; this steered policy was made for "
                f"{config.fingerprint}. Its noises would become other actions. Use the policy that it was made for, or export "
                "anew."
            )
        self._check_actions(config, base)
        self._base = base
        self.base_policy = base.policy  # registered, so that it moves between devices with this one
        self.noise_policy: ChunkRegressor | None = None
        self.reasoner: Reasoner | None = None
        if config.noise_policy is not None:
            place = Path(config.noise_policy)
            place = place if place.is_absolute() or folder is None else Path(folder) / place
            self.noise_policy = ChunkRegressor.load(place, base.device)
            self._steered = steer_learned(base, self.noise_policy, config.perturbation)
        elif config.reasoner is not None:
            self.reasoner = _find(config.reasoner)
            start = FlowReversal(
                config.reversal_steps,
                perturbation=config.perturbation,
                padding=config.padding,  # type: ignore[arg-type]
            )
            self._steered = SteeredPolicy(base, start=start, steps=config.reversal_steps)
        else:
            self._steered = SteeredPolicy(base, steps=config.steps or base.steps, solver=base.solver)
        spec = base.action_spec
        self.executed = config.n_action_steps or spec.executed or spec.horizon - spec.past
        if not 1 <= self.executed <= spec.horizon - spec.past:
            raise InvalidInputError(
                f"n_action_steps is {config.n_action_steps}; this policy decides on {spec.horizon - spec.past} actions at a time."
            )
        self._rng = generator(config.seed)
        self.reset()

    @staticmethod
    def _check_actions(config: CounterflowConfig, base: LeRobotPolicy) -> None:
        feature = config.action_feature
        if feature is not None and tuple(feature.shape) != (base.action_spec.dim,):
            raise MismatchError(
                f"the environment or robot takes actions of shape {tuple(feature.shape)} and {config.base or 'the base policy'} "
                f"acts in {base.action_spec.dim} dimensions. Use a policy that was trained for it."
            )

    def reset(self) -> None:
        """Forget the chunk and the history: another episode begins."""
        self._queue: deque[Tensor] = deque()
        self._history: deque[dict[str, Tensor]] = deque(maxlen=int(self.base_policy.config.n_obs_steps))

    def train(self, mode: bool = True) -> CounterflowPolicy:
        """Stay in evaluation mode: everything here is frozen."""
        del mode
        super().train(False)
        return self

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Return a chunk (B, H, A) in the robot's units, for observations by LeRobot's names."""
        self._base.to(self._base.device)  # LeRobot may have moved the policy
        seen = {name: value for name, value in batch.items() if name.startswith("observation.") or name == "task"}
        reference = self._reference(batch)
        return self._steered.act(seen, reference, self._rng).actions

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Return the next action (B, A) of the chunk, deciding on a new one when it is used up."""
        batch = self._with_history(batch)
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch)[:, : self.executed].transpose(0, 1))
        return self._queue.popleft()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any] | None]:
        """Refuse: a noise policy is trained by `counterflow distill`."""
        del batch
        raise InvalidInputError(
            "a steered policy is not trained by LeRobot; train its noise policy: counterflow distill."
        )

    def get_optim_params(self) -> dict[str, Any]:
        """Return nothing: everything here is frozen."""
        return {}

    def _with_history(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return (B, S, ...) observations for a base that sees S moments; before the first there was nothing else."""
        moments = self._history.maxlen or 1
        if moments == 1:
            return batch
        now = {name: value for name, value in batch.items() if name.startswith("observation.") and _is_tensor(value)}
        while len(self._history) < moments - 1:
            self._history.append(now)
        self._history.append(now)
        past = {name: torch.stack([moment[name] for moment in self._history], dim=1) for name in now}
        return {**batch, **past}

    def _reference(self, batch: dict[str, Any]) -> Reference | None:
        """Ask who gives references, and bring the answer to the policy's units."""
        answer = None if self.reasoner is None else self.reasoner(batch)
        if answer is None or isinstance(answer, Reference):
            return answer
        spec = self._base.action_spec
        if isinstance(answer, Tensor):
            return Reference.of(spec.normalise(answer.float()))
        return to_reference(list(answer), spec)

    def _save_pretrained(self, save_directory: Path, state_dict: Any = None) -> None:
        """Write the config and the noise policy; the base policy's weights stay where they are."""
        del state_dict
        if not self.config.base:
            raise CheckpointError(
                "this steered policy does not know where its base lies; set config.base before saving."
            )
        self.config.fingerprint = self._base.fingerprint
        if self.noise_policy is not None:
            self.noise_policy.save(save_directory / NOISE_POLICY)
            self.config.noise_policy = NOISE_POLICY
        # The config comes last and whole: without it the folder is no policy.
        with tempfile.TemporaryDirectory() as scratch, replacing(save_directory / "config.json") as temporary:
            self.config._save_pretrained(Path(scratch))
            temporary.write_text((Path(scratch) / "config.json").read_text())

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> CounterflowPolicy:
        """Load what `counterflow lerobot export` or `save_pretrained` wrote; a hub id is fetched first."""
        folder = Path(pretrained_name_or_path)
        revision = kwargs.get("revision")
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(pretrained_name_or_path), revision=revision))
        if config is None:
            config = PreTrainedConfig.from_pretrained(folder)
        if not isinstance(config, CounterflowConfig):
            raise CheckpointError(f"{folder} holds a policy of type {config.type!r}; expected 'counterflow'.")
        policy = cls(config, folder=folder)
        policy.eval()
        return policy


def export(
    base: str,
    out: Path | str,
    *,
    noise_policy: Path | str | None = None,
    device: str = "cpu",
    **settings: Any,
) -> Path:
    """Write a steered policy to a folder that LeRobot's commands take as `--policy.path`.

    Args:
        base: hub id or folder of the frozen policy.
        out: the folder; made if it is missing.
        noise_policy: what `counterflow distill` wrote; None: none.
        device: where it is to compute.
        settings: other entries of `CounterflowConfig`.

    Returns:
        The folder.

    Raises:
        MismatchError: the noise policy belongs to another base.
        CheckpointError: base or noise policy can't be read.
        StorageError: the folder can't be written.
    """
    out = Path(out)
    frozen = load_lerobot(base, device, revision=settings.get("base_revision"))
    inner = frozen.policy.config
    place = str(Path(base).resolve()) if Path(base).is_dir() else base
    config = CounterflowConfig(
        base=place,
        device=device,
        input_features={frozen._given_name(name): feature for name, feature in inner.input_features.items()},
        output_features=dict(inner.output_features),
        noise_policy=None if noise_policy is None else str(weights_path(noise_policy).resolve()),
        **settings,
    )
    if "n_action_steps" not in settings:
        config.n_action_steps = frozen.action_spec.executed
    policy = CounterflowPolicy(config, base=frozen)
    from lerobot_policy_counterflow.processor_counterflow import make_counterflow_pre_post_processors

    out.mkdir(parents=True, exist_ok=True)
    for processor in make_counterflow_pre_post_processors(config):
        processor.save_pretrained(out)
    policy.save_pretrained(out)
    return out


def _find(name: str) -> Reasoner:
    """Return the function that "package.module:function" names."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInputError(
            f"the reasoner {name!r} can't be found ({error}); expected 'package.module:function', importable from here."
        ) from error
    if not callable(found):
        raise InvalidInputError(f"the reasoner {name!r} is a {type(found).__name__}; expected a function of the batch.")
    reasoner: Reasoner = found
    return reasoner


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
