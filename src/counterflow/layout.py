"""Which number of an action or an observation means what: what environments know, and policies and reasoners need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActionLayout:
    """Which dimensions of an action do what, so that a direction in words can be written into an action.

    Attributes:
        translation: the dimensions that move the end effector along world x, y and z.
        rotation: the dimensions that turn it.
        gripper: the dimension that moves the gripper, or None.
        gripper_close_sign: +1 if positive values close the gripper, -1 if they open it.
    """

    translation: tuple[int, ...]
    rotation: tuple[int, ...] = ()
    gripper: int | None = None
    gripper_close_sign: int = 1


@dataclass(frozen=True)
class ObjectEntry:
    """Where an observation tells of one object.

    Attributes:
        name: what it is called, in words: "drawer handle", "akita black bowl 1".
        columns: for each of the D numbers that this family of environments tells of an object, its place in the observation;
            None where nothing is told of this object. The first three are its position, metres, world frame.
    """

    name: str
    columns: tuple[int | None, ...]


@dataclass(frozen=True)
class ObservationLayout:
    """Which entries of an observation tell of the robot, and which of each object.

    Tasks of one family may have different objects, and so observations of different lengths; the robot is always told of by
    the same numbers in the same order, and an object by the same D.

    Attributes:
        robot: places of the robot's numbers; the first three are the end effector's position, metres, world frame.
        objects: the objects, in the observation's order; the goal, where it is part of the observation, is one of them.
    """

    robot: tuple[int, ...]
    objects: tuple[ObjectEntry, ...]

    @property
    def object_dim(self) -> int:
        """D, how many numbers may be told of an object."""
        return len(self.objects[0].columns)
