// The hardware primitives of every CUDA kernel, in one place. nvcc compiles them to the GPU's instructions; any other
// compiler gets the same names from twin.h, which runs the same kernels thread by thread on the CPU, for tests.
//
// Rules the twin relies on, and checks where it can: kernels use no static __shared__ memory; they read what another
// kernel may have written through load_input* or copy_async_input, and write through store*, both below
// wait_for_inputs(); shuffles, matrix fragments and barriers are reached by all 32 lanes, respectively all threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pyruntime {

// 16 bytes: what one thread loads, copies or stores at once
struct alignas(16) Words {
    std::uint32_t word[4];
};
struct Pair {
    float low;
    float high;
};

// `early`: may start before the kernel in front has ended (sm_90 and above); `cooperative`: all blocks run at once
struct LaunchShape {
    unsigned blocks;
    unsigned threads;
    std::size_t shared_bytes = 0;
    bool early = false;
    bool cooperative = false;
    unsigned blocks_y = 1;
    unsigned blocks_z = 1;
};

}  // namespace pyruntime

#if defined(__CUDACC__)
#include "hardware.cuh"
#else
#include "twin.h"
#endif

namespace pyruntime {

constexpr int kWarpSize = 32;

__device__ inline int lane_idx() {
    return thread_idx() % kWarpSize;
}
__device__ inline int warp_idx() {
    return thread_idx() / kWarpSize;
}

__device__ inline float as_float(std::uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// sum over the lanes of a warp, the same value in every lane
__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        value += shuffle_xor(value, offset);
    }
    return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, shuffle_xor(value, offset));
    }
    return value;
}

// Sum over all threads of a block, the same value and the same order in every thread. `of_warp` is shared memory for
// one float a warp, which may be used again after the call.
__device__ inline float block_sum(float value, float* of_warp) {
    value = warp_sum(value);
    if (lane_idx() == 0) {
        of_warp[warp_idx()] = value;
    }
    sync_threads();
    float total = 0.0f;
    for (int warp = 0; warp < num_threads() / kWarpSize; ++warp) {
        total += of_warp[warp];
    }
    // whoever uses `of_warp` next must not overwrite what a slower warp still reads
    sync_threads();
    return total;
}

// Whether this block is the last of `num_parts` to come to `counter`, the same answer in all its threads. What the
// other blocks stored before they came is then visible (read it with load_l2*), and the counter is zero again.
// `flag` is shared memory that nothing else uses until the next barrier behind the call.
__device__ inline bool is_last_arrival(std::uint32_t* counter, std::uint32_t num_parts, std::uint32_t* flag) {
    sync_threads();
    if (thread_idx() == 0) {
        const bool last = atomic_add_acq_rel(counter, 1u) + 1u == num_parts;
        if (last) {
            store(counter, 0u);
        }
        *flag = last ? 1u : 0u;
    }
    sync_threads();
    return *flag != 0u;
}

// A barrier of all blocks of a cooperative launch. `counters` are two zeros in global memory; finish() leaves zeros.
struct GridBarrier {
    std::uint32_t* counters;
    std::uint32_t goal = 0;

    // what any thread stored before is visible to every thread behind
    __device__ void sync() {
        goal += static_cast<std::uint32_t>(num_blocks());
        sync_threads();
        if (thread_idx() == 0) {
            atomic_add_acq_rel(counters, 1u);
            while (load_acquire(counters) < goal) {
            }
        }
        sync_threads();
    }

    // the last thing a block does
    __device__ void finish() {
        const auto all = static_cast<std::uint32_t>(num_blocks());
        if (thread_idx() == 0 && atomic_add_acq_rel(counters + 1, 1u) + 1u == all) {
            store(counters, 0u);
            store(counters + 1, 0u);
        }
    }
};

}  // namespace pyruntime
