"""jax_flash/_native.pyi says what the compiled library has."""

import ast
import inspect
import pathlib
import re

import jax_flash
from jax_flash import _native

STUB = pathlib.Path(jax_flash.__file__).with_name("_native.pyi")
BODY = ast.parse(STUB.read_text()).body


def test_same_names():
    names = [node.name for node in BODY if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names += [node.target.id for node in BODY if isinstance(node, ast.AnnAssign)]
    assert {name for name in names if name[0] != "_"} == {name for name in dir(_native) if name[0] != "_"}


def test_same_parameters():
    for node in BODY:
        if isinstance(node, ast.FunctionDef):
            library = inspect.getdoc(getattr(_native, node.name)).splitlines()[0]  # "f(a: int, b: str) -> list"
            stub = [f"{a.arg}: {ast.unparse(a.annotation)}" for a in node.args.args]
            assert f"{node.name}({', '.join(stub)})" == re.sub(r"collections\.abc\.| -> .*", "", library)


def test_rows_have_these_fields():
    classes = {node.name: [field.target.id for field in node.body] for node in BODY if isinstance(node, ast.ClassDef)}
    assert classes == {
        "_Operand": list(_native.operands()[0]),
        "_Kernel": list(_native.kernels()[0]),
        "_BuildInfo": list(_native.build_info()),
    }


def test_typed():
    assert STUB.with_name("py.typed").exists()
