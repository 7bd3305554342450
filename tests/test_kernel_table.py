"""The table of kernels: the README shows it, every feature has a name, and calls get the kernels they should."""

import pathlib
import re

import pytest

from jax_flash import _ffi, _native
from jax_flash._spec import Band, Spec

ROOT = pathlib.Path(__file__).parent.parent
KERNELS = _native.kernels()


def matrix() -> str:
    """The table as the README has it: a column for each kernel of each call."""

    def row(name, cell):
        return f"| {name} | " + " | ".join(cell(kernel) for kernel in KERNELS) + " |"

    def capability(kernel):
        first, last = kernel["first_capability"], kernel["last_capability"]
        return "CPU" if not first else f"{first / 10}" if first == last else f"{first / 10} and newer"

    def head_dims(kernel):
        multiple = kernel["head_dim_multiple"]
        return (
            f"1 to {kernel['most_head_dim']}"
            if multiple == 1
            else f"multiples of {multiple} to " + str(kernel["most_head_dim"])
        )

    def takes(feature):
        def cell(kernel):
            others = (other for other in KERNELS if other["call"] == kernel["call"])
            if not any(feature in other["supports"] for other in others):
                return ""
            return "yes" if feature in kernel["supports"] else "no"

        return cell

    return "\n".join(
        [
            row("call", lambda kernel: kernel["call"]),
            "|---" * (len(KERNELS) + 1) + "|",
            row("kernel", lambda kernel: kernel["name"]),
            row("compute capability", capability),
            row("dtypes", lambda kernel: ", ".join(kernel["dtypes"])),
            row("head dim", head_dims),
            *(row(feature, takes(feature)) for feature in _native.FEATURES),
        ]
    )


def test_readme_has_the_table():
    expected = matrix()
    assert expected in (ROOT / "README.md").read_text(), f"README.md must have:\n\n{expected}\n"


def test_every_bit_has_a_name_and_a_kernel():
    bits = [int(bit) for bit in re.findall(r"kNeeds\w+ = 1 << (\d+)", (ROOT / "csrc/needs.h").read_text())]
    assert bits == list(range(len(_native.FEATURES)))
    assert len(set(_native.FEATURES)) == len(bits)
    assert {feature for kernel in KERNELS for feature in kernel["supports"]} == set(_native.FEATURES)


def kernel_name(call="forward", capability=90, dtype="bfloat16", S=4096, H=128, operands=(), spec=None):
    attributes = _ffi.attributes(spec or Spec(H**-0.5), operands)
    lists = {name: values.tolist() for name, values in attributes.items()}
    return _native.kernel_name(call, capability, dtype, S, H, list(operands), **lists)


MOST_ORDERED_KEYS = 128 * 65534
EVERY_SIDE = Spec(0.1, softcap=30.0, band=Band(5, 0, top_left=True))


@pytest.mark.parametrize(
    "call,wanted",
    [
        (dict(), "sm90"),
        (dict(dtype="float16", H=64, spec=EVERY_SIDE, operands=["q_lengths", "kv_lengths", "diagonal"]), "sm90"),
        (dict(operands=["key_ranges"]), "sm90"),
        (dict(operands=["mask"]), "sm80"),
        (dict(H=100), "sm80"),
        (dict(capability=80), "sm80"),
        (dict(capability=120), "sm80"),
        (dict(capability=75), ""),
        (dict(H=257), ""),
        (dict(dtype="float32"), ""),
        (dict(dtype="float32", capability=0, operands=["mask"], H=1), "cpu"),
        (dict(call="backward", spec=EVERY_SIDE, operands=["dlse"]), "sm90"),
        (dict(call="backward", operands=["key_ranges", "query_ranges"]), "sm90"),
        (dict(call="backward", operands=["mask"]), "sm80"),
        (dict(call="backward", S=MOST_ORDERED_KEYS, spec=Spec(0.1, deterministic=True)), "sm90"),
        (dict(call="backward", S=MOST_ORDERED_KEYS + 1, spec=Spec(0.1, deterministic=True)), "sm80"),
        (dict(call="backward", S=MOST_ORDERED_KEYS + 1), "sm90"),
        (dict(call="backward", capability=0), "cpu"),
    ],
    ids=lambda x: "-".join(f"{name}={value}" for name, value in x.items()) if isinstance(x, dict) else x or "none",
)
def test_kernel_of_a_call(call, wanted):
    assert kernel_name(**call) == wanted


def test_unknown_calls_are_errors():
    with pytest.raises(ValueError, match="forward or backward"):
        kernel_name(call="kvcache")
    with pytest.raises(ValueError, match="unsupported dtype float64"):
        kernel_name(dtype="float64")
