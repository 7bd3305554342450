"""Memory: what attention to pages takes, and that a call which finds none says so and harms nothing."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from kvcache_oracle import Case

from jax_flash import flash_attn_with_kvcache

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it limits memory as Linux does")


# One chunk and many, one piece and many, rows that the kernels take in either way, and windows that pass whole chunks.
PAGED = [
    Case("float32", B=1, N=2, K=1, T=1, T_new=1, S=9000, H=32, page=48),
    Case("float32", B=1, N=2, K=1, T=300, T_new=300, S=2600, H=32, page=48, lengths=(2290,)),
    Case("float32", B=2, N=4, K=2, T=70, T_new=5, S=2300, H=80, page=8, causal=False, window=(900, 10)),
    Case("float32", B=2, N=2, K=2, T=49, T_new=49, S=1500, H=256, page=600, causal=False, window=(300, -1)),
    Case("float32", B=1, N=2, K=1, T=200, T_new=200, S=1400, H=16, page=24, leftpad=True, softcap=3.0),
    Case("bfloat16", B=2, N=8, K=8, T=20, T_new=20, S=1100, H=128, page=256, lengths=(1060, 3)),
]


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.id)
def test_pages_are_as_a_contiguous_cache(case):
    arrays = case.arrays()
    paged = flash_attn_with_kvcache(**arrays, **case.options(), return_softmax_lse=True)
    table = arrays.pop("block_table")
    for name in ("k_cache", "v_cache"):
        pages = arrays[name][table]  # (B, pages, page, K, H)
        arrays[name] = pages.reshape(case.B, -1, *pages.shape[3:])
    contiguous = flash_attn_with_kvcache(**arrays, **case.options(), return_softmax_lse=True)
    bound = 1e-5 if case.dtype == "float32" else 2e-2
    for name, a, b in zip(("out", "lse"), paged, contiguous, strict=False):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(b[b != -np.inf]).all()
        np.testing.assert_allclose(a, b, bound, bound, err_msg=name)


# Limits the address space of a child to what it has when it is warm, and `room` more.
PRELUDE = """
import re, resource
import jax, jax.numpy as jnp, numpy as np
import jax_flash
jax.config.update("jax_platforms", "cpu")

def limit(room):
    size = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))

def unlimit():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def run(body: str) -> str:
    code = PRELUDE + textwrap.dedent(body)
    # One arena: each further one has address space in reserve, which no limit touches.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    child = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300, env=environment
    )
    assert child.returncode == 0, f"the child ended with {child.returncode}\n{child.stdout}\n{child.stderr[-3000:]}"
    return child.stdout


@pytest.mark.parametrize("T", [1, 40])
def test_a_page_named_often_is_not_copied_as_often(T):
    """2 GB of keys and values where each entry of the table counts, in 256 MB."""
    run(f"""
        rng = np.random.default_rng(0)
        q = jnp.asarray(rng.standard_normal((1, {T}, 1, 64), np.float32))
        k, v = (jnp.asarray(rng.standard_normal((1, 256, 1, 64), np.float32)) for _ in range(2))

        @jax.jit
        def attend(q, k, v, table, length):
            return jax_flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=length, block_table=table)[0]

        once = np.asarray(attend(q, k, v, jnp.zeros((1, 1), jnp.int32), jnp.array([256])))
        table, length = jnp.zeros((1, 2**14), jnp.int32), jnp.array([2**22])
        compiled = attend.lower(q, k, v, table, length).compile()
        limit(2**28)
        often = np.asarray(compiled(q, k, v, table, length))
        np.testing.assert_allclose(often, once, 1e-4, 1e-4)
    """)


# The results are small, so that XLA finds room for them, and what the kernels keep beside them is not.
CALLS = {
    "forward": """
        q, k = (jnp.asarray(rng.standard_normal((1, n, 2, 128), np.float32)) for n in (48, 3000))
        call, args = jax_flash.attention, (q, k, k)
    """,
    "backward": """
        q, k = (jnp.asarray(rng.standard_normal((1, n, 2, 128), np.float32)) for n in (48, 300))
        call, args = jax.grad(lambda *qkv: jax_flash.attention(*qkv).sum(), (0, 1, 2)), (q, k, k)
    """,
    "kvcache": """
        q = jnp.asarray(rng.standard_normal((1, 256, 8, 64), np.float32))
        pages = jnp.asarray(rng.standard_normal((4, 8, 8, 64), np.float32))
        args = q, pages, pages, jnp.array([32]), jnp.arange(4)[None]
        def call(q, k, v, lengths, table):
            return jax_flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table)[0]
    """,
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_call_without_memory_is_an_error_and_no_more(kind):
    """With ever more room: each call raises or is right, on a helper's thread as on its own, and the next is right."""
    body = "rng = np.random.default_rng(0)\n" + textwrap.dedent(CALLS[kind])
    body += textwrap.dedent(f"""
        import ctypes
        libc = ctypes.CDLL(None)
        compiled = jax.jit(call).lower(*args).compile()
        want = jax.tree.map(np.asarray, compiled(*args))
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: from 64 KB on, memory comes from the system and goes back to it
        outcomes = []
        for room in range(0, 2**23, 2**16):
            libc.malloc_trim(0)
            limit(room)
            try:
                got = jax.tree.map(np.asarray, compiled(*args))
            except Exception as error:
                got = str(error)
            unlimit()
            if isinstance(got, str):
                assert got.startswith("RESOURCE_EXHAUSTED"), got
                outcomes.append("jax_flash {kind} (float32" in got)
                got = jax.tree.map(np.asarray, compiled(*args))
            else:
                outcomes.append(None)
            jax.tree.map(np.testing.assert_array_equal, got, want)
        assert True in outcomes and outcomes[-1] is None, outcomes
    """)
    run(body)
