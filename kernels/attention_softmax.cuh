// Decode attention: the running softmax of a warp over its slabs, and of a block over its warps.
#pragma once

#include <cmath>

#include "attention_tiles.cuh"

namespace pyruntime {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// One warp's softmax over what it has seen: lane l has rows l/4 and l/4 + 8, scores in units of log2(e).
template <typename T, int kHeadDim>
struct Softmax {
    float mix[kHeadDim / 8][4] = {};
    float highest[2] = {-INFINITY, -INFINITY};
    float sum[2] = {};  // over this lane's columns

    // takes in a slab that has `visible` rows; `q` is [16, kPitch]
    __device__ void add(const AttentionParams& p, const T* q, const T* slab, Tiles visible) {
        float scores[2][4] = {};
        score(q, slab, scores);
#pragma unroll
        for (int idx = 0; idx < 8; ++idx) {
            float& value = scores[idx / 4][idx % 4];
            const int row = idx / 4 * 8 + lane_idx() % 4 * 2 + idx % 2;
            value *= p.scale;
            if (p.softcap > 0.0f) {
                value = p.softcap * tanhf(value / p.softcap);
            }
            value = row >= visible.begin && row < visible.end ? value * kLog2e : -INFINITY;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            weigh(scores, half);
        }
        const std::uint32_t weights[4] = {
            pack<T>(scores[0][0], scores[0][1]),
            pack<T>(scores[0][2], scores[0][3]),
            pack<T>(scores[1][0], scores[1][1]),
            pack<T>(scores[1][2], scores[1][3]),
        };
        const T* values = slab + Shape<kHeadDim>::kSlabSize;
        const T* row = values + lane_idx() % 16 * Shape<kHeadDim>::kPitch + lane_idx() / 16 * 8;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; n += 2) {
            std::uint32_t b[4];
            load_matrix_x4_transposed(b, row + 8 * n);
            matrix_multiply<T>(mix[n], weights, {b[0], b[1]});
            matrix_multiply<T>(mix[n + 1], weights, {b[2], b[3]});
        }
    }

private:
    // q keys^T for the first and the last 8 rows of the slab
    __device__ void score(const T* q, const T* keys, float (&scores)[2][4]) const {
        constexpr int kPitch = Shape<kHeadDim>::kPitch;
        const int lane = lane_idx();
        q += lane % 16 * kPitch + lane / 16 * 8;
        keys += (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < kHeadDim; k += 16) {
            std::uint32_t a[4];
            std::uint32_t b[4];
            load_matrix_x4(a, q + k);
            load_matrix_x4(b, keys + k);
            matrix_multiply<T>(scores[0], a, {b[0], b[1]});
            matrix_multiply<T>(scores[1], a, {b[2], b[3]});
        }
    }

    // scores of the lane's row become weights; some score of each row is a number
    __device__ void weigh(float (&scores)[2][4], int half) {
        float& first = scores[0][2 * half];
        float& second = scores[0][2 * half + 1];
        float& third = scores[1][2 * half];
        float& fourth = scores[1][2 * half + 1];
        float top = fmaxf(fmaxf(first, second), fmaxf(third, fourth));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(highest[half], fmaxf(top, shuffle_xor(top, 2)));
        const float shrink = exp2f(highest[half] - top);
        highest[half] = top;
        first = exp2f(first - top);
        second = exp2f(second - top);
        third = exp2f(third - top);
        fourth = exp2f(fourth - top);
        sum[half] = sum[half] * shrink + (first + second) + (third + fourth);
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            mix[n][2 * half] *= shrink;
            mix[n][2 * half + 1] *= shrink;
        }
    }
};

// Where a block brings together what its warps found.
template <typename T, int kHeadDim>
struct Together {
    using S = Shape<kHeadDim>;
    float* highest;  // [kWarps, 16]
    float* sums;     // [kWarps, 16]
    std::uint32_t* flag;
    float* mix;  // [heads, kMixPitch]

    __device__ explicit Together(unsigned char* shared)
        : highest(reinterpret_cast<float*>(shared + S::kBlock.slab_bytes)),
          sums(highest + S::kWarps * kAttentionRows),
          flag(reinterpret_cast<std::uint32_t*>(sums + S::kWarps * kAttentionRows)),
          mix(reinterpret_cast<float*>(flag + 4)) {}

    __device__ float highest_of(int row) const {
        float top = highest[row];
        for (int warp = 1; warp < S::kWarps; ++warp) {
            top = fmaxf(top, highest[warp * kAttentionRows + row]);
        }
        return top;
    }
    __device__ float sum_of(int row) const {
        const float top = highest_of(row);
        float sum = 0.0f;
        for (int warp = 0; warp < S::kWarps; ++warp) {
            const int idx = warp * kAttentionRows + row;
            sum += exp2f(highest[idx] - top) * sums[idx];
        }
        return sum;
    }

    // the mix of all warps, warp by warp, so that the order of the sums is always the same
    __device__ void gather(const Softmax<T, kHeadDim>& own, int num_rows) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = own.sum[half] + shuffle_xor(own.sum[half], 1);
            sum += shuffle_xor(sum, 2);
            if (lane_idx() % 4 == 0) {
                const int idx = warp_idx() * kAttentionRows + lane_idx() / 4 + 8 * half;
                highest[idx] = own.highest[half];
                sums[idx] = sum;
            }
        }
        sync_threads();
        for (int warp = 0; warp < S::kWarps; ++warp) {
            if (warp_idx() == warp) {
                add(own, num_rows, warp == 0);
            }
            sync_threads();
        }
    }

private:
    __device__ void add(const Softmax<T, kHeadDim>& own, int num_rows, bool is_first) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane_idx() / 4 + 8 * half;
            if (row >= num_rows) {
                continue;
            }
            const float factor = exp2f(own.highest[half] - highest_of(row));
            float* to = mix + row * S::kMixPitch + lane_idx() % 4 * 2;
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n) {
                const float low = factor * own.mix[n][2 * half];
                const float high = factor * own.mix[n][2 * half + 1];
                to[8 * n] = is_first ? low : to[8 * n] + low;
                to[8 * n + 1] = is_first ? high : to[8 * n + 1] + high;
            }
        }
    }
};

}  // namespace
}  // namespace pyruntime
