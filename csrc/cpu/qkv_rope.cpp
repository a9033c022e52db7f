// Norm, the projections that exist, norms of heads, rotation, and the write into the cache.
#include "cpu/matmul.h"

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {
namespace {

// norms and turns the heads of one row in place; a norm spans one head or all of them
void finish_heads(float* values, int64_t heads, const NormWeights& norm, const QkvRopeStep& step, const float* angles) {
    if (norm.kind != kNoNorm) {
        for (int64_t at = 0; at < heads * step.head_dim; at += norm.size) {
            norm_row(norm, values + at, values + at);
        }
    }
    if (angles == nullptr) {
        return;
    }
    const int64_t half = step.rope_half;
    const float* sines = angles + half;
    for (int64_t head = 0; head < heads; ++head) {
        float* first = values + head * step.head_dim;
        float* second = first + half;
        for (int64_t i = 0; i < half; ++i) {
            const float a = first[i], b = second[i];
            first[i] = a * angles[i] - b * sines[i];
            second[i] = b * angles[i] + a * sines[i];
        }
    }
}

struct CachePlace {
    int64_t page;
    int64_t offset;
    int64_t page_size;
};

template <class Value, class Convert>
void write_row(const QkvRopeStep& step, const KvPool& pool, const CachePlace& place, const float* keys,
               const float* values, Convert convert) {
    for (int64_t head = 0; head < step.num_kv_heads; ++head) {
        const int64_t block = (place.page * step.num_kv_heads + head) * step.head_dim * place.page_size;
        Value* key_to = static_cast<Value*>(pool.keys) + block + place.offset;
        Value* value_to = static_cast<Value*>(pool.values) + block + place.offset * step.head_dim;
        for (int64_t d = 0; d < step.head_dim; ++d) {
            key_to[d * place.page_size] = convert(keys[head * step.head_dim + d]);
            value_to[d] = convert(values[head * step.head_dim + d]);
        }
    }
}

struct RowSource {
    const float* product;  // [rows, width]
    const float* normed;   // [rows, in_size]
    int64_t width;
    int64_t in_size;

    float at(int64_t row, int64_t column) const {
        return column < in_size ? normed[row * in_size + column] : product[row * width + column - in_size];
    }

    void read(const ValueSource& from, int64_t row, int64_t count, float* out) const {
        if (from.columns != nullptr) {
            for (int64_t k = 0; k < count; ++k) {
                out[k] = at(row, from.columns[k]);
            }
            return;
        }
        const float* values = from.column < in_size ? normed + row * in_size + from.column
                                                    : product + row * width + from.column - in_size;
        __builtin_memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
    }
};

void finish_row(const QkvRopeStep& step, const RunContext& run, View view, const RowSource& source, int64_t row,
                float* own) {
    const ViewRows& rows = run.views[view];
    const float* angles = step.rotary < 0 ? nullptr : run.rotaries[step.rotary] + row * 2 * step.rope_half;
    const int64_t q_size = step.num_heads * step.head_dim, kv_size = step.num_kv_heads * step.head_dim;
    if (step.q.column != kNotComputed) {
        float* queries = run.places[step.out] + row * q_size;
        source.read(step.q, row, q_size, queries);
        finish_heads(queries, step.num_heads, step.q_norm, step, angles);
    }
    if (step.k.column == kNotComputed) {
        return;
    }
    float* values = own + kv_size;
    source.read(step.k, row, kv_size, own);
    source.read(step.v, row, kv_size, values);
    finish_heads(own, step.num_kv_heads, step.k_norm, step, angles);
    finish_heads(values, step.num_kv_heads, step.v_norm, step, nullptr);
    const CachePlace place{rows.slots[row] / run.page_size, rows.slots[row] % run.page_size, run.page_size};
    const KvPool& pool = run.pools[step.slot];
    if (step.cache_dtype == kFloat32) {
        write_row<float>(step, pool, place, own, values, [](float value) { return value; });
    } else {
        write_row<uint16_t>(step, pool, place, own, values,
                            [](float value) { return static_cast<uint16_t>(bfloat16_word(value) >> 16); });
    }
}

}  // namespace

void qkv_rope(const QkvRopeStep& step, const RunContext& run, View view, const Worker& worker) {
    const int64_t rows = run.views[view].num_rows;
    const float* in = run.places[step.in];
    // without a norm the input itself is what the values are taken from
    float* normed = takes_input(step) && step.norm.kind != kNoNorm ? run.normed : nullptr;
    if (step.matrix.outputs > 0 || normed != nullptr) {
        const uint32_t* packed =
            norm_and_pack(step.norm, in, step.in_size, rows, step.matrix.dtype, normed, run, worker);
        const RowsOut to{run.wide, nullptr, step.matrix.outputs};
        matmul(step.matrix, packed, rows, store_rows, &to, worker);
    }
    const RowSource source{run.wide, normed == nullptr ? in : normed, step.matrix.outputs, step.in_size};
    float* own = run.own + worker.index * run.own_floats;
    for (int64_t begin, end; take(worker, rows, 1, &begin, &end);) {
        for (int64_t row = begin; row < end; ++row) {
            finish_row(step, run, view, source, row, own);
        }
    }
    wait_for_all(worker);
}

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
