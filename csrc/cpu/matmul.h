// Matrix products of packed rows with panels, shared out over a team. Included only by files compiled once per ISA.
#pragma once

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "pyruntime/steps.h"

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {

// Vectors in a panel, running sums that fit the registers beside the operands, and rows that share a read of a panel.
constexpr int kVecs = kPanel / kLanes;
constexpr int kSums = kLanes == 16 ? 24 : kLanes == 8 ? 12 : 8;
constexpr int kTileRows = kSums / kVecs / (kLanes == 16 ? 2 : 1);

static_assert(kTileRows <= kMaxTileRows, "scratch is sized for kMaxTileRows");

// Rows are packed in tiles of nearly equal height. In a tile, each unit of inputs has a word for every row.
struct Tile {
    int64_t first_row;
    int64_t rows;
};

namespace {

inline int64_t num_tiles(int64_t rows) {
    return (rows + kTileRows - 1) / kTileRows;
}

inline Tile tile_at(int64_t rows, int64_t idx) {
    const int64_t tiles = num_tiles(rows);
    const int64_t height = rows / tiles, taller = rows % tiles;
    return {idx * height + (idx < taller ? idx : taller), height + (idx < taller ? 1 : 0)};
}

// writes `count` inputs of one row, beginning with unit `first_unit`, into its tile; bfloat16 pads an odd count with
// zero
inline void pack_row(const float* row, int64_t count, int32_t dtype, uint32_t* tile, int64_t tile_rows, int64_t at_row,
                     int64_t first_unit) {
    uint32_t* to = tile + first_unit * tile_rows + at_row;
    if (dtype == kFloat32) {
        for (int64_t k = 0; k < count; ++k) {
            __builtin_memcpy(to + k * tile_rows, row + k, sizeof(float));
        }
        return;
    }
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        uint32_t words[kLanes];
        const WordVec rounded = bfloat16_words(load(row + k));
        __builtin_memcpy(words, &rounded, sizeof words);
        for (int lane = 0; lane < kLanes; lane += 2) {
            to[(k + lane) / 2 * tile_rows] = words[lane] >> 16 | (words[lane + 1] & 0xffff0000u);
        }
    }
    for (; k + 1 < count; k += 2) {
        to[k / 2 * tile_rows] = bfloat16_word(row[k]) >> 16 | (bfloat16_word(row[k + 1]) & 0xffff0000u);
    }
    if (k < count) {
        to[k / 2 * tile_rows] = bfloat16_word(row[k]) >> 16;
    }
}

}  // namespace

// Receives one tile's results for `panels` panels from `first_panel` on: values[row][kGroup * 16], bias added.
using StoreTile = void (*)(const void* context, const Tile& tile, int64_t first_panel, int64_t panels,
                           const float* values);

// Multiplies `rows` packed rows with all panels. The sum of an output runs over the inputs in order, whatever the
// number of rows and workers, so a row's result does not depend on its neighbours. Ends with a wait for all.
void matmul(const Panels& panels, const uint32_t* packed, int64_t rows, StoreTile store, const void* context,
            const Worker& worker);

// Norms each row of `in` [rows, width], or takes it as it is, and packs it for `matmul`; returns where. `normed`
// [rows, width], where it is not null, gets the same values row by row, for all workers to see.
const uint32_t* norm_and_pack(const NormWeights& norm, const float* in, int64_t width, int64_t rows, int32_t dtype,
                              float* normed, const RunContext& run, const Worker& worker);

// out = norm of one row of norm.size values; `out` may be `row`
void norm_row(const NormWeights& norm, const float* row, float* out);

// Stores a product row-major, with a residual added where it is not null.
struct RowsOut {
    float* out;             // [rows, width]
    const float* residual;  // [rows, width] or null
    int64_t width;
};
void store_rows(const void* rows_out, const Tile& tile, int64_t first_panel, int64_t panels, const float* values);

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
