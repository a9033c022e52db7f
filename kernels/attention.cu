// Decode attention over paged keys and values, split over all processors (CUDA).
//
// attention_schedule.h says which block works on which tiles. In a block, each warp takes 16 neighbouring positions (a
// slab) of every tile, with its own pipeline of copies and its own softmax; nothing meets before the block's part of an
// item is done. Query heads are the 16 rows of the matrix products.
#include "attention_softmax.cuh"
#include "attention_tiles.cuh"
#include "pyruntime/params.h"

namespace pyruntime {
namespace {

// Where the parts of an item leave what they found; see attention_partials.
struct Partials {
    float* mixes;
    float* stats;
    int heads;
    int head_dim;

    __device__ Partials(const AttentionParams& p)
        : mixes(p.partials), heads(heads_per_item(p.num_heads, p.num_kv_heads)), head_dim(p.head_dim) {
        stats = mixes + attention_places(num_blocks()) * heads * head_dim;
    }
    __device__ float* mix(std::int64_t place, int row) const { return mixes + (place * heads + row) * head_dim; }
    // the highest score and the sum
    __device__ float* stat(std::int64_t place, int row) const { return stats + (place * heads + row) * 2; }
};

template <typename T>
__device__ void store_four(T* to, float a, float b, float c, float d) {
    store(reinterpret_cast<std::uint64_t*>(to), static_cast<std::uint64_t>(pack<T>(c, d)) << 32 | pack<T>(a, b));
}

template <typename T, int kHeadDim>
__device__ void store_whole(const Together<T, kHeadDim>& found, T* out, int num_rows) {
    constexpr int kFours = kHeadDim / 4;
    for (int idx = thread_idx(); idx < num_rows * kFours; idx += num_threads()) {
        const int row = idx / kFours;
        const int column = idx % kFours * 4;
        const float* mix = found.mix + row * Shape<kHeadDim>::kMixPitch + column;
        const float factor = 1.0f / found.sum_of(row);
        store_four(out + row * kHeadDim + column, factor * mix[0], factor * mix[1], factor * mix[2], factor * mix[3]);
    }
}

template <typename T, int kHeadDim>
__device__ void store_part(const Together<T, kHeadDim>& found, const Partials& partials, std::int64_t place,
                           int num_rows) {
    constexpr int kFours = kHeadDim / 4;
    for (int idx = thread_idx(); idx < num_rows * kFours; idx += num_threads()) {
        const int row = idx / kFours;
        const int column = idx % kFours * 4;
        store_16(partials.mix(place, row) + column, load_16(found.mix + row * Shape<kHeadDim>::kMixPitch + column));
    }
    for (int row = thread_idx(); row < num_rows; row += num_threads()) {
        store(partials.stat(place, row), found.highest_of(row));
        store(partials.stat(place, row) + 1, found.sum_of(row));
    }
}

// One warp brings together the parts of one row, in their order.
template <typename T, int kHeadDim>
__device__ void combine_row(const Partials& partials, Parts parts, int row, T* out) {
    constexpr int kFours = (kHeadDim / 4 + kWarpSize - 1) / kWarpSize;  // of each lane
    const int lane = lane_idx();
    float top = -INFINITY;
    for (int part = lane; part < parts.count; part += kWarpSize) {
        top = fmaxf(top, load_l2(partials.stat(partial_place(parts, part), row)));
    }
    top = warp_max(top);
    float sum = 0.0f;
    float mix[kFours][4] = {};
    for (int first = 0; first < parts.count; first += kWarpSize) {
        float weight = 0.0f;
        if (first + lane < parts.count) {
            const float* stat = partials.stat(partial_place(parts, first + lane), row);
            weight = exp2f(load_l2(stat) - top);
            sum += weight * load_l2(stat + 1);
        }
        const int count = parts.count - first < kWarpSize ? parts.count - first : kWarpSize;
#pragma unroll 8
        for (int idx = 0; idx < count; ++idx) {
            const float factor = shuffle(weight, idx);
            const float* from = partials.mix(partial_place(parts, first + idx), row);
#pragma unroll
            for (int four = 0; four < kFours; ++four) {
                const int column = 4 * (lane + four * kWarpSize);
                if (column < kHeadDim) {
                    const Words words = load_l2_16(from + column);
#pragma unroll
                    for (int each = 0; each < 4; ++each) {
                        mix[four][each] += factor * as_float(words.word[each]);
                    }
                }
            }
        }
    }
    const float factor = 1.0f / warp_sum(sum);
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
        const int column = 4 * (lane + four * kWarpSize);
        if (column < kHeadDim) {
            const float (&m)[4] = mix[four];
            store_four(out + column, factor * m[0], factor * m[1], factor * m[2], factor * m[3]);
        }
    }
}

// The block has done its tiles of an item, whose tiles begin at number `begin` of all: to the output, or to the other
// parts.
template <typename T, int kHeadDim>
__device__ void finish(const Step& step, const Cursor& at, int begin, int per_block, const Softmax<T, kHeadDim>& own,
                       const Together<T, kHeadDim>& found) {
    const AttentionParams& p = step.p;
    const Heads heads(p, at.item);
    T* out = static_cast<T*>(p.out) + at.sequence * p.out_stride + static_cast<std::int64_t>(heads.first) * kHeadDim;
    const Parts parts = parts_of(begin, begin + at.tiles.end - at.tiles.begin, per_block);
    found.gather(own, heads.count);
    if (parts.count == 1) {
        store_whole(found, out, heads.count);
    } else {
        const Partials partials(p);
        store_part(found, partials, partial_place(parts, block_idx() - parts.first_block), heads.count);
        std::uint32_t* counter = p.counters + static_cast<std::int64_t>(at.sequence) * step.items + at.item;
        if (is_last_arrival(counter, static_cast<std::uint32_t>(parts.count), found.flag)) {
            for (int row = warp_idx(); row < heads.count; row += num_threads() / kWarpSize) {
                combine_row<T, kHeadDim>(partials, parts, row, out + row * kHeadDim);
            }
        }
    }
    // the next item overwrites what slower warps still read
    sync_threads();
}

// this block's share of the weights that a later kernel reads
__device__ inline void prefetch(const AttentionParams& p) {
    constexpr std::int64_t kLine = 128;
    const auto* weights = static_cast<const unsigned char*>(p.prefetch);
    const std::int64_t all_threads = static_cast<std::int64_t>(num_blocks()) * num_threads();
    const std::int64_t own = static_cast<std::int64_t>(block_idx()) * num_threads() + thread_idx();
    for (std::int64_t at = own * kLine; at < p.prefetch_bytes; at += all_threads * kLine) {
        prefetch_l2(weights + at);
    }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Shape<kHeadDim>::kThreads) attention_kernel(AttentionParams p) {
    using S = Shape<kHeadDim>;
    prefetch(p);
    wait_for_inputs();
    const Step step{p, S::kTile, items_per_sequence(p.num_heads, p.num_kv_heads)};
    const int num_tiles = step.num_tiles();
    const int per_block = tiles_per_block(num_tiles, num_blocks(), p.least_tiles);
    const int first = block_idx() * per_block;
    const int last = first + per_block < num_tiles ? first + per_block : num_tiles;
    if (first >= last) {
        let_next_start();
        return;
    }
    T* const slabs = reinterpret_cast<T*>(shared_memory()) + warp_idx() * S::kStages * 2 * S::kSlabSize;
    const auto stage = [&](int number) { return slabs + (number - first) % S::kStages * 2 * S::kSlabSize; };
    const Together<T, kHeadDim> found(shared_memory());
    T* const q = reinterpret_cast<T*>(found.mix);

    Cursor now;
    now.find(step, first);
    Cursor coming = now;
    int page = coming.page(step);
    int copied = first;
    const auto copy_next = [&] {
        if (copied < last) {
            copy_slab<T, kHeadDim>(step, coming, page, stage(copied));
            if (++copied < last) {
                coming.advance(step);
                // asked for here, needed at the next call
                page = coming.page(step);
            }
        }
        commit_copies();
    };
    for (int number = 1; number < S::kStages; ++number) {
        copy_next();
    }
    for (int number = first; number < last;) {
        const int begin = number - (now.tile - now.tiles.begin);
        const int end = begin + now.tiles.end - now.tiles.begin;
        const int own_last = end < last ? end : last;
        copy_queries<T, kHeadDim>(p, now, q);
        Softmax<T, kHeadDim> own;
        for (; number < own_last; ++number, ++now.tile) {
            copy_next();
            wait_copies<S::kStages - 1>();
            sync_warp();
            const Tiles visible = now.visible_rows(step);
            if (visible.begin < visible.end) {
                own.add(p, q, stage(number), visible);
            }
            // all lanes have read the slab before it is overwritten
            sync_warp();
        }
        if (number == last) {
            let_next_start();
        }
        finish(step, now, begin, per_block, own, found);
        if (number < last) {
            --now.tile;
            now.advance(step);
        }
    }
}

template <typename T, int kHeadDim>
int launch_attention(const AttentionParams& params, void* stream) {
    LaunchShape shape{};
    shape.blocks = static_cast<unsigned>(params.blocks);
    shape.threads = Shape<kHeadDim>::kThreads;
    shape.shared_bytes = static_cast<std::size_t>(
        attention_shared_bytes(kHeadDim, heads_per_item(params.num_heads, params.num_kv_heads)));
    shape.early = params.early != 0;
    return launch("attention", attention_kernel<T, kHeadDim>, shape, params, stream);
}

template <typename T>
int launch_head_dim(const AttentionParams& params, void* stream) {
    switch (params.head_dim) {
        case 64:
            return launch_attention<T, 64>(params, stream);
        case 96:
            return launch_attention<T, 96>(params, stream);
        case 128:
            return launch_attention<T, 128>(params, stream);
        default:
            return launch_attention<T, 256>(params, stream);
    }
}

}  // namespace
}  // namespace pyruntime

// plain C: returns a cudaError_t. The bindings check what AttentionParams says.
extern "C" int pyruntime_launch_attention(const pyruntime::AttentionParams* params, void* stream) {
    return params->dtype == pyruntime::kFloat16 ? pyruntime::launch_head_dim<pyruntime::Float16>(*params, stream)
                                                : pyruntime::launch_head_dim<pyruntime::Bfloat16>(*params, stream);
}
