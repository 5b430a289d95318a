"""A generalist: one flow policy for many tasks, on what is told of the robot and of each object, and a sentence.

Tokens for the robot, for every object (its numbers, where it lies from the gripper, its name) and for the task's sentence go
through a transformer encoder once an observation; the chunk's tokens attend to them at every flow step (a diffusion transformer
with cross-attention, DiT, arXiv 2212.09748). There may be any number of objects, in any order: those that aren't there are
masked.

A task is described by its sentence and an `ObservationLayout`. `policy.for_task(sentence, layout)` is the same policy for one
task, and sees that task's plain observations; the weights are shared. What it learns is bound to nothing but the family's
numbers of the robot and of an object, so it can be given tasks that it was never trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from counterflow.checks import COUNT
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.flow.field import inspectable
from counterflow.layout import ObservationLayout
from counterflow.policies.base import ActionSpec
from counterflow.policies.described import Format, fingerprint, rebuild, save_described
from counterflow.policies.networks import TimeEmbedding, zero_linear
from counterflow.policies.normalisation import Normaliser
from counterflow.policies.text import HASHED, embed_texts

FORMAT = Format("counterflow/generalist-policy", 1, "Expected a policy of 'counterflow train generalist'.")
LARGEST_INPUT = 10.0  # what is further off than this, normalised, looks the same to the network


@dataclass(frozen=True)
class GeneralistConfig:
    """The architecture.

    Attributes:
        width: size of a token.
        encoder_depth: blocks over the observation's tokens, computed once an observation.
        depth: blocks over the chunk's tokens, computed at every flow step.
        heads: attention heads; they must divide the width.
        name_dim: numbers of a name's embedding.
        sentence_dim: numbers of a sentence's embedding.
        text: how both are embedded, see `counterflow.policies.text`.
        max_objects: how many objects `features` has room for, and so the most that a task may have.

    Raises:
        InvalidInputError: a size is not positive, or the heads do not divide the width.
    """

    width: int = 128
    encoder_depth: int = 3
    depth: int = 4
    heads: int = 4
    name_dim: int = 32
    sentence_dim: int = 64
    text: str = HASHED
    max_objects: int = 32

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("width", "encoder_depth", "depth", "heads", "name_dim", "sentence_dim", "max_objects"):
            value = getattr(self, name)
            COUNT.check(f"the generalist's {name}", value, written=True)
        if self.width % self.heads:
            raise InvalidInputError(f"width {self.width} can't be divided among {self.heads} heads; choose a multiple.")


@dataclass(frozen=True)
class TaskDescription:
    """What the policy has to know of a task beforehand.

    Attributes:
        sentence: the task in words.
        layout: which of the observation's entries tell of the robot and of which object.
    """

    sentence: str
    layout: ObservationLayout


class GeneralistPolicy(nn.Module):
    """A base policy for all tasks of a family whose observations have a layout.

    Before it can see anything it must know for which task: `for_task`, or `for_tasks` to train on many at once.

    Args:
        config: the architecture.
        robot_normaliser: of the robot's R numbers.
        object_normaliser: of an object's D numbers and its position from the end effector, D + 3.
        action_spec: the action space, with the actions' normaliser.
        family: the environments that it was made for, for example "metaworld".

    Raises:
        InvalidInputError: the action space is padded, reaches into the past, or has another prior than the Gaussian.
    """

    def __init__(
        self,
        config: GeneralistConfig,
        robot_normaliser: Normaliser,
        object_normaliser: Normaliser,
        action_spec: ActionSpec,
        family: str = "",
    ) -> None:
        if not action_spec.is_plain or action_spec.prior != "gaussian":
            raise InvalidInputError(
                f"a generalist's flow moves its chunk and nothing else, from Gaussian noise; padding is {action_spec.padding}, "
                f"past {action_spec.past}, prior {action_spec.prior!r}. Expected 0, 0 and 'gaussian'."
            )
        super().__init__()
        self.config, self.action_spec, self.family = config, action_spec, family
        self.robot_normaliser, self.object_normaliser = robot_normaliser, object_normaliser
        self.action_normaliser = action_spec.normaliser
        self.network = GeneralistNetwork(
            config, robot_normaliser.dim, object_normaliser.dim - 3, action_spec.horizon, action_spec.dim
        )
        self.tasks: _TaskTable | None = None
        self.provenance: dict[str, Any] = {}

    @property
    def robot_dim(self) -> int:
        """R, how many numbers tell of the robot."""
        return self.robot_normaliser.dim

    @property
    def object_dim(self) -> int:
        """D, how many numbers tell of an object."""
        return self.object_normaliser.dim - 3

    @property
    def observation_dim(self) -> int | None:
        """O, how many numbers it sees of the task that it is for; None while it is for none."""
        return None if self.tasks is None else self.tasks.observation_dim

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    def for_task(self, sentence: str, layout: ObservationLayout | None) -> GeneralistPolicy:
        """Return this policy for one task, on its plain observations (B, O); weights are shared.

        Raises:
            MismatchError: the task has no layout, or one of another family, or too many objects.
        """
        if layout is None:
            raise MismatchError(
                f"the task {sentence!r} does not say which numbers of its observations tell of which object, and a generalist "
                f"has to know. Use one of the environments of {self.family or 'its family'}."
            )
        return self._with(_TaskTable([TaskDescription(sentence, layout)], self, packed=False))

    def for_tasks(self, tasks: Sequence[TaskDescription]) -> GeneralistPolicy:
        """Return this policy for many tasks at once, on packed observations (`pack`); weights are shared.

        Raises:
            MismatchError: as for `for_task`.
        """
        return self._with(_TaskTable(tasks, self, packed=True))

    def _with(self, table: _TaskTable) -> GeneralistPolicy:
        bound = copy.copy(self)
        bound._modules = dict(self._modules)
        bound.tasks = table.to(self.device)
        return bound

    def encode(self, observation: Tensor | npt.NDArray[Any]) -> dict[str, Tensor]:
        """Encode observations (B, O), on the policy's device: tokens, which of them are there, and features.

        Raises:
            MismatchError: it isn't known for which task, or the shape is not (B, O).
            InvalidInputError: (on the CPU) values are NaN or infinite.
        """
        if self.tasks is None:
            raise MismatchError(
                "a generalist was asked to act without a task. Say which: policy.for_task(spec.task, spec.observation_layout); "
                "the commands of 'counterflow' do."
            )
        given = torch.as_tensor(np.asarray(observation) if isinstance(observation, list) else observation)
        if given.ndim != 2 or given.shape[1] != self.tasks.observation_dim:
            raise MismatchError(
                f"observations have shape {tuple(given.shape)}; for this task the policy sees (B, {self.tasks.observation_dim}). "
                "One observation needs a batch dimension."
            )
        if inspectable(given) and not bool(torch.isfinite(given).all()):
            raise InvalidInputError("observations hold NaN or infinite values; look for them where they were recorded.")
        scene = self.tasks.read(given.to(self.device, torch.float32))
        robot = self.robot_normaliser.normalise(scene.robot).clamp(-LARGEST_INPUT, LARGEST_INPUT)
        objects = self._normalised_objects(scene)
        known = scene.known.to(objects.dtype)
        tokens = self.network.encode(
            robot, torch.cat([objects, known, scene.names], dim=-1), scene.present, scene.sentence
        )
        here = torch.ones(len(given), 2, dtype=torch.bool, device=self.device)
        room = self.config.max_objects - objects.shape[1]
        padded = functional.pad(objects, (0, 0, 0, room)).flatten(1)
        return {
            "tokens": tokens,
            "present": torch.cat([here, scene.present], dim=1),
            "features": torch.cat([robot, padded, scene.sentence], dim=1),
        }

    def _normalised_objects(self, scene: _Scene) -> Tensor:
        """Return (B, N, D + 3) normalised, zero where nothing is told."""
        relative = scene.objects[..., :3] - scene.robot[:, None, :3]
        told = torch.cat([scene.objects, relative], dim=-1)
        known = torch.cat([scene.known, scene.known[..., :3]], dim=-1)
        normalised = self.object_normaliser.normalise(told).clamp(-LARGEST_INPUT, LARGEST_INPUT)
        return normalised * known

    def features(self, context: dict[str, Tensor]) -> Tensor:
        """Return what small networks may learn from (B, F): robot, objects and sentence, of one size for all tasks."""
        return context["features"]

    def velocity(self, context: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, H, A) at state x (B, H, A) and time t (B,), for encoded observations."""
        velocity: Tensor = self.network(context["tokens"], context["present"], x, t)
        return velocity

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values; the task that it is for is not part of it."""
        return {
            "family": self.family,
            "network": asdict(self.config),
            "observation": {
                "robot_dim": self.robot_dim,
                "object_dim": self.object_dim,
                "robot_normalisation": self.robot_normaliser.kind,
                "object_normalisation": self.object_normaliser.kind,
            },
            "action": self.action_spec.description(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return every number that makes the policy what it is, by name, on the CPU."""
        found = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        found |= self.robot_normaliser.tensors("robot") | self.object_normaliser.tensors("object")
        found |= self.action_spec.tensors()
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    @property
    def fingerprint(self) -> str:
        """A short name for exactly this policy, whichever task it is for: what depends on it can refuse another."""
        return fingerprint(self.description(), self.tensors())


