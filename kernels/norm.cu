// Residual addition and RMSNorm in one pass (CUDA).
#include "device.cuh"
#include "pyruntime/params.h"

namespace pyruntime {
namespace {

constexpr int kThreads = 256;

// One block per row. The second pass reads back what this thread itself stored (or x, which is then in the cache).
template <typename T>
__global__ void __launch_bounds__(kThreads) norm_kernel(NormParams p) {
    wait_for_inputs();
    const std::int64_t row = block_idx();
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    const T* weight = static_cast<const T*>(p.weight);
    T* sum_out = static_cast<T*>(p.sum_out) + row * p.sum_out_stride;
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    const bool has_residual = p.residual != nullptr;

    float squares = 0.0f;
    for (std::int64_t column = thread_idx(); column < p.hidden; column += kThreads) {
        float state = to_float(load_input(x + column));
        if (has_residual) {
            const T rounded = from_float<T>(state + to_float(load_input(residual + column)));
            store(sum_out + column, rounded);
            state = to_float(rounded);
        }
        squares += state * state;
    }
    const float mean = block_sum(squares, reinterpret_cast<float*>(shared_memory())) / static_cast<float>(p.hidden);
    const float scale = 1.0f / sqrtf(mean + p.eps);
    const T* state = has_residual ? sum_out : x;
    for (std::int64_t column = thread_idx(); column < p.hidden; column += kThreads) {
        store(out + column, from_float<T>(to_float(load_input(state + column)) * scale * to_float(weight[column])));
    }
}

template <typename T>
int launch_norm(const NormParams& params, void* stream) {
    LaunchShape shape{};
    shape.blocks = static_cast<unsigned>(params.rows);
    shape.threads = kThreads;
    shape.shared_bytes = kThreads / kWarpSize * sizeof(float);
    return launch("norm", norm_kernel<T>, shape, params, stream);
}

}  // namespace
}  // namespace pyruntime

// plain C: returns a cudaError_t. params->rows fits in a grid and params->dtype is a Dtype: the bindings check both.
extern "C" int pyruntime_launch_norm(const pyruntime::NormParams* params, void* stream) {
    switch (params->dtype) {
        case pyruntime::kFloat32:
            return pyruntime::launch_norm<float>(*params, stream);
        case pyruntime::kFloat16:
            return pyruntime::launch_norm<pyruntime::Float16>(*params, stream);
        default:
            return pyruntime::launch_norm<pyruntime::Bfloat16>(*params, stream);
    }
}
