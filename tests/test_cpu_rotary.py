"""The rotation of queries and new keys, value by value."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import flash_attn_with_kvcache


@pytest.mark.parametrize("table_dtype", ["float16", "float32"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
def test_every_finite_float16_turned_by_nothing_is_itself(interleaved, table_dtype):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    # Neighbours differ in size, so that no error hides behind a large partner.
    x = np.random.default_rng(0).permutation(every).reshape(1, -1, 1, 256)
    T = x.shape[1]
    cache = np.full((1, T, 1, 256), np.nan, np.float16)
    cos, sin = np.ones((T, 128), table_dtype), np.zeros((T, 128), table_dtype)
    new = dict(k=x, v=x / 16, cache_seqlens=np.zeros(1, np.int32))
    options = dict(softmax_scale=1e-9, causal=True, return_softmax_lse=True)

    turned = flash_attn_with_kvcache(
        x, cache, cache, **new, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, **options
    )
    # A zero may lose its sign: -0 * 1 - x * 0 is +0 for negative x.
    np.testing.assert_array_equal(np.asarray(turned[2]), x)
    # The same queries give the same scores, to the last bit.
    plain = flash_attn_with_kvcache(x, cache, cache, **new, **options)
    for name, a, b in zip(("out", "lse"), turned, plain, strict=False):
        assert jnp.isfinite(b).all()
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
