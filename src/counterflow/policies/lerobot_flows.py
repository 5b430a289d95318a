"""Where LeRobot's flow policies keep their prefix and their velocity, one class each, in this library's convention.

LeRobot's openpi family counts time from action (0) to noise (1) and regresses noise - action; everything here returns
v = -v' at t = 1 - t'. Each class computes the expensive part once (`prefix`) and the velocity as often as it is asked.

The caches of keys and values that these models fill are objects that a denoising step appends to and crops (SmolVLA) or
copies (pi0, pi0.5). A `Prefix` therefore holds tensors alone and hands a new cache to every step, so a context can serve
several threads, several candidates and a gradient at the same time. Source: LeRobot 0.6.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from counterflow.errors import InvalidInputError
from counterflow.policies.base import Prior

STATE = "observation.state"
IMAGES = "observation.images"
TOKENS = "observation.language.tokens"
TOKEN_MASK = "observation.language.attention_mask"


@dataclass(frozen=True)
class Prefix:
    """What a policy computes once an observation: tensors whose leading dimension is B, in no shared state.

    Attributes:
        features: (B, F) float32, what small networks may learn from: the pooled prefix and the normalised state.
        tensors: by name, what a step needs beside the cache.
        cache: for each layer the keys and values (B, heads, P, D) of the prefix.
    """

    features: Tensor
    tensors: Mapping[str, Tensor]
    cache: tuple[tuple[Tensor, Tensor], ...] = ()

    def repeat_interleave(self, copies: int) -> Prefix:
        """Repeat every row `copies` times, neighbours together (for several candidates an observation)."""

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(copies, 0)

        return Prefix(
            repeat(self.features),
            {name: repeat(tensor) for name, tensor in self.tensors.items()},
            tuple((repeat(keys), repeat(values)) for keys, values in self.cache),
        )

    def past(self) -> Any:
        """Return a cache of the library that the models are written with, which nobody else holds."""
        from transformers import DynamicCache

        return DynamicCache(self.cache)


class Flow(Protocol):
    """One kind of policy: what it computes once, and its velocity.

    Attributes:
        steps: the name of the config's entry for the number of denoising steps.
        prior: the law of its noise.
        convention: in words, for the description.
    """

    steps: ClassVar[str]
    prior: ClassVar[Prior]
    convention: ClassVar[str]

    def __init__(self, policy: Any) -> None:
        """Take the policy, in evaluation mode."""

    def prefix(self, batch: dict[str, Any]) -> Prefix:
        """Compute the prefix of a preprocessed batch."""
        ...

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at state x (B, H, A + padding) and time t (B,)."""
        ...


