// Which warp of a chain of MLPs multiplies what.
//
// Each layer is two phases: gate and up, whose unit is a row of each, and down, whose unit is one row or two. The units
// of a phase are dealt evenly to the blocks. A block cuts the inputs of its units into slices, so that all its warps
// have work where it has few units; a warp's job is one slice of one unit.
#pragma once

#include "schedule.h"

namespace pyruntime {

constexpr int kChainWarps = 16;
constexpr int kChainThreads = kChainWarps * 32;
constexpr int kMostChainRows = 4;
constexpr int kMostSliceBits = 4;
// elements that a thread loads at once, 16 bytes
constexpr int kChainWord = 8;

struct Units {
    int begin;
    int end;
};

// rows of down that a warp multiplies at once: with more rows of activations, each is loaded for two
PYRUNTIME_BOTH constexpr int chain_down_rows(int rows) {
    return rows > 2 ? 2 : 1;
}

// the units of a block; units * blocks is less than 2^31
PYRUNTIME_BOTH Units chain_units(int units, int blocks, int block) {
    return {units * block / blocks, units * (block + 1) / blocks};
}

PYRUNTIME_BOTH int most_chain_units(int units, int blocks) {
    return (units + blocks - 1) / blocks;
}

// words of slice `slice` of `words` cut into 2^bits
PYRUNTIME_BOTH Units chain_slice(int words, int bits, int slice) {
    return {static_cast<int>(static_cast<std::int64_t>(words) * slice >> bits),
            static_cast<int>(static_cast<std::int64_t>(words) * (slice + 1) >> bits)};
}

// What the busiest warp does where a block has `units` units of `words` words: the loads of each thread, and as much as
// one load for the sum over the lanes that ends a job.
PYRUNTIME_BOTH std::int64_t chain_cost(int units, int words, int bits) {
    const std::int64_t longest = divided_up(words, std::int64_t{1} << bits);
    return divided_up(static_cast<std::int64_t>(units) << bits, kChainWarps) * (divided_up(longest, 32) + 1);
}

// the base-2 logarithm of the number of slices with the least cost, the fewest of those
PYRUNTIME_BOTH int chain_slice_bits(int units, int words) {
    int best = 0;
    for (int bits = 1; bits <= kMostSliceBits; ++bits) {
        if (chain_cost(units, words, bits) < chain_cost(units, words, best)) {
            best = bits;
        }
    }
    return best;
}

// Shared memory of a block, in bytes from its beginning: the inputs [rows, inputs] in 16 bit, then floats: the sums of
// each job, the stream where it is added to [rows, own outputs], and the squares of each warp [rows, warps].
struct ChainMemory {
    std::int64_t sums;
    std::int64_t stream;
    std::int64_t squares;
    std::int64_t bytes;
};

// `inputs`, `jobs` and `outputs` are the most that any phase has; a job has up to 2 sums for each row
PYRUNTIME_BOTH ChainMemory chain_memory(int rows, std::int64_t inputs, std::int64_t jobs, std::int64_t outputs) {
    ChainMemory found{};
    found.sums = rows * inputs * 2;
    found.stream = found.sums + jobs * 2 * rows * 4;
    found.squares = found.stream + rows * outputs * 4;
    found.bytes = found.squares + static_cast<std::int64_t>(rows) * kChainWarps * 4;
    return found;
}

}  // namespace pyruntime
