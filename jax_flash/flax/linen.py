"""Attention layer for flax.linen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen
from flax.typing import PrecisionLike

from jax_flash.cache import PageTable
from jax_flash.flax._multi_head import AxisNames, Cache, Options, Projections, head_sizes, multi_head_attention
from jax_flash.rotary import Rotary

__all__ = ["MultiHeadAttention"]

_default_kernel_init = linen.initializers.lecun_normal()
_default_bias_init = linen.initializers.zeros_init()
_CacheVariables = tuple[linen.Variable[Any], linen.Variable[Any], linen.Variable[Any] | None]


class MultiHeadAttention(linen.Module):
    """Multi-head attention with the kernels of jax_flash, for training, prefill and decode.

    It is what `jax_flash.flax.nnx.MultiHeadAttention` is, with the same arguments, formula, shapes and names, which are
    said there. It differs where linen does:

    - The sizes of the inputs are taken from the inputs.
    - Its parameters are those of `flax.linen.MultiHeadDotProductAttention`: a checkpoint of one is one of the other.
    - With `decode`, the collection "cache" holds cached_key, cached_value and cache_index. As in Flax, `init` with
      inputs of shape (B, max_length, features) makes an empty cache for them, and `apply` needs mutable=["cache"].
      `init` with a `page_table` makes an empty pool of the table's pages. Donate the cache to jit: it is then updated
      in place.
    - `axis_names` makes `linen.LogicallyPartitioned` parameters and caches.

    Args:
      num_heads: N; the others are keyword arguments.
      cache_dtype: of the cache, in which attention is then computed; default: dtype or param_dtype.

    >>> import jax, jax.numpy as jnp
    >>> from jax_flash.flax.linen import MultiHeadAttention
    >>> from jax_flash.rotary import Rotary
    >>> layer = MultiHeadAttention(num_heads=4, num_kv_heads=2, head_dim=16, rotary=Rotary(), use_bias=False)
    >>> x = jnp.ones((2, 10, 32))
    >>> params = layer.init(jax.random.key(0), x)["params"]
    >>> y = layer.apply({"params": params}, x, is_causal=True)

    Decoding: a prompt of 6 tokens in chunks of 3, then token by token.

    >>> import functools
    >>> decoder = layer.clone(decode=True)
    >>> kv = decoder.init(jax.random.key(0), jnp.ones((2, 64, 32)))["cache"]
    >>> @functools.partial(jax.jit, donate_argnames="kv")
    ... def step(kv, x):
    ...     y, changed = decoder.apply({"params": params, "cache": kv}, x, mutable=["cache"])
    ...     return y, changed["cache"]
    >>> steps = []
    >>> for start, end in ((0, 3), (3, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
    ...     out, kv = step(kv, x[:, start:end])
    ...     steps.append(out)
    >>> bool(jnp.allclose(jnp.concatenate(steps, axis=1), y, atol=1e-5))
    True
    """

    num_heads: int
    _: dataclasses.KW_ONLY
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rotary: Rotary | None = None
    window_size: int | tuple[int | None, int | None] | None = None
    softcap: float | None = None
    softmax_scale: float | None = None
    use_qk_norm: bool = False
    norm_epsilon: float = 1e-6
    use_sinks: bool = False
    use_bias: bool = True
    use_out_bias: bool | None = None
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Callable = _default_kernel_init
    out_kernel_init: Callable | None = None
    bias_init: Callable = _default_bias_init
    out_bias_init: Callable | None = None
    decode: bool = False
    cache_dtype: jax.typing.DTypeLike | None = None
    axis_names: AxisNames | None = None

    @linen.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        is_causal: bool = False,
        input_positions: jax.Array | None = None,
        q_lengths: jax.Array | None = None,
        kv_lengths: jax.Array | None = None,
        q_segment_ids: jax.Array | None = None,
        kv_segment_ids: jax.Array | None = None,
        page_table: PageTable | None = None,
    ) -> jax.Array:
        """As `jax_flash.flax.nnx.MultiHeadAttention`'s."""
        num_kv_heads, head_dim = head_sizes(
            self.num_heads, self.num_kv_heads, inputs_q.shape[-1], self.qkv_features, self.head_dim
        )
        variables = self._cache_variables(inputs_q, num_kv_heads, head_dim, page_table) if self.decode else None
        before = None
        if self.is_initializing():  # with inputs as long as the cache, which says how large it is to be
            page_table = None
        elif variables is not None:
            key, value, lengths = variables
            before = Cache(key.value, value.value, None if lengths is None else lengths.value)
        out, after = multi_head_attention(
            Options(self.rotary, self.window_size, self.softcap, self.softmax_scale),
            self._projections(num_kv_heads, head_dim, self.out_features or inputs_q.shape[-1]),
            inputs_q,
            inputs_k,
            inputs_v,
            before,
            mask=mask,
            is_causal=is_causal,
            input_positions=input_positions,
            q_lengths=q_lengths,
            kv_lengths=kv_lengths,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=kv_segment_ids,
            page_table=page_table,
        )
        if variables is not None and after is not None:
            for variable, value in zip(variables, after, strict=True):
                if variable is not None:
                    variable.value = value
        return out

    def _projections(self, num_kv_heads, head_dim, out_features) -> Projections:
        initial: dict[str, Any] = dict(use_bias=self.use_bias, kernel_init=self.kernel_init, bias_init=self.bias_init)

        def dense(name, features, **options: Any):
            return _Dense(
                name=name,
                features=features,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                precision=self.precision,
                axis_names=self.axis_names,
                **initial | options,
            )

        def norm(name):
            return linen.RMSNorm(
                name=name,
                epsilon=self.norm_epsilon,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                scale_init=_named(linen.initializers.ones, self.axis_names and (self.axis_names.head_dim,)),
            )

        return Projections(
            query=dense("query", (self.num_heads, head_dim)),
            key=dense("key", (num_kv_heads, head_dim)),
            value=dense("value", (num_kv_heads, head_dim)),
            out=dense(
                "out",
                out_features,
                axis=(-2, -1),
                use_bias=self.use_bias if self.use_out_bias is None else self.use_out_bias,
                kernel_init=self.out_kernel_init or self.kernel_init,
                bias_init=self.out_bias_init or self.bias_init,
            ),
            query_norm=norm("query_norm") if self.use_qk_norm else None,
            key_norm=norm("key_norm") if self.use_qk_norm else None,
            sinks=self._sinks() if self.use_sinks else None,
        )

    def _sinks(self) -> jax.Array:
        init = _named(linen.initializers.zeros, self.axis_names and (self.axis_names.heads,))
        return cast("jax.Array", self.param("sinks", init, (self.num_heads,), self.param_dtype))

    def _cache_variables(self, inputs, num_kv_heads, head_dim, page_table) -> _CacheVariables:
        """The fields of Cache as variables of the collection "cache"; cache_index is None if the cache is paged."""
        if self.is_initializing():
            paged = page_table is not None
        elif self.has_variable("cache", "cached_key"):
            paged = not self.has_variable("cache", "cache_index")
        else:
            raise ValueError("MultiHeadAttention: decode needs the collection that init(...)['cache'] makes")
        # The sizes matter while initializing only.
        rows = inputs.shape[0] if page_table is None else page_table.references.shape[0]
        length = inputs.shape[1] if page_table is None else page_table.page_size
        shape, dtype = (rows, length, num_kv_heads, head_dim), self.cache_dtype or self.dtype or self.param_dtype
        zeros = _named(jnp.zeros, self.axis_names and self.axis_names.cache(paged))
        counts = _named(jnp.zeros, self.axis_names and (self.axis_names.batch,))
        return (
            self.variable("cache", "cached_key", zeros, shape, dtype),
            self.variable("cache", "cached_value", zeros, shape, dtype),
            None if paged else self.variable("cache", "cache_index", counts, (rows,), jnp.int32),
        )


class _Dense(linen.DenseGeneral):
    """With names for the axes of its parameters.

    DenseGeneral calls an initializer that gives names for a kernel that it flattened, where they do not fit.
    """

    axis_names: AxisNames | None = None

    def param(self, name, init_fn, *init_args, **options):
        names = self.axis_names and getattr(self.axis_names, name)(self.name)
        return super().param(name, _named(init_fn, names), *init_args, **options)


def _named(init_fn, names):
    return init_fn if names is None else linen.with_logical_partitioning(init_fn, names)
