"""Attention for Flax models: layers for flax.linen and flax.nnx, and `attention_fn` for Flax's own attention layers.

This subpackage is the only part of jax_flash that imports Flax.
"""

from jax_flash.flax import linen, nnx
from jax_flash.flax._attention_fn import attention_fn
from jax_flash.flax._multi_head import AxisNames

__all__ = ["AxisNames", "attention_fn", "linen", "nnx"]
