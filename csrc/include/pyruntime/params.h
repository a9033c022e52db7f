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

// kNone is for plain products
enum Activation : std::int32_t { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4, kRelu2 = 5 };

// What becomes of the columns of a product that are heads: the first num_heads are queries and go to `out`, as many as
// num_kv_heads keys and then values go to the place of their row in a paged cache. Queries and keys are rotated.
struct HeadParams {
    const std::int32_t* positions;   // [rows]
    const std::int32_t* sequences;   // [rows], which line of the page table is a row's
    const std::int32_t* page_table;  // [sequences, page_stride]
    const float* cos;                // [positions, rope_dim / 2], null where rope_dim is 0
    const float* sin;
    void* keys;    // [pages, page_size, num_kv_heads, head_dim] in the weights' dtype
    void* values;  // as keys
    std::int64_t page_stride;
    std::int32_t page_size;
    std::int32_t num_heads;
    std::int32_t num_kv_heads;
    std::int32_t head_dim;  // 0: the columns are no heads
    std::int32_t rope_dim;
};

// y = W (x * gain) / sqrt(mean(x^2) + eps) + bias, the norm only where `norm` is not 0. Then out = y, or, `gated`,
// out = act(first half of y) * second half; or act(y); softcap * tanh(y / softcap); plus the residual; or heads.
// Columns are contiguous; strides count elements. `out` may be `residual`.
struct ProductParams {
    const void* x;            // [rows, inputs] in x_dtype
    const float* gain;        // [inputs], null: ones
    const void* weight;       // [outputs, inputs] in dtype
    const float* bias;        // [outputs] or null
    const float* residual;    // [rows, outputs] or null
    void* out;                // [rows, outputs; gated: outputs / 2; heads: those of queries] in out_dtype
    float* partials;          // product_partials() of schedule.h floats, null without splits
    float* squares;           // [columns, splits, rows], null without splits
    std::uint32_t* counters;  // a zero for each column, left zero; null without splits
    std::int64_t x_stride;
    std::int64_t residual_stride;
    std::int64_t out_stride;
    std::int32_t rows;
    std::int32_t inputs;
    std::int32_t outputs;
    std::int32_t columns;  // blocks over the outputs
    std::int32_t splits;   // blocks over the inputs
    std::int32_t dtype;    // kFloat16 or kBfloat16
    std::int32_t x_dtype;  // kFloat32 or dtype
    std::int32_t out_dtype;
    std::int32_t norm;
    std::int32_t gated;
    std::int32_t activation;
    std::int32_t early;  // whether it may start before the kernel in front has ended
    float eps;
    float softcap;  // 0: none
    HeadParams heads;
};

}  // namespace pyruntime
