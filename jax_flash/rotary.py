"""Rotary position embedding: turns queries and keys by angles that grow with their positions.

Scores of turned queries and keys depend on the distance between their positions alone. A `Rotary` says how a model does
it; training calls it, and `flash_attn_with_kvcache` takes its tables and turns by the same angles in its kernel.

>>> import jax, jax.numpy as jnp, jax_flash
>>> from jax_flash.rotary import Llama3, Rotary
>>> rotary = Rotary(base=500_000.0, scaling=Llama3(factor=8.0), interleaved=False)  # Llama 3.1
>>> q = jax.random.normal(jax.random.key(0), (1, 16, 4, 64))  # (B, T, N, H)
>>> k = v = jax.random.normal(jax.random.key(1), (1, 16, 2, 64))
>>> out = jax_flash.attention(rotary(q), rotary(k), v, causal=True)

The same with a cache, whose kernel turns q and k itself:

>>> k_cache, v_cache = jax_flash.cache.contiguous(batch=1, length=32, num_heads=2, head_dim=64, dtype=jnp.float32)
>>> cos, sin = rotary.tables(32, head_dim=64)
>>> with_cache, k_cache, v_cache = jax_flash.flash_attn_with_kvcache(
...     q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=rotary.interleaved,
...     cache_seqlens=0, causal=True)
>>> bool(jnp.allclose(out, with_cache, atol=1e-5))
True

RoFormer (https://arxiv.org/abs/2104.09864) is the paper.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import _validate

__all__ = ["Linear", "Llama3", "Rotary", "rotate"]


@dataclasses.dataclass(frozen=True)
class Linear:
    """Divides every position by `factor`: factor 8 stretches a context of 4096 tokens to 32768.

    Position interpolation (https://arxiv.org/abs/2306.15595); "linear" in a Hugging Face configuration.

    >>> from jax_flash.rotary import Linear, Rotary
    >>> print(Rotary(scaling=Linear(factor=8.0)).frequencies(4))
    [0.125   0.00125]
    """

    factor: float

    def __post_init__(self):
        _check_positive("Linear", factor=self.factor)

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Frequencies as the model was first trained with them to those it uses; radians a position."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Divides slow frequencies by `factor` and keeps fast ones, with a ramp between them; since Llama 3.1.

    A frequency that turns at most `low_freq_factor` times in the original context is divided, one that turns at least
    `high_freq_factor` times is kept. The names are those of a Hugging Face configuration ("llama3"), the defaults
    Llama 3.1's.

    >>> from jax_flash.rotary import Llama3, Rotary
    >>> before, after = Rotary(base=5e5).frequencies(16), Rotary(base=5e5, scaling=Llama3()).frequencies(16)
    >>> [round(float(ratio), 2) for ratio in before / after]
    [1.0, 1.0, 1.0, 1.0, 2.69, 8.0, 8.0, 8.0]
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        _check_positive("Llama3", **dataclasses.asdict(self))
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "rotary.Llama3: low_freq_factor must be below high_freq_factor; "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Frequencies as the model was first trained with them to those it uses; radians a position."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Rotary:
    r"""How a model turns its queries and keys. Hashable, so that it may be a static argument or a module's attribute.

    Pair i of a head's elements turns by position * frequency_i radians, where

    .. math:: \mathrm{frequency}_i = \mathrm{base}^{-2 i / \mathrm{rotary\_dim}},
              \qquad 0 \le i < \mathrm{rotary\_dim} / 2,

    and `scaling` changes the frequencies for contexts longer than those of the first training.

    Args:
      base: of the frequencies; "rope_theta" in a Hugging Face configuration.
      rotary_dim: the first rotary_dim elements of each head turn, the others stay. Even. Default: the whole head.
      interleaved: the pairs are (0, 1), (2, 3), ..., as in GGUF files of Llamas and by default in
        `flash_attn_with_kvcache`; False: (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ..., as in Hugging Face's models
        and flax.nnx.RoPE.
      scaling: `Linear`, `Llama3` or None.

    Raises:
      ValueError: a number is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from jax_flash.rotary import Rotary
    >>> rotary, q = Rotary(interleaved=False), jnp.ones((2, 5, 4, 64), jnp.bfloat16)
    >>> rotary(q).shape
    (2, 5, 4, 64)
    >>> counted = rotary(q, positions=jnp.arange(5))
    >>> bool((rotary(q) == counted).all())
    True
    """

    base: float = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = True
    scaling: Linear | Llama3 | None = None

    def __post_init__(self):
        _check_positive("Rotary", base=self.base)
        if self.rotary_dim is not None:
            _check_positive("Rotary", rotary_dim=self.rotary_dim)
        if self.scaling is not None and not isinstance(self.scaling, (Linear, Llama3)):
            raise ValueError(f"rotary.Rotary: scaling must be Linear, Llama3 or None; got {self.scaling!r}")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position, (rotary_dim / 2,) float32."""
        rotary_dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if rotary_dim % 2 != 0 or rotary_dim > head_dim:
            raise ValueError(
                f"rotary.Rotary: rotary_dim must be even and at most the head dim; got {rotary_dim} for {head_dim}"
            )
        # In double precision, since an angle at position 10^5 has five digits fewer than its frequency.
        frequencies = float(self.base) ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
        if self.scaling is not None:
            frequencies = self.scaling.scale(frequencies)
        return frequencies.astype(np.float32)

    def tables(self, positions: jax.Array | int, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines, each (*positions.shape, rotary_dim / 2) float32.

        Args:
          positions: an array of any shape; or an int n for 0, ..., n - 1, as `flash_attn_with_kvcache` wants the tables
            of a cache of n positions.
          head_dim: H of the queries and keys.
        """
        if isinstance(positions, numbers.Integral) or jax.export.is_symbolic_dim(cast(Any, positions)):
            positions = jnp.arange(positions)
        positions = jnp.asarray(positions).astype(jnp.float32)
        frequencies = self.frequencies(head_dim).reshape((1,) * positions.ndim + (-1,))
        angles = positions[..., None] * frequencies
        return jnp.cos(angles), jnp.sin(angles)

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """x (batch..., T, heads, H), turned.

        Args:
          x: queries or keys.
          positions: (T,) or (batch..., T) integers, the position of each token; default 0, 1, 2, ....
        """
        cos, sin = self.tables(x.shape[-3] if positions is None else positions, x.shape[-1])
        return rotate(x, cos, sin, interleaved=self.interleaved)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = True) -> jax.Array:
    r"""Turns pairs of elements of each head: :math:`(a, b) \mapsto (a \cos - b \sin,\; b \cos + a \sin)`.

    ===========  =====================================  =========================
    array        shape                                  dtype
    ===========  =====================================  =========================
    x            (batch..., T, heads, H)                any float
    cos, sin     (T, rotary_dim / 2), or with batch...  any float; float32 is best
    returns      like x                                 like x
    ===========  =====================================  =========================

    Computed in float32 and rounded once, as in the kernel of `flash_attn_with_kvcache`.

    Args:
      x: queries or keys.
      cos: the cosines of each token's angles.
      sin: the sines.
      interleaved: the pairs are (0, 1), (2, 3), ...; else (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ....

    Raises:
      ValueError: the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> from jax_flash.rotary import rotate
    >>> x = jnp.arange(4.0).reshape(1, 1, 4)  # one token, one head
    >>> cos, sin = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])  # a quarter turn, and none
    >>> rotate(x, cos, sin).tolist(), rotate(x, cos, sin, interleaved=False).tolist()
    ([[[-1.0, 0.0, 2.0, 3.0]]], [[[-2.0, 1.0, 0.0, 3.0]]])
    """
    _check_tables(x, cos, sin)
    half = cos.shape[-1]
    # An axis for the heads, and those of the batch that the tables lack.
    cos, sin = (
        t.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1 - t.ndim), *t.shape[:-1], 1, half) for t in (cos, sin)
    )
    turning, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        pairs = turning.reshape(*turning.shape[:-1], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turning.shape)
    else:
        a, b = turning[..., :half], turning[..., half:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def _check_tables(x, cos, sin) -> None:
    got = f"got x {_validate.show(x)}, cos {_validate.show(cos)}, sin {_validate.show(sin)}"
    if x.ndim < 3 or cos.ndim < 2 or cos.shape != sin.shape:
        raise ValueError(
            f"rotary.rotate: x must be (batch..., T, heads, H), cos and sin both (T, rotary_dim / 2) or with x's batch "
            f"axes before that; {got}"
        )
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"rotary.rotate: rotary_dim may be at most the head dim H; {got}")
    tokens = x.shape[:-2][-(cos.ndim - 1) :]
    if cos.ndim > x.ndim - 1 or any(t not in (1, s) for t, s in zip(cos.shape[:-1], tokens, strict=True)):
        raise ValueError(f"rotary.rotate: cos and sin must have a row for each token of x; {got}")


def _check_positive(name: str, **values) -> None:
    for field, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
            raise ValueError(f"rotary.{name}: {field} must be a positive number; got {value!r}")
