// Who computes what: the arithmetic of indices, the same on the host, on the GPU and in tests.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYRUNTIME_BOTH __host__ __device__ inline
#else
#define PYRUNTIME_BOTH inline
#endif

namespace pyruntime {

struct Range {
    std::int32_t begin;
    std::int32_t end;
};

PYRUNTIME_BOTH std::int64_t divided_up(std::int64_t value, std::int64_t by) {
    return (value + by - 1) / by;
}
PYRUNTIME_BOTH std::int64_t smaller(std::int64_t a, std::int64_t b) {
    return a < b ? a : b;
}
PYRUNTIME_BOTH std::int64_t larger(std::int64_t a, std::int64_t b) {
    return a < b ? b : a;
}

// part number `part` of 0..total cut into `parts` whose lengths differ by one at most
PYRUNTIME_BOTH Range part_of(std::int32_t total, std::int32_t parts, std::int32_t part) {
    const std::int64_t whole = total;
    return {static_cast<std::int32_t>(whole * part / parts), static_cast<std::int32_t>(whole * (part + 1) / parts)};
}

// the place, in tokens, of a position on a page of a cache's pool
PYRUNTIME_BOTH std::int64_t place_in_pool(std::int64_t page, std::int32_t position, std::int32_t page_size) {
    return page * page_size + position % page_size;
}

// Rows of a weight matrix that one thread finishes together, because the values they give belong together.
enum class Pairing : std::int32_t {
    kNeighbours = 0,  // 2p and 2p + 1
    kHalves = 1,      // p and p + outputs / 2: gate and up
    kHeads = 2,       // within a head i and i + rope_dim / 2 where they are rotated, neighbours elsewhere
};

// `second` is -1 where there is none
struct RowPair {
    std::int32_t first;
    std::int32_t second;
};

// How the `outputs` rows of a matrix are paired. Heads: the first `num_roped` of them have pairs of rope, others not.
struct Pairs {
    Pairing pairing;
    std::int32_t outputs;
    std::int32_t head_dim;  // kHeads only, here and below
    std::int32_t rope_dim;
    std::int32_t num_roped;
    std::int32_t count;  // of pairs
};

PYRUNTIME_BOTH Pairs pairs_of_rows(std::int32_t outputs, bool gated) {
    return {gated ? Pairing::kHalves : Pairing::kNeighbours, outputs, 0, 0, 0, (outputs + 1) / 2};
}
PYRUNTIME_BOTH Pairs pairs_of_heads(std::int32_t num_heads, std::int32_t head_dim, std::int32_t rope_dim,
                                    std::int32_t num_roped) {
    return {Pairing::kHeads, num_heads * head_dim, head_dim, rope_dim, num_roped, num_heads * ((head_dim + 1) / 2)};
}

PYRUNTIME_BOTH RowPair rows_of(const Pairs& pairs, std::int32_t pair) {
    if (pairs.pairing == Pairing::kHalves) {
        return {pair, pair + pairs.outputs / 2};
    }
    std::int32_t begin = 0, end = pairs.outputs, within = pair;
    if (pairs.pairing == Pairing::kHeads) {
        const std::int32_t each = (pairs.head_dim + 1) / 2;
        const std::int32_t head = pair / each;
        begin = head * pairs.head_dim;
        end = begin + pairs.head_dim;
        within = pair - head * each;
        const std::int32_t half = head < pairs.num_roped ? pairs.rope_dim / 2 : 0;
        if (within < half) {
            return {begin + within, begin + within + half};
        }
        begin += 2 * half;
        within -= half;
    }
    const std::int32_t first = begin + 2 * within;
    return {first, first + 1 < end ? first + 1 : -1};
}

// A matrix product of few rows of activations: every warp takes groups of pairs of rows of the weight, over one of
// `splits` ranges of the inputs; the blocks of a column (same groups, other ranges) meet where the last one adds up.
struct ProductTile {
    int max_rows;       // rows of activations that the kernel holds
    int group_pairs;    // pairs that a warp handles at once
    int step;           // inputs that a warp multiplies at once
    int stages;         // steps under way
    int words;          // 16-byte loads of a thread in a step
    int halves;         // in so many runs of inputs
    int blocks_per_sm;  // that a launch counts on
    int resident;       // that find registers, so that the next kernel's may start
};

constexpr int kProductThreads = 256;
constexpr int kProductWarps = kProductThreads / 32;

// Up to 4 rows: a warp multiplies two rows of the weight as vectors. Above: with the tensor cores, weights as the side
// of 16, activations in units of 8.
constexpr PYRUNTIME_BOTH ProductTile product_tile(int rows) {
    if (rows <= 4) {
        return {rows == 3 ? 4 : rows, 1, 512, 4, 4, 2, 2, rows <= 2 ? 3 : 2};
    }
    if (rows <= 16) {
        return {rows <= 8 ? 8 : 16, 8, 64, 4, 4, 2, 2, 3};
    }
    return rows <= 32 ? ProductTile{32, 8, 64, 4, 4, 2, 1, 1} : ProductTile{64, 16, 32, 4, 4, 1, 1, 1};
}

// elements from one row of activations in shared memory to the next: whole steps, and 64 bytes beside a multiple of
// 128, so that the rows of a tensor core's tile lie in different banks
PYRUNTIME_BOTH std::int32_t staged_stride(const ProductTile& tile, std::int32_t steps) {
    const std::int32_t width = steps * tile.step;
    return tile.group_pairs == 1 ? width : width + (width % 64 == 0 ? 32 : 0);
}

// where the parts of a block's shared memory begin, in bytes; first comes the ring of weights
struct ProductMemory {
    std::int32_t rows;       // [max_rows, staged_stride] activations
    std::int32_t sums;       // [warps, max_rows, 2 * finished_pairs + 1] float
    std::int32_t squares;    // [max_rows, warps] float, parts of each row's sum of squares
    std::int32_t places;     // [max_rows] int64, in the cache's pool
    std::int32_t positions;  // [max_rows] int32
    std::int32_t scales;     // [max_rows] float, of the norm
    std::int32_t flag;
    std::int32_t bytes;
};

// of a group, those that a warp finishes at once
constexpr PYRUNTIME_BOTH int finished_pairs(const ProductTile& tile) {
    return tile.group_pairs == 1 ? 1 : 8;
}

// `steps`: at most kMostProductSteps
PYRUNTIME_BOTH ProductMemory product_memory(const ProductTile& tile, std::int32_t steps) {
    ProductMemory found{};
    found.rows = kProductThreads * tile.stages * tile.words * 16;
    found.sums = found.rows + tile.max_rows * staged_stride(tile, steps) * 2;
    found.squares = found.sums + kProductWarps * tile.max_rows * (2 * finished_pairs(tile) + 1) * 4;
    found.places = found.squares + tile.max_rows * kProductWarps * 4;
    found.positions = found.places + tile.max_rows * 8;
    found.scales = found.positions + tile.max_rows * 4;
    found.flag = found.scales + tile.max_rows * 4;
    found.bytes = (found.flag + 4 + 15) / 16 * 16;
    return found;
}

// what a launch of `columns` * `splits` blocks does
struct ProductPlan {
    std::int64_t columns;
    std::int64_t splits;
    std::int64_t steps;  // the most that one split has
};

constexpr std::int64_t kMostProductSplits = 64;
// of one split: far more than find room in shared memory
constexpr std::int64_t kMostProductSteps = 8192;
// so that a block of the next kernel finds room beside one of this, or two of this beside each other
constexpr std::int64_t kProductShared = 110 * 1024;
constexpr std::int64_t kMostShared = 227 * 1024;
// parts that the last block reads in the time of one
constexpr std::int64_t kReadAtOnce = 4;
// what it costs to meet, in steps
constexpr std::int64_t kSplitCost = 3;

// floats that the parts of a split product take, [groups, splits, rows, 2 * group_pairs]
PYRUNTIME_BOTH std::int64_t product_partials(int rows, std::int64_t pairs, std::int64_t splits) {
    const ProductTile tile = product_tile(rows);
    const std::int64_t groups = divided_up(pairs, tile.group_pairs);
    return splits > 1 ? groups * splits * rows * 2 * tile.group_pairs : 0;
}

// What the busiest warp does, in steps: a step reads 16-bit weights, a part is written once as float32, and the block
// that comes last reads all parts of its groups.
PYRUNTIME_BOTH std::int64_t product_cost(const ProductTile& tile, std::int64_t pairs, const ProductPlan& plan) {
    const std::int64_t groups = divided_up(divided_up(pairs, tile.group_pairs), plan.columns * kProductWarps);
    if (plan.splits == 1) {
        return groups * plan.steps;
    }
    const std::int64_t part = divided_up(4 * tile.max_rows, tile.step);
    return groups * (plan.steps + part + divided_up(part * plan.splits, kReadAtOnce)) + kSplitCost;
}

// Columns and splits for a device whose blocks have at most `shared_bytes`: the busiest warp has the least to do, with
// the fewest splits for it. splits 0: no number of splits leaves room for the activations.
PYRUNTIME_BOTH ProductPlan plan_product(int rows, std::int64_t pairs, std::int64_t inputs, int num_sms,
                                        std::int64_t shared_bytes) {
    const ProductTile tile = product_tile(rows);
    const std::int64_t groups = divided_up(pairs, tile.group_pairs);
    const std::int64_t all_steps = divided_up(inputs, tile.step);
    const std::int64_t room = tile.blocks_per_sm > 1 ? smaller(kProductShared, shared_bytes) : shared_bytes;
    const std::int64_t blocks = static_cast<std::int64_t>(num_sms) * tile.blocks_per_sm;
    ProductPlan best{};
    for (std::int64_t splits = 1; splits <= smaller(kMostProductSplits, all_steps); ++splits) {
        const std::int64_t steps = divided_up(all_steps, splits);
        if (steps > kMostProductSteps || product_memory(tile, static_cast<std::int32_t>(steps)).bytes > room) {
            continue;
        }
        const ProductPlan plan{larger(1, smaller(groups, blocks / splits)), splits, steps};
        if (best.splits == 0 || product_cost(tile, pairs, plan) < product_cost(tile, pairs, best)) {
            best = plan;
        }
    }
    return best;
}

}  // namespace pyruntime
