"""LIBERO's simulator, stepped and reset as robosuite does it, in half of the time and less.

Of each of an action's 25 physics steps robosuite computes the state three times: before the controller, again inside the
controller, and in the step itself. MuJoCo's step has two halves, and the controller needs the first alone, so once is enough;
what the controller reads is gathered here without looking names up at every step. The control law, the gripper and the sampling
of observations are robosuite's own code. The numbers are robosuite's up to the tolerance of MuJoCo's constraint solver (1e-8),
which begins each time where it ended the last: with three solutions a step it ends a little closer.

A reset of LIBERO's compiles the same description of the scene again, three quarters of a reset's time, and so does every other
environment of the task; here it is copied. What the old simulator held is freed without looking through all of Python's objects.

Source: robosuite 1.4.0 (arXiv 2009.12293): `MujocoEnv.step`, `SingleArm.control`, `Controller.update`, `MjSim.from_xml_string`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt


class Physics:
    """Executes actions in one of robosuite's environments with a single arm.

    To be made again after every reset, which makes a new simulator.

    Args:
        env: the environment; its controller turns displacements of the hand into torques (operational space control).
    """

    def __init__(self, env: Any) -> None:
        import mujoco

        self._mujoco = mujoco
        self._env, self._robot = env, env.robots[0]
        self._controller = self._robot.controller
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._substeps = int(env.control_timestep / env.model_timestep)
        self._site = env.sim.model.site_name2id(self._controller.eef_name)
        joints = self._controller.qvel_index
        self._joints, self._square = joints, np.ix_(joints, joints)
        count = self._model.nv
        self._jacobians = np.zeros((3, count)), np.zeros((3, count))
        self._mass = np.zeros((count, count))
        self._arm = np.asarray(self._robot._ref_joint_actuator_indexes)
        self._torque_limits = self._robot.torque_limits
        self._fingers = [env.sim.model.actuator_name2id(name) for name in self._robot.gripper.actuators]
        low, high = self._model.actuator_ctrlrange[self._fingers].T
        self._middle, self._reach = 0.5 * (high + low), 0.5 * (high - low)

    def execute(self, action: npt.NDArray[np.float64]) -> None:
        """Do what robosuite's `step` does, except for collecting observations.

        Args:
            action: (7,), in [-1, 1].
        """
        env, control = self._env, self._data.ctrl
        env.timestep += 1
        for substep in range(self._substeps):
            self._mujoco.mj_step1(self._model, self._data)
            # Not in the first step after a reset: there the controller keeps what the reset told it, as in robosuite.
            if self._controller.new_update:
                self._tell_controller()
            if substep == 0:  # a new goal, and robosuite's records of the last steps
                env._pre_action(action, True)
            else:
                control[self._arm] = np.clip(self._controller.run_controller(), *self._torque_limits)
                fingers = self._robot.gripper.format_action(action[self._controller.control_dim :])
                control[self._fingers] = self._middle + self._reach * fingers
            self._mujoco.mj_step2(self._model, self._data)
            env._update_observables()
        env.cur_time += env.control_timestep
        # What is left of robosuite's `_post_action` without its reward, which asks the predicates for success once more.
        env.done = env.timestep >= env.horizon and not env.ignore_done
        env._post_process()

    def _tell_controller(self) -> None:
        """Set what `Controller.update` sets, and mark it as done."""
        controller, model, data = self._controller, self._model, self._data
        forwards, turns = self._jacobians
        self._mujoco.mj_jacSite(model, data, forwards, turns, self._site)
        self._mujoco.mj_fullM(model, self._mass, data.qM)
        velocity = data.qvel
        controller.ee_pos = data.site_xpos[self._site].copy()
        controller.ee_ori_mat = data.site_xmat[self._site].reshape(3, 3).copy()
        controller.ee_pos_vel, controller.ee_ori_vel = forwards @ velocity, turns @ velocity
        controller.joint_pos = data.qpos[controller.qpos_index]
        controller.joint_vel = velocity[self._joints]
        controller.J_pos, controller.J_ori = forwards[:, self._joints], turns[:, self._joints]
        controller.J_full = np.concatenate([controller.J_pos, controller.J_ori])
        controller.mass_matrix = self._mass[self._square]
        controller.new_update = False


@contextmanager
def quick_reset() -> Iterator[None]:
    """Meanwhile let robosuite copy a scene that this process has compiled before, and not search for garbage."""
    from robosuite.utils.binding_utils import MjSim

    compile_scene, free = MjSim.__dict__["from_xml_string"], MjSim.free
    # A copy each time: a reset moves the fixtures in it.
    MjSim.from_xml_string = classmethod(lambda kind, xml: kind(copy.copy(_compiled(xml))))
    MjSim.free = _let_go
    try:
        yield
    finally:
        MjSim.from_xml_string, MjSim.free = compile_scene, free


def _let_go(simulator: Any) -> None:
    """Do what `MjSim.free` does, except for a garbage collection: nothing refers to the old simulator in a circle."""
    del simulator._render_context_offscreen, simulator.data, simulator.model


@lru_cache(maxsize=2)
def _compiled(xml: str) -> Any:
    import mujoco

    return mujoco.MjModel.from_xml_string(xml)
