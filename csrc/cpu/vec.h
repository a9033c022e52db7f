// Float vectors of the width that one compiled copy has. Included only by files that are compiled once per ISA, after
// PYRUNTIME_ISA is set by the build. Everything is in an anonymous namespace: a symbol shared between copies could be
// merged by the linker, and the AVX-512 body would then run on a CPU that has none.
#pragma once

#include <stdint.h>

#define PYRUNTIME_JOIN_(a, b) a##b
#define PYRUNTIME_JOIN(a, b) PYRUNTIME_JOIN_(a, b)
#define PYRUNTIME_ISA_NAMESPACE PYRUNTIME_JOIN(cpu_, PYRUNTIME_ISA)

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxRowsAtOnce = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMaxRowsAtOnce = 2;
#else
constexpr int kLanes = 4;
constexpr int kMaxRowsAtOnce = 2;
#endif

// running sums per row: as many as hide the latency of an FMA. The order of a sum depends on this and kLanes alone.
constexpr int kSums = 4;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef float UnalignedVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vec load(const float* from) {
    return *reinterpret_cast<const UnalignedVec*>(from);
}

inline float add_lanes(Vec sum) {
    float total = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) {
        total += sum[lane];
    }
    return total;
}

// products[r] = sum over k of weight[k] * x[r * x_stride + k], for R rows that share the one read of the weight.
// Each row adds in the same order whatever R is, so a row's result does not depend on its neighbours.
template <int R>
inline void dot_rows(const float* weight, const float* x, int64_t x_stride, int64_t n, float* products) {
    Vec sums[R][kSums] = {};
    int64_t k = 0;
    for (; k + kLanes * kSums <= n; k += kLanes * kSums) {
        for (int s = 0; s < kSums; ++s) {
            const Vec w = load(weight + k + s * kLanes);
            for (int r = 0; r < R; ++r) {
                sums[r][s] += w * load(x + r * x_stride + k + s * kLanes);
            }
        }
    }
    for (; k + kLanes <= n; k += kLanes) {
        const Vec w = load(weight + k);
        for (int r = 0; r < R; ++r) {
            sums[r][0] += w * load(x + r * x_stride + k);
        }
    }
    for (int r = 0; r < R; ++r) {
        float tail = 0.0f;
        for (int64_t t = k; t < n; ++t) {
            tail += weight[t] * x[r * x_stride + t];
        }
        products[r] = add_lanes((sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3])) + tail;
    }
}

// the same for any number of rows
inline void dot_many(const float* weight, const float* x, int64_t x_stride, int64_t n, int64_t rows, float* products) {
    int64_t row = 0;
    for (; row + kMaxRowsAtOnce <= rows; row += kMaxRowsAtOnce) {
        dot_rows<kMaxRowsAtOnce>(weight, x + row * x_stride, x_stride, n, products + row);
    }
    for (; row < rows; ++row) {
        dot_rows<1>(weight, x + row * x_stride, x_stride, n, products + row);
    }
}

}  // namespace
