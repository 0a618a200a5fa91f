"""A frozen network as one call on a CPU with AMX: `network.AmxNetwork`, its `weights`, and the `program` that it runs.

Every convolution is a sum of AMX tile products with bias, residual and ReLU in the tile, on activations in blocks of 32
channels (csrc/cpu/amx/amx.h); in bfloat16, where a CPU has no AMX, of AVX-512's dot products. bfloat16 is what AMX
multiplies. float32 is as exact as PyTorch's own: a value is the sum of three bfloat16s, and of the nine products of two
such sums the six that float32 can tell from zero are computed (Henry et al. 2019, arXiv:1904.06376), on tiles fifteen
times as fast as float32's multiply-adds. Inf becomes NaN there.
"""
