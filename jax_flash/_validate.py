"""The checks of a call's arguments: each mistake is named at call time, before anything reaches the kernels.

ValueError: the arguments contradict each other. NotImplementedError: they make sense, but no kernel does it.
"""

from __future__ import annotations

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_flash._spec import Band, Spec

DTYPES = ("float16", "bfloat16", "float32")
MAX_HEAD_DIM = 256
MAX_LENGTH = 2**29
# What has a shape and a dtype.
Shaped = jax.Array | np.ndarray | jax.ShapeDtypeStruct
_INT32 = np.iinfo(np.int32)
_FLOAT32 = np.finfo(np.float32)


def as_array(function: str, name: str, x) -> jax.Array:
    """x as a JAX array, if it is an array; lists and Python's numbers are refused, since they are usually a slip."""
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "iu":
        x = np.asarray(_saturated(x, np))  # before JAX cuts off what 32 bits do not hold
    if isinstance(x, (jax.Array, np.ndarray, np.generic)) or hasattr(x, "__jax_array__"):
        return jnp.asarray(x)
    raise ValueError(f"{function}: {name} must be a JAX or NumPy array; got {type(x).__name__}")


def int32(x: jax.Array) -> jax.Array:
    """Integers of any dtype as int32: what that does not hold becomes its smallest or largest number."""
    return x if x.dtype == jnp.int32 else _saturated(x, jnp)


def _saturated(x, library):
    info = np.iinfo(x.dtype)
    if int(info.min) >= int(_INT32.min) and int(info.max) <= int(_INT32.max):
        return x.astype(np.int32)
    least, most = max(int(info.min), int(_INT32.min)), min(int(info.max), int(_INT32.max))
    return library.clip(x, library.asarray(least, x.dtype), library.asarray(most, x.dtype)).astype(np.int32)


def check_qkv(function: str, q: Shaped, k: Shaped, v: Shaped, names: tuple[str, str, str] = ("q", "k", "v")):
    """q (B, T, N, H), k and v (B, S, K, H), or all three without B; one dtype; N a multiple of K."""
    n_q, n_k, n_v = names
    every, keys = f"{n_q}, {n_k} and {n_v}", f"{n_k} and {n_v}"
    got = "got " + ", ".join(f"{name} {show(x)}" for name, x in zip(names, (q, k, v), strict=True))
    if q.ndim not in (3, 4) or k.ndim != q.ndim or v.ndim != q.ndim:
        raise ValueError(f"{function}: {every} must be (B, T, N, H) or all (T, N, H); {got}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{function}: {every} must have one dtype; {got}")
    if q.dtype.name not in DTYPES:
        kind = NotImplementedError if jnp.issubdtype(q.dtype, jnp.floating) else ValueError
        raise kind(
            f"{function}: {every} must be {', '.join(DTYPES[:2])} or {DTYPES[2]}; {got}. Cast with x.astype(...)"
        )
    if q.ndim == 4 and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"{function}: {every} must share the batch size B; {got}")
    if k.shape[-3] != v.shape[-3]:
        raise ValueError(f"{function}: {keys} must share length S; {got}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"{function}: {keys} must share the number of heads K; {got}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{function}: {n_q} and {n_k} must share head dim H; {got}")
    if k.shape[-1] != v.shape[-1]:
        raise NotImplementedError(
            f"{function}: {keys} must share head dim H; {got}. Pad the smaller one with zeros, and where that is "
            f"{n_q} and {n_k}, whose head dim H sets the default scale, give the scale H**-0.5 of before"
        )
    N, K, H = q.shape[-2], k.shape[-2], q.shape[-1]
    if not all(isinstance(size, int) for size in (N, K, H)):
        raise NotImplementedError(f"{function}: the heads and the head dim must be static, not symbolic; {got}")
    if N != 0 if K == 0 else N % K != 0:
        raise ValueError(
            f"{function}: the number of query heads N={N} must be a multiple of that of {keys}, K={K}; {got}"
        )
    if H == 0:
        raise ValueError(f"{function}: head dim H must be at least 1; {got}")
    if H > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"{function}: head dim H is at most {MAX_HEAD_DIM}; {got}. Use jax.nn's attention for it"
        )
    for size in (q.shape[-3], k.shape[-3]):
        if isinstance(size, int) and size > MAX_LENGTH:
            raise NotImplementedError(f"{function}: a sequence holds at most {MAX_LENGTH} tokens; {got}. Split it")


