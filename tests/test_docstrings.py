"""The examples in the docstrings run, and every public function and class has one."""

import doctest
import importlib.util

import pytest

import jax_flash

# The functions of jax_flash.cache share the example of the module.
MODULES = [jax_flash, jax_flash.ring, jax_flash.rotary]
if importlib.util.find_spec("flax"):
    import jax_flash.flax

    MODULES += [jax_flash.flax, jax_flash.flax.nnx, jax_flash.flax.linen]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if callable(getattr(module, name))
}
PUBLIC |= {module.__name__: module for module in (jax_flash.cache, jax_flash.ring, jax_flash.rotary)}


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name):
    (test,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name)
    assert test.examples, f"{name} has no example"
    assert not doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed
