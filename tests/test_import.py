"""Importing the package is quick, because it imports little; and a missing library says what to do."""

import importlib.metadata
import subprocess
import sys

import pytest

PRELUDE = "import sys, jax; before = set(sys.modules);"


def run(code: str, succeeds: bool = True) -> str:
    # -P: not the source tree of the folder that the tests are started in, which holds no library.
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == succeeds, result.stderr
    return result.stdout + result.stderr


def test_imports_little():
    new = run(PRELUDE + "import jax_flash; print(*(set(sys.modules) - before))").split()
    assert "jax_flash._attention" in new
    for heavy in ("flax", "jax.experimental.pallas", "jax._src.pallas.core", "jax.extend"):
        assert heavy not in new
    assert len([name for name in new if not name.startswith("jax_flash")]) < 20, new


def test_missing_library():
    message = run("import sys; sys.modules['jax_flash._native'] = None; import jax_flash", succeeds=False)
    assert "ImportError: jax_flash: its compiled library jax_flash._native is missing" in message
    assert "pip install" in message


VERSION = "import jax_flash; print(jax_flash.__version__);"


def test_version_is_the_library_s():
    python, library = run(VERSION + "print(jax_flash._ffi._native.build_info()['version'])").split()
    assert python == library


def test_version_is_the_distribution_s():
    try:
        installed = importlib.metadata.version("jax-flash")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this jax_flash is not installed as a distribution")
    assert run(VERSION).strip() == installed
