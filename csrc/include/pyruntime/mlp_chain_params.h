// What the CUDA kernel of a chain of MLPs reads.
#pragma once

#include <cstdint>

namespace pyruntime {

// so that the parameters of a launch stay below 4 KiB
constexpr int kMostChainLayers = 56;

struct MlpChainLayer {
    const void* gate_up;        // [2 * hidden, width], gate above up
    const void* down;           // [width, hidden]
    const float* gain;          // [width] of the norm, or null
    const float* gate_up_bias;  // [2 * hidden], or null
    const float* down_bias;     // [width], or null
    std::int32_t hidden;
    std::int32_t activation;  // Activation of params.h
    std::int32_t norm;        // whether there is an RMS norm in front
    float eps;
    std::int16_t inner_slice_bits;  // slices of gate and up's inputs, see mlp_chain_schedule.h
    std::int16_t outer_slice_bits;  // of down's
};

// x += down(activation(gate(norm(x))) * up(norm(x))) for one layer after the other. Rows are contiguous, strides count
// elements; width and every hidden are multiples of 8.
struct MlpChainParams {
    const float* x;           // [rows, width]
    float* out;               // [rows, width], may be x
    void* hidden;             // [rows, the largest hidden], undefined
    std::uint32_t* counters;  // two zeros, left zero
    std::int64_t x_stride;
    std::int64_t out_stride;
    std::int64_t prefetch_bytes;  // of the next phase's weights, all blocks together, before each barrier
    std::int64_t sums_at;         // ChainMemory
    std::int64_t stream_at;
    std::int64_t squares_at;
    std::int64_t shared_bytes;
    std::int32_t rows;  // 1 to 4
    std::int32_t width;
    std::int32_t num_layers;
    std::int32_t blocks;  // all of which run at once
    std::int32_t dtype;   // of weights and hidden: kFloat16 or kBfloat16
    MlpChainLayer layers[kMostChainLayers];
};
static_assert(sizeof(MlpChainParams) <= 4096, "what every GPU takes as parameters");

}  // namespace pyruntime
