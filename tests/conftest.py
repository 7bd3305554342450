"""Set-up for all tests: eight CPU devices, no implicit rank promotion."""

import os
import pathlib

import jax
import pytest
from hypothesis import HealthCheck, settings

# Before any backend starts, so that meshes of CPU devices exist beside whatever the default device is.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

if not pathlib.Path("/dev/nvidiactl").exists():
    # JAX's CUDA plugin may be here all the same, to compile for a GPU (test_cuda_lowering.py): it is not to look for
    # one, nor for libraries that only running needs.
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"


# What random calls there are: the same few in every run, or by --hypothesis-profile=night as many others.
_RANDOM = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("few", max_examples=80, derandomize=True, database=None, **_RANDOM)
settings.register_profile("night", max_examples=100_000, print_blob=True, **_RANDOM)
settings.load_profile("few")


@pytest.fixture(scope="session")
def platform() -> str:
    """The backend the tests run on: "cpu" or "gpu"."""
    return jax.default_backend()


@pytest.fixture(scope="session")
def dtype(platform) -> str:
    """The dtype for tests that are not about dtypes: the most exact that the backend's kernels have."""
    return "float32" if platform == "cpu" else "float16"


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose time is XLA's: programs that run once need not be fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
