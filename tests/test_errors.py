"""Bad input: the right exception at call time, with what was wanted and what came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash


def arrays(q=(2, 8, 4, 64), k=(2, 12, 2, 64), v=None, dtype="bfloat16"):
    return [jnp.zeros(shape, dtype) for shape in (q, k, v or k)]


SHAPES = [
    (
        dict(v=(2, 11, 2, 64)),
        ValueError,
        r"share length S; got .*k bfloat16\(2, 12, 2, 64\), v bfloat16\(2, 11, 2, 64\)",
    ),
    (dict(v=(2, 12, 1, 64)), ValueError, "number of heads K"),
    (dict(k=(3, 12, 2, 64)), ValueError, "batch size B"),
    (dict(k=(2, 12, 3, 64)), ValueError, "N=4 must be a multiple .* K=3"),
    (dict(k=(2, 12, 0, 64)), ValueError, "N=4 must be a multiple .* K=0"),
    (dict(k=(2, 12, 2, 32)), ValueError, "q and k must share head dim H"),
    (dict(v=(2, 12, 2, 32)), NotImplementedError, r"Pad the smaller .* q and k, whose .* give the scale H\*\*-0\.5"),
    (dict(q=(2, 8, 4, 0), k=(2, 12, 2, 0)), ValueError, "at least 1"),
    (dict(q=(2, 8, 4, 257), k=(2, 12, 2, 257)), NotImplementedError, "at most 256"),
    (dict(k=(12, 2, 64)), ValueError, r"\(B, T, N, H\)"),
    (dict(q=(8, 64), k=(12, 64)), ValueError, r"\(B, T, N, H\)"),
    (dict(dtype="int32"), ValueError, r"bfloat16.*got q int32\(2, 8, 4, 64\)"),
    (dict(dtype="complex64"), ValueError, "complex64"),
    (dict(dtype="float8_e4m3fn"), NotImplementedError, "Cast"),
]


@pytest.mark.parametrize("shapes,error,message", SHAPES, ids=lambda x: str(x) if isinstance(x, dict) else "")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_shapes_and_dtypes(shapes, error, message, jit):
    attention = jax.jit(jax_flash.attention) if jit else jax_flash.attention
    with pytest.raises(error, match=message):
        attention(*arrays(**shapes))


def test_sequences_too_long():
    x = jax.ShapeDtypeStruct((1, 2**29 + 1, 1, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="tokens"):
        jax.eval_shape(jax_flash.attention, x, x, x)


def test_mixed_dtypes():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="one dtype; got q float16"):
        jax_flash.attention(q.astype("float16"), k, v)


@pytest.mark.parametrize("q", [None, 1.0, [[1.0]], "q"], ids=repr)
def test_not_an_array(q):
    with pytest.raises(ValueError, match=f"q must be a JAX or NumPy array; got {type(q).__name__}"):
        jax_flash.attention(q, *arrays()[1:])


OPTIONS = [
    (dict(softmax_scale=1e39), ValueError, "softmax_scale must be finite in float32"),
    (dict(softmax_scale=float("nan")), ValueError, "finite"),
    (dict(softmax_scale="1"), ValueError, "must be a number"),
    (dict(softcap=-1.0), ValueError, "softcap must be positive"),
    (dict(softcap=1e-39), ValueError, "softcap must be positive and at least"),
    (dict(softcap=1e39), ValueError, "softcap must be finite in float32"),
    (dict(softcap=True), ValueError, "must be a number"),
    (dict(return_softmax_lse="False"), ValueError, "return_softmax_lse must be True or False"),
    (dict(causal=1), ValueError, "causal must be True or False; got 1"),
    (dict(causal=None), ValueError, "causal"),
    (dict(deterministic="yes"), ValueError, "deterministic"),
    (dict(window_size=-2), ValueError, r"None or -1 for no limit; got -2"),
    (dict(window_size=(1, -3)), ValueError, "window_size"),
    (dict(window_size=(1, 2, 3)), ValueError, "window_size"),
    (dict(window_size=(1.5, 2)), ValueError, "window_size"),
    (dict(mask=jnp.zeros((2, 4, 8, 12))), ValueError, "mask must be boolean"),
    (dict(mask=jnp.zeros((2, 4, 8, 11), bool)), ValueError, r"broadcast to \(B, N, T, S\) = \(2, 4, 8, 12\)"),
    (dict(mask=jnp.zeros((2, 2, 8, 12), bool)), ValueError, "mask must broadcast"),
    (dict(mask=jnp.zeros((1, 2, 4, 8, 12), bool)), ValueError, "mask must broadcast"),
    (dict(mask=[[True]]), ValueError, "mask must be a JAX"),
    (dict(kv_lengths=jnp.zeros((3,), jnp.int32)), ValueError, r"kv_lengths must have shape \(B,\) = \(2,\)"),
    (dict(kv_lengths=jnp.zeros((2,))), ValueError, "kv_lengths must be integers; got float32"),
    (dict(q_lengths=jnp.zeros((2,), bool)), ValueError, "q_lengths must be integers"),
    (dict(q_lengths=3), ValueError, "q_lengths must be a JAX"),
]


@pytest.mark.parametrize("options,error,message", OPTIONS, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        jax_flash.attention(*arrays(), **options)


def test_a_traced_scale_is_refused():
    with pytest.raises(NotImplementedError, match=r"multiply q by it, and give softmax_scale=1\.0"):
        jax.jit(lambda scale: jax_flash.attention(*arrays(), softmax_scale=scale))(2.0)


def test_numpy_numbers_are_numbers():
    q, k, v = arrays()
    out = jax_flash.attention(
        q, k, v, softmax_scale=np.float32(0.1), window_size=(np.int64(3), None), causal=np.bool_(True)
    )
    assert out.shape == q.shape


def test_unknown_arguments():
    with pytest.raises(TypeError, match="unexpected keyword"):
        jax_flash.attention(*arrays(), scale=1.0)


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        jax_flash.attention(*arrays(), None, 1.0)


def test_float32_on_a_gpu_is_refused(platform):
    if platform != "gpu":
        pytest.skip("no GPU here")
    with pytest.raises(NotImplementedError, match=r"float32 has no CUDA kernel; got q float32\(.*Cast"):
        jax_flash.attention(*arrays(dtype="float32"))


def test_devices_that_differ():
    cpus = jax.devices("cpu")
    q, k, v = (jax.device_put(x, device) for x, device in zip(arrays(dtype="float32"), cpus, strict=False))
    with pytest.raises(ValueError, match="incompatible devices"):
        jax_flash.attention(q, k, v)
