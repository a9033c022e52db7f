// A run of MLPs in one cooperative launch, for up to 4 rows (CUDA).
//
// All blocks run at once and meet at a barrier after each phase (mlp_chain_schedule.h): gate and up leave the hidden
// values in global memory, down adds to the stream. Sums are taken in an order that depends on nothing but the sizes.
#include "activation.cuh"
#include "device.cuh"
#include "mlp_chain_schedule.h"
#include "pyruntime/mlp_chain_params.h"
#include "pyruntime/params.h"

namespace pyruntime {
namespace {

// words of weights that a thread has on their way: 16 warps of 8 are 64 KiB
constexpr int kWordsUnderWay = 8;

// The parts of a block's shared memory.
template <typename T>
struct Memory {
    T* inputs;
    float* sums;
    float* stream;
    float* squares;

    __device__ explicit Memory(const MlpChainParams& p)
        : inputs(reinterpret_cast<T*>(shared_memory())),
          sums(reinterpret_cast<float*>(shared_memory() + p.sums_at)),
          stream(reinterpret_cast<float*>(shared_memory() + p.stream_at)),
          squares(reinterpret_cast<float*>(shared_memory() + p.squares_at)) {}
};

// The weights of a phase as a block sees them: its units, and the rows of unit u: u * rows + i, or, where they are
// halves, u + i * num_units.
struct Weights {
    const void* matrix;
    int inputs;
    int num_units;
    int rows;  // of a unit
    bool halves;
    int slice_bits;

    __device__ Units own() const { return chain_units(num_units, num_blocks(), block_idx()); }
    __device__ std::int64_t row(int unit, int idx) const {
        const std::int64_t from = unit;
        return halves ? from + static_cast<std::int64_t>(idx) * num_units : from * rows + idx;
    }

    // brings the first of this block's weights into L2, `bytes` of them
    __device__ void prefetch(std::int64_t bytes) const {
        constexpr int kLine = 128;
        const Units units = own();
        const int pieces = halves ? rows : 1;
        const std::int64_t row_bytes = static_cast<std::int64_t>(inputs) * 2;
        const std::int64_t own_bytes = (units.end - units.begin) * row_bytes * rows / pieces;
        const std::int64_t most = smaller(bytes / pieces, own_bytes);
        for (int piece = 0; piece < pieces; ++piece) {
            const auto* from = static_cast<const unsigned char*>(matrix) + row(units.begin, piece) * row_bytes;
#pragma unroll 1
            for (std::int64_t at = std::int64_t{kLine} * thread_idx(); at < most; at += kLine * kChainThreads) {
                prefetch_l2(from + at);
            }
        }
    }
};

__device__ inline Weights inner_of(const MlpChainParams& p, int layer) {
    const MlpChainLayer& own = p.layers[layer];
    return {own.gate_up, p.width, own.hidden, 2, true, own.inner_slice_bits};
}

template <int kRows>
__device__ inline Weights outer_of(const MlpChainParams& p, int layer) {
    const MlpChainLayer& own = p.layers[layer];
    constexpr int kDownRows = chain_down_rows(kRows);
    return {own.down, own.hidden, p.width / kDownRows, kDownRows, false, own.outer_slice_bits};
}

template <typename T>
__device__ inline void add_products(Words weights, Words inputs, float& sum) {
#pragma unroll
    for (int idx = 0; idx < 4; ++idx) {
        const Pair weight = unpack<T>(weights.word[idx]);
        const Pair input = unpack<T>(inputs.word[idx]);
        sum += weight.low * input.low;
        sum += weight.high * input.high;
    }
}

// One warp: some words of kUnit rows of weights times those of kRows rows of inputs, the same sums in every lane.
template <typename T, int kRows, int kUnit>
__device__ void multiply(const T* const (&rows)[kUnit], const T* inputs, int num_inputs, Units words,
                         float (&sums)[kUnit][kRows]) {
    constexpr int kUnroll = kWordsUnderWay / kUnit;
    for (int first = words.begin + lane_idx(); first < words.end; first += kUnroll * kWarpSize) {
        Words weights[kUnroll][kUnit];
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            const int word = first + step * kWarpSize;
#pragma unroll
            for (int idx = 0; idx < kUnit; ++idx) {
                weights[step][idx] = word < words.end ? load_weights_16(rows[idx] + word * kChainWord) : Words{};
            }
        }
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            const int word = first + step * kWarpSize;
            if (word >= words.end) {
                break;
            }
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                const Words input = load_16(inputs + row * num_inputs + word * kChainWord);
#pragma unroll
                for (int idx = 0; idx < kUnit; ++idx) {
                    add_products<T>(weights[step][idx], input, sums[idx][row]);
                }
            }
        }
    }
#pragma unroll
    for (int idx = 0; idx < kUnit; ++idx) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            sums[idx][row] = warp_sum(sums[idx][row]);
        }
    }
}

