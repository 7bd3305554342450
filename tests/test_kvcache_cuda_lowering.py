"""What XLA makes of flash_attn_with_kvcache on an H100, compiled without one: one call, and no copy of a cache."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_cuda_lowering import topology  # noqa: F401

from jax_flash import _native, flash_attn_with_kvcache

QUERY = (8, 1, 32, 128)
NEW = (8, 1, 8, 128)
CACHE = (8, 4096, 8, 128)


def step(q, k_cache, v_cache, k, v, lengths):
    return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)


def loop(q, k_cache, v_cache, k, v, lengths):
    def body(state):
        q, k_cache, v_cache, lengths = state
        return *step(q, k_cache, v_cache, k, v, lengths), lengths + 1

    return jax.lax.while_loop(lambda state: state[3][0] < 4000, body, (q, k_cache, v_cache, lengths))


def compiled(topology, fun, shapes, donated):  # noqa: F811
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    arguments.append(jax.ShapeDtypeStruct((shapes[0][0],), jnp.int32, sharding=sharding))
    lowered = jax.jit(fun, donate_argnums=donated).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile()


def made(text: str, shape) -> list[str]:
    """The operations whose result is an array of this shape."""
    return re.findall(rf"= bf16\[{','.join(map(str, shape))}\]\S* (\S+?)\(", text)


@pytest.mark.parametrize("donated", [(1, 2), (0, 1, 2)], ids=["caches", "q+caches"])
@pytest.mark.parametrize("fun", [step, loop], ids=lambda fun: fun.__name__)
def test_one_call_and_no_copy_of_the_cache(topology, fun, donated):  # noqa: F811
    result = compiled(topology, fun, [QUERY, CACHE, CACHE, NEW, NEW], donated)
    text = result.as_text()
    assert text.count('custom_call_target="jax_flash_kvcache"') == 1
    assert not {"copy", "fusion", "transpose"} & set(made(text, CACHE))
    # The output lies where q does: a q that the caller keeps is copied, once, and none inside a loop.
    kept = 0 not in donated
    copies = len(re.findall(r" bf16\S* copy\(", text))
    assert copies == kept
    if fun is step:
        assert len(re.findall(r" (?:copy|fusion|transpose)\(", text)) == copies
    assert result.memory_analysis().alias_size_in_bytes == 2 * (2 * np.prod(CACHE) + (not kept) * np.prod(QUERY))


def test_the_output_of_a_prompt_has_its_own_buffer(topology):  # noqa: F811
    """The forward kernels do not promise what decode does: to read queries before anybody writes where they lie."""
    result = compiled(topology, step, [(8, 256, 32, 128), CACHE, CACHE, (8, 256, 8, 128), (8, 256, 8, 128)], (0, 1, 2))
    assert "{0}: (0, {})" not in result.as_text()
    assert result.memory_analysis().alias_size_in_bytes >= 2 * 2 * np.prod(CACHE)


def test_q_is_copied_where_it_is_the_new_key_too(topology):  # noqa: F811
    def fun(q, k_cache, v_cache, lengths):
        return flash_attn_with_kvcache(q, k_cache, v_cache, q, q, cache_seqlens=lengths, causal=True)

    text = compiled(topology, fun, [NEW, CACHE, CACHE], (1, 2)).as_text()
    assert len(re.findall(r" bf16\S* copy\(", text)) == 1


def test_slices_of_one_projection_share_nothing_with_the_output(topology):  # noqa: F811
    """XLA passes slices of one array as views, the new keys lying behind the query; the output lies elsewhere."""

    def fun(qkv, k_cache, v_cache, lengths):
        q, k, v = qkv[:, :, :32], qkv[:, :, 32:40], qkv[:, :, 40:]
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    result = compiled(topology, fun, [(1, 1, 48, 128), (1, *CACHE[1:]), (1, *CACHE[1:])], (1, 2))
    assert result.memory_analysis().alias_size_in_bytes == 2 * 2 * np.prod(CACHE[1:])


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_symbolic_sizes_export(paged):
    """The batch, the capacity and the pages: what is planned for a call is computed from its sizes."""
    if not _native.build_info()["cuda_architectures"]:
        pytest.skip("jax_flash was built without CUDA kernels")
    b, s, n = jax.export.symbolic_shape("b, s, n")
    shapes = [(b, 1, 32, 128), *[(s, 16, 8, 128) if paged else (b, s, 8, 128)] * 2, *[(b, 1, 8, 128)] * 2]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arguments += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(b,), *[(b, n)] * paged]]

    def fun(q, k_cache, v_cache, k, v, lengths, table=None):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table, causal=True)

    safe = [jax.export.DisabledSafetyCheck.custom_call("jax_flash_kvcache")]
    exported = jax.export.export(jax.jit(fun), platforms=["cuda"], disabled_checks=safe)(*arguments)
    assert exported.mlir_module().count("@jax_flash_kvcache") == 1
