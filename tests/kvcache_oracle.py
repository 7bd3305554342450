"""flash_attn_with_kvcache in NumPy, position by position, and the situations that its tests share."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. Lengths may lie outside the cache; `page` makes it a paged one."""

    dtype: str = "bfloat16"
    B: int = 3
    T: int = 1
    T_new: int = 1
    N: int = 8
    K: int = 2
    H: int = 64
    S: int = 200
    page: int = 0
    lengths: tuple[int, ...] | None = None
    rotary: int = 0
    interleaved: bool = True
    causal: bool = True
    window: tuple[int, int] | None = None
    softcap: float | None = None
    scale: float | None = None
    splits: int | None = None
    leftpad: bool = False
    batch_index: tuple[int, ...] | None = None
    extra_rows: int = 0
    sinks: bool = False
    holes: bool = False  # entries of the block table that name no page

    @property
    def id(self) -> str:
        default = Case()
        parts = [self.dtype]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != getattr(default, field.name):
                parts.append(field.name + str(value).replace(" ", "").strip("()").replace(",", "_"))
        return "-".join(parts)

    def options(self) -> dict:
        return dict(
            causal=self.causal,
            window_size=self.window,
            softcap=self.softcap,
            softmax_scale=self.scale,
            num_splits=self.splits,
            rotary_interleaved=self.interleaved,
        )

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """By the function's names. Positions of the cache that hold nothing are NaN."""
        rng = np.random.default_rng(seed)
        dtype = jnp.dtype(self.dtype)

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32).astype(dtype)

        a = {"q": normal(self.B, self.T, self.N, self.H)}
        pages = -(-self.S // self.page) if self.page else 0
        rows, length = (self.B * pages + 3, self.page) if self.page else (self.B + self.extra_rows, self.S)
        a["k_cache"], a["v_cache"] = normal(rows, length, self.K, self.H), normal(rows, length, self.K, self.H)
        lengths = self.lengths
        if lengths is None:
            lengths = tuple(rng.integers(0, self.S - self.T_new + 1, self.B))
        a["cache_seqlens"] = np.array(lengths, np.int32)
        if self.page:
            a["block_table"] = rng.permutation(rows)[: self.B * pages].reshape(self.B, pages).astype(np.int32)
            if self.holes:
                a["block_table"][0, 0], a["block_table"][-1, -1] = -1, rows + 5
        if self.batch_index is not None:
            a["cache_batch_idx"] = np.array(self.batch_index, np.int32)
        if self.leftpad:
            a["cache_leftpad"] = np.array([rng.integers(-1, max(1, n)) for n in lengths], np.int32)
        if self.T_new:
            a["k"], a["v"] = normal(self.B, self.T_new, self.K, self.H), normal(self.B, self.T_new, self.K, self.H)
        if self.rotary:
            angle = rng.uniform(0, 2 * math.pi, (self.S + self.T, self.rotary // 2))
            table = np.float32 if self.interleaved else dtype
            a["rotary_cos"], a["rotary_sin"] = np.cos(angle).astype(table), np.sin(angle).astype(table)
        if self.sinks:
            a["sinks"] = 2 * rng.standard_normal(self.N).astype(np.float32)
        held = np.zeros((rows, length), bool)
        for b in range(self.B):
            for place in places(a, b)[: max(0, lengths[b])]:
                if place is not None:
                    held[place] = True
        for name in ("k_cache", "v_cache"):
            a[name][~held] = np.nan
        return a


def places(a: dict[str, np.ndarray], b: int) -> list[tuple[int, int] | None]:
    """(row, offset) of every position of sequence b, None where it has no place."""
    rows, S = a["k_cache"].shape[:2]
    if "block_table" in a:
        return [(int(p), i) if 0 <= p < rows else None for p in a["block_table"][b] for i in range(S)]
    row = int(a["cache_batch_idx"][b]) if "cache_batch_idx" in a else b
    return [(row, i) for i in range(S)] if 0 <= row < rows else []


def rotate(x, cos, sin, interleaved: bool):
    x = x.copy()
    half = cos.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = x[..., first].copy(), x[..., second].copy()
    x[..., first], x[..., second] = a * cos - b * sin, b * cos + a * sin
    return x


def oracle(case: Case, a: dict[str, np.ndarray]):
    """(out, lse, k_cache, v_cache): float32 all through, but for the rounding of what is rotated or stored."""
    dtype = a["q"].dtype
    B, T, N, H = a["q"].shape
    G = N // max(1, a["k_cache"].shape[2])
    k_cache, v_cache = a["k_cache"].copy(), a["v_cache"].copy()
    sinks = a.get("sinks", np.full(N, -np.inf, np.float32))
    out, lse = np.zeros((B, T, N, H), np.float32), np.broadcast_to(sinks[:, None], (B, N, T)).copy()
    left, right = case.window or (-1, -1)
    right = 0 if case.causal else right
    table = [x.astype(np.float32) for x in (a["rotary_cos"], a["rotary_sin"])] if case.rotary else None
    for b in range(B):
        place = places(a, b)
        length = min(max(int(a["cache_seqlens"][b]), 0), len(place))
        T_new = case.T_new if place else 0

        def turned(x, position):
            if table is None:
                return x.astype(np.float32)
            row = min(position, len(table[0]) - 1)
            return (
                rotate(x.astype(np.float32), table[0][row], table[1][row], case.interleaved)
                .astype(dtype)
                .astype(np.float32)
            )

        for t in range(T_new):
            if length + t < len(place) and place[length + t] is not None:
                k_cache[place[length + t]] = turned(a["k"][b, t], length + t).astype(dtype)
                v_cache[place[length + t]] = a["v"][b, t]
        end = min(length + T_new, len(place))
        start = max(0, int(a["cache_leftpad"][b])) if "cache_leftpad" in a else 0
        for t in range(T):
            local = left >= 0 or right >= 0
            q = turned(a["q"][b, t], length + (t if local else 0))
            seen = [
                place[j]
                for j in range(start, end)
                if (right < 0 or j <= t + end - T + right) and (left < 0 or j >= t + end - T - left)
            ]
            if not seen:
                continue
            nothing = np.zeros(a["k_cache"].shape[2:], np.float32)  # on pages that the table does not name
            keys, values = (
                np.repeat(np.stack([c[p].astype(np.float32) if p else nothing for p in seen]), G, axis=1)
                for c in (k_cache, v_cache)
            )
            score = np.einsum("nh,snh->ns", q, keys) * (case.scale or H**-0.5)
            if case.softcap:
                score = case.softcap * np.tanh(score / case.softcap)
            top = np.maximum(score.max(-1, keepdims=True), sinks[:, None])
            weight = np.exp(score - top)
            total = weight.sum(-1, keepdims=True) + np.exp(sinks[:, None] - top)
            out[b, t] = np.einsum("ns,snh->nh", weight / total, values)
            lse[b, :, t] = (top + np.log(total))[:, 0]
    return out, lse, k_cache, v_cache


CASES = [
    Case(),
    Case(dtype="float16"),
    Case(T_new=0),
    Case(T_new=0, causal=False, lengths=(0, 200, 77)),
    Case(T=4, T_new=4),
    Case(T=5, T_new=2),
    Case(T=3, T_new=3, causal=False),
    Case(T=70, T_new=70),
    Case(T=37, T_new=20, H=128, page=16),
    Case(N=2, K=2),
    Case(N=6, K=2, T=3, T_new=3, page=24),
    Case(N=8, K=1, T=3),
    Case(N=32, K=1, H=128),
    Case(N=71, K=1, S=90),
    *(Case(H=H, T=2, T_new=2, page=page) for H in (16, 40, 59, 80, 111, 128, 192, 256) for page in (0, 8)),
    *(
        Case(H=H, rotary=rotary, interleaved=i, T=3, T_new=3)
        for H, rotary in ((64, 64), (128, 32))
        for i in (True, False)
    ),
    Case(rotary=32, T=3, T_new=2, causal=False, page=16),
    Case(rotary=64, interleaved=False, T=2, T_new=2, causal=False, window=(20, 3)),
    Case(window=(10, 0), T=3, T_new=2, causal=False),
    Case(window=(0, 0), T=3, T_new=3, page=8, leftpad=True),
    Case(window=(-1, 4), T=3, T_new=1, causal=False),
    Case(window=(50, -1), T=2, T_new=2, S=500),
    Case(softcap=2.0, T=2, T_new=2),
    Case(scale=0.3),
    Case(sinks=True, lengths=(0, 199, 77), T_new=0, causal=False),
    Case(sinks=True, S=900, splits=7, H=128),
    Case(sinks=True, T=37, T_new=20, page=16, lengths=(0, 150, 100)),
    Case(sinks=True, T=3, T_new=3, page=24, N=6, window=(30, 0), leftpad=True),
    Case(sinks=True, batch_index=(3, -1, 9), extra_rows=2, T=2, T_new=2),
    *(Case(splits=n, S=400, page=page) for n in (1, 2, 7, 300) for page in (0, 40)),
    Case(leftpad=True, T=2, T_new=2),
    Case(batch_index=(3, 0, 4), extra_rows=2),
    Case(batch_index=(3, -1, 9), extra_rows=2, T=2, T_new=2),
    Case(B=7, T=2, T_new=2, lengths=(0, 198, 199, 200, 300, -5, 10)),
    Case(B=7, T=2, T_new=2, lengths=(0, 207, 206, 208, 300, -5, 10), page=16, causal=False, window=(150, 1)),
    Case(T=2, T_new=2, lengths=(150, 100, 198), page=32, S=224, holes=True),
    Case(B=40, N=4, K=2, S=64, page=8),
    Case(B=9, S=1500, lengths=(1400, 5, 6, 7, 8, 9, 10, 11, 12)),
]
