"""`jax_flash.rotary` against NumPy, Flax, and what flash_attn_with_kvcache does in its kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kvcache_oracle
import numpy as np
import pytest
from rotary_oracle import angles

from jax_flash import attention, cache, flash_attn_with_kvcache
from jax_flash.rotary import Linear, Llama3, Rotary, rotate

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, N, K, H = 2, 7, 4, 2, 64
PAIRINGS = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
SCALINGS = {"none": None, "linear": Linear(4.0), "llama3": Llama3(original_max_position_embeddings=128)}


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
    "scaling, rotary_dim, positions",
    [
        ("none", None, "counted"),
        ("none", 16, "given for each sequence"),
        ("linear", None, "given for each sequence"),
        ("linear", 6, "given"),
        ("llama3", None, "given"),
        ("llama3", 16, "counted"),
    ],
)
@PAIRINGS
def test_turns_by_the_angles_of_the_definition(interleaved, scaling, rotary_dim, positions):
    rotary = Rotary(base=500.0, rotary_dim=rotary_dim, interleaved=interleaved, scaling=SCALINGS[scaling])
    at = {
        "counted": None,
        "given": jnp.array([0, 3, 1, 90, 1000, 7, 7]),
        "given for each sequence": jax.random.randint(jax.random.key(1), (B, T), 0, 1000, jnp.int32),
    }[positions]
    x = normal(B, T, N, H)
    angle = angles(rotary, np.arange(T) if at is None else at, H)
    angle = np.broadcast_to(angle, (B, T, angle.shape[-1]))[:, :, None]
    expected = kvcache_oracle.rotate(np.asarray(x, np.float64), np.cos(angle), np.sin(angle), interleaved)
    # A float32 angle of 1000 is off by up to 6e-5.
    np.testing.assert_allclose(jax.jit(rotary)(x, at), expected, atol=2e-5 if at is None else 3e-4)


@pytest.mark.parametrize(
    "scaling, rotary_dim, page_size, interleaved", [("linear", 32, 0, True), ("llama3", H, 8, False)]
)
def test_turns_as_the_cache_s_kernel_does(interleaved, page_size, rotary_dim, scaling, dtype):
    """What stands in the cache afterwards, and the output, for chunks behind caches of different lengths."""
    rotary = Rotary(base=500.0, rotary_dim=rotary_dim, interleaved=interleaved, scaling=SCALINGS[scaling])
    q, k, v = (normal(B, T, heads, H, seed=i, dtype=dtype) for i, heads in enumerate((N, K, K)))
    held, capacity = jnp.array([3, 50]), 64
    past_k, past_v = (normal(B, 50, K, H, seed=10 + i, dtype=dtype) for i in range(2))
    options, attend = {}, dict(causal=True, rotary_interleaved=interleaved)
    if page_size:
        caches = cache.paged(B * capacity // page_size, page_size, K, H, dtype)
        options["block_table"] = jnp.arange(B * capacity // page_size)[::-1].reshape(B, -1)
    else:
        caches = cache.contiguous(B, capacity, K, H, dtype)
    caches = cache.append(*caches, past_k, past_v, jnp.zeros(B, jnp.int32), **options)

    cos, sin = rotary.tables(capacity, H)
    out, *after = flash_attn_with_kvcache(
        q, *caches, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=held, **attend, **options
    )
    positions = held[:, None] + jnp.arange(T)[None]
    turned = rotary(k, positions)
    expected, *_ = flash_attn_with_kvcache(
        rotary(q, positions), *caches, turned, v, cache_seqlens=held, **attend, **options
    )
    stored = cache.gather(after[0], held + T, **options)
    stored = jnp.stack([stored[b, n : n + T] for b, n in enumerate((3, 50))])
    # The same product in float32, but for fused multiplications, is rounded: one unit of the last place of 4.
    unit = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(stored.astype(jnp.float32), turned.astype(jnp.float32), rtol=0, atol=unit)
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=4 * unit)


@pytest.mark.parametrize("dtype, interleaved", [("float16", True), ("bfloat16", False)])
def test_half_precision_is_rounded_once(interleaved, dtype):
    rotary, x = Rotary(interleaved=interleaved), normal(B, T, N, H, dtype=dtype)
    turned = jax.jit(rotary)(x)
    assert turned.dtype == dtype
    once = np.asarray(jax.jit(rotary)(x.astype(jnp.float32)))
    error = np.abs(turned.astype(jnp.float32) - once)
    assert (error <= 0.501 * float(jnp.finfo(dtype).eps) * np.abs(once) + 1e-6).all()


@PAIRINGS
def test_scores_depend_on_distances_alone(interleaved, dtype):
    rotary = Rotary(interleaved=interleaved)
    q, k, v = (normal(B, T, heads, H, seed=i, dtype=dtype) for i, heads in enumerate((N, K, K)))

    def attend(start):
        positions = start + jnp.arange(T)
        return attention(rotary(q, positions), rotary(k, positions), v, causal=True).astype(jnp.float32)

    assert np.abs(attend(0) - attention(q, k, v, causal=True)).max() > 0.05
    np.testing.assert_allclose(attend(0), attend(1000), atol=2e-4 if dtype == "float32" else 5e-3)


@PAIRINGS
def test_gradient_turns_back(interleaved):
    rotary, x, d = Rotary(rotary_dim=48, interleaved=interleaved), normal(B, T, N, H), normal(B, T, N, H, seed=1)
    back = jax.jit(lambda x, d: jax.vjp(rotary, x)[1](d)[0])(x, d)
    np.testing.assert_allclose(back, jax.jit(rotary)(d, -jnp.arange(T)), atol=1e-5)


@PAIRINGS
def test_transforms(interleaved):
    rotary, x = Rotary(interleaved=interleaved), normal(B, T, N, H)
    np.testing.assert_allclose(jax.vmap(rotary)(x), rotary(x), atol=1e-6)
    positions = jnp.array([[0] * T, range(T)])
    np.testing.assert_allclose(jax.vmap(rotary)(x, positions), rotary(x, positions), atol=1e-6)
    (symbolic,) = jax.export.symbolic_shape("T")
    exported = jax.export.export(jax.jit(rotary))(jax.ShapeDtypeStruct((B, symbolic, N, H), jnp.float32))
    np.testing.assert_allclose(exported.call(x), rotary(x), atol=1e-6)


def test_equals_flax_s():
    nnx = pytest.importorskip("flax.nnx")
    if not hasattr(nnx, "RoPE"):
        pytest.skip("this Flax has no nnx.RoPE")
    x = normal(B, T, N, H)
    expected = jax.vmap(nnx.RoPE(theta=500.0), in_axes=-2, out_axes=-2)(x)
    np.testing.assert_allclose(Rotary(base=500.0, interleaved=False)(x), expected, atol=1e-5)


def test_description_is_hashable():
    assert len({Rotary(), Rotary(scaling=Linear(2.0)), Rotary(scaling=Linear(2.0)), Rotary(scaling=Llama3())}) == 3


@pytest.mark.parametrize(
    "message, call",
    [
        ("base must be a positive number; got 0", lambda x: Rotary(base=0)),
        ("rotary_dim must be a positive number; got -2", lambda x: Rotary(rotary_dim=-2)),
        ("scaling must be Linear, Llama3 or None; got 8.0", lambda x: Rotary(scaling=8.0)),
        ("factor must be a positive number; got True", lambda x: Linear(True)),
        ("low_freq_factor must be below high_freq_factor; got 4.0 and 4", lambda x: Llama3(low_freq_factor=4.0)),
        ("must be even and at most the head dim; got 7 for 64", lambda x: Rotary(rotary_dim=7)(x)),
        ("must be even and at most the head dim; got 66 for 64", lambda x: Rotary(rotary_dim=66)(x)),
        ("must be even and at most the head dim; got 59 for 59", lambda x: Rotary()(x[..., :59])),
        (r"a row for each token of x; got x float32\(2, 7, 4, 64\)", lambda x: Rotary()(x, jnp.arange(8))),
        ("a row for each token", lambda x: Rotary()(x, jnp.zeros((3, 7)))),
        ("a row for each token", lambda x: Rotary()(x, jnp.zeros((1, 2, 7)))),
        ("x must be", lambda x: rotate(x, jnp.ones((7, 4)), jnp.ones((7, 5)))),
        ("x must be", lambda x: rotate(x[0, 0], jnp.ones((7, 4)), jnp.ones((7, 4)))),
        ("at most the head dim H", lambda x: rotate(x, jnp.ones((7, 33)), jnp.ones((7, 33)))),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_mistakes_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call(normal(B, T, N, H))
