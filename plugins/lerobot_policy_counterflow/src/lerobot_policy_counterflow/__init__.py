"""Steered policies of Counterflow as a policy type of LeRobot: importing this registers "counterflow"."""

from lerobot_policy_counterflow.configuration_counterflow import CounterflowConfig

__all__ = ["CounterflowConfig"]