// All jobs of the block: the sums of job j at [j, kUnit, kRows].
template <typename T, int kRows, int kUnit>
__device__ void multiply_units(const Weights& weights, const Memory<T>& memory) {
    const Units units = weights.own();
    const int num_jobs = (units.end - units.begin) << weights.slice_bits;
    for (int job = warp_idx(); job < num_jobs; job += kChainWarps) {
        const int slice = job & ((1 << weights.slice_bits) - 1);
        const int unit = units.begin + (job >> weights.slice_bits);
        const T* rows[kUnit];
#pragma unroll
        for (int idx = 0; idx < kUnit; ++idx) {
            rows[idx] = static_cast<const T*>(weights.matrix) + weights.row(unit, idx) * weights.inputs;
        }
        float sums[kUnit][kRows] = {};
        const Units words = chain_slice(weights.inputs / kChainWord, weights.slice_bits, slice);
        multiply<T, kRows, kUnit>(rows, memory.inputs, weights.inputs, words, sums);
        if (lane_idx() == 0) {
#pragma unroll
            for (int idx = 0; idx < kUnit * kRows; ++idx) {
                memory.sums[job * kUnit * kRows + idx] = sums[idx / kRows][idx % kRows];
            }
        }
    }
}

// of all slices of a unit, the block's own unit number `unit`
template <int kRows, int kUnit>
__device__ float sum_of_slices(const float* sums, int slice_bits, int unit, int idx, int row) {
    float sum = 0.0f;
    for (int slice = 0; slice < 1 << slice_bits; ++slice) {
        sum += sums[(((unit << slice_bits) + slice) * kUnit + idx) * kRows + row];
    }
    return sum;
}

__device__ inline void load_eight(const float* from, float (&to)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Words words = load_input_16(from + 4 * half);
#pragma unroll
        for (int idx = 0; idx < 4; ++idx) {
            to[4 * half + idx] = as_float(words.word[idx]);
        }
    }
}

// 1 / sqrt(mean of squares + eps) of each row
template <typename T, int kRows>
__device__ void norm_scales(const MlpChainParams& p, const float* x, std::int64_t stride, float eps,
                            const Memory<T>& memory, float (&scales)[kRows]) {
    float squares[kRows] = {};
    for (int at = thread_idx() * kChainWord; at < p.width; at += kChainThreads * kChainWord) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            float own[kChainWord];
            load_eight(x + row * stride + at, own);
#pragma unroll
            for (int idx = 0; idx < kChainWord; ++idx) {
                squares[row] += own[idx] * own[idx];
            }
        }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const float sum = warp_sum(squares[row]);
        if (lane_idx() == 0) {
            memory.squares[row * kChainWarps + warp_idx()] = sum;
        }
    }
    sync_threads();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        float sum = 0.0f;
        for (int warp = 0; warp < kChainWarps; ++warp) {
            sum += memory.squares[row * kChainWarps + warp];
        }
        scales[row] = 1.0f / sqrtf(sum / static_cast<float>(p.width) + eps);
    }
}

// the stream, normed, as inputs of gate and up
template <typename T, int kRows>
__device__ void stage_stream(const MlpChainParams& p, const float* x, std::int64_t stride, const MlpChainLayer& layer,
                             const Memory<T>& memory) {
    float scales[kRows];
    if (layer.norm != 0) {
        norm_scales<T, kRows>(p, x, stride, layer.eps, memory, scales);
    } else {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            scales[row] = 1.0f;
        }
    }
    for (int at = thread_idx() * kChainWord; at < p.width; at += kChainThreads * kChainWord) {
        float gain[kChainWord] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
        if (layer.gain != nullptr) {
            load_eight(layer.gain + at, gain);
        }
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            float own[kChainWord];
            load_eight(x + row * stride + at, own);
#pragma unroll
            for (int idx = 0; idx < kChainWord; ++idx) {
                own[idx] *= scales[row] * gain[idx];
            }
            const Words words{
                {pack<T>(own[0], own[1]), pack<T>(own[2], own[3]), pack<T>(own[4], own[5]), pack<T>(own[6], own[7])}};
            store_16(memory.inputs + row * p.width + at, words);
        }
    }
    sync_threads();
}

// activation(gate) * up of the block's units into global memory
template <typename T, int kRows>
__device__ void store_hidden(const MlpChainParams& p, const MlpChainLayer& layer, const Weights& weights,
                             const Memory<T>& memory) {
    const Units units = weights.own();
    const int count = units.end - units.begin;
    for (int idx = thread_idx(); idx < kRows * count; idx += kChainThreads) {
        const int row = idx / count;
        const int unit = idx % count;
        float gate = sum_of_slices<kRows, 2>(memory.sums, weights.slice_bits, unit, 0, row);
        float up = sum_of_slices<kRows, 2>(memory.sums, weights.slice_bits, unit, 1, row);
        const std::int64_t at = units.begin + unit;
        if (layer.gate_up_bias != nullptr) {
            gate += layer.gate_up_bias[at];
            up += layer.gate_up_bias[at + layer.hidden];
        }
        T* to = static_cast<T*>(p.hidden) + static_cast<std::int64_t>(row) * layer.hidden + at;
        store(to, from_float<T>(activated(gate, layer.activation) * up));
    }
}

