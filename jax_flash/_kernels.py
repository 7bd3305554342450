"""What the compiled library says of its kernels: which take a call, how a call is planned, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax.core import ShapedArray

from jax_flash._ffi import _native
from jax_flash._operands import PUBLIC_NAMES, sizes
from jax_flash._spec import Spec

_UNKNOWN = np.iinfo(np.int64).max


def dtypes(call: str, cuda: bool) -> set[str]:
    """The dtypes that a call has kernels for."""
    rows = [row for row in _native.kernels() if row["call"] == call and bool(row["first_capability"]) == cuda]
    return {dtype for row in rows for dtype in row["dtypes"]}


def check_cuda(call: str, q: ShapedArray) -> None:
    """Refuses a call that is lowered for CUDA and has no kernel there."""
    function = PUBLIC_NAMES[call]
    if not _native.build_info()["cuda_architectures"]:
        raise NotImplementedError(
            f"{function}: this jax_flash was built without its CUDA kernels. Install nvcc and reinstall with "
            "`pip install . -C cmake.define.JAX_FLASH_CUDA=ON`, or run on the CPU with jax.default_device"
        )
    if q.dtype.name not in dtypes(call, cuda=True):
        raise NotImplementedError(
            f"{function}: {q.dtype.name} has no CUDA kernel; got q {q.dtype.name}{q.shape}. Cast all arrays to "
            "bfloat16 or float16, or run on the CPU with jax.default_device(jax.devices('cpu')[0])"
        )


class Plan(NamedTuple):
    """How a call is done. The handler obeys it, and refuses buffers that do not fit."""

    workspace: ShapedArray | None = None
    kvcache_kernel: int = 0
    # A loop that carries the query, as one over steps or layers does, would else copy o there in every iteration; where
    # q is needed afterwards, or is a parameter that was not donated, XLA copies that small array before the call. Nor
    # can another operand lie in that buffer: o is live while the call runs, and XLA shares a buffer only among values
    # that are not live at once; it copies q where two operands are one value.
    o_may_be_q: bool = False


def plan(
    call: str, platform: str, spec: Spec, operands: Mapping[str, ShapedArray], memory_order: bool, devices: int
) -> Plan:
    """devices: how many XLA splits the call over; their parts of the workspace must add up to what each needs."""
    q = operands["q"]
    lead = q.shape[: q.ndim - 4]
    size = sizes(operands, memory_order)
    heads = math.prod(lead) * size["k"]
    if call == "forward":
        per_head, shared, chosen = 0, _native.FORWARD_WORKSPACE, Plan()
    elif call == "backward":
        per_kv_head, per_rows, per_keys, rows = _native.backward_workspace(size["h"])
        per_head, shared, chosen = per_kv_head + size["g"] * (-(-size["t"] // rows) * per_rows), 0, Plan()
        if not (isinstance(size["g"], int) and size["g"] == 1):
            per_head += -(-size["s"] // rows) * per_keys
    elif platform == "cpu":
        per_head, shared, chosen = 0, 1, Plan()
    else:
        pages = "block_table" in operands
        capacity = size["s"] * (size["n"] if pages else 1)
        kernel, o_may_be_q, per_head, per_position, shared = _native.plan_kvcache(
            size["t"],
            size["g"],
            size["h"],
            rotary="cos" in operands,
            pages=pages,
            batch_index="batch_index" in operands,
            leftpad="leftpad" in operands,
            num_splits=spec.num_splits,
            positions=positions if isinstance(positions := heads * capacity, int) else _UNKNOWN,
        )
        per_head += per_position * capacity
        chosen = Plan(None, kernel, o_may_be_q)
    if memory_order:
        return chosen._replace(workspace=ShapedArray((heads * per_head + shared,), np.dtype(np.uint8)))
    per_head += -(-shared * devices // heads) if shared else 0
    return chosen._replace(workspace=ShapedArray((*lead, size["k"], per_head), np.dtype(np.uint8)))
