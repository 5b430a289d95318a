"""The noise policies of a run: those that were learned before, the one that was given, and the training of another."""

from __future__ import annotations

from dataclasses import replace

from counterflow.cockpit.settings import SessionSettings
from counterflow.cockpit.targets import Target, binding_for
from counterflow.cockpit.training import POLICIES, Training, train
from counterflow.errors import CounterflowError, InvalidInputError
from counterflow.learning.dsbc import DSBCConfig
from counterflow.steering import ChunkRegressor


class NoisePolicies:
    """What can drive with "dsbc", and how more of it is made.

    Args:
        settings: the run's folder, the one that is given, and how to train.
        target: whose flow they are for.

    Attributes:
        learned: by name, in the order in which they came.
        training: the last; None: there was none.

    Raises:
        CounterflowError: the one that is given can't be loaded, or is for another policy.
    """

    def __init__(self, settings: SessionSettings, target: Target) -> None:
        self._settings, self._target = settings, target
        self.learned: dict[str, ChunkRegressor] = {}
        self.training: Training | None = None
        self._load()

    @property
    def newest(self) -> str | None:
        """The name of the one that came last."""
        return next(reversed(self.learned), None)

    def get(self, name: str | None) -> ChunkRegressor | None:
        """Return one by its name, or None."""
        return self.learned.get(name or "")

    def prepare(self) -> Training:
        """Begin the account of a training, which `train` then is to do.

        Raises:
            InvalidInputError: a training runs already.
            MismatchError: nobody knows the noises of what was driven.
        """
        binding_for(self._target, "there can be no training")
        if self.training is not None and self.training.state == "running":
            raise InvalidInputError("a training is running; wait for it, or stop it.")
        number = 1
        while (self._settings.out / POLICIES / f"noise-policy-{number}.safetensors").exists():
            number += 1
        self.training = Training(f"noise-policy-{number}")
        return self.training

    def train(self, training: Training, env: str, initial: ChunkRegressor | None) -> str:
        """Train on what was recorded of a task; may be called from another thread.

        Args:
            training: what `prepare` returned.
            env: the task.
            initial: the noise policy that was helped, if any.

        Returns:
            What to say.

        Raises:
            InvalidInputError: it failed, or was stopped.
        """
        settings = self._settings
        made = train(settings.out, env, training, config=self._config(), initial=initial, seed=settings.seed)
        if made is None:
            raise InvalidInputError(training.message)
        self.learned = self.learned | {training.name: made}  # whole or not at all: the session reads it meanwhile
        return f"{training.name} is trained"

    def stop_training(self) -> None:
        """Stop the training."""
        if self.training is not None:
            self.training.stop.set()

    def _config(self) -> DSBCConfig:
        """Return how to train: on observations where the policy offers no features."""
        config = self._settings.distillation
        if self._target.inputs == "features" or config.regressor.inputs == "observation":
            return config
        return replace(config, regressor=replace(config.regressor, inputs="observation"))

    def _load(self) -> None:
        settings = self._settings
        for path in sorted(
            (settings.out / POLICIES).glob("*.safetensors"), key=lambda path: (len(path.name), path.name)
        ):
            try:
                learned = ChunkRegressor.load(path, settings.device)
                self._target.check_learned(learned)
            except CounterflowError:
                continue  # of another policy, or damaged: it can't drive
            self.learned[path.stem] = learned
        if settings.noise_policy is not None:
            given = ChunkRegressor.load(settings.noise_policy, settings.device)
            self._target.check_learned(given)
            self.learned[settings.noise_policy.stem] = given
