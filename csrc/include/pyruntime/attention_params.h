// What the CUDA kernel of decode attention reads.
#pragma once

#include <cstdint>

namespace pyruntime {

// out[s] = softmax(scale * q[s] keys^T) values over the positions of sequence s: one query row a sequence, which stands
// at the end of its context. Rows are contiguous, strides count elements. Of `page_table` and the pages only what lies
// within a sequence's context and window is read; `contexts` are at least 1.
struct AttentionParams {
    const void* q;                   // [num_sequences, num_heads * head_dim]
    void* out;                       // [num_sequences, num_heads * head_dim]
    const void* keys;                // [pages, page_size, num_kv_heads, head_dim]
    const void* values;              // as keys
    const std::int32_t* contexts;    // [num_sequences]
    const std::int32_t* page_table;  // [num_sequences, table_stride]
    float* partials;                 // attention_partials() floats, undefined
    std::uint32_t* counters;         // a zero for each item, left zero
    const void* prefetch;            // weights that a later kernel reads, brought into L2
    std::int64_t prefetch_bytes;     // 0: none
    std::int64_t q_stride;
    std::int64_t out_stride;
    std::int64_t table_stride;
    std::int32_t num_sequences;
    std::int32_t num_heads;
    std::int32_t num_kv_heads;
    std::int32_t head_dim;     // 64, 96, 128 or 256
    std::int32_t page_size;    // a multiple of 16
    std::int32_t window;       // positions that a query sees, its own included; 0: all
    std::int32_t blocks;       // of the grid
    std::int32_t least_tiles;  // in a block's run
    std::int32_t dtype;        // kFloat16 or kBfloat16
    std::int32_t early;        // whether it may start before the kernel in front has ended
    float scale;
    float softcap;  // scores become softcap * tanh(score / softcap); 0: they stay
};

}  // namespace pyruntime
