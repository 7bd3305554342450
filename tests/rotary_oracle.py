"""The angles of jax_flash.rotary, one frequency at a time."""

from __future__ import annotations

import math

import numpy as np

from jax_flash.rotary import Linear, Llama3


def angles(rotary, positions, head_dim):
    """In float64, from the definitions, one frequency at a time."""
    dim = rotary.rotary_dim or head_dim
    frequencies = []
    for i in range(dim // 2):
        frequency = rotary.base ** (-2 * i / dim)
        if isinstance(rotary.scaling, Linear):
            frequency /= rotary.scaling.factor
        elif isinstance(rotary.scaling, Llama3):
            s = rotary.scaling
            wavelength, context = 2 * math.pi / frequency, s.original_max_position_embeddings
            if wavelength > context / s.low_freq_factor:
                frequency /= s.factor
            elif wavelength > context / s.high_freq_factor:
                ramp = (context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                frequency *= ramp + (1 - ramp) / s.factor
        frequencies.append(frequency)
    return np.asarray(positions, np.float64)[..., None] * np.array(frequencies)
