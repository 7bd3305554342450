"""The doctor, `python -m jax_flash`: what is installed, which kernel a call gets, and whether they are right here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash
from jax_flash import _ffi, _native, _validate, reference
from jax_flash import _kernels as _kernels_table


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    failed = False
    for title, lines in (
        ("Versions", _versions()),
        ("Devices", _devices()),
        ("Kernels built", _built()),
        (f"This call: {_describe(options)}", _kernels(options)),
        ("Precision, largest error against the float32 reference", _precision()),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")
            failed |= line.endswith("WRONG")
        print()
    if failed:
        print("The kernels are wrong on this machine: please report the above.")
    return int(failed)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jax_flash",
        description="Shows what is installed and built, which kernel a call gets, and checks the kernels' precision.",
    )
    parser.add_argument("--dtype", choices=_validate.DTYPES, default="bfloat16")
    for letter, default, what in (
        ("B", 2, "batch size"),
        ("T", 4096, "query length"),
        ("S", None, "key length (default: T)"),
        ("N", 16, "query heads"),
        ("K", None, "key and value heads (default: N)"),
        ("H", 128, "head dim"),
    ):
        parser.add_argument(
            f"-{letter}", type=int, default=default, help=what + (f" (default: {default})" if default else "")
        )
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"))
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--mask", action="store_true", help="with a boolean mask")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--gpu", metavar="CAPABILITY", help="ask for this GPU, such as 9.0, instead of the ones here")
    options = parser.parse_args(arguments)
    options.S = options.T if options.S is None else options.S
    options.K = options.N if options.K is None else options.K
    try:
        options.spec = _check(options)
        options.gpu = None if options.gpu is None else _capability(options.gpu)
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace):
    """The call's description, if `attention` would accept the call."""
    sizes = (options.B, options.T, options.N, options.H), (options.B, options.S, options.K, options.H)
    if min(min(size) for size in sizes) < 1:
        raise ValueError(f"sizes must be at least 1; got {_describe(options)}")
    q, k = (jax.ShapeDtypeStruct(size, options.dtype) for size in sizes)
    _validate.check_qkv("attention", q, k, k)
    window = tuple(options.window) if options.window else None
    return _validate.make_spec(
        "attention",
        options.H,
        causal=options.causal,
        window_size=window,
        softcap=options.softcap,
        deterministic=options.deterministic,
    )


def _capability(text: str) -> int:
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit() and len(minor) == 1):
        raise ValueError(f"--gpu must be a compute capability such as 9.0; got {text}")
    return 10 * int(major) + int(minor)


def _versions() -> Iterator[str]:
    yield f"jax_flash {jax_flash.__version__} (compiled {_native.build_info()['version']})"
    yield f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}, numpy {np.__version__}"
    yield f"Python {platform.python_version()}, {platform.platform()}"


def _devices() -> Iterator[str]:
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        kind = device.platform if capability is None else f"{device.platform}, compute capability {capability}"
        yield f"{device.id}: {device.device_kind} ({kind})"


def _built() -> Iterator[str]:
    info = _native.build_info()
    cpu, cuda = (", ".join(sorted(_kernels_table.dtypes("forward", cuda=cuda))) for cuda in (False, True))
    yield f"CPU: chosen here {info['cpu_instruction_set']}; {cpu}"
    if info["cuda_architectures"]:
        yield f"CUDA: {info['cuda_architectures']}; {cuda}"
    else:
        yield "CUDA: none (built without nvcc; see the README's install section)"


def _describe(options: argparse.Namespace) -> str:
    sizes = " ".join(f"{letter}={getattr(options, letter)}" for letter in "BTSNKH")
    switches = [name for name in ("causal", "mask", "deterministic") if getattr(options, name)]
    values = [
        f"{name}={getattr(options, name)}" for name in ("window", "softcap") if getattr(options, name) is not None
    ]
    return " ".join([options.dtype, sizes, *switches, *values])


def _kernels(options: argparse.Namespace) -> Iterator[str]:
    """Which kernel the call gets on the CPU, and on the GPUs here or the one asked for."""
    yield f"CPU: {_native.build_info()['cpu_instruction_set']}"
    here = {_capability(str(d.compute_capability)) for d in jax.devices() if hasattr(d, "compute_capability")}
    for capability in sorted(here) if options.gpu is None else [options.gpu]:
        names = [_kernel(direction, capability, options) for direction in ("forward", "backward")]
        yield f"GPU {capability / 10}: forward {names[0]}, backward {names[1]}"
    if options.gpu is None and not here:
        yield "GPU: none here (ask for one with --gpu 9.0)"


def _kernel(direction: str, capability: int, options: argparse.Namespace) -> str:
    name = _native.kernel_name(
        direction,
        capability,
        options.dtype,
        options.S,
        options.H,
        ["mask"] if options.mask else [],
        **{name: values.tolist() for name, values in _ffi.attributes(options.spec, ()).items()},
    )
    return name or "none"


def _precision() -> Iterator[str]:
    """A line for each backend and dtype that has kernels: errors of the output and of the three gradients."""
    backends = dict.fromkeys([jax.default_backend(), "cpu"])
    for backend in backends:
        if backend == "gpu" and not _native.build_info()["cuda_architectures"]:
            continue
        for dtype in _validate.DTYPES:
            if dtype in _kernels_table.dtypes("backward", cuda=backend == "gpu"):
                with jax.default_device(jax.local_devices(backend=backend)[0]):
                    yield f"{backend} {dtype}: {_measure(dtype)}"


def _measure(dtype: str) -> str:
    rng = np.random.default_rng(0)
    shapes = (2, 130, 4, 64), (2, 200, 2, 64), (2, 200, 2, 64), (2, 130, 4, 64)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))) for shape in shapes)

    def run(attend, dtype, **options):
        def both(q, k, v, d_out):
            out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, causal=True, **options), q, k, v)
            return out, *pull(d_out)

        return [np.asarray(x, np.float32) for x in jax.jit(both)(*(x.astype(dtype) for x in (q, k, v, d_out)))]

    ours = run(jax_flash.attention, dtype)
    exact = run(reference.attention, "float32")
    # The yardstick: the same formula computed plainly in the inputs' own dtype.
    plain = run(reference.attention, dtype, compute_dtype=dtype)
    right, shown = True, []
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        error, allowed = np.abs(a - b).max(), 3 * np.abs(c - b).max() + 1e-5 * np.abs(b).max()
        right &= bool(error <= allowed)
        shown.append(f"{name} {error:.1e}")
    return f"{', '.join(shown)}: {'ok' if right else 'WRONG'}"


if __name__ == "__main__":
    sys.exit(main())
