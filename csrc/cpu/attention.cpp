// Causal attention of queries over the pages of their sequence, by blocks of positions with a running softmax
// (Milakov & Gimelshein 2018; Dao et al. 2022). Everything is float32 but what the cache holds.
#include "cpu/matmul.h"

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {
namespace {

// no score is below it, and the distance to a hidden one is infinite, not undefined
constexpr float kLowest = -3.40282347e38f;

// The queries of one task: `tile` counts (row, query head of the key head) pairs of its span, rows first.
struct Task {
    const SpanRows* span;
    int64_t kv_head;
    Tile tile;
};

int64_t tasks_in(const AttentionStep& step, const SpanRows& span) {
    return num_tiles((span.end - span.begin) * (step.num_heads / step.num_kv_heads)) * step.num_kv_heads;
}

int64_t num_tasks(const AttentionStep& step, const ViewRows& rows) {
    int64_t total = 0;
    for (int64_t i = 0; i < rows.num_spans; ++i) {
        total += tasks_in(step, rows.spans[i]);
    }
    return total;
}

Task task_at(const AttentionStep& step, const ViewRows& rows, int64_t idx) {
    const SpanRows* span = rows.spans;
    for (; idx >= tasks_in(step, *span); ++span) {
        idx -= tasks_in(step, *span);
    }
    const int64_t queries = (span->end - span->begin) * (step.num_heads / step.num_kv_heads);
    // later rows see more positions: they go first, so that no worker ends with the longest task
    const int64_t tile = num_tiles(queries) - 1 - idx / step.num_kv_heads;
    return {span, idx % step.num_kv_heads, tile_at(queries, tile)};
}

// [first, last] positions that a query sees
struct Range {
    int64_t first, last;
};

// What one worker keeps of its task, in floats of its own.
struct State {
    float* queries;  // [head_dim][rows of the tile]
    float* weights;  // [rows][kAttentionBlock]: scores, then their exponentials
    float* sums;     // [rows][head_dim]: mix of values so far
    float* visible;  // [rows][kAttentionBlock]: 1 where the row sees a position, else 0; shaped attention only
    float* means;    // [rows][head_dim]: sum of the visible values so far; shaped attention only
    int64_t head[kTileRows];
    float maximum[kTileRows];
    float total[kTileRows];
    Range seen[kTileRows];
};

template <class Value>
struct Block {
    const AttentionStep* step;
    const RunContext* run;
    const Task* task;

    // 16 positions of the task's key head, from position `strip * 16`
    int64_t offset(int64_t strip) const {
        const int64_t position = strip * kPanel;
        const int64_t page = task->span->pages[position / run->page_size];
        return (page * step->num_kv_heads + task->kv_head) * step->head_dim * run->page_size;
    }
    const Value* keys(int64_t strip) const {
        const Value* pool = static_cast<const Value*>(run->pools[step->slot].keys);
        return pool + offset(strip) + strip * kPanel % run->page_size;
    }
    const Value* values(int64_t strip) const {
        const Value* pool = static_cast<const Value*>(run->pools[step->slot].values);
        return pool + offset(strip) + strip * kPanel % run->page_size * step->head_dim;
    }
};

inline float widen(float value) {
    return value;
}
inline float widen(uint16_t value) {
    return widen_bfloat16(value);
}

// scores of 16 positions: keys [head_dim][page_size], queries [head_dim][M]
template <class Value, int M>
void score_strip(const Value* keys, int64_t page_size, const float* queries, int64_t head_dim, float* scores) {
    Vec sums[M][kVecs] = {};
    for (int64_t d = 0; d < head_dim; ++d, keys += page_size, queries += M) {
        Vec key[kVecs];
#pragma GCC unroll 32
        for (int v = 0; v < kVecs; ++v) {
            key[v] = load(keys + v * kLanes);
        }
#pragma GCC unroll 32
        for (int r = 0; r < M; ++r) {
#pragma GCC unroll 32
            for (int v = 0; v < kVecs; ++v) {
                sums[r][v] += key[v] * queries[r];
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 32
        for (int v = 0; v < kVecs; ++v) {
            store(scores + r * kAttentionBlock + v * kLanes, sums[r][v]);
        }
    }
}

// adds the weighted values of `count` positions to P panels of the sums
template <class Value, int M, int P>
void mix_panels(const Value* values, int64_t head_dim, const float* weights, int64_t count, float* sums_at) {
    Vec sums[M][P * kVecs];
#pragma GCC unroll 32
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 32
        for (int v = 0; v < P * kVecs; ++v) {
            sums[r][v] = load(sums_at + r * head_dim + v * kLanes);
        }
    }
    for (int64_t position = 0; position < count; ++position, values += head_dim) {
        Vec value[P * kVecs];
#pragma GCC unroll 32
        for (int v = 0; v < P * kVecs; ++v) {
            value[v] = load(values + v * kLanes);
        }
#pragma GCC unroll 32
        for (int r = 0; r < M; ++r) {
#pragma GCC unroll 32
            for (int v = 0; v < P * kVecs; ++v) {
                sums[r][v] += value[v] * weights[r * kAttentionBlock + position];
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 32
        for (int v = 0; v < P * kVecs; ++v) {
            store(sums_at + r * head_dim + v * kLanes, sums[r][v]);
        }
    }
}

template <class Value, int M>
void mix_strip(const Value* values, int64_t head_dim, const float* weights, int64_t count, float* sums) {
    constexpr int kAtOnce = kSums / (M * kVecs) >= 2 ? 2 : 1;
    int64_t d = 0;
    for (; d + kAtOnce * kPanel <= head_dim; d += kAtOnce * kPanel) {
        mix_panels<Value, M, kAtOnce>(values + d, head_dim, weights, count, sums + d);
    }
    for (; d + kPanel <= head_dim; d += kPanel) {
        mix_panels<Value, M, 1>(values + d, head_dim, weights, count, sums + d);
    }
    for (; d < head_dim; ++d) {
        for (int r = 0; r < M; ++r) {
            for (int64_t position = 0; position < count; ++position) {
                sums[r * head_dim + d] +=
                    weights[r * kAttentionBlock + position] * widen(values[position * head_dim + d]);
            }
        }
    }
}

// scores to exponentials, for one row and the positions [begin, begin + count); rescales what was summed before
void soften(const AttentionStep& step, State& state, int64_t r, int64_t begin, int64_t count) {
    float* weights = state.weights + r * kAttentionBlock;
    // counted from the block's begin; the block's width is as good as any place behind it
    const auto in_block = [&](int64_t position) {
        const int64_t at = position - begin;
        return static_cast<int32_t>(at < -1 ? -1 : at > kAttentionBlock ? kAttentionBlock : at);
    };
    const int32_t first = in_block(state.seen[r].first), last = in_block(state.seen[r].last);
    const bool hides = first > 0 || last < count - 1;
    for (int64_t k = 0; k < count; k += kLanes) {
        Vec scores = load(weights + k) * step.scale;
        if (step.softcap != 0.0f) {
            scores = step.softcap * tanh(scores / step.softcap);
        }
        const IntVec position = lane_numbers() + static_cast<int32_t>(k);
        if (step.slopes != nullptr) {
            const IntVec distance = position + static_cast<int32_t>(begin - state.seen[r].last);
            scores += step.slopes[state.head[r]] * __builtin_convertvector(distance, Vec);
        }
        if (hides) {
            scores = (position < first) | (position > last) ? splat(-INFINITY) : scores;
        }
        store(weights + k, scores);
        if (step.softmax_gain != nullptr) {
            const Vec one = splat(1.0f);
            store(state.visible + r * kAttentionBlock + k, (position < first) | (position > last) ? Vec{} : one);
        }
    }
    Vec best = splat(state.maximum[r]);
    for (int64_t k = 0; k < count; k += kLanes) {
        best = max(load(weights + k), best);
    }
    const float maximum = max_lanes(best);
    Vec total = {};
    for (int64_t k = 0; k < count; k += kLanes) {
        const Vec weight = exp(load(weights + k) - maximum);
        store(weights + k, weight);
        total += weight;
    }
    const float shrink = expf(state.maximum[r] - maximum);
    state.maximum[r] = maximum;
    state.total[r] = state.total[r] * shrink + add_lanes(total);
    if (shrink != 1.0f) {
        float* sums = state.sums + r * step.head_dim;
        for (int64_t d = 0; d < step.head_dim; ++d) {
            sums[d] *= shrink;
        }
    }
}

// softmax_gain * mix + identity_gain * own value - centre_gain * mean, in place of the mix
template <class Value>
void shape_row(const Block<Value>& block, State& state, int64_t r) {
    const AttentionStep& step = *block.step;
    const int64_t head = state.head[r];
    const Range seen = state.seen[r];
    const float mixed = step.softmax_gain[head] / state.total[r];
    const float centre = step.centre_gain[head] / static_cast<float>(seen.last - seen.first + 1);
    const Value* own = block.values(seen.last / kPanel) + seen.last % kPanel * step.head_dim;
    float* sums = state.sums + r * step.head_dim;
    for (int64_t d = 0; d < step.head_dim; ++d) {
        sums[d] =
            mixed * sums[d] + step.identity_gain[head] * widen(own[d]) - centre * state.means[r * step.head_dim + d];
    }
    state.total[r] = 1.0f;
}

template <class Value, int M>
void attend(const Block<Value>& block, State& state) {
    const AttentionStep& step = *block.step;
    const bool shaped = step.softmax_gain != nullptr;
    Range all = state.seen[0];
    for (int r = 1; r < M; ++r) {
        all.first = state.seen[r].first < all.first ? state.seen[r].first : all.first;
        all.last = state.seen[r].last > all.last ? state.seen[r].last : all.last;
    }
    const int64_t last_strip = all.last / kPanel;
    constexpr int64_t kStrips = kAttentionBlock / kPanel;
    // blocks begin at fixed positions: what a row adds up must not depend on the rows beside it
    for (int64_t strip = all.first / kAttentionBlock * kStrips; strip <= last_strip; strip += kStrips) {
        const int64_t strips = last_strip - strip + 1 < kStrips ? last_strip - strip + 1 : kStrips;
        for (int64_t i = 0; i < strips; ++i) {
            score_strip<Value, M>(block.keys(strip + i), block.run->page_size, state.queries, step.head_dim,
                                  state.weights + i * kPanel);
        }
        for (int r = 0; r < M; ++r) {
            soften(step, state, r, strip * kPanel, strips * kPanel);
        }
        for (int64_t i = 0; i < strips; ++i) {
            // behind the last position the cache holds nothing, and nothing times zero may be no number
            const int64_t left = all.last + 1 - (strip + i) * kPanel;
            const int64_t count = left < kPanel ? left : kPanel;
            const Value* values = block.values(strip + i);
            mix_strip<Value, M>(values, step.head_dim, state.weights + i * kPanel, count, state.sums);
            if (shaped) {
                mix_strip<Value, M>(values, step.head_dim, state.visible + i * kPanel, count, state.means);
            }
        }
    }
    for (int r = 0; shaped && r < M; ++r) {
        shape_row(block, state, r);
    }
}

template <class Value>
using Attend = void (*)(const Block<Value>&, State&);

template <class Value, int M = kTileRows>
Attend<Value> attend_of(int64_t rows) {
    if constexpr (M > 1) {
        return rows == M ? attend<Value, M> : attend_of<Value, M - 1>(rows);
    } else {
        return attend<Value, 1>;
    }
}

void run_task(const AttentionStep& step, const RunContext& run, const ViewRows& rows, const Task& task, float* own) {
    const int64_t group = step.num_heads / step.num_kv_heads;
    const int64_t width = step.num_heads * step.head_dim;
    const int64_t height = task.tile.rows;
    State state;
    state.queries = own;
    state.weights = state.queries + kTileRows * step.head_dim;
    state.sums = state.weights + kTileRows * kAttentionBlock;
    state.means = state.sums + kTileRows * step.head_dim;
    state.visible = state.means + kTileRows * step.head_dim;
    const bool shaped = step.softmax_gain != nullptr;
    int64_t at[kTileRows];
    for (int64_t r = 0; r < height; ++r) {
        const int64_t query = task.tile.first_row + r;
        const int64_t row = task.span->begin + query / group;
        state.head[r] = task.kv_head * group + query % group;
        at[r] = row * width + state.head[r] * step.head_dim;
        const int64_t last = rows.positions[row];
        const int64_t first = step.window == 0 || last < step.window ? 0 : last - step.window + 1;
        state.seen[r] = {first, last};
        state.maximum[r] = kLowest;
        state.total[r] = 0.0f;
        for (int64_t d = 0; d < step.head_dim; ++d) {
            state.queries[d * height + r] = run.places[step.in][at[r] + d];
            state.sums[r * step.head_dim + d] = 0.0f;
        }
        for (int64_t d = 0; shaped && d < step.head_dim; ++d) {
            state.means[r * step.head_dim + d] = 0.0f;
        }
    }
    if (step.cache_dtype == kFloat32) {
        attend_of<float>(height)(Block<float>{&step, &run, &task}, state);
    } else {
        attend_of<uint16_t>(height)(Block<uint16_t>{&step, &run, &task}, state);
    }
    for (int64_t r = 0; r < height; ++r) {
        for (int64_t d = 0; d < step.head_dim; ++d) {
            run.places[step.out][at[r] + d] = state.sums[r * step.head_dim + d] / state.total[r];
        }
    }
}

}  // namespace

void attention(const AttentionStep& step, const RunContext& run, View view, const Worker& worker) {
    const ViewRows& rows = run.views[view];
    float* own = run.own + worker.index * run.own_floats;
    for (int64_t begin, end; take(worker, num_tasks(step, rows), 1, &begin, &end);) {
        for (int64_t idx = begin; idx < end; ++idx) {
            run_task(step, run, rows, task_at(step, rows, idx), own);
        }
    }
    wait_for_all(worker);
}

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
