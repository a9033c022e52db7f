// Rows of the embedding table, and the two steps that only move rows: gather and add.
#include "cpu/matmul.h"

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {
namespace {

float value_at(const void* table, int32_t dtype, int64_t at) {
    return dtype == kFloat32 ? static_cast<const float*>(table)[at]
                             : widen_bfloat16(static_cast<const uint16_t*>(table)[at]);
}

void read_row(const EmbedStep& step, int64_t token, float* out) {
    const bool wide = step.dtype == kFloat32;
    if (!step.in_panels) {
        for (int64_t k = 0; k < step.size; ++k) {
            out[k] = value_at(step.table, step.dtype, token * step.size + k);
        }
        return;
    }
    // a token is one lane of its panel: its values stand a panel's width apart
    const int64_t units = units_of(step.dtype, step.size);
    const uint32_t* word = static_cast<const uint32_t*>(step.table) + token / kPanel * units * kPanel + token % kPanel;
    for (int64_t k = 0; k < step.size; ++k) {
        const uint32_t both = word[(wide ? k : k / 2) * kPanel];
        const uint32_t bits = wide ? both : k % 2 == 0 ? both << 16 : both & 0xffff0000u;
        __builtin_memcpy(out + k, &bits, sizeof bits);
    }
}

}  // namespace

void embed(const EmbedStep& step, const RunContext& run, View view, const Worker& worker) {
    const ViewRows& rows = run.views[view];
    for (int64_t begin, end; take(worker, rows.num_rows, 1, &begin, &end);) {
        for (int64_t row = begin; row < end; ++row) {
            float* out = run.places[step.out] + row * step.size;
            read_row(step, rows.token_ids[row], out);
            for (int64_t k = 0; step.scale != 1.0f && k < step.size; ++k) {
                out[k] *= step.scale;
            }
            for (int64_t k = 0; step.position_table != nullptr && k < step.size; ++k) {
                out[k] += value_at(step.position_table, step.dtype, rows.positions[row] * step.size + k);
            }
        }
    }
    wait_for_all(worker);
}

void gather(const GatherStep& step, const RunContext& run, View view, const Worker& worker) {
    const ViewRows& rows = run.views[view];
    const size_t row_bytes = static_cast<size_t>(step.width) * sizeof(float);
    for (int64_t begin, end; take(worker, rows.num_rows, 1, &begin, &end);) {
        for (int64_t row = begin; row < end; ++row) {
            const float* from = run.places[step.in] + rows.index[row] * step.width;
            __builtin_memcpy(run.places[step.out] + row * step.width, from, row_bytes);
        }
    }
    wait_for_all(worker);
}

void add(const AddStep& step, const RunContext& run, View view, const Worker& worker) {
    const float* in = run.places[step.in];
    const float* other = run.places[step.other];
    float* out = run.places[step.out];
    for (int64_t begin, end; take(worker, run.views[view].num_rows * step.width, 4096, &begin, &end);) {
        for (int64_t k = begin; k < end; ++k) {
            out[k] = in[k] + other[k];
        }
    }
    wait_for_all(worker);
}

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
