"""Kernels finish while another program holds a part of the GPU: none of their thread blocks waits for one that has no
place to run."""

import ctypes
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash

HELD = 16  # multiprocessors
PATIENCE = 20  # seconds

# A kernel of HELD blocks, each of which takes all the shared memory of its multiprocessor until it is told to end.
HOLDER = """
#include <cuda_runtime.h>

static volatile int* flags;  // host memory: [0] told to end, [1] blocks that run
static cudaStream_t stream;

__global__ void hold(volatile int* flags) {
  atomicAdd_system(const_cast<int*>(flags) + 1, 1);
  while (!flags[0]) __nanosleep(1000);
}

extern "C" int start(int blocks) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  cudaFuncSetAttribute(hold, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (cudaHostAlloc((void**)&flags, 2 * sizeof(int), cudaHostAllocMapped)) return 1;
  flags[0] = flags[1] = 0;
  if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)) return 2;
  hold<<<blocks, 32, bytes, stream>>>(flags);
  return cudaGetLastError();
}

extern "C" int running() { return flags[1]; }

extern "C" void end() { flags[0] = 1; }

extern "C" int finish() { return cudaStreamSynchronize(stream); }
"""


@pytest.fixture(scope="module")
def holder(platform, tmp_path_factory):
    if platform != "gpu":
        pytest.skip("needs a GPU")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("holder")
    (folder / "holder.cu").write_text(HOLDER)
    library = folder / "libholder.so"
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-arch=native", "-o", library, folder / "holder.cu"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def seconds_beside(holder, call, *args):
    """How long a call takes, at most PATIENCE: then the multiprocessors are set free, so that it ends in any case."""
    assert holder.start(HELD) == 0
    try:
        deadline = time.monotonic() + PATIENCE
        while holder.running() < HELD:
            assert time.monotonic() < deadline, "the multiprocessors could not be had"
        timer = threading.Timer(PATIENCE, holder.end)
        timer.start()
        start = time.monotonic()
        results = jax.block_until_ready(call(*args))
        seconds = time.monotonic() - start
        timer.cancel()
    finally:
        holder.end()
        assert holder.finish() == 0
    return seconds, results


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("H", [64, 128, 256])
def test_no_block_waits_for_one_that_cannot_run(H, causal, holder):
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((2, 4096, heads, H)), jnp.bfloat16) for heads in (8, 4, 4, 8))

    @jax.jit
    def forward(q, k, v):
        return jax_flash.attention(q, k, v, causal=causal)

    @jax.jit
    def gradients(q, k, v, d_out):
        _, pull = jax.vjp(lambda *x: jax_flash.attention(*x, causal=causal, deterministic=True), q, k, v)
        return pull(d_out)

    for call, args in ((forward, (q, k, v)), (gradients, (q, k, v, d_out))):
        alone = jax.block_until_ready(call(*args))  # compiled and loaded before
        seconds, beside = seconds_beside(holder, call, *args)
        assert seconds < PATIENCE / 2, f"{seconds:.1f} s: it waited until the multiprocessors were free"
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(beside), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
