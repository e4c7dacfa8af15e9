"""The hash of `kernels.noise.reference` for other kernels: the same bits, element by element."""

import triton
import triton.language as tl


@triton.jit
def log_uniform(start, key):
    """log of a uniform number in (0, 1): what `Stem.log_uniform` gives for a stem's start and an int32 key."""
    x = start.to(tl.uint32, bitcast=True) + key.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    # 23 bits and a half are exact in float32
    return tl.log(((x >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07)
