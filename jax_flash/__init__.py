"""Fused attention for JAX, on CPUs and NVIDIA GPUs."""

from jax_flash import cache, reference, ring, rotary
from jax_flash._attention import attention
from jax_flash._jax_nn import dot_product_attention
from jax_flash._varlen import attention_varlen
from jax_flash.kvcache import flash_attn_with_kvcache
from jax_flash.ring import ring_attention

__all__ = [
    "attention",
    "attention_varlen",
    "cache",
    "dot_product_attention",
    "flash_attn_with_kvcache",
    "reference",
    "ring",
    "ring_attention",
    "rotary",
]
__version__ = "0.1.0"