def check_mask(function: str, mask: jax.Array, q: jax.Array, k: jax.Array) -> None:
    """A boolean mask that broadcasts to (B, N, T, S), or to (N, T, S) where there is no batch axis."""
    scores = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
    got = f"got mask {show(mask)} with q {show(q)}, k {show(k)}"
    if mask.dtype != jnp.bool_:
        raise ValueError(f"{function}: mask must be boolean (True: the query sees the key); {got}")
    if mask.ndim > len(scores) or any(m not in (1, s) for m, s in zip(mask.shape[::-1], scores[::-1], strict=False)):
        raise ValueError(
            f"{function}: mask must broadcast to {'(B, N, T, S)'[0 if q.ndim == 4 else 4 :]} = {scores}; {got}"
        )


def check_lengths(function: str, name: str, lengths: jax.Array, q: jax.Array) -> None:
    """Integers, one for each sequence."""
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{function}: {name} must be integers; got {show(lengths)}")
    if lengths.shape != q.shape[:-3]:
        raise ValueError(
            f"{function}: {name} must have shape (B,) = {q.shape[:-3]}; got {show(lengths)} with q {show(q)}"
        )


def with_segment_ids(function: str, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays with ids for both queries and keys, which have q_segment_ids, or ids of their own."""
    q, k = arrays["q"], arrays["k"]
    if "q_segment_ids" not in arrays:
        raise ValueError(f"{function}: kv_segment_ids need q_segment_ids")
    got = ", ".join(f"{name} {show(arrays[name])}" for name in ("q_segment_ids", "kv_segment_ids") if name in arrays)
    got = f"got {got} with q {show(q)}, k {show(k)}"
    for name, x in (("q_segment_ids", q), ("kv_segment_ids", k)):
        ids = arrays.get(name)
        if ids is None:
            if q.shape[-3] != k.shape[-3]:
                raise ValueError(f"{function}: kv_segment_ids must be given where T and S differ; {got}")
            continue
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{function}: {name} must be integers; {got}")
        if ids.shape != x.shape[:-2]:
            letters = ("(B, T)" if x is q else "(B, S)") if x.ndim == 4 else ("(T,)" if x is q else "(S,)")
            raise ValueError(f"{function}: {name} must have shape {letters} = {x.shape[:-2]}; {got}")
    return {"kv_segment_ids": arrays["q_segment_ids"]} | arrays


def segment_ids(function: str, name: str, ids) -> jax.Array:
    """Ids as an array: none may be lost in 32 bits."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" and ids.size:
        if int(ids.max()) > int(_INT32.max) or int(ids.min()) < int(_INT32.min):
            raise ValueError(f"{function}: {name} must fit in 32 bits; got {ids.min()} to {ids.max()}")
    return as_array(function, name, ids)


def check_sinks(function: str, sinks: jax.Array, q: jax.Array) -> None:
    """Floating-point numbers, one for each query head."""
    got = f"got sinks {show(sinks)} with q {show(q)}"
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"{function}: sinks must be floating-point numbers; {got}")
    if sinks.shape != (q.shape[-2],):
        raise ValueError(f"{function}: sinks must have shape (N,) = ({q.shape[-2]},), one for each query head; {got}")


def check_packed(function: str, arrays: dict[str, jax.Array]) -> None:
    """Packed sequences: q (total_q, N, H), k and v (total_k, K, H), where each begins and how much of it counts."""
    q, k, v = (arrays[name] for name in "qkv")
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(
            f"{function}: q must be (total_q, N, H), k and v (total_k, K, H), without a batch axis; got q {show(q)}, "
            f"k {show(k)}, v {show(v)}"
        )
    check_qkv(function, q, k, v)
    rest = {name: x for name, x in arrays.items() if name.startswith(("cu_seqlens", "seqused"))}
    got = "got " + ", ".join(f"{name} {show(x)}" for name, x in rest.items())
    for name, x in rest.items():
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{function}: {name} must be integers; {got}")
    starts = arrays["cu_seqlens_q"].shape
    if len(starts) != 1 or (isinstance(starts[0], int) and starts[0] < 1) or arrays["cu_seqlens_k"].shape != starts:
        raise ValueError(f"{function}: cu_seqlens_q and cu_seqlens_k must both have shape (B + 1,); {got}")
    for name in ("seqused_q", "seqused_k"):
        if name in arrays and arrays[name].shape != (starts[0] - 1,):
            raise ValueError(f"{function}: {name} must have shape (B,) = ({starts[0] - 1},); {got}")


