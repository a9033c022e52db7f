// Which block of a decode attention works on which positions.
//
// An item is one sequence and up to 16 query heads that share a key head. Its visible positions are cut into tiles at
// multiples of the tile's size; the tiles of all items, one behind the other, are dealt to the blocks in runs of equal
// length. So an item is computed by neighbouring blocks, its parts, and a block has at most two items that it shares
// with others: the one that came from the block in front, and the one that goes on in the block behind.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace pyruntime {

// query heads on the rows of one matrix product, and positions that a warp takes at once
constexpr int kAttentionRows = 16;
constexpr int kSlab = 16;

// How the blocks for a head_dim are made.
struct AttentionBlock {
    int warps;
    int stages;       // slabs of a warp that are under way or worked on
    int pitch;        // elements from row to row of a slab: rows of a fragment lie in different banks
    int mix_pitch;    // floats from row to row of the block's mix
    int slab_bytes;   // of all warps and stages, keys and values
    int stat_bytes;   // maxima and sums [warp, 16], a flag in 16 bytes
    int query_bytes;  // [16, pitch]
};

PYRUNTIME_BOTH constexpr AttentionBlock attention_block(int head_dim) {
    // with more warps of the widest heads, fewer blocks would fit on a processor
    const int warps = head_dim > 128 ? 2 : 4;
    const int stages = head_dim > 64 ? 2 : 3;
    const int pitch = head_dim + 8;
    return {warps,
            stages,
            pitch,
            head_dim + 8,
            warps * stages * 2 * kSlab * pitch * 2,
            2 * warps * kAttentionRows * 4 + 16,
            kAttentionRows * pitch * 2};
}

// positions of a tile
PYRUNTIME_BOTH constexpr int attention_tile(int head_dim) {
    return attention_block(head_dim).warps * kSlab;
}

// a block's shared memory: slabs [warp, stage, keys or values], stats, and the queries in the place of the mix
// [heads, mix_pitch], which comes when they are done
PYRUNTIME_BOTH constexpr int attention_shared_bytes(int head_dim, int heads) {
    const AttentionBlock block = attention_block(head_dim);
    const int mix_bytes = heads * block.mix_pitch * 4;
    return block.slab_bytes + block.stat_bytes + (mix_bytes > block.query_bytes ? mix_bytes : block.query_bytes);
}

struct Tiles {
    int begin;
    int end;
};

struct Parts {
    int first_block;
    int count;
};

// the first position that a query sees which stands at the end of `context`; window 0: all
PYRUNTIME_BOTH int first_visible(int context, int window) {
    return window > 0 && context > window ? context - window : 0;
}

// tiles of `context` that hold a visible position; none for an empty context
PYRUNTIME_BOTH Tiles visible_tiles(int context, int window, int tile) {
    if (context <= 0) {
        return {0, 0};
    }
    return {first_visible(context, window) / tile, (context - 1) / tile + 1};
}

// tiles in each block's run: as few as `blocks` allow, but at least `least`, which bounds the parts to be combined
PYRUNTIME_BOTH int tiles_per_block(int num_tiles, int blocks, int least) {
    const int needed = (num_tiles + blocks - 1) / blocks;
    return needed > least ? needed : least;
}

// the blocks of an item whose tiles are [begin, end) of all
PYRUNTIME_BOTH Parts parts_of(int begin, int end, int per_block) {
    const int first = begin / per_block;
    return {first, (end - 1) / per_block - first + 1};
}

// Where the partial result of part `part` lies, among two a block: the part that starts an item has the second place,
// so that the block can hold the end of the item before it in the first.
PYRUNTIME_BOTH std::int64_t partial_place(Parts parts, int part) {
    return 2 * static_cast<std::int64_t>(parts.first_block + part) + (part == 0 ? 1 : 0);
}

// query heads of one item
PYRUNTIME_BOTH int heads_per_item(int num_heads, int num_kv_heads) {
    const int group = num_heads / num_kv_heads;
    return group < kAttentionRows ? group : kAttentionRows;
}

// items of each sequence
PYRUNTIME_BOTH int items_per_sequence(int num_heads, int num_kv_heads) {
    const int group = num_heads / num_kv_heads;
    return num_kv_heads * ((group + kAttentionRows - 1) / kAttentionRows);
}

PYRUNTIME_BOTH std::int64_t attention_places(int blocks) {
    return 2 * static_cast<std::int64_t>(blocks);
}

// floats of the partial results: mixes [places, heads, head_dim], then maxima and sums [places, heads, 2]
PYRUNTIME_BOTH std::int64_t attention_partials(int blocks, int heads, int head_dim) {
    return attention_places(blocks) * heads * (head_dim + 2);
}

}  // namespace pyruntime
