"""The compiled library, what is registered of it with XLA, and how a call's static part reaches it."""

from __future__ import annotations

from collections.abc import Collection

import jax
import numpy as np

from jax_flash._spec import Spec

try:
    from jax_flash import _native
except ImportError as error:
    raise ImportError(
        "jax_flash: its compiled library jax_flash._native is missing or does not load "
        f"({error}). Build it with `pip install .` in the source tree, which needs a C++17 compiler. If it is "
        "installed already, Python found the source tree first: start Python elsewhere, or as `python -P`"
    ) from error

_ROWS = [row["name"] for row in _native.operands()]


def attributes(spec: Spec, operands: Collection[str], *, memory_order: bool = True, kvcache_kernel: int = 0) -> dict:
    """A call's attributes, as csrc/options.h has them."""
    left, right = (_native.UNBOUNDED if side is None else side for side in (spec.band.left, spec.band.right))
    options = dict(
        present=sum(1 << row for row, name in enumerate(_ROWS) if name in operands),
        memory_order=memory_order,
        left=left,
        right=right,
        top_left=spec.band.top_left,
        deterministic=spec.deterministic,
        num_splits=spec.num_splits,
        rotary_interleaved=spec.rotary_interleaved,
        kvcache_kernel=kvcache_kernel,
    )
    score = dict(softmax_scale=spec.softmax_scale, softcap=spec.softcap or 0.0)
    return dict(
        options=np.array([options[name] for name in _native.OPTIONS], np.int64),
        score=np.array([score[name] for name in _native.SCORE], np.float32),
    )


def _register_targets() -> None:
    for platform, targets in _native.registrations().items():
        for name, handler in targets.items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)
            jax.ffi.register_ffi_target_as_batch_partitionable(name)


_register_targets()
