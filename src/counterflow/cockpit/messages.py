"""What a page may say. Everything is checked here; what isn't listed is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from counterflow.cockpit.control import Way
from counterflow.reasoners.direction import GripperCommand

LARGEST = 16_384  # bytes of a message
Sequence = Annotated[int, Field(ge=0, le=2**53)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Hello(_Message):
    """Who is there: the first message of every connection."""

    type: Literal["hello"]
    client: str = Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")
    token: str | None = Field(default=None, max_length=1024)
    watch: bool = False


class Report(_Message):
    """Which keys are held now."""

    type: Literal["report"]
    held: list[Way] = Field(default_factory=list, max_length=7)
    less: bool = False
    sequence: Sequence = 0


class Tap(_Message):
    """One chunk."""

    type: Literal["tap"]
    held: list[Way] = Field(max_length=7)
    less: bool = False
    sequence: Sequence = 0


class Grip(_Message):
    """What the gripper is told."""

    type: Literal["grip"]
    command: GripperCommand
    sequence: Sequence = 0


class Choose(_Message):
    """How it is driven."""

    type: Literal["choose"]
    method: str | None = Field(default=None, max_length=32)
    reversal_steps: int | None = Field(default=None, ge=1, le=1000)
    steps: int | None = Field(default=None, ge=1, le=1000)
    tau: float | None = Field(default=None, ge=0, lt=1)
    candidates: int | None = Field(default=None, ge=1, le=256)
    magnitude: float | None = Field(default=None, gt=0, le=10)
    noise_policy: str | None = Field(default=None, max_length=200)
    pilot: str | None = Field(default=None, max_length=32)


class Task(_Message):
    """Another task."""

    type: Literal["task"]
    env: str = Field(max_length=200)


class Command(_Message):
    """A button."""

    type: Literal["command"]
    name: Literal["pause", "resume", "reset", "keep", "discard", "restart", "train", "stop_training", "film"]


class Seat(_Message):
    """Take the wheel, or give it away."""

    type: Literal["seat"]
    take: bool


class Seen(_Message):
    """A picture has been drawn: there is room for another."""

    type: Literal["seen"]
    frame: Sequence


Message = Annotated[Hello | Report | Tap | Grip | Choose | Task | Command | Seat | Seen, Field(discriminator="type")]
MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)
