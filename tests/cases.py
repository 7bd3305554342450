"""The one list of situations that forward, gradient, transform and backend tests share: a new one is a new line."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

BF16, F16, F32 = "bfloat16", "float16", "float32"
_SHORT = {BF16: "bf16", F16: "f16", F32: "f32"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `mask` is the shape of a random boolean mask; a length may pass T or S, or be negative."""

    dtype: str = BF16
    B: int = 2
    T: int = 113
    S: int = 203
    N: int = 4
    K: int = 2
    H: int = 64
    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    mask: tuple[int, ...] | None = None
    q_lengths: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    segments: int | None = None  # ids from -1, which is none, to this, in any order
    sinks: float | None = None  # their scale; they are of either sign

    @property
    def id(self) -> str:
        sizes = "-".join(f"{letter}{getattr(self, letter)}" for letter in "BTSNKH")
        features = ["causal"] if self.causal else []
        for name in ("window", "softcap", "scale", "mask", "q_lengths", "kv_lengths", "segments", "sinks"):
            if (value := getattr(self, name)) is not None:
                features.append(name + (str(value).strip("()").replace(", ", "_").replace(",", "")))
        return "-".join([_SHORT[self.dtype], sizes, *features])

    def options(self) -> dict:
        return dict(causal=self.causal, window_size=self.window, softcap=self.softcap, softmax_scale=self.scale)

    def arrays(self, seed: int = 0) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """({q, k, v}, {mask, lengths, segment ids, sinks as far as the case has them})."""
        # NumPy's generator: jax.random compiles a program for every new shape, which takes longer than the test.
        rng = np.random.default_rng(seed)
        shapes = {"q": (self.B, self.T, self.N, self.H)} | dict.fromkeys("kv", (self.B, self.S, self.K, self.H))
        qkv = {name: _normal(rng, shape, self.dtype) for name, shape in shapes.items()}
        extras = {n: jnp.array(getattr(self, n), jnp.int32) for n in ("q_lengths", "kv_lengths") if getattr(self, n)}
        if self.mask is not None:
            extras["mask"] = jnp.asarray(rng.random(self.mask) < 0.7)
        if self.segments is not None:
            for name, size in (("q_segment_ids", self.T), ("kv_segment_ids", self.S)):
                extras[name] = jnp.asarray(rng.integers(-1, self.segments + 1, (self.B, size)), jnp.int32)
        if self.sinks is not None:
            extras["sinks"] = self.sinks * _normal(rng, (self.N,), F32)
        return qkv, extras

    def cotangents(self, seed: int = 1) -> tuple[jax.Array, jax.Array]:
        """Of the output and of the log-sum-exp."""
        rng = np.random.default_rng(seed)
        return _normal(rng, (self.B, self.T, self.N, self.H), self.dtype), _normal(rng, (self.B, self.N, self.T), F32)


def _normal(rng, shape, dtype) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)))


HEAD_DIMS = (1, 8, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = (
    (1, 239), (3, 799), (127, 512), (128, 217), (108, 256), (256, 512), (512, 256),
    (1023, 1024), (1024, 1023), (1, 1), (239, 1), (799, 3),
)  # fmt: skip
HEADS = ((4, 4), (6, 2), (8, 1), (3, 1))

_FEATURES = (
    dict(window=(20, 0)),
    dict(window=17),
    dict(window=(None, 5)),
    dict(window=(9, None)),
    dict(window=(70, 300), causal=True),
    dict(window=(0, 0), T=130, S=130),
    dict(window=(3, 4), T=300, S=20),
    dict(softcap=2.0, scale=0.3),
    dict(softcap=20.0, causal=True, H=128),
    dict(scale=1.0),
    dict(mask=(2, 4, 113, 203)),
    dict(mask=(1, 1, 113, 203), causal=True),
    dict(mask=(2, 1, 1, 203), N=4, K=4),
    dict(mask=(4, 113, 203), K=1),
    dict(mask=(2, 1, 113, 1)),
    dict(mask=(203,), H=128),
    dict(mask=(2, 4, 1, 33), T=1, S=33),
    dict(kv_lengths=(203, 0)),
    dict(kv_lengths=(1, 130), causal=True),
    dict(kv_lengths=(-4, 500)),
    dict(q_lengths=(113, 64), kv_lengths=(100, 3), causal=True),
    dict(q_lengths=(0, 77)),
    dict(q_lengths=(5, 113), kv_lengths=(203, 77), window=(30, 2), softcap=5.0),
    dict(q_lengths=(90, 2), mask=(2, 4, 113, 203), causal=True, H=96),
    dict(T=1, S=300, kv_lengths=(299, 13), causal=True, N=8, K=2, H=128),
    dict(segments=3),
    dict(segments=2, causal=True, window=(40, None), H=128),
    dict(segments=1, q_lengths=(90, 2), kv_lengths=(203, 77), window=(60, 30), softcap=5.0),
    dict(segments=2, mask=(2, 1, 113, 203), causal=True, sinks=1.0),
    dict(segments=0, mask=(4, 1, 203), T=200, S=203, N=4, K=4),
    dict(sinks=2.0, causal=True),
    dict(sinks=30.0, H=128),
    dict(sinks=1.0, window=(9, None), softcap=5.0, q_lengths=(90, 2), kv_lengths=(203, 0)),
    dict(sinks=1.0, mask=(2, 4, 113, 203), T=113, S=203, H=96),
)


def _grid() -> list[Case]:
    cases = []
    for at, H in enumerate(HEAD_DIMS):
        cases += [Case(dtype=d, H=H, causal=bool((at + i) % 2)) for i, d in enumerate((BF16, F16, F32))]
    for at, (T, S) in enumerate(LENGTHS):
        for i, dtype in enumerate((BF16, F32)):
            cases.append(Case(dtype, 1, T, S, N=2, K=1, H=(64, 128)[at % 2], causal=bool((at + i) % 2)))
    for at, (N, K) in enumerate(HEADS):
        cases += [Case(dtype=d, N=N, K=K, causal=bool((at + i) % 2)) for i, d in enumerate((F16, F32))]
    for at, feature in enumerate(_FEATURES):
        cases += [Case(dtype=d, **feature) for d in ((BF16, F32) if at % 2 else (F16, F32))]
    return cases


CASES = _grid()
# A few that stand for all, for tests that do something costly with each.
FEW = [
    Case(dtype=F32, T=33, S=47, H=40, causal=True),
    Case(dtype=BF16, T=130, S=70, window=(20, 10), softcap=5.0, kv_lengths=(70, 50)),
    Case(dtype=F16, T=65, S=129, H=128, mask=(2, 4, 65, 129), q_lengths=(65, 30)),
]