def pack(observations: npt.NDArray[Any], task: int, layout: ObservationLayout, objects: int) -> npt.NDArray[np.float32]:
    """Bring one task's observations into the layout that all tasks of a training share.

    Args:
        observations: (T, O) of the task.
        task: its number among the training's tasks.
        layout: what they tell.
        objects: N, for how many objects there is room.

    Returns:
        (T, 1 + R + N D): the task's number, the robot, the objects; zero where nothing is told.
    """
    steps, dim = len(observations), layout.object_dim
    packed = np.zeros((steps, 1 + len(layout.robot) + objects * dim), dtype=np.float32)
    packed[:, 0] = task
    packed[:, 1 : 1 + len(layout.robot)] = observations[:, list(layout.robot)]
    for index, entry in enumerate(layout.objects):
        first = 1 + len(layout.robot) + index * dim
        for place, column in enumerate(entry.columns):
            if column is not None:
                packed[:, first + place] = observations[:, column]
    return packed


def fit_normalisers(packed: npt.NDArray[np.float32], tasks: Sequence[TaskDescription]) -> tuple[Normaliser, Normaliser]:
    """Fit the normalisers of the robot (R) and of an object (D + 3) to packed observations of many tasks."""
    robot_dim, dim = len(tasks[0].layout.robot), tasks[0].layout.object_dim
    robot = torch.from_numpy(packed[:, 1 : 1 + robot_dim])
    numbers = torch.from_numpy(packed[:, 1 + robot_dim :]).reshape(len(packed), -1, dim)
    which = torch.from_numpy(packed[:, 0]).long()
    known = _known(tasks, numbers.shape[1])[which]
    told = torch.cat([numbers, numbers[..., :3] - robot[:, None, :3]], dim=-1).double()
    there = torch.cat([known, known[..., :3]], dim=-1).double()
    count = there.sum((0, 1)).clamp_min(1.0)
    mean = (told * there).sum((0, 1)) / count
    deviation = (((told - mean) * there) ** 2).sum((0, 1)).div(count).sqrt()
    # A number that never moved, such as a quaternion's of things that don't turn, keeps its own scale.
    scale = torch.where(deviation > 1e-3, deviation, torch.ones_like(deviation))
    return Normaliser.fit(robot, "mean_std"), Normaliser(mean, scale, "mean_std")