def make_spec(
    function: str,
    H: int,
    *,
    softmax_scale=None,
    causal=False,
    window_size=None,
    softcap=None,
    top_left=False,
    names: dict[str, str] | None = None,
    least_window: int = -1,
    **options,
) -> Spec:
    """The static description of a call, from the public arguments.

    names: what the public function calls them. least_window: 0 where -1 is not a window without limit.
    """
    name = {"softmax_scale": "softmax_scale", "causal": "causal", "window_size": "window_size"} | (names or {})
    left, right = window(function, window_size, name["window_size"], least_window)
    if static_bool(function, name["causal"], causal):
        right = 0 if right is None else min(right, 0)
    scale = H**-0.5 if softmax_scale is None else _number(function, name["softmax_scale"], softmax_scale)
    if abs(scale) < float(_FLOAT32.tiny):
        scale = 0.0
    return Spec(scale, _softcap(function, softcap), Band(left, right, top_left), **options)


def _softcap(function: str, softcap) -> float | None:
    if softcap is None:
        return None
    value = _number(function, "softcap", softcap)
    if value == 0:  # FlashAttention's word for none
        return None
    if value < 0 or np.float32(value) < _FLOAT32.tiny:
        raise ValueError(
            f"{function}: softcap must be positive and at least {_FLOAT32.tiny:.3g}, or None or 0 for none; got "
            f"{softcap!r}"
        )
    return value


def show(x: Shaped) -> str:
    """The dtype and shape of an array, for messages."""
    return f"{x.dtype.name}{tuple(x.shape)}"


def static(function: str, name: str, value, way_out: str = "") -> None:
    """Refuses a traced value where a compiled program depends on what it is."""
    if isinstance(value, Tracer):
        way_out = way_out or (
            f"bind it with functools.partial({function}, {name}=...) before jit, or list it in jit's static_argnames"
        )
        raise NotImplementedError(
            f"{function}: {name} must be known when the call is compiled; got a traced value, {value}: {way_out}"
        )


def _number(function: str, name: str, value) -> float:
    ways_out = {
        "softmax_scale": "multiply q by it, and give softmax_scale=1.0",
        "scale": "multiply query by it, and give scale=1.0",
    }
    static(function, name, value, ways_out.get(name, ""))
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0 and value.dtype.kind in "fiuV":
        value = float(value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise ValueError(f"{function}: {name} must be a number; got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer
        number = math.inf
    if not abs(number) <= float(_FLOAT32.max):  # nor NaN
        raise ValueError(f"{function}: {name} must be finite in float32, or None; got {value!r}")
    return number


def static_bool(function: str, name: str, value) -> bool:
    static(function, name, value)
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{function}: {name} must be True or False; got {value!r}")
    return bool(value)


def window(function: str, window_size, name: str = "window_size", least: int = -1) -> tuple[int | None, int | None]:
    """The two sides, None where there is no limit."""
    unlimited = "None or -1" if least == -1 else "None"
    wanted = f"{name} must be (left, right) or one int for both, each at least 0, or {unlimited} for no limit"
    sides = window_size if isinstance(window_size, (tuple, list)) else (window_size, window_size)
    for side in sides:
        static(function, name, side)
    integers = all(s is None or (isinstance(s, numbers.Integral) and not isinstance(s, bool)) for s in sides)
    if len(sides) != 2 or not integers or any(s is not None and s < least for s in sides):
        raise ValueError(f"{function}: {wanted}; got {window_size!r}")
    left, right = (None if s is None or s == -1 or s > MAX_LENGTH else int(s) for s in sides)
    return left, right
