// Code that kernels and the host both run: the tests drive it on the CPU.
#pragma once

#ifdef __CUDACC__
#define RF_HOST_DEVICE __host__ __device__ __forceinline__
#define RF_UNROLL _Pragma("unroll")
#else
#define RF_HOST_DEVICE inline
#define RF_UNROLL
#endif
