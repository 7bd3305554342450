"""Attention and its gradients in NumPy and float64, by their formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What the functions of q, k and v differ in."""

    top_left: bool = False  # where causal and windows are aligned
    mean_where_unseen: bool = False  # the output of a query that sees no key; else 0


def visible(case, extras: dict[str, np.ndarray], top_left: bool) -> np.ndarray:
    """Which keys each query sees, (B, N, T, S)."""
    i, j = np.arange(case.T)[:, None], np.arange(case.S)[None]
    t, s = (_column(extras.get(name), most) for name, most in (("q_lengths", case.T), ("kv_lengths", case.S)))
    d = 0 if top_left else s - t
    left, right = case.window if isinstance(case.window, tuple) else (case.window, case.window)
    seen = (i < t) & (j < s)
    if left is not None:
        seen = seen & (j >= i + d - left)
    if right is not None:
        seen = seen & (j <= i + d + right)
    if case.causal:
        seen = seen & (j <= i + d)
    return np.broadcast_to(seen, (case.B, case.N, case.T, case.S)) & extras.get("mask", True)


def _column(lengths, most: int):
    return most if lengths is None else np.clip([int(x) for x in lengths], 0, most).reshape(-1, 1, 1, 1)


def attend(case, meaning: Meaning, qkv, extras, cotangents, rounded: Callable = lambda x: x):
    """(out, lse), (dq, dk, dv). rounded: what a rough computation does to the operands and results of its products."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (*qkv, *cotangents))
    G = case.N // case.K if case.K else 1
    q, k, v, d_out = q.swapaxes(1, 2), *(np.repeat(x.swapaxes(1, 2), G, axis=1) for x in (k, v)), d_out.swapaxes(1, 2)
    seen = visible(case, extras, meaning.top_left)
    scale = case.H**-0.5 if case.scale is None else case.scale
    score = rounded(q @ k.swapaxes(2, 3)) * scale
    slope = scale
    if case.softcap is not None:
        tanh = np.tanh(score / case.softcap)
        score, slope = case.softcap * tanh, scale * (1 - tanh**2)
    score = np.where(seen, score, -np.inf)
    top = score.max(-1, keepdims=True, initial=-1e300)
    p = np.exp(score - top)
    total = p.sum(-1, keepdims=True)
    unseen = total[..., 0] == 0
    with np.errstate(divide="ignore"):
        lse = np.where(unseen, -np.inf, top[..., 0] + np.log(total[..., 0]))
    p = rounded(p / np.where(unseen[..., None], 1, total))
    d_out, d_lse = np.where(unseen[..., None], 0, d_out), np.where(unseen, 0, d_lse)
    if meaning.mean_where_unseen and case.S:
        valid = np.arange(case.T)[:, None] < _column(extras.get("q_lengths"), case.T)
        mean = unseen[..., None] & valid
        p = np.where(mean, rounded(np.float64(1 / case.S)), p)
        d_out = np.where(mean, np.asarray(cotangents[0], np.float64).swapaxes(1, 2), d_out)
    out = rounded(p @ v)
    dv = p.swapaxes(2, 3) @ d_out
    dp = rounded(d_out @ v.swapaxes(2, 3))
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + d_lse[..., None])
    ds = rounded(np.where(seen, ds, 0) * slope)
    dq, dk = rounded(ds @ k), ds.swapaxes(2, 3) @ q

    def per_kv_head(x):
        return rounded(x.reshape(case.B, case.K, G, case.S, case.H).sum(2)).swapaxes(1, 2)

    return (out.swapaxes(1, 2), lse), (dq.swapaxes(1, 2), per_kv_head(dk), per_kv_head(dv))