def save_generalist(policy: GeneralistPolicy, path: Path | str) -> Path:
    """Write a policy to `path` (ending in ".safetensors", or without an ending) and its description beside it.

    Raises:
        StorageError: writing failed; what stood there before is untouched.
    """
    return save_described(path, FORMAT, policy.description(), policy.provenance, policy.tensors())


def load_generalist(path: Path, device: torch.device | str = "cpu") -> GeneralistPolicy:
    """Load a policy, frozen (no gradients, evaluation mode), for no task yet; `counterflow.load` finds this by itself.

    Raises:
        CheckpointError: the file is truncated, damaged, foreign, or written by a newer version.
    """
    policy = rebuild(path, FORMAT, _build)
    return policy.to(device).requires_grad_(False).eval()


def _build(content: dict[str, Any], tensors: dict[str, Tensor]) -> GeneralistPolicy:
    observation = content["observation"]
    policy = GeneralistPolicy(
        GeneralistConfig(**content["network"]),
        Normaliser.from_tensors(tensors, "robot", observation["robot_normalisation"]),
        Normaliser.from_tensors(tensors, "object", observation["object_normalisation"]),
        ActionSpec.from_description(content["action"], tensors),
        content["family"],
    )
    weights = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    policy.network.load_state_dict(weights)
    policy.provenance = content["provenance"]
    return policy


