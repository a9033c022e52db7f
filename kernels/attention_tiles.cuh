// Decode attention: which tile comes next, and the copies of its keys and values into shared memory.
#pragma once

#include "attention_schedule.h"
#include "device.cuh"
#include "pyruntime/attention_params.h"

namespace pyruntime {
namespace {

template <int kHeadDim>
struct Shape {
    static constexpr AttentionBlock kBlock = attention_block(kHeadDim);
    static constexpr int kWarps = kBlock.warps;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kTile = attention_tile(kHeadDim);
    static constexpr int kStages = kBlock.stages;
    static constexpr int kPitch = kBlock.pitch;
    static constexpr int kMixPitch = kBlock.mix_pitch;
    static constexpr int kSlabSize = kSlab * kPitch;
};

__device__ inline int warp_sum_int(int value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        value += shuffle_xor(value, offset);
    }
    return value;
}

// sum over this lane and those below
__device__ inline int warp_scan(int value) {
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int below = shuffle(value, lane_idx() < offset ? 0 : lane_idx() - offset);
        value += lane_idx() < offset ? 0 : below;
    }
    return value;
}

// What a block needs to know of the whole step.
struct Step {
    const AttentionParams& p;
    int tile;   // positions
    int items;  // of a sequence

    __device__ Tiles tiles(int context) const { return visible_tiles(context, p.window, tile); }

    // of all items of the sequences first to first + 31, this lane's
    __device__ int tiles_of_lane(int first) const {
        const int sequence = first + lane_idx();
        if (sequence >= p.num_sequences) {
            return 0;
        }
        const Tiles own = tiles(load_input(p.contexts + sequence));
        return (own.end - own.begin) * items;
    }

    __device__ int num_tiles() const {
        int sum = 0;
        for (int first = 0; first < p.num_sequences; first += kWarpSize) {
            sum += tiles_of_lane(first);
        }
        return warp_sum_int(sum);
    }
};

// One tile of one item.
struct Cursor {
    int sequence;
    int item;
    int tile;
    int context;
    Tiles tiles;  // of each of the sequence's items

    // to tile number `number` of all, which exists
    __device__ void find(const Step& step, int number) {
        int before = 0;
        for (int first = 0;; first += kWarpSize) {
            const int upto = before + warp_scan(step.tiles_of_lane(first));
            // sequences that end at or in front of the tile
            const int passed = warp_sum_int(upto <= number ? 1 : 0);
            const int skipped = shuffle(upto, passed > 0 ? passed - 1 : 0);
            if (passed < kWarpSize) {
                enter(step, first + passed);
                const int inside = number - (passed > 0 ? skipped : before);
                item = inside / (tiles.end - tiles.begin);
                tile = tiles.begin + inside % (tiles.end - tiles.begin);
                return;
            }
            before = skipped;
        }
    }

    // to the next tile, which exists
    __device__ void advance(const Step& step) {
        if (++tile < tiles.end) {
            return;
        }
        if (++item == step.items) {
            item = 0;
            do {
                enter(step, sequence + 1);
            } while (tiles.begin == tiles.end);
        }
        tile = tiles.begin;
    }

    // where this warp's slab of the tile begins
    __device__ int slab() const { return (tile * (num_threads() / kWarpSize) + warp_idx()) * kSlab; }
    // its visible rows; none where the begin is not in front of the end
    __device__ Tiles visible_rows(const Step& step) const {
        const int begin = first_visible(context, step.p.window) - slab();
        const int end = context - slab();
        return {begin > 0 ? begin : 0, end < kSlab ? end : kSlab};
    }
    // the page that the slab lies on: pages hold a multiple of 16 positions
    __device__ int page(const Step& step) const {
        const Tiles rows = visible_rows(step);
        const std::int32_t* table = step.p.page_table + sequence * step.p.table_stride;
        return rows.begin < rows.end ? load_input(table + slab() / step.p.page_size) : 0;
    }

private:
    __device__ void enter(const Step& step, int to) {
        sequence = to;
        context = load_input(step.p.contexts + to);
        tiles = step.tiles(context);
    }
};

// The query heads of an item.
struct Heads {
    int kv_head;
    int first;
    int count;

    __device__ Heads(const AttentionParams& p, int item) {
        const int group = p.num_heads / p.num_kv_heads;
        const int per_kv_head = (group + kAttentionRows - 1) / kAttentionRows;
        const int skipped = item % per_kv_head * kAttentionRows;
        kv_head = item / per_kv_head;
        first = kv_head * group + skipped;
        count = group - skipped < kAttentionRows ? group - skipped : kAttentionRows;
    }
};

// Starts the copies of a slab on `page`. Rows that are not visible become zeros: what was never written may be NaN.
template <typename T, int kHeadDim>
__device__ void copy_slab(const Step& step, const Cursor& at, int page, T* slab) {
    using S = Shape<kHeadDim>;
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, a row
    const AttentionParams& p = step.p;
    const Tiles visible = at.visible_rows(step);
    if (visible.begin >= visible.end) {
        return;
    }
    // lanes side by side copy a row, the others those below; with 12 chunks a row some lanes have nothing to do
    constexpr int kAcross = kChunks == 12 ? 16 : kChunks;
    constexpr int kDown = kWarpSize / kAcross;
    int row = lane_idx() / kAcross;
    const int column = lane_idx() % kAcross * 8;
    if (column >= kHeadDim) {
        return;
    }
    const std::int64_t row_size = static_cast<std::int64_t>(p.num_kv_heads) * kHeadDim;
    const std::int64_t place = static_cast<std::int64_t>(page) * p.page_size + at.slab() % p.page_size + row;
    const std::int64_t head = Heads(p, at.item).kv_head;
    const std::int64_t from = place * row_size + head * kHeadDim + column;
    const T* keys = static_cast<const T*>(p.keys) + from;
    const T* values = static_cast<const T*>(p.values) + from;
    slab += row * S::kPitch + column;
#pragma unroll 2
    for (int pass = 0; pass < kSlab / kDown; ++pass, row += kDown) {
        const bool valid = row >= visible.begin && row < visible.end;
        copy_async_input(slab, keys, valid);
        copy_async_input(slab + S::kSlabSize, values, valid);
        keys += kDown * row_size;
        values += kDown * row_size;
        slab += kDown * S::kPitch;
    }
}

// the queries of an item into shared memory [16, kPitch], zeros in the rows that it does not have
template <typename T, int kHeadDim>
__device__ void copy_queries(const AttentionParams& p, const Cursor& at, T* to) {
    constexpr int kChunks = kHeadDim / 8;
    const Heads heads(p, at.item);
    const std::int64_t start = at.sequence * p.q_stride + static_cast<std::int64_t>(heads.first) * kHeadDim;
    const T* from = static_cast<const T*>(p.q) + start;
    for (int idx = thread_idx(); idx < kAttentionRows * kChunks; idx += num_threads()) {
        const int row = idx / kChunks;
        const int column = idx % kChunks * 8;
        const Words words = row < heads.count ? load_input_16(from + row * kHeadDim + column) : Words{};
        store_16(to + row * Shape<kHeadDim>::kPitch + column, words);
    }
    sync_threads();
}

}  // namespace
}  // namespace pyruntime
