"""What the Flax layers compute, in NumPy from the definitions; and both of Flax's APIs behind the same functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kvcache_oracle
import numpy as np
import rotary_oracle
from flax import nnx

import jax_flash.flax


def by_definition(
    q, k, v, mask=None, is_causal=False, window=(None, None), softcap=None, scale=None, lengths=(None,), sinks=None
):
    """What attention_fn computes with its own arguments, from all scores; lengths: of the queries, of the keys."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    (T, N), (S, K) = q.shape[-3:-1], k.shape[-3:-1]
    k, v = (np.repeat(x, N // K, axis=-2) for x in (k, v))
    score = np.einsum("...tnh,...snh->...nts", q, k) * (scale or q.shape[-1] ** -0.5)
    score = softcap * np.tanh(score / softcap) if softcap else score
    i, j = np.arange(T)[:, None], np.arange(S)[None]
    sees = np.ones_like(score, bool) if mask is None else np.broadcast_to(mask, score.shape)
    if window[0] is not None:
        sees = sees & (j >= i - window[0])
    if window[1] is not None:
        sees = sees & (j <= i + window[1])
    if is_causal:
        sees = sees & (j <= i)
    for n, index in zip(lengths, (i, j), strict=False):
        sees = sees if n is None else sees & (index < np.asarray(n)[..., None, None, None])
    weight = np.where(sees, np.exp(score), 0)
    total = weight.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks)[:, None, None])
    return np.einsum("...nts,...snh->...tnh", weight / np.where(total > 0, total, 1), v)


def layer_by_definition(params, x, *, rotary=None, positions=None, epsilon=1e-6, **options):
    """The output of a self-attention layer with these parameters, in float64; options as for by_definition."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = np.asarray(x, np.float64)

    def project(name):
        heads = np.einsum("btd,dnh->btnh", x, params[name]["kernel"]) + params[name].get("bias", 0)
        if f"{name}_norm" in params:
            mean_square = np.mean(heads**2, axis=-1, keepdims=True)
            heads = heads / np.sqrt(mean_square + epsilon) * params[f"{name}_norm"]["scale"]
        if rotary is not None and name != "value":
            angle = rotary_oracle.angles(
                rotary, np.arange(x.shape[1]) if positions is None else positions, heads.shape[-1]
            )
            angle = np.broadcast_to(angle, (*x.shape[:2], angle.shape[-1]))[:, :, None]
            heads = kvcache_oracle.rotate(heads, np.cos(angle), np.sin(angle), rotary.interleaved)
        return heads

    out = by_definition(project("query"), project("key"), project("value"), sinks=params.get("sinks"), **options)
    return np.einsum("btnh,nhd->btd", out, params["out"]["kernel"]) + params["out"].get("bias", 0)


def filled(shapes):
    """Random parameters of these shapes, scales around 1; made by NumPy, which compiles nothing."""
    random = np.random.default_rng(0)

    def fill(path, leaf):
        name = str(path[-1].key)
        spread = np.sqrt(leaf.size / leaf.shape[-1]) ** -1 if name == "kernel" else 0.3
        return jnp.asarray(random.normal(float(name == "scale"), spread, leaf.shape).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(fill, shapes)


def of_nnx(create):
    """(parameters as nested dicts, function of such parameters and the layer's arguments) of the layer it creates."""
    graph, state, rest = nnx.split(nnx.eval_shape(create), nnx.Param, ...)

    def apply(params, *inputs, **options):
        new = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(new, params)
        return nnx.merge(graph, new, rest)(*inputs, **options)

    return filled(nnx.to_pure_dict(state)), apply


def of_linen(layer, *inputs):
    """The same; inputs: for `init`."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)["params"]
    return filled(shapes), lambda params, *inputs, **options: layer.apply({"params": params}, *inputs, **options)


def make(kind, *inputs, **options):
    """(parameters, function) of our layer."""
    if kind == "linen":
        return of_linen(jax_flash.flax.linen.MultiHeadAttention(**options), *inputs)
    sizes = dict(in_features=inputs[0].shape[-1], in_kv_features=inputs[-1].shape[-1])
    return of_nnx(lambda: jax_flash.flax.nnx.MultiHeadAttention(**sizes, **options, rngs=nnx.Rngs(0)))


def nnx_with(create, params):
    """The layer that it creates, with these parameters."""
    layer = nnx.eval_shape(create)
    state = nnx.state(layer, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(layer, state)
    return layer


class Decoder:
    """A layer with a cache, called step by step under jit. `page_table`: a paged one; else for `shape`."""

    def __init__(self, kind, params, shape, page_table=None, cache_dtype=None, **options):
        if kind == "nnx":
            sizes = dict(in_features=shape[-1], decode=True)
            layer = nnx_with(
                lambda: jax_flash.flax.nnx.MultiHeadAttention(**sizes, **options, rngs=nnx.Rngs(0)), params
            )
            if page_table is None:
                layer.init_cache(shape, cache_dtype)
            else:
                layer.init_paged_cache(page_table.references.shape[0], page_table.page_size, cache_dtype)
            self.graph, self.cache, self.rest = nnx.split(layer, nnx.Cache, ...)
        else:
            self.layer = jax_flash.flax.linen.MultiHeadAttention(decode=True, cache_dtype=cache_dtype, **options)
            init = lambda x: self.layer.init(jax.random.key(0), x, page_table=page_table)["cache"]  # noqa: E731
            self.cache, self.rest = jax.jit(init)(jnp.zeros(shape)), params
        self.step = jax.jit(self._nnx_step if kind == "nnx" else self._linen_step, donate_argnums=0)

    def _nnx_step(self, cache, rest, x, options):
        layer = nnx.merge(self.graph, cache, rest)
        return layer(x, **options), nnx.state(layer, nnx.Cache)

    def _linen_step(self, cache, rest, x, options):
        out, changed = self.layer.apply({"params": rest, "cache": cache}, x, **options, mutable=["cache"])
        return out, changed["cache"]

    def __call__(self, x, **options):
        out, self.cache = self.step(self.cache, self.rest, x, options)
        return out

    @property
    def arrays(self):
        """The cache by name."""
        return nnx.to_pure_dict(self.cache) if isinstance(self.cache, nnx.State) else self.cache
