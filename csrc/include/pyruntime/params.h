// One plain struct per CUDA op: pointers, sizes, strides and the output. Kernels read these and nothing else.
// Only fixed-width types stand here, so that every compiled copy of a kernel sees the same layout.
#pragma once

#include <cstdint>

namespace pyruntime {

// h = x + residual, rounded to the element type; sum_out = h; out = h / sqrt(mean(h^2) + eps) * weight.
// `residual` and `sum_out` are null together: then it is a plain RMSNorm of x. Columns are contiguous; strides count
// elements.
struct NormParams {
    const void* x;
    const void* residual;
    const void* weight;
    void* sum_out;
    void* out;
    std::int64_t rows;
    std::int64_t hidden;
    std::int64_t x_stride;
    std::int64_t residual_stride;
    std::int64_t sum_out_stride;
    std::int64_t out_stride;
    float eps;
    std::int32_t dtype;  // kFloat32, kFloat16 or kBfloat16
};

enum Dtype : std::int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

}  // namespace pyruntime
