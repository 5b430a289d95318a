"""The outer processors of a steered policy: they rename and move tensors; the base policy's own are applied inside."""

from __future__ import annotations

from typing import Any

from lerobot.processor.factory import make_default_policy_processor_steps, make_policy_processor_pipelines

from lerobot_policy_counterflow.configuration_counterflow import CounterflowConfig


def make_counterflow_pre_post_processors(
    config: CounterflowConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Return the pre- and the postprocessor; statistics are of no use to them."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    before, after = make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, steps.to_device], output_steps=[steps.to_cpu]
    )
    return before, after