// the hidden values as inputs of down, and the stream that the block's outputs are added to
template <typename T, int kRows>
__device__ void stage_hidden(const float* x, std::int64_t stride, const MlpChainParams& p, const MlpChainLayer& layer,
                             const Weights& weights, const Memory<T>& memory) {
    const T* hidden = static_cast<const T*>(p.hidden);
    const int size = kRows * layer.hidden;
    for (int at = thread_idx() * kChainWord; at < size; at += kChainThreads * kChainWord) {
        copy_async_input(memory.inputs + at, hidden + at);
    }
    commit_copies();
    const Units units = weights.own();
    const int first = units.begin * weights.rows;
    const int count = (units.end - units.begin) * weights.rows;
    for (int idx = thread_idx(); idx < kRows * count; idx += kChainThreads) {
        memory.stream[idx] = load_input(x + idx / count * stride + first + idx % count);
    }
    wait_copies<0>();
    sync_threads();
}

// stream + down of the block's outputs
template <typename T, int kRows, int kUnit>
__device__ void store_stream(const MlpChainParams& p, const MlpChainLayer& layer, const Weights& weights,
                             const Memory<T>& memory) {
    const Units units = weights.own();
    const int first = units.begin * kUnit;
    const int count = (units.end - units.begin) * kUnit;
    for (int idx = thread_idx(); idx < kRows * count; idx += kChainThreads) {
        const int row = idx / count;
        const int output = idx % count;
        float sum = sum_of_slices<kRows, kUnit>(memory.sums, weights.slice_bits, output / kUnit, output % kUnit, row);
        if (layer.down_bias != nullptr) {
            sum += layer.down_bias[first + output];
        }
        store(p.out + row * p.out_stride + first + output, memory.stream[idx] + sum);
    }
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kChainThreads, 1) mlp_chain_kernel(const __grid_constant__ MlpChainParams p) {
    constexpr int kUnit = chain_down_rows(kRows);
    const Memory<T> memory(p);
    const std::int64_t prefetch_bytes = p.prefetch_bytes / num_blocks();
    GridBarrier barrier{p.counters};
    inner_of(p, 0).prefetch(prefetch_bytes);
    wait_for_inputs();
    for (int idx = 0; idx < p.num_layers; ++idx) {
        const MlpChainLayer& layer = p.layers[idx];
        const float* x = idx == 0 ? p.x : p.out;
        const std::int64_t stride = idx == 0 ? p.x_stride : p.out_stride;
        const Weights inner = inner_of(p, idx);
        const Weights outer = outer_of<kRows>(p, idx);

        stage_stream<T, kRows>(p, x, stride, layer, memory);
        multiply_units<T, kRows, 2>(inner, memory);
        outer.prefetch(prefetch_bytes);
        sync_threads();
        store_hidden<T, kRows>(p, layer, inner, memory);
        barrier.sync();

        stage_hidden<T, kRows>(x, stride, p, layer, outer, memory);
        multiply_units<T, kRows, kUnit>(outer, memory);
        const bool is_last = idx + 1 == p.num_layers;
        if (is_last) {
            let_next_start();
        } else {
            inner_of(p, idx + 1).prefetch(prefetch_bytes);
        }
        sync_threads();
        store_stream<T, kRows, kUnit>(p, layer, outer, memory);
        if (!is_last) {
            barrier.sync();
        }
    }
    barrier.finish();
}

template <typename T, int kRows>
int launch_rows(const MlpChainParams& params, void* stream) {
    LaunchShape shape{};
    shape.blocks = static_cast<unsigned>(params.blocks);
    shape.threads = kChainThreads;
    shape.shared_bytes = static_cast<std::size_t>(params.shared_bytes);
    shape.cooperative = true;
    return launch("mlp_chain", mlp_chain_kernel<T, kRows>, shape, params, stream);
}

template <typename T>
int launch_mlp_chain(const MlpChainParams& params, void* stream) {
    switch (params.rows) {
        case 1:
            return launch_rows<T, 1>(params, stream);
        case 2:
            return launch_rows<T, 2>(params, stream);
        case 3:
            return launch_rows<T, 3>(params, stream);
        default:
            return launch_rows<T, 4>(params, stream);
    }
}

}  // namespace
}  // namespace pyruntime

// plain C: returns a cudaError_t. The bindings check what MlpChainParams says.
extern "C" int pyruntime_launch_mlp_chain(const pyruntime::MlpChainParams* params, void* stream) {
    return params->dtype == pyruntime::kFloat16 ? pyruntime::launch_mlp_chain<pyruntime::Float16>(*params, stream)
                                                : pyruntime::launch_mlp_chain<pyruntime::Bfloat16>(*params, stream);
}
