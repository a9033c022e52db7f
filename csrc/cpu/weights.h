// Rows of logits as distances from the best one and as weights e^-distance in double, and the search for a border among
// them without a sort. Included only by files that are compiled once per ISA, like vec.h and for the same reason in an
// anonymous namespace.
#pragma once

#include "pyruntime/sample.h"
#include "vec.h"

namespace {

using pyruntime::kSampleBlock;

constexpr int kWideLanes = kLanes / 2;
typedef double WideVec __attribute__((vector_size(kLanes * 4)));
typedef int64_t LongVec __attribute__((vector_size(kLanes * 4)));
typedef float NarrowVec __attribute__((vector_size(kLanes * 2)));
typedef double UnalignedWideVec __attribute__((vector_size(kLanes * 4), aligned(8), may_alias));
typedef float UnalignedNarrowVec __attribute__((vector_size(kLanes * 2), aligned(4), may_alias));

// e^-708 is the least power that is a normal number; what is farther has the weight 0
constexpr double kFarthest = 708.0;

inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

inline int64_t num_blocks(int64_t count) {
    return (count + kSampleBlock - 1) / kSampleBlock;
}

inline uint64_t bits_of(double value) {
    uint64_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

// e^-d for d >= 0, to about one unit in the last place: -d = n ln 2 + r, a Taylor polynomial for e^r, n to the exponent
inline WideVec exp_minus(WideVec d) {
    const WideVec magic = 6755399441055744.0 - WideVec{};  // 1.5 * 2^52: adding it rounds to an integer
    const WideVec near = d < kFarthest ? d : kFarthest - WideVec{};
    const WideVec shifted = magic - near * 1.44269504088896340736;
    const WideVec n = shifted - magic;
    // the upper part of ln 2 has so few bits that its product with n is exact
    const WideVec r = (-near - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    WideVec p = 1.0 / 6227020800.0 - WideVec{};
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const LongVec power = reinterpret_cast<LongVec>(shifted) - reinterpret_cast<LongVec>(magic);
    const WideVec scale = reinterpret_cast<WideVec>((power + 1023) << 52);
    return d < kFarthest ? p * scale : WideVec{};
}

struct Best {
    float value;
    bool nan;  // then `value` says nothing
};

// The greatest value of the row and of each block.
inline Best scan(const float* row, int64_t size, float* block_best) {
    IntVec nan = {};
    bool nan_at_end = false;
    float best = -INFINITY;
    for (int64_t begin = 0; begin < size; begin += kSampleBlock) {
        const int64_t end = smaller(begin + kSampleBlock, size);
        Vec even = splat(-INFINITY), odd = even;
        int64_t i = begin;
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
            const Vec a = load(row + i), b = load(row + i + kLanes);
            nan |= (a != a) | (b != b);
            even = max(even, a);
            odd = max(odd, b);
        }
        float block = max_lanes(max(even, odd));
        for (; i < end; ++i) {
            nan_at_end |= row[i] != row[i];
            block = block > row[i] ? block : row[i];
        }
        block_best[begin / kSampleBlock] = block;
        best = best > block ? best : block;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        nan_at_end |= nan[lane] != 0;
    }
    // -0 becomes 0: a distance of -0 would have the greatest of all keys
    return {best + 0.0f, nan_at_end};
}

inline int64_t first_equal(const float* row, float best, const float* block_best) {
    int64_t block = 0;
    while (block_best[block] != best) {
        ++block;
    }
    int64_t i = block * kSampleBlock;
    while (row[i] != best) {
        ++i;
    }
    return i;
}

inline int64_t count_greater(const float* row, int64_t size, float value) {
    IntVec found = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        // a comparison that holds is -1; no lane can overflow, as ids have 31 bits
        found -= load(row + i) > value;
    }
    int64_t count = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        count += found[lane];
    }
    for (; i < size; ++i) {
        count += row[i] > value ? 1 : 0;
    }
    return count;
}

// What turns logits into weights.
struct Scale {
    double best;
    double temperature;
};

inline double distance(float logit, Scale scale) {
    return (scale.best - static_cast<double>(logit)) / scale.temperature;
}

inline void measure(const float* logits, int64_t count, Scale scale, double* distances) {
    int64_t i = 0;
    for (; i + kWideLanes <= count; i += kWideLanes) {
        const NarrowVec narrow = *reinterpret_cast<const UnalignedNarrowVec*>(logits + i);
        const WideVec wide = (scale.best - __builtin_convertvector(narrow, WideVec)) / scale.temperature;
        *reinterpret_cast<UnalignedWideVec*>(distances + i) = wide;
    }
    for (; i < count; ++i) {
        distances[i] = distance(logits[i], scale);
    }
}

inline void weigh(const double* distances, int64_t count, double* weights) {
    int64_t i = 0;
    for (; i + kWideLanes <= count; i += kWideLanes) {
        const WideVec wide = *reinterpret_cast<const UnalignedWideVec*>(distances + i);
        *reinterpret_cast<UnalignedWideVec*>(weights + i) = exp_minus(wide);
    }
    for (; i < count; ++i) {
        weights[i] = exp_minus(distances[i] - WideVec{})[0];
    }
}

// Weights of the block of `size` logits that starts at `logits`; zero behind its end.
inline void weigh_block(const float* logits, int64_t size, Scale scale, double* weights) {
    const int64_t count = smaller(size, kSampleBlock);
    double distances[kSampleBlock];
    measure(logits, count, scale, distances);
    weigh(distances, count, weights);
    for (int64_t i = count; i < kSampleBlock; ++i) {
        weights[i] = 0.0;
    }
}

// The sum of all weights, and that of each block.
inline double sum_weights(const float* row, int64_t size, Scale scale, double* block_sums) {
    double total = 0.0;
    double weights[kSampleBlock];
    for (int64_t begin = 0; begin < size; begin += kSampleBlock) {
        weigh_block(row + begin, size - begin, scale, weights);
        WideVec sums = {};
        for (int64_t i = 0; i < kSampleBlock; i += kWideLanes) {
            sums += *reinterpret_cast<const UnalignedWideVec*>(weights + i);
        }
        double block = 0.0;
        for (int lane = 0; lane < kWideLanes; ++lane) {
            block += sums[lane];
        }
        block_sums[begin / kSampleBlock] = block;
        total += block;
    }
    return total;
}

struct Border {
    uint64_t key;
    double before;
};

// Walks the values by their keys (the bits, which have the order of the values, as these are not negative; flipped for
// the opposite order) until the shares that were passed reach `target`: the key where that happens, else the last one,
// and the sum of the shares before that key. `shares` null: each counts 1.
inline Border find_border(const double* values, uint64_t flip, const double* shares, int64_t count, double target) {
    constexpr int kMostBits = 11;
    // few values: the digits themselves would take the time
    const int bits_at_once = count < 4096 ? 8 : kMostBits;
    double sums[1 << kMostBits];
    int64_t entries[1 << kMostBits];
    Border border = {0, 0.0};
    int shift = 64;
    while (shift > 0) {
        const int digit_bits = shift < bits_at_once ? shift : bits_at_once;
        const int next_shift = shift - digit_bits;
        const int num_digits = 1 << digit_bits;
        for (int digit = 0; digit < num_digits; ++digit) {
            sums[digit] = 0.0;
            entries[digit] = 0;
        }
        for (int64_t i = 0; i < count; ++i) {
            const uint64_t key = bits_of(values[i]) ^ flip;
            if (shift == 64 || key >> shift == border.key) {
                const int digit = static_cast<int>((key >> next_shift) & (num_digits - 1));
                sums[digit] += shares == nullptr ? 1.0 : shares[i];
                ++entries[digit];
            }
        }
        int found = -1;
        for (int digit = 0; digit < num_digits; ++digit) {
            if (entries[digit] == 0) {
                continue;
            }
            border.before += found < 0 ? 0.0 : sums[found];
            found = digit;
            if (border.before + sums[found] >= target) {
                break;
            }
        }
        border.key = border.key << digit_bits | static_cast<uint64_t>(found);
        shift = next_shift;
        if (entries[found] == 1) {
            break;
        }
    }
    // one value is left: the rest of its key
    for (int64_t i = 0; shift > 0; ++i) {
        const uint64_t key = bits_of(values[i]) ^ flip;
        if (key >> shift == border.key) {
            border.key = key;
            shift = 0;
        }
    }
    return border;
}

}  // namespace
