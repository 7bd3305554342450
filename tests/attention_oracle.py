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
    if "q_segment_ids" in extras:
        of_q, of_k = (extras[name][:, None] for name in ("q_segment_ids", "kv_segment_ids"))
        seen = seen & ((of_q[..., None] == of_k[..., None, :]) & (of_q[..., None] >= 0))
    return np.broadcast_to(seen, (case.B, case.N, case.T, case.S)) & extras.get("mask", True)


def valid(case, extras: dict[str, np.ndarray]) -> np.ndarray:
    """Which queries are any: those of a sequence and a segment, (B, N, T)."""
    queries = np.arange(case.T)[:, None] < _column(extras.get("q_lengths"), case.T)
    if "q_segment_ids" in extras:
        queries = queries & (extras["q_segment_ids"][:, None, :, None] >= 0)
    return np.broadcast_to(queries, (case.B, case.N, case.T, 1))[..., 0]


def _column(lengths, most: int):
    return most if lengths is None else np.clip([int(x) for x in lengths], 0, most).reshape(-1, 1, 1, 1)


def attend(case, meaning: Meaning, qkv, extras, cotangents, rounded: Callable = lambda x: x):
    """(out, lse), (dq, dk, dv, dsinks). rounded: what a rough run does to its products."""
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
    sink = np.full((case.N, 1, 1), -np.inf)
    if "sinks" in extras:
        sink = np.asarray(extras["sinks"], np.float64)[:, None, None]
    sink = np.where(valid(case, extras)[..., None], sink, -np.inf)
    top = np.maximum(score.max(-1, keepdims=True, initial=-1e300), sink)
    p = np.exp(score - top)
    unseen = ~seen.any(-1)
    total = p.sum(-1, keepdims=True) + np.exp(sink - top)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, -np.inf, top + np.log(total))
    p = rounded(p / np.where(total == 0, 1, total))
    p_sink = np.exp(sink - np.where(total == 0, 0, lse))[..., 0]
    lse = lse[..., 0]
    d_out, d_lse = np.where(unseen[..., None], 0, d_out), np.where(np.isneginf(lse), 0, d_lse)
    if meaning.mean_where_unseen and case.S:
        mean = (unseen & valid(case, extras))[..., None]
        p = np.where(mean, rounded(np.float64(1 / case.S)), p)
        d_out = np.where(mean, np.asarray(cotangents[0], np.float64).swapaxes(1, 2), d_out)
    out = rounded(p @ v)
    dv = p.swapaxes(2, 3) @ d_out
    dp = rounded(d_out @ v.swapaxes(2, 3))
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + d_lse[..., None])
    ds = rounded(np.where(seen, ds, 0) * slope)
    dq, dk = rounded(ds @ k), ds.swapaxes(2, 3) @ q
    d_sinks = -(p_sink * ((out * d_out).sum(-1) - d_lse)).sum((0, 2))

    def per_kv_head(x):
        return rounded(x.reshape(case.B, case.K, G, case.S, case.H).sum(2)).swapaxes(1, 2)

    return (out.swapaxes(1, 2), lse), (dq.swapaxes(1, 2), per_kv_head(dk), per_kv_head(dv), d_sinks)
