"""The settings of a steered policy, as LeRobot's command line and config.json know them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode

from counterflow.errors import InvalidInputError


@PreTrainedConfig.register_subclass("counterflow")
@dataclass
class CounterflowConfig(PreTrainedConfig):
    """What is steered, and how.

    Attributes:
        base: hub id or folder of the frozen policy.
        base_revision: of a hub id, a commit, branch or tag.
        fingerprint: of the base policy that this was made for; another one is refused. None: any.
        noise_policy: file of a noise policy, absolute or relative to the folder that this config lies in.
        reasoner: "package.module:function" of who gives references; see the README.
        steps: denoising steps of the base policy alone; None: its own number.
        reversal_steps: K of flow reversal steering.
        perturbation: standard deviation of what is added to a noise that was reversed or learned.
        padding: what becomes of padded dimensions in a reversal: "fresh", "held" or "reversed".
        n_action_steps: actions of a chunk that are executed before it decides again; None: as the base policy.
        task: what to do, where the batch doesn't say.
        translation, rotation, gripper, gripper_close_sign: which dimensions of an action do what; see `ActionLayout`.
        seed: what the draws of noise descend from.
    """

    base: str = ""
    base_revision: str | None = None
    fingerprint: str | None = None
    noise_policy: str | None = None
    reasoner: str | None = None
    steps: int | None = None
    reversal_steps: int = 5
    perturbation: float = 0.0
    padding: str = "fresh"
    n_action_steps: int | None = None
    task: str | None = None
    translation: tuple[int, ...] = ()
    rotation: tuple[int, ...] = ()
    gripper: int | None = None
    gripper_close_sign: int = 1
    seed: int = 0
    # The base policy normalises by itself.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self) -> None:
        """Check what can be checked without the base policy."""
        super().__post_init__()
        if self.noise_policy is not None and self.reasoner is not None:
            raise InvalidInputError(
                "both a noise policy and a reasoner were given; expected one of them. A noise policy replaces who gives hints."
            )

    def validate_features(self) -> None:
        """Leave that to the base policy, which checks every observation."""

    @property
    def observation_delta_indices(self) -> None:
        """None: the history, where the base policy sees one, is kept by the policy itself."""
        return

    @property
    def action_delta_indices(self) -> None:
        """None: nothing is trained here."""
        return

    @property
    def reward_delta_indices(self) -> None:
        """None: nothing is trained here."""
        return

    def get_optimizer_preset(self) -> Any:
        """Refuse: a noise policy is trained by `counterflow distill`."""
        raise InvalidInputError(
            "a steered policy is not trained by LeRobot; train its noise policy: counterflow distill."
        )

    def get_scheduler_preset(self) -> None:
        """None: nothing is trained here."""
        return