@dataclass(frozen=True)
class _Scene:
    """A batch of observations, taken apart: robot (B, R), objects (B, N, D), what is known of them, names, sentence."""

    robot: Tensor
    objects: Tensor
    known: Tensor
    present: Tensor
    names: Tensor
    sentence: Tensor


class _TaskTable(nn.Module):
    """What is known of tasks beforehand, as tensors, and where their observations tell of what.

    Args:
        tasks: T of them.
        policy: the policy that is to act in them; its dimensions are checked.
        packed: whether observations are packed; else there is one task, and they are its own.
    """

    def __init__(self, tasks: Sequence[TaskDescription], policy: GeneralistPolicy, packed: bool) -> None:
        super().__init__()
        config = policy.config
        for task in tasks:
            layout = task.layout
            if (len(layout.robot), layout.object_dim) != (policy.robot_dim, policy.object_dim):
                raise MismatchError(
                    f"the task {task.sentence!r} tells {len(layout.robot)} numbers of the robot and {layout.object_dim} of an "
                    f"object; this policy knows {policy.robot_dim} and {policy.object_dim}. It was made for "
                    f"{policy.family or 'another family'}."
                )
            if len(layout.objects) > config.max_objects:
                raise MismatchError(
                    f"the task {task.sentence!r} has {len(layout.objects)} objects; this policy has room for "
                    f"{config.max_objects}. Train one with a larger max_objects."
                )
        count = max(len(task.layout.objects) for task in tasks)
        self.packed, self.robot_dim, self.object_dim = packed, policy.robot_dim, policy.object_dim
        names = torch.zeros(len(tasks), count, config.name_dim)
        present = torch.zeros(len(tasks), count, dtype=torch.bool)
        for index, task in enumerate(tasks):
            words = [entry.name for entry in task.layout.objects]
            names[index, : len(words)] = embed_texts(words, config.name_dim, config.text)
            present[index, : len(words)] = True
        sentence = embed_texts([task.sentence for task in tasks], config.sentence_dim, config.text)
        for name, tensor in (("names", names), ("present", present), ("sentence", sentence)):
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("known", _known(tasks, count), persistent=False)
        self.names: Tensor
        self.present: Tensor
        self.sentence: Tensor
        self.known: Tensor
        self.robot_columns: Tensor
        self.object_columns: Tensor
        if packed:
            self.observation_dim = 1 + self.robot_dim + count * self.object_dim
            return
        layout = tasks[0].layout
        told = [*layout.robot, *(c for entry in layout.objects for c in entry.columns if c is not None)]
        # Numbers that the layout says nothing of may follow; those that it names must be there.
        self.observation_dim = max(told) + 1
        columns = [[self.observation_dim if c is None else c for c in entry.columns] for entry in layout.objects]
        self.register_buffer("robot_columns", torch.tensor(layout.robot), persistent=False)
        self.register_buffer("object_columns", torch.tensor(columns), persistent=False)

    def read(self, observation: Tensor) -> _Scene:
        """Take observations (B, O) apart."""
        if self.packed:
            task = observation[:, 0].round().long()
            robot = observation[:, 1 : 1 + self.robot_dim]
            objects = observation[:, 1 + self.robot_dim :].unflatten(1, (-1, self.object_dim))
        else:
            task = torch.zeros(len(observation), dtype=torch.long, device=observation.device)
            robot = observation[:, self.robot_columns]
            objects = functional.pad(observation, (0, 1))[:, self.object_columns]  # the last is what isn't told
        known, present = self.known[task], self.present[task]
        return _Scene(robot, objects * known, known, present, self.names[task], self.sentence[task])


def _known(tasks: Sequence[TaskDescription], count: int) -> Tensor:
    """Say which numbers are told of which object: (T, N, D) bool."""
    known = torch.zeros(len(tasks), count, tasks[0].layout.object_dim, dtype=torch.bool)
    for index, task in enumerate(tasks):
        for place, entry in enumerate(task.layout.objects):
            known[index, place] = torch.tensor([column is not None for column in entry.columns])
    return known