class SmolVLAFlow:
    """SmolVLA (arXiv 2506.01844): `embed_prefix`, one pass that fills the cache, then `denoise_step`."""

    steps: ClassVar[str] = "num_steps"
    prior: ClassVar[Prior] = "gaussian"
    convention: ClassVar[str] = "t = 1 is noise, v = noise - action; both turned round here"

    def __init__(self, policy: Any) -> None:
        if not policy.config.use_cache:
            raise InvalidInputError(
                "this SmolVLA is configured with use_cache = False, so every step would compute the prefix again. Set it to "
                "True in its config.json: the actions stay the same."
            )
        self.policy, self.model = policy, policy.model

    def prefix(self, batch: dict[str, Any]) -> Prefix:
        """Embed images, words and state, and run them through the backbone once."""
        from lerobot.policies.common.vla_utils import make_att_2d_masks

        images, image_masks = self.policy.prepare_images(batch)
        state = self.policy.prepare_state(batch)
        embedded, mask, attention = self.model.embed_prefix(
            images, image_masks, batch[TOKENS], batch[TOKEN_MASK], state=state
        )
        outputs, cache = self.model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(mask, attention),
            position_ids=torch.cumsum(mask, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        return Prefix(_features(outputs[0], mask, batch), {"mask": mask}, _layers(cache))

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """Take one `denoise_step`, turned round."""
        velocity: Tensor = self.model.denoise_step(
            prefix_pad_masks=prefix.tensors["mask"], past_key_values=prefix.past(), x_t=x, timestep=1.0 - t
        )
        return -velocity


class PiFlow:
    """pi0 (arXiv 2410.24164): the state is no part of the prefix but goes into every step."""

    steps: ClassVar[str] = "num_inference_steps"
    prior: ClassVar[Prior] = "gaussian"
    convention: ClassVar[str] = "t = 1 is noise, v = noise - action; both turned round here"

    def __init__(self, policy: Any) -> None:
        self.policy, self.model = policy, policy.model

    def prefix(self, batch: dict[str, Any]) -> Prefix:
        """Embed images and words, and run them through the backbone once."""
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        images, image_masks = self.policy._preprocess_images(batch)
        embedded, mask, attention = self.model.embed_prefix(images, image_masks, batch[TOKENS], batch[TOKEN_MASK])
        both = self.model.paligemma_with_expert
        both.paligemma.model.language_model.config._attn_implementation = "eager"  # as its own sampler does
        outputs, cache = both.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(mask, attention)),
            position_ids=torch.cumsum(mask, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        return Prefix(_features(outputs[0], mask, batch), {"mask": mask, **self._extra(batch)}, _layers(cache))

    def _extra(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"state": self.policy.prepare_state(batch)}

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """Take one `denoise_step`, turned round."""
        extra = {name: tensor for name, tensor in prefix.tensors.items() if name != "mask"}
        velocity: Tensor = self.model.denoise_step(
            prefix_pad_masks=prefix.tensors["mask"], past_key_values=prefix.past(), x_t=x, timestep=1.0 - t, **extra
        )
        return -velocity


class Pi05Flow(PiFlow):
    """pi0.5 (arXiv 2504.16054): the state is written into the prompt, so a step needs the prefix alone."""

    def _extra(self, batch: dict[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002 - as pi0's
        return {}


class MultiTaskDiTFlow:
    """The multi-task diffusion transformer with its flow-matching objective: a conditioning vector, then `noise_predictor`."""

    steps: ClassVar[str] = "num_integration_steps"
    prior: ClassVar[Prior] = "gaussian"
    convention: ClassVar[str] = "t = 0 is noise, v = action - noise, as here"

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def prefix(self, batch: dict[str, Any]) -> Prefix:
        """Encode images (B, S, 3, H, W), states (B, S, D) and words into one vector."""
        batch = dict(batch)
        cameras = list(self.policy.config.image_features)
        if cameras:
            batch[IMAGES] = torch.stack([batch[name] for name in cameras], dim=-4)
        vector: Tensor = self.policy.observation_encoder.encode(batch)
        return Prefix(vector.float(), {"vector": vector})

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """Call the network; it predicts action - noise."""
        velocity: Tensor = self.policy.noise_predictor(x, t, conditioning_vec=prefix.tensors["vector"])
        return velocity


class Evo1Flow:
    """EVO-1 (arXiv 2511.04555): noise is uniform on [-1, 1], and time comes in a thousand steps.

    What lies beyond the robot's own dimensions is masked to zero before and after the network, so it never counts.
    """

    steps: ClassVar[str] = "num_inference_timesteps"
    prior: ClassVar[Prior] = "uniform"
    convention: ClassVar[str] = "t = 0 is noise, v = action - noise, as here; noise uniform on [-1, 1]"
    TIMES: ClassVar[int] = 1000

    def __init__(self, policy: Any) -> None:
        self.policy, self.head = policy, policy.model.action_head

    def prefix(self, batch: dict[str, Any]) -> Prefix:
        """Embed images and words with the backbone, and the state beside them."""
        policy = self.policy
        images, image_masks = policy._collect_image_batches(batch)
        state, _ = policy._prepare_state(batch)
        tokens, mask = policy._compute_fused_tokens(policy._normalize_task_batch(batch), images, image_masks)
        embodiment = policy._get_embodiment_ids(batch, len(state))
        context, padded, embodiment = self.head._prepare_context(tokens, state, embodiment, mask)
        padded = torch.zeros(context.shape[:2], dtype=torch.bool, device=context.device) if padded is None else padded
        tensors = {"context": context.to(self.head.dtype), "padded": padded, "embodiment": embodiment}
        return Prefix(_features(context, ~padded, batch), tensors)

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """Run the action head's transformer on the masked state."""
        head, rows = self.head, len(x)
        mask = self.policy._prepare_inference_action_mask(rows)[:, None].to(x)
        embodiment = prefix.tensors["embodiment"]
        index = (t * (self.TIMES - 1)).long().clamp(0, self.TIMES - 1)
        time = head.time_pos_enc(self.TIMES)[0, index].to(x.device, head.dtype)
        hidden = head._project_actions((x * mask).to(head.dtype), embodiment).to(head.dtype)
        for block in head.transformer_blocks:
            hidden = block(hidden, prefix.tensors["context"], time, prefix.tensors["padded"])
        hidden = head.norm_out(hidden)
        pooled = head.seq_pool_proj(hidden.reshape(rows, -1)) if head.horizon > 1 else hidden.squeeze(1)
        velocity: Tensor = head.mlp_head(pooled, embodiment).view_as(x).to(x.dtype) * mask
        return velocity


FLOWS: dict[str, type[Flow]] = {
    "smolvla": SmolVLAFlow,
    "pi0": PiFlow,
    "pi05": Pi05Flow,
    "multi_task_dit": MultiTaskDiTFlow,
    "evo1": Evo1Flow,
}

NOT_FLOWS = {
    "act": "it regresses actions (a variational autoencoder with a style variable); there is no field to follow",
    "diffusion": "it predicts the noise of a diffusion schedule (epsilon), not a velocity, and its sampler draws more on the way",
    "gaussian_actor": "its actions are one Gaussian around a mean; there is no field to follow",
    "pi0_fast": "it writes actions as a sequence of tokens, one after the other",
    "tdmpc": "it plans with a learned model at every step",
    "vqbet": "it chooses actions from a codebook",
    "groot": "its processors decode actions relative to the state of each observation, its loop runs inside the action head, and "
    "it is built from a checkpoint of several gigabytes alone, so an adapter could not be checked against it here",
    "xvla": "it predicts the clean action, and its own sampler mixes that with the first noise again at every step instead of "
    "following (a - x) / (1 - t), so no velocity reproduces what it does; a gripper's channel is a logit outside of the flow",
    "eo1": "its flow runs inside a Qwen2.5-VL whose configuration and processor come from a hub; it is not adapted yet",
    **dict.fromkeys(
        ("fastwam", "lingbot_va", "molmoact2", "vla_jepa", "wall_x"),
        "its sampler runs inside a larger model, and nobody has adapted it yet",
    ),
}
"""Why the other policies of LeRobot 0.6.1 can't be steered, or not yet."""


def _layers(cache: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the keys and values of a filled cache, layer by layer."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def _features(hidden: Tensor, mask: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return the mean of what the backbone made of the valid tokens (B, P, W), with the normalised state: (B, W + D)."""
    weight = mask.to(torch.float32)[..., None]
    pooled = (hidden.float() * weight).sum(1) / weight.sum(1).clamp_min(1.0)
    state = batch.get(STATE)
    if state is None:
        return pooled
    state = state[:, -1] if state.ndim > 2 else state
    return torch.cat([pooled, state.to(pooled)], dim=1)
