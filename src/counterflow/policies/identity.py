"""A short name for exactly this code with exactly these numbers, whatever it is made of.

Noises belong to one frozen policy. A policy of one's own may be a module, a function, or a module in a function's closure;
two of them with the same action space are still two policies. `identify` looks into what it is given: numbers count by their
values, code by what it does, so that the same policy has the same name in every process that runs the same Python.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def identify(*things: Any) -> str:
    """Return 16 hexadecimal digits that depend on every number, every setting and the code of `things`.

    Tensors, arrays and modules count by their numbers; functions by their bytecode, constants, defaults, closures and the
    tensors, modules and functions among the globals that they name; other objects by their class and attributes. What none
    of this reaches (the inside of a compiled library, a server behind a socket) does not count.
    """
    digest = hashlib.sha256()
    _add(things, digest, set())
    return digest.hexdigest()[:16]


def add_tensor(tensor: Tensor, digest: Any) -> None:
    """Add shape, type and every number of a tensor to a hash, without a second copy of it."""
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{tuple(plain.shape)}{plain.dtype}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)


def _add(thing: Any, digest: Any, inside: set[int]) -> None:
    """Add anything to a hash; what is met again inside of itself adds nothing more."""
    digest.update(f"<{type(thing).__qualname__}>".encode())
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        digest.update(repr(thing).encode())
        return
    if isinstance(thing, Enum):
        digest.update(str(thing).encode())
        return
    if isinstance(thing, Tensor):
        add_tensor(thing, digest)
        return
    if isinstance(thing, np.ndarray | np.generic):
        digest.update(f"{np.shape(thing)}{thing.dtype}".encode())
        digest.update(np.ascontiguousarray(thing).tobytes())
        return
    if id(thing) in inside:
        return
    inside.add(id(thing))
    try:
        _look_inside(thing, digest, inside)
    finally:
        inside.remove(id(thing))


def _look_inside(thing: Any, digest: Any, inside: set[int]) -> None:
    """Add what a thing is made of."""
    if isinstance(thing, type | types.ModuleType | types.BuiltinFunctionType):
        digest.update(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)}".encode())
    elif isinstance(thing, nn.Module):
        _add_module(thing, digest)
    elif isinstance(thing, types.FunctionType):
        _add_function(thing, digest, inside)
    elif isinstance(thing, types.MethodType):
        _add((thing.__func__, thing.__self__), digest, inside)
    elif isinstance(thing, functools.partial):
        _add((thing.func, thing.args, thing.keywords), digest, inside)
    elif isinstance(thing, Mapping):
        for name in sorted(thing, key=repr):
            _add((name, thing[name]), digest, inside)
    elif isinstance(thing, set | frozenset):
        _add(sorted(thing, key=repr), digest, inside)
    elif isinstance(thing, tuple | list):
        for part in thing:
            _add(part, digest, inside)
    else:
        _add((type(thing), getattr(thing, "__dict__", {})), digest, inside)


def _add_module(module: nn.Module, digest: Any) -> None:
    """Add a module's classes, the settings that it shows, and its numbers; where they lie does not count."""
    for name, part in module.named_modules():
        shown = part.extra_repr()
        digest.update(f"{name}:{type(part).__module__}.{type(part).__qualname__}".encode())
        digest.update(b"" if " at 0x" in shown else shown.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            add_tensor(tensor, digest)


def _add_function(function: types.FunctionType, digest: Any, inside: set[int]) -> None:
    """Add what a function does, not where it was written."""
    _add_code(function.__code__, digest, inside)
    _add((function.__defaults__, function.__kwdefaults__), digest, inside)
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        _add(content, digest, inside)
    for name in function.__code__.co_names:
        named = function.__globals__.get(name)
        if isinstance(named, Tensor | nn.Module | np.ndarray | types.FunctionType | int | float | str):
            _add((name, named), digest, inside)


def _add_code(code: types.CodeType, digest: Any, inside: set[int]) -> None:
    digest.update(code.co_code)
    digest.update(repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(constant, digest, inside)
        else:
            _add(constant, digest, inside)
