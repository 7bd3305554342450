"""What is static in a call: it travels from the API to the kernel, and is hashable, so that it can be a parameter of a
primitive and a key of jit's cache."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Band:
    """The contiguous range of keys that a query sees.

    With t and s valid queries and keys, query i < t sees the keys j < s with i + d - left <= j <= i + d + right. A side
    may have any sign, and None does not limit; causal is right=0. d is 0 from the top left, else s - t, that is
    FlashAttention's bottom right; or what the operand `diagonal` says.
    """

    left: int | None = None
    right: int | None = None
    top_left: bool = False

    def __post_init__(self):
        if self.left is None and self.right is None:  # one way to say it, and one compiled program
            object.__setattr__(self, "top_left", False)


@dataclasses.dataclass(frozen=True)
class Spec:
    """score = softmax_scale * q.k, then softcap * tanh(score / softcap) if there is a softcap, then the band."""

    softmax_scale: float
    softcap: float | None = None
    band: Band = Band()
    deterministic: bool = False
    # Of calls over a KV cache.
    rotary_interleaved: bool = False
    num_splits: int = 0  # of the keys; 0: balanced over the device
