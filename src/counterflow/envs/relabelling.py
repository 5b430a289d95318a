"""Rewards of recorded states: what an OGBench task would have given for them.

One dataset serves all five tasks of its family: rewards are computed afterwards, from the simulator's recorded state, by
`ogbench.relabel_utils.relabel_dataset` itself, so that they are the benchmark's to the last bit.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.envs.ogbench import OGBenchEnv
from counterflow.envs.ogbench_locomotion import OGBenchLocomotionEnv
from counterflow.envs.registry import make_task
from counterflow.errors import InvalidInputError, MismatchError

Float32Array = npt.NDArray[np.float32]


def relabel(
    name: str, qpos: npt.NDArray[Any], button_states: npt.NDArray[Any] | None = None
) -> tuple[Float32Array, Float32Array]:
    """Compute a single task's rewards and masks of recorded states.

    Args:
        name: a single task of OGBench's, for example "ogbench/scene-task2".
        qpos: (N, Q) the simulator's generalised positions, as the archives keep them.
        button_states: (N, buttons); needed where there are buttons (scene, puzzle).

    Returns:
        rewards (N,): for a manipulation task minus the number of sub-goals that are not reached, for a locomotion task 0 at the
        goal and -1 elsewhere; masks (N,): 0 where the task is solved, 1 elsewhere. Both float32, both of the state itself.

    Raises:
        UnknownNameError: there is no such environment.
        InvalidInputError: it is a family, or has its goal in the observation; or buttons are missing.
        MismatchError: the states are not of this environment.
    """
    env = make_task(name)
    try:
        if env.spec.goal_dim or not isinstance(env, OGBenchEnv | OGBenchLocomotionEnv):
            raise InvalidInputError(
                f"{name} has no rewards to compute for recorded states; expected a single task, such as "
                f"'{name.replace('-goals', '')}'. For goal-conditioned learning goals and rewards are drawn from the data "
                "(`counterflow.data.GoalSampler`)."
            )
        env.reset(0)  # the goal is set from then on; a single task's is the same for every seed
        simulator = env.simulator
        arrays: dict[str, npt.NDArray[Any]] = {"qpos": np.asarray(qpos)}
        expected = {"qpos": simulator.model.nq}
        if hasattr(simulator, "_num_buttons"):
            if button_states is None:
                raise InvalidInputError(
                    f"the rewards of {name} depend on its buttons, and no button_states were given. Use an archive that holds "
                    "them, as OGBench's and those of 'counterflow collect' do."
                )
            arrays["button_states"] = np.asarray(button_states)
            expected["button_states"] = simulator._num_buttons
        for key, size in expected.items():
            if arrays[key].shape != (len(arrays["qpos"]), size):
                raise MismatchError(
                    f"{key} are {arrays[key].shape}; {name} expects ({len(arrays['qpos'])}, {size}). Use the environment that "
                    "the data were collected in."
                )

        from ogbench.relabel_utils import relabel_dataset

        # It resets what it is given, without a seed; ours is reset already.
        relabel_dataset(name, SimpleNamespace(unwrapped=simulator, reset=lambda: None), arrays)
        return arrays["rewards"], arrays["masks"]
    finally:
        env.close()
