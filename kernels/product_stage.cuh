// What stands in front of a matrix product: activations times gain, rounded, in shared memory, and their squares.
#pragma once

#include "device.cuh"
#include "pyruntime/params.h"
#include "schedule.h"

namespace pyruntime {
namespace {

template <typename T>
__device__ inline void unpack_8(const Words& words, float (&out)[8]) {
#pragma unroll
    for (int idx = 0; idx < 4; ++idx) {
        const Pair pair = unpack<T>(words.word[idx]);
        out[2 * idx] = pair.low;
        out[2 * idx + 1] = pair.high;
    }
}

// 8 neighbouring activations as float32, zeros beyond the matrix
template <typename X>
__device__ inline void load_8(const ProductParams& p, int row, int input, float (&out)[8]) {
#pragma unroll
    for (int idx = 0; idx < 8; ++idx) {
        out[idx] = 0.0f;
    }
    if (row >= p.rows || input >= p.inputs) {
        return;
    }
    const X* from = static_cast<const X*>(p.x) + row * p.x_stride + input;
    if constexpr (sizeof(X) == 4) {
        const Words low = load_input_16(from), high = load_input_16(from + 4);
#pragma unroll
        for (int idx = 0; idx < 4; ++idx) {
            out[idx] = as_float(low.word[idx]);
            out[idx + 4] = as_float(high.word[idx]);
        }
    } else {
        unpack_8<X>(load_input_16(from), out);
    }
}

// Activations times gain, rounded to T, of all rows over some steps, into shared memory; there behind a barrier.
// `squares` [rows][warps] gets parts of the sums of squares of what stands there before it is rounded.
template <typename X, typename T, int kRows>
__device__ void stage(const ProductParams& p, Range steps, T* to, int stride, float* squares) {
    constexpr int kStep = product_tile(kRows).step;
    constexpr int kTeams = kRows < kProductWarps ? kRows : kProductWarps;  // rows at once
    constexpr int kParts = kProductWarps / kTeams;                         // warps that share a row
    // loads under way: of several rows, or of several places in one
    constexpr int kTogether = kRows / kTeams < 4 ? kRows / kTeams : 4;
    constexpr int kAhead = 4 / kTogether;
    constexpr int kWidth = kParts * kWarpSize * 8;
    const int team = warp_idx() / kParts, part = warp_idx() % kParts;
    const int width = (steps.end - steps.begin) * kStep;
    for (int first = team; first < kRows; first += kTeams * kTogether) {
        float sums[kTogether] = {};
        for (int begin = (part * kWarpSize + lane_idx()) * 8; begin < width; begin += kAhead * kWidth) {
            float values[kAhead][kTogether][8];
#pragma unroll
            for (int ahead = 0; ahead < kAhead; ++ahead) {
#pragma unroll
                for (int each = 0; each < kTogether; ++each) {
                    const int input = begin + ahead * kWidth;
                    // beyond the width stand other splits' inputs
                    load_8<X>(p, input < width ? first + each * kTeams : p.rows, steps.begin * kStep + input,
                              values[ahead][each]);
                }
            }
#pragma unroll
            for (int ahead = 0; ahead < kAhead; ++ahead) {
                const int input = begin + ahead * kWidth;
                if (input >= width) {
                    break;
                }
                float gain[8] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
                if (p.gain != nullptr && steps.begin * kStep + input < p.inputs) {
                    const Words low = load_16(p.gain + steps.begin * kStep + input);
                    const Words high = load_16(p.gain + steps.begin * kStep + input + 4);
#pragma unroll
                    for (int idx = 0; idx < 4; ++idx) {
                        gain[idx] = as_float(low.word[idx]);
                        gain[idx + 4] = as_float(high.word[idx]);
                    }
                }
#pragma unroll
                for (int each = 0; each < kTogether; ++each) {
                    const float (&x)[8] = values[ahead][each];
                    Words packed;
#pragma unroll
                    for (int idx = 0; idx < 8; ++idx) {
                        sums[each] += x[idx] * x[idx];
                    }
#pragma unroll
                    for (int idx = 0; idx < 4; ++idx) {
                        packed.word[idx] = pack<T>(x[2 * idx] * gain[2 * idx], x[2 * idx + 1] * gain[2 * idx + 1]);
                    }
                    *reinterpret_cast<Words*>(to + (first + each * kTeams) * stride + input) = packed;
                }
            }
        }
#pragma unroll
        for (int each = 0; each < kTogether; ++each) {
            const float sum = warp_sum(sums[each]);
            if (lane_idx() == 0) {
                squares[(first + each * kTeams) * kProductWarps + part] = sum;
            }
        }
    }
}

// sum of squares of a row over this block's inputs
template <int kRows>
__device__ inline float row_squares(const float* squares, int row) {
    constexpr int kParts = kProductWarps / (kRows < kProductWarps ? kRows : kProductWarps);
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        sum += squares[row * kProductWarps + part];
    }
    return sum;
}

}  // namespace
}  // namespace pyruntime
