// Residual addition and RMSNorm in one pass (CUDA).
#include "common.cuh"

namespace pyruntime {
namespace {

constexpr int kThreads = 256;

// One block per row. The second pass reads back what this thread itself stored (or x, which is then in the cache).
template <typename T>
__global__ void __launch_bounds__(kThreads) norm_kernel(NormParams p) {
    const int64_t row = blockIdx.x;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    const T* weight = static_cast<const T*>(p.weight);
    T* sum_out = static_cast<T*>(p.sum_out) + row * p.sum_out_stride;
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    const bool has_residual = p.residual != nullptr;

    float squares = 0.0f;
    for (int64_t column = threadIdx.x; column < p.hidden; column += kThreads) {
        float state = to_float(x[column]);
        if (has_residual) {
            const T rounded = from_float<T>(state + to_float(residual[column]));
            sum_out[column] = rounded;
            state = to_float(rounded);
        }
        squares += state * state;
    }
    const float scale = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(p.hidden) + p.eps);
    const T* state = has_residual ? sum_out : x;
    for (int64_t column = threadIdx.x; column < p.hidden; column += kThreads) {
        out[column] = from_float<T>(to_float(state[column]) * scale * to_float(weight[column]));
    }
}

template <typename T>
cudaError_t launch(const NormParams& params, cudaStream_t stream) {
    norm_kernel<T><<<static_cast<unsigned>(params.rows), kThreads, 0, stream>>>(params);
    return cudaGetLastError();
}

}  // namespace
}  // namespace pyruntime

// plain C: returns a cudaError_t. params->rows fits in a grid and params->dtype is a Dtype: the bindings check both.
extern "C" int pyruntime_launch_norm(const pyruntime::NormParams* params, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    switch (params->dtype) {
        case pyruntime::kFloat32:
            return pyruntime::launch<float>(*params, on);
        case pyruntime::kFloat16:
            return pyruntime::launch<__half>(*params, on);
        case pyruntime::kBfloat16:
            return pyruntime::launch<__nv_bfloat16>(*params, on);
        default:
            return cudaErrorInvalidValue;
    }
}
