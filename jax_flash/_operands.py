"""The table of a call's arrays, csrc/operands.h, and what follows from it for each of the three calls.

A row says by letters which axes an array has: in memory, which is also the order of the primitives' shapes, and in the
logical order, batch and heads first, in which XLA may split a call over devices. An array that is absent is None in C++
and has no entry in the dicts that Python passes around, whose order is the table's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jax_flash._ffi import _native

CALLS = ("forward", "backward", "kvcache")
# What messages call them.
PUBLIC_NAMES = {"forward": "attention", "backward": "attention", "kvcache": "flash_attn_with_kvcache"}


@dataclasses.dataclass(frozen=True)
class Operand:
    """A row; csrc/operands.h says what the letters mean."""

    name: str
    axes: str
    memory: str
    type: str
    gradient: str
    roles: Mapping[str, str] = dataclasses.field(hash=False)

    @property
    def per_group(self) -> bool:
        """Whether it differs between the query heads of a KV head."""
        return "g" in self.axes.lower()

    @property
    def batched(self) -> bool:
        """Whether the axes of vmap stand before its own."""
        return self.memory[0] in "br"


TABLE = {row["name"]: Operand(**row) for row in _native.operands()}


def in_order(arrays: Mapping) -> dict:
    """The same, in the order of the table, without what is None."""
    return {name: arrays[name] for name in TABLE if arrays.get(name) is not None}


def results(call: str, operands: Iterable[str]) -> tuple[str, ...]:
    """The names of a call's results, but for the workspace."""
    roles = ("result", "updated") if "k_new" in operands else ("result",)
    return tuple(name for name, row in TABLE.items() if row.roles[call] in roles and name != "workspace")


def like(call: str, result: str) -> str:
    """The operand that a result looks like: what it is the gradient or the update of, or else q, as o does."""
    for name, row in TABLE.items():
        if result == row.gradient or (result == name and row.roles[call] == "updated"):
            return name
    return "q"


def sizes(operands: Mapping, memory_order: bool = True) -> dict[str, Any]:
    """What the letters stand for in a call with operands of these shapes; axes of vmap aside."""
    letters = {}
    for name, x in operands.items():
        axes = TABLE[name].memory if memory_order else TABLE[name].axes
        letters |= zip(axes, x.shape[x.ndim - len(axes) :], strict=True)
    return letters


def split_heads(name: str, x, K: int):
    """(..., N, ...) of the API to (..., K, G, ...) of the primitives."""
    at = TABLE[name].memory.index("kg")
    N = x.shape[at]
    return x.reshape(*x.shape[:at], K, N // K if K else 1, *x.shape[at + 1 :])


def merge_heads(name: str, x):
    """And back."""
    at = TABLE[name].memory.index("kg")
    return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
