"""Attention layer for flax.nnx."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PrecisionLike

from jax_flash import cache
from jax_flash.cache import PageTable
from jax_flash.flax._multi_head import AxisNames, Cache, Options, Projections, head_sizes, multi_head_attention
from jax_flash.rotary import Rotary

__all__ = ["MultiHeadAttention"]

_default_kernel_init = nnx.initializers.lecun_normal()
_default_bias_init = nnx.initializers.zeros_init()


class MultiHeadAttention(nnx.Module):
    r"""Multi-head attention with the kernels of jax_flash, for training, prefill and decode.

    .. math:: \mathrm{out} = \sum_n \mathrm{attention}(x W^Q_n, x W^K_{k(n)}, x W^V_{k(n)}) W^O_n,
              \qquad k(n) = \lfloor n K / N \rfloor

    Its parameters have the names and shapes of those of `flax.nnx.MultiHeadAttention` and `flax.linen`'s, and the
    same values give the same output; a query whose mask hides every key gets 0, where Flax returns the mean of all
    values. There is no dropout on the attention weights: a layer that needs it is Flax's own. With N = num_heads and
    K = num_kv_heads:

    =====================  ===================================================================
    inputs_q, and output   (batch..., T, in_features), (batch..., T, out_features)
    inputs_k, inputs_v     (batch..., S, in_kv_features)
    mask                   broadcasts to (batch..., N, T, S); True: the query sees the key
    input_positions        (T,) or (batch..., T), integers
    q_lengths, kv_lengths  (batch...), integers
    q_, kv_segment_ids     (batch..., T), (batch..., S), integers
    query.kernel           (in_features, N, head_dim)
    key, value.kernel      (in_kv_features, K, head_dim)
    out.kernel             (N, head_dim, out_features)
    sinks                  (N,)
    cached_key, _value     (B, max_length, K, head_dim), or (num_pages, page_size, K, head_dim)
    cache_index            (B,) int32: the tokens that each sequence holds
    =====================  ===================================================================

    In `jax.checkpoint` policies, what goes into attention is named "query_proj", "key_proj" and "value_proj", what
    comes out of it "jax_flash_out" and "jax_flash_lse", and the layer's output "out_proj".

    Args:
      num_heads: of the queries.
      in_features: of inputs_q.
      qkv_features: num_heads * head_dim, default in_features.
      out_features: default in_features.
      num_kv_heads: of the keys and values; a divisor of num_heads, which is the default. Fewer make grouped-query
        attention, 1 multi-query.
      in_kv_features: of inputs_k and inputs_v, default in_features.
      head_dim: default qkv_features / num_heads.
      rotary: how queries and keys are turned by their positions; default: they are not.
      window_size: (left, right): query i sees keys from i - left to i + right. None does not limit a side; one integer
        is for both. Mistral's window of 4096 is (4095, 0).
      softcap: scores become softcap * tanh(score / softcap), as in Gemma 2.
      softmax_scale: what the products of queries and keys are multiplied by, default 1 / sqrt(head_dim).
      use_qk_norm: RMS norms `query_norm` and `key_norm` over each head, before the rotary embedding, as in Qwen 3 and
        Gemma 3.
      norm_epsilon: of these norms.
      use_sinks: a learnable score of each head in the softmax of all queries, which has no value, as in gpt-oss; it
        begins at 0.
      use_bias: in all four projections.
      use_out_bias: in the last one, default use_bias.
      dtype: of the computation; default: the common type of inputs and parameters. The kernels want bfloat16 or
        float16; on CPUs float32 too.
      param_dtype: of the parameters.
      precision: of the projections' products.
      kernel_init: of the projections' kernels.
      out_kernel_init: of the last one's, default kernel_init.
      bias_init: of the biases.
      out_bias_init: of the last one's, default bias_init.
      decode: use the cache that `init_cache` or `init_paged_cache` made.
      axis_names: logical axes for the parameters and the cache, which Flax then shards as its rules say
        (`nnx.logical_axis_rules`), on the mesh of `jax.set_mesh`; default: they have none.
      rngs: for the parameters.

    Raises:
      ValueError: the arguments contradict each other.
      NotImplementedError: they make sense, but no kernel does it; the message says what to do.

    The papers: attention https://arxiv.org/abs/1706.03762, grouped queries https://arxiv.org/abs/2305.13245.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jax_flash.flax.nnx import MultiHeadAttention
    >>> from jax_flash.rotary import Rotary
    >>> layer = MultiHeadAttention(
    ...     num_heads=4, num_kv_heads=2, in_features=32, head_dim=16, rotary=Rotary(), use_bias=False, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 10, 32))
    >>> y = layer(x, is_causal=True)

    Decoding: a prompt of 6 tokens in chunks of 3, then token by token.

    >>> layer.init_cache((2, 64, 32))
    >>> step = nnx.jit(lambda layer, x: layer(x, decode=True), donate_argnums=0)
    >>> steps = [step(layer, x[:, :3]), step(layer, x[:, 3:6]), *(step(layer, x[:, i : i + 1]) for i in range(6, 10))]
    >>> bool(jnp.allclose(jnp.concatenate(steps, axis=1), y, atol=1e-5))
    True
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        head_dim: int | None = None,
        rotary: Rotary | None = None,
        window_size: int | tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        softmax_scale: float | None = None,
        use_qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        use_sinks: bool = False,
        use_bias: bool = True,
        use_out_bias: bool | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: jax.nn.initializers.Initializer = _default_kernel_init,
        out_kernel_init: jax.nn.initializers.Initializer | None = None,
        bias_init: jax.nn.initializers.Initializer = _default_bias_init,
        out_bias_init: jax.nn.initializers.Initializer | None = None,
        decode: bool = False,
        axis_names: AxisNames | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_kv_heads, self.head_dim = head_sizes(num_heads, num_kv_heads, in_features, qkv_features, head_dim)
        self.rotary = rotary
        self.window_size = window_size
        self.softcap = softcap
        self.softmax_scale = softmax_scale
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.decode = decode
        self.axis_names = axis_names

        def linear(name, in_features, out_features, use_bias, kernel_init, bias_init, axis: int | tuple[int, ...] = -1):
            return nnx.LinearGeneral(
                in_features,
                out_features,
                axis=axis,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                bias_init=bias_init,
                kernel_metadata=_metadata(axis_names and axis_names.kernel(name)),
                bias_metadata=_metadata(axis_names and axis_names.bias(name)),
                rngs=rngs,
            )

        def norm():
            return nnx.RMSNorm(
                self.head_dim,
                epsilon=norm_epsilon,
                dtype=dtype,
                param_dtype=param_dtype,
                scale_metadata=_metadata(axis_names and (axis_names.head_dim,)),
                rngs=rngs,
            )

        # The order is that of flax.nnx.MultiHeadAttention, so that the same rngs give the same parameters.
        in_kv_features = in_features if in_kv_features is None else in_kv_features
        heads, kv_heads = (num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        self.query = linear("query", in_features, heads, use_bias, kernel_init, bias_init)
        self.key = linear("key", in_kv_features, kv_heads, use_bias, kernel_init, bias_init)
        self.value = linear("value", in_kv_features, kv_heads, use_bias, kernel_init, bias_init)
        self.query_norm = norm() if use_qk_norm else nnx.data(None)
        self.key_norm = norm() if use_qk_norm else nnx.data(None)
        self.out = linear(
            "out",
            heads,
            in_features if out_features is None else out_features,
            use_bias if use_out_bias is None else use_out_bias,
            out_kernel_init or kernel_init,
            out_bias_init or bias_init,
            axis=(-2, -1),
        )
        sinks_metadata = _metadata(axis_names and (axis_names.heads,))
        self.sinks = nnx.Param(jnp.zeros(num_heads, param_dtype), **sinks_metadata) if use_sinks else nnx.data(None)
        self.cached_key: nnx.Cache[jax.Array] | None = nnx.data(None)
        self.cached_value: nnx.Cache[jax.Array] | None = nnx.data(None)
        self.cache_index: nnx.Cache[jax.Array] | None = nnx.data(None)

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
        decode: bool | None = None,
        page_table: PageTable | None = None,
        qkv_sharding=None,
        out_sharding=None,
    ) -> jax.Array:
        """Attends from inputs_q to inputs_k, or with `decode` appends to the cache and attends to all that it holds.

        With a cache, the T tokens follow those that it holds, each sees itself and what comes before, and the cache
        counts them. T may be 1 or a chunk of a prompt. A chunk must fit into the cache with its padding: the output of
        a sequence where it does not is not-a-number.

        Args:
          inputs_q: what the queries are made of.
          inputs_k: what the keys are made of; default inputs_q, self-attention.
          inputs_v: what the values are made of; default inputs_k.
          mask: True, or nonzero, where a query may see a key; not with a cache.
          is_causal: query i sees keys j <= i. A cache is always causal.
          input_positions: where the tokens are for the rotary embedding; default 0, 1, ..., or those that follow what
            the cache holds.
          q_lengths: how many queries of each sequence are valid; attention's output is 0 for the others. With a cache,
            the cache holds that many tokens more afterwards.
          kv_lengths: how many keys are valid; the others are never seen. In self-attention one of the two says both.
          q_segment_ids: of packed sequences: a token sees those of its own segment alone; not with a cache.
          kv_segment_ids: those of the keys; default: q_segment_ids.
          decode: default: as the layer was made.
          page_table: which pages belong to whom, if `init_paged_cache` made the cache; with room for the T tokens
            (`reserve`), which it does not count yet (`advance` it after the last layer).
          qkv_sharding: of the projections' outputs, on a mesh of explicit axes.
          out_sharding: of the output, on a mesh of explicit axes.
        """
        decode = self.decode if decode is None else decode
        keys = ("inputs_q as keys", inputs_q, self.key) if inputs_k is None else ("inputs_k", inputs_k, self.key)
        for name, x, linear in (("inputs_q", inputs_q, self.query), keys):
            if x.shape[-1:] != linear.in_features:
                raise ValueError(
                    f"MultiHeadAttention: {name} must have {linear.in_features[0]} features, as the layer was made "
                    f"for; got {x.shape}"
                )

        def project(linear, sharding):
            return functools.partial(linear, out_sharding=sharding)

        out, after = multi_head_attention(
            Options(self.rotary, self.window_size, self.softcap, self.softmax_scale),
            Projections(
                project(self.query, qkv_sharding),
                project(self.key, qkv_sharding),
                project(self.value, qkv_sharding),
                project(self.out, out_sharding),
                self.query_norm,
                self.key_norm,
                None if self.sinks is None else self.sinks[...],
            ),
            inputs_q,
            inputs_k,
            inputs_v,
            self._cache() if decode else None,
            mask=mask,
            is_causal=is_causal,
            input_positions=input_positions,
            q_lengths=q_lengths,
            kv_lengths=kv_lengths,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=kv_segment_ids,
            page_table=page_table,
        )
        if after is not None:
            for variable, value in zip((self.cached_key, self.cached_value, self.cache_index), after, strict=True):
                if variable is not None:
                    variable[...] = value
        return out

    def init_cache(self, input_shape: tuple[int, int, int], dtype: jax.typing.DTypeLike | None = None) -> None:
        """An empty cache for inputs of the shape (B, max_length, features), as in Flax.

        Args:
          input_shape: B sequences of at most max_length tokens.
          dtype: of the keys and values, in which attention is then computed; default: the layer's dtype or param_dtype.
        """
        if len(input_shape) != 3:
            raise ValueError(f"MultiHeadAttention: init_cache wants (B, max_length, features); got {input_shape}")
        batch, max_length, _ = input_shape
        self._set_cache(cache.contiguous, batch, max_length, dtype, paged=False)
        names = self.axis_names and (self.axis_names.batch,)
        self.cache_index = nnx.Cache(jnp.zeros(batch, jnp.int32), **_metadata(names))

    def init_paged_cache(self, num_pages: int, page_size: int, dtype: jax.typing.DTypeLike | None = None) -> None:
        """An empty pool of pages, for a `jax_flash.cache.PageTable` of the same num_pages and page_size."""
        self._set_cache(cache.paged, num_pages, page_size, dtype, paged=True)
        self.cache_index = nnx.data(None)

    def set_view(self, decode: bool | None = None, batch_size: int | None = None, max_length: int | None = None):
        """For `nnx.view`: switches `decode`, and makes a cache where a size for it is given.

        Args:
          decode: use the cache.
          batch_size: B of `init_cache`.
          max_length: max_length of `init_cache`.
        """
        self.decode = self.decode if decode is None else decode
        if batch_size is not None and max_length is not None:
            self.init_cache((batch_size, max_length, self.query.in_features[0]))

    def _set_cache(self, make, rows, length, dtype, paged):
        dtype = dtype or self.dtype or self.param_dtype
        key, value = make(rows, length, self.num_kv_heads, self.head_dim, dtype)
        names = _metadata(self.axis_names and self.axis_names.cache(paged))
        self.cached_key, self.cached_value = nnx.Cache(key, **names), nnx.Cache(value, **names)

    def _cache(self) -> Cache:
        if self.cached_key is None or self.cached_value is None:
            raise ValueError("MultiHeadAttention: decode needs a cache; call init_cache or init_paged_cache first")
        lengths = None if self.cache_index is None else self.cache_index[...]
        return Cache(self.cached_key[...], self.cached_value[...], lengths)


def _metadata(names) -> dict[str, Any]:
    """How Flax wants the names of an array's axes, if it has any."""
    return {} if names is None else {"out_sharding": names}
