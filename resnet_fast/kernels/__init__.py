"""Triton kernels: @triton.jit functions only. They allocate nothing and know no tensor; launchers are in `backends`."""
