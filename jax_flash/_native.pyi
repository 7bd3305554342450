"""The signatures of csrc/ffi/module.cc."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

class _Operand(TypedDict):
    name: str
    axes: str
    memory: str
    type: str
    gradient: str  # "" where it has none
    roles: Mapping[str, Literal["", "required", "optional", "updated", "result"]]

class _Kernel(TypedDict):
    name: str
    call: Literal["forward", "backward", "kvcache"]
    first_capability: int  # 10 * major + minor; 0: the CPU
    last_capability: int
    dtypes: list[str]
    head_dim_multiple: int
    most_head_dim: int
    supports: list[str]

class _BuildInfo(TypedDict):
    version: str
    cpu_instruction_set: str
    cuda_architectures: str  # "" without CUDA kernels

UNBOUNDED: int
FORWARD_WORKSPACE: int  # bytes
OPTIONS: tuple[str, ...]
SCORE: tuple[str, ...]
FEATURES: tuple[str, ...]

def registrations() -> dict[str, dict[str, object]]: ...
def build_info() -> _BuildInfo: ...
def operands() -> list[_Operand]: ...
def kernels() -> list[_Kernel]: ...
def kernel_name(
    call: str,
    capability: int,
    dtype: str,
    S: int,
    H: int,
    operands: Sequence[str],
    options: Sequence[int],
    score: Sequence[float],
) -> str: ...
def plan_kvcache(
    T: int,
    G: int,
    H: int,
    rotary: bool,
    pages: bool,
    batch_index: bool,
    leftpad: bool,
    num_splits: int,
    positions: int,
) -> tuple[int, bool, int, int, int]: ...
def backward_workspace(H: int) -> tuple[int, int, int, int]: ...
