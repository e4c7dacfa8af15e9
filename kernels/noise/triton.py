"""The hash of `kernels.noise.reference` for other kernels: the same bits, element by element."""

import triton
import triton.language as tl


@triton.jit
def uniform(start, key):
    """A number in (0, 1): what `kernels.uniform` gives for the keys of a stem's start and one more, int32."""
    x = start.to(tl.uint32, bitcast=True) + key.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    # 23 bits and a half are exact in float32
    return ((x >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def log_uniform(start, key):
    """Its log, which `Stem.log_uniform` gives; the last bit may differ."""
    return tl.log(uniform(start, key))
