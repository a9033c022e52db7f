// Vectors of the width that one compiled copy has. Included only by files that are compiled once per ISA, after
// PYRUNTIME_ISA is set by the build. Everything is in an anonymous namespace: a symbol shared between copies could be
// merged by the linker, and the AVX-512 body would then run on a CPU that has none.
#pragma once

#include <math.h>
#include <stdint.h>

#define PYRUNTIME_JOIN_(a, b) a##b
#define PYRUNTIME_JOIN(a, b) PYRUNTIME_JOIN_(a, b)
#define PYRUNTIME_ISA_NAMESPACE PYRUNTIME_JOIN(cpu_, PYRUNTIME_ISA)

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t WordVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t UnalignedWordVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline Vec load(const float* from) {
    return *reinterpret_cast<const UnalignedVec*>(from);
}

inline WordVec load(const uint32_t* from) {
    return *reinterpret_cast<const UnalignedWordVec*>(from);
}

// bfloat16 values, widened
inline Vec load(const uint16_t* from) {
    const HalfVec half = *reinterpret_cast<const UnalignedHalfVec*>(from);
    return reinterpret_cast<Vec>(__builtin_convertvector(half, WordVec) << 16);
}

inline void store(float* to, Vec values) {
    *reinterpret_cast<UnalignedVec*>(to) = values;
}

inline Vec splat(float value) {
    return value - Vec{};
}

inline Vec max(Vec a, Vec b) {
    return a > b ? a : b;
}

// lane i + `by` in lane i; the lanes beyond the last begin anew
inline Vec upper_lanes(Vec values, int by) {
    IntVec from;
    for (int lane = 0; lane < kLanes; ++lane) {
        from[lane] = (lane + by) % kLanes;
    }
    return __builtin_shuffle(values, from);
}

inline float add_lanes(Vec sum) {
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) {
        sum += upper_lanes(sum, half);
    }
    return sum[0];
}

inline float max_lanes(Vec values) {
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) {
        values = max(values, upper_lanes(values, half));
    }
    return values[0];
}

// 0, 1, 2, ...
inline IntVec lane_numbers() {
    IntVec numbers;
    for (int lane = 0; lane < kLanes; ++lane) {
        numbers[lane] = lane;
    }
    return numbers;
}

// the word whose upper half is the bfloat16 nearest to the value, ties to even; a NaN stays one
inline WordVec bfloat16_words(Vec values) {
    const WordVec bits = reinterpret_cast<WordVec>(values);
    const WordVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return values != values ? bits | 0x400000u : rounded;
}

// the same for one value
inline uint32_t bfloat16_word(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return value != value ? bits | 0x400000u : rounded;
}

inline float widen_bfloat16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// e^x to about one unit in the last place: x = n ln 2 + r, a polynomial for e^r (Cephes, expf), then n into the
// exponent. 0 below -87; infinity above 88.7228; a NaN stays one.
inline Vec exp(Vec x) {
    const Vec low = splat(-87.0f), high = splat(88.7228f);
    Vec t = x < low ? low : x;
    t = t > high ? high : t;
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec n = (t * 1.44269504088896341f + magic) - magic;
    const Vec r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // in two halves, so that 2^128 does not overflow before it is multiplied
    const IntVec whole = __builtin_convertvector(n, IntVec);
    const IntVec half = whole >> 1;
    const Vec first = reinterpret_cast<Vec>((half + 127) << 23);
    const Vec second = reinterpret_cast<Vec>((whole - half + 127) << 23);
    const Vec value = p * first * second;
    const Vec bounded = x > 88.7228f ? splat(INFINITY) : (x < low ? Vec{} : value);
    return x != x ? x : bounded;
}

// tanh x: an odd polynomial near 0 (Cephes, tanhf), else 1 - 2 / (e^2x + 1)
inline Vec tanh(Vec x) {
    const Vec square = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Vec near = x + x * square * p;
    const Vec far = 1.0f - 2.0f / (exp(x + x) + 1.0f);
    return (x > -0.625f) & (x < 0.625f) ? near : far;
}

}  // namespace
