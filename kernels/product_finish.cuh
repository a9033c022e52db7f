// What stands behind a matrix product: scale of the norm, bias, activation, residual, rotation, and the store.
#pragma once

#include "activation.cuh"
#include "device.cuh"
#include "pyruntime/params.h"
#include "schedule.h"

namespace pyruntime {
namespace {

// What is known of each row of activations once, in shared memory, and what is done with each pair of sums.
class Finish {
public:
    // below wait_for_inputs(); a barrier must follow
    __device__ Finish(const ProductParams& p, const Pairs& pairs, unsigned char* shared, const ProductMemory& memory)
        : p_(p),
          pairs_(pairs),
          places_(reinterpret_cast<std::int64_t*>(shared + memory.places)),
          positions_(reinterpret_cast<std::int32_t*>(shared + memory.positions)),
          scales_(reinterpret_cast<float*>(shared + memory.scales)),
          flag_(reinterpret_cast<std::uint32_t*>(shared + memory.flag)) {
        const HeadParams& heads = p.heads;
        const int row = thread_idx();
        if (heads.head_dim > 0 && row < p.rows) {
            const std::int32_t position = load_input(heads.positions + row);
            positions_[row] = position;
            if (heads.num_kv_heads > 0) {
                const std::int64_t sequence = load_input(heads.sequences + row);
                const std::int32_t* pages = heads.page_table + sequence * heads.page_stride;
                const std::int64_t page = load_input(pages + position / heads.page_size);
                places_[row] = place_in_pool(page, position, heads.page_size);
            }
        }
    }

    __device__ std::uint32_t* flag() const { return flag_; }

    // the norm's factor, from the sum of squares of a row
    __device__ void set_scale(int row, float squares) {
        scales_[row] = p_.norm ? 1.0f / sqrtf(squares / static_cast<float>(p_.inputs) + p_.eps) : 1.0f;
    }

    // a warp finishes kPairs pairs from `begin` on: sums are [rows][2 * kPairs + 1], pair after pair
    template <typename T, int kPairs>
    __device__ void pairs(int begin, const float* sums) {
        for (int item = lane_idx(); item < p_.rows * kPairs; item += kWarpSize) {
            const int row = item / kPairs, pair = begin + item % kPairs;
            if (pair >= pairs_.count) {
                continue;
            }
            const RowPair at = rows_of(pairs_, pair);
            const float scale = p_.norm ? scales_[row] : 1.0f;
            const float* found = sums + row * (2 * kPairs + 1) + item % kPairs * 2;
            finish<T>(row, at, with_bias(found[0] * scale, at.first), with_bias(found[1] * scale, at.second));
        }
    }

private:
    __device__ float with_bias(float y, std::int32_t output) const {
        return p_.bias != nullptr && output >= 0 ? y + p_.bias[output] : y;
    }

    template <typename T>
    __device__ void finish(int row, RowPair at, float first, float second) {
        if (pairs_.pairing == Pairing::kHeads) {
            to_heads<T>(row, at, first, second);
        } else if (pairs_.pairing == Pairing::kHalves) {
            put<T>(row, at.first, activated(first, p_.activation) * second);
        } else {
            put<T>(row, at.first, activated(first, p_.activation));
            if (at.second >= 0) {
                put<T>(row, at.second, activated(second, p_.activation));
            }
        }
    }

    template <typename T>
    __device__ void put(int row, std::int32_t output, float y) {
        if (p_.softcap > 0.0f) {
            y = p_.softcap * tanhf(y / p_.softcap);
        }
        if (p_.residual != nullptr) {
            y += load_input(p_.residual + row * p_.residual_stride + output);
        }
        const std::int64_t offset = row * p_.out_stride + output;
        if (p_.out_dtype == kFloat32) {
            store(static_cast<float*>(p_.out) + offset, y);
        } else {
            store(static_cast<T*>(p_.out) + offset, from_float<T>(y));
        }
    }

    template <typename T>
    __device__ void to_heads(int row, RowPair at, float first, float second) {
        const HeadParams& heads = p_.heads;
        const int head = at.first / heads.head_dim, within = at.first - head * heads.head_dim;
        if (head < pairs_.num_roped && within < heads.rope_dim / 2) {
            const std::int64_t angle = static_cast<std::int64_t>(positions_[row]) * (heads.rope_dim / 2) + within;
            const float cos = heads.cos[angle], sin = heads.sin[angle];
            const float turned = first * cos - second * sin;
            second = second * cos + first * sin;
            first = turned;
        }
        if (head < heads.num_heads) {
            put<T>(row, at.first, first);
            if (at.second >= 0) {
                put<T>(row, at.second, second);
            }
            return;
        }
        const bool is_key = head < heads.num_heads + heads.num_kv_heads;
        const int kv_head = head - heads.num_heads - (is_key ? 0 : heads.num_kv_heads);
        T* token = static_cast<T*>(is_key ? heads.keys : heads.values) +
                   (places_[row] * heads.num_kv_heads + kv_head) * heads.head_dim - head * heads.head_dim;
        store(token + at.first, from_float<T>(first));
        if (at.second >= 0) {
            store(token + at.second, from_float<T>(second));
        }
    }

    const ProductParams& p_;
    const Pairs& pairs_;
    std::int64_t* places_;
    std::int32_t* positions_;
    float* scales_;
    std::uint32_t* flag_;
};

}  // namespace
}  // namespace pyruntime