class GeneralistNetwork(nn.Module):
    """The encoder of an observation's tokens, and the velocity of a chunk that attends to them.

    Args:
        config: the architecture.
        robot_dim: R.
        object_dim: D.
        horizon: H.
        dim: A.
    """

    def __init__(self, config: GeneralistConfig, robot_dim: int, object_dim: int, horizon: int, dim: int) -> None:
        super().__init__()
        width = config.width
        self.robot = nn.Linear(robot_dim, width)
        self.sentence = nn.Linear(config.sentence_dim, width)
        # An object's numbers, its place from the gripper, which of its numbers are told, and its name.
        self.object = nn.Sequential(
            nn.Linear(2 * object_dim + 3 + config.name_dim, width), nn.GELU(), nn.Linear(width, width)
        )
        self.kind = nn.Parameter(torch.randn(3, width) * 0.02)
        self.encoder = nn.ModuleList(_EncoderBlock(width, config.heads) for _ in range(config.encoder_depth))
        self.encoded = nn.LayerNorm(width)
        self.time = TimeEmbedding()
        self.token = nn.Linear(dim, width)
        self.position = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.condition = nn.Sequential(nn.Linear(2 * width + self.time.dim, width), nn.SiLU(), nn.Linear(width, width))
        self.decoder = nn.ModuleList(_DecoderBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_linear(nn.Linear(width, 2 * width))
        self.out = zero_linear(nn.Linear(width, dim))

    def encode(self, robot: Tensor, objects: Tensor, present: Tensor, sentence: Tensor) -> Tensor:
        """Return the tokens (B, 2 + N, W) of robot (B, R), sentence (B, S) and objects (B, N, ...), in this order."""
        tokens = torch.cat(
            [
                (self.robot(robot) + self.kind[0])[:, None],
                (self.sentence(sentence) + self.kind[1])[:, None],
                self.object(objects) + self.kind[2],
            ],
            dim=1,
        )
        mask = functional.pad(present, (2, 0), value=True)[:, None, None]
        for block in self.encoder:
            tokens = block(tokens, mask)
        encoded: Tensor = self.encoded(tokens)
        return encoded

    def forward(self, tokens: Tensor, present: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, H, A)."""
        condition = functional.silu(self.condition(torch.cat([tokens[:, 0], tokens[:, 1], self.time(t)], dim=1)))
        mask = present[:, None, None]
        chunk = self.token(x) + self.position
        for block in self.decoder:
            chunk = block(chunk, tokens, mask, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        velocity: Tensor = self.out(self.norm(chunk) * (1 + scale) + shift)
        return velocity


class _Attention(nn.Module):
    """Attention of queries (B, Q, W) to what is given (B, K, W), where the mask (B, 1, 1, K) is true."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, given: Tensor, mask: Tensor | None) -> Tensor:
        query = self.query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(given).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = _attend(query, key, value, mask)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return scaled dot-product attention of queries (B, N, Q, D) to keys and values (B, N, K, D)."""
    if query.device.type == "cuda" or not torch.compiler.is_compiling():
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # There is a handful of tokens. PyTorch's own kernel for the CPU is made for long sequences and took half of an update's time;
    # written out like this, the compiler fuses it to loops that take a quarter of that.
    weights = (query[..., :, None, :].float() * key[..., None, :, :].float()).sum(-1) * query.shape[-1] ** -0.5
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    mixed: Tensor = (weights.softmax(-1)[..., None] * value[..., None, :, :].float()).sum(-2)
    return mixed.to(query.dtype)


class _EncoderBlock(nn.Module):
    """Self-attention and an MLP, normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        normed = self.first(tokens)
        tokens = tokens + self.attention(normed, normed, mask)
        mixed: Tensor = tokens + self.mlp(self.second(tokens))
        return mixed


class _DecoderBlock(nn.Module):
    """Self-attention of the chunk, attention to the observation, and an MLP, each modulated and gated (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_linear(nn.Linear(width, 9 * width))
        self.own, self.seen = _Attention(width, heads), _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, chunk: Tensor, given: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(condition)[:, None].chunk(9, dim=-1)
        normed = self.norm(chunk) * (1 + parts[1]) + parts[0]
        chunk = chunk + parts[2] * self.own(normed, normed, None)
        chunk = chunk + parts[5] * self.seen(self.norm(chunk) * (1 + parts[4]) + parts[3], given, mask)
        mixed: Tensor = chunk + parts[8] * self.mlp(self.norm(chunk) * (1 + parts[7]) + parts[6])
        return mixed
