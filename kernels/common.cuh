// What every CUDA kernel shares.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "pyruntime/params.h"

namespace pyruntime {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;

__device__ inline float to_float(float value) {
    return value;
}
__device__ inline float to_float(__half value) {
    return __half2float(value);
}
__device__ inline float to_float(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// sum over all threads of a block, the same value and the same order in every thread; blockDim.x is a multiple of 32
__device__ inline float block_sum(float value) {
    __shared__ float of_warp[kMaxWarps];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    if (lane == 0) {
        of_warp[warp] = value;
    }
    __syncthreads();
    float total = 0.0f;
    for (int idx = 0; idx < static_cast<int>(blockDim.x) / kWarpSize; ++idx) {
        total += of_warp[idx];
    }
    // a second call must not overwrite what a slower warp still reads
    __syncthreads();
    return total;
}

}  // namespace
}  // namespace pyruntime
