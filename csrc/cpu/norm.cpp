// RMSNorm and LayerNorm, alone or in front of a product.
#include "cpu/matmul.h"

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {
namespace {

float sum_of(const float* row, int64_t count) {
    Vec sums = {};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        sums += load(row + k);
    }
    float tail = 0.0f;
    for (; k < count; ++k) {
        tail += row[k];
    }
    return add_lanes(sums) + tail;
}

float sum_of_squares(const float* row, float mean, int64_t count) {
    Vec sums = {};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        const Vec x = load(row + k) - mean;
        sums += x * x;
    }
    float tail = 0.0f;
    for (; k < count; ++k) {
        tail += (row[k] - mean) * (row[k] - mean);
    }
    return add_lanes(sums) + tail;
}

}  // namespace

void norm_row(const NormWeights& norm, const float* row, float* out) {
    const float size = static_cast<float>(norm.size);
    const float mean = norm.kind == kLayerNorm ? sum_of(row, norm.size) / size : 0.0f;
    const float scale = 1.0f / sqrtf(sum_of_squares(row, mean, norm.size) / size + norm.eps);
    for (int64_t k = 0; k < norm.size; ++k) {
        out[k] = (row[k] - mean) * scale;
    }
    if (norm.gain != nullptr) {
        for (int64_t k = 0; k < norm.size; ++k) {
            out[k] *= norm.gain[k];
        }
    }
    if (norm.bias != nullptr) {
        for (int64_t k = 0; k < norm.size; ++k) {
            out[k] += norm.bias[k];
        }
    }
}

const uint32_t* norm_and_pack(const NormWeights& norm, const float* in, int64_t width, int64_t rows, int32_t dtype,
                              float* normed, const RunContext& run, const Worker& worker) {
    const int64_t units = units_of(dtype, width);
    float* own = run.own + worker.index * run.own_floats;
    const auto pack = [&](int64_t idx, uint32_t* packed) {
        const Tile tile = tile_at(rows, idx);
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t row = tile.first_row + r;
            const float* values = in + row * width;
            float* to = normed == nullptr ? own : normed + row * width;
            if (norm.kind != kNoNorm) {
                norm_row(norm, values, to);
                values = to;
            } else if (normed != nullptr) {
                __builtin_memcpy(to, values, static_cast<size_t>(width) * sizeof(float));
            }
            pack_row(values, width, dtype, packed + tile.first_row * units, tile.rows, r, 0);
        }
    };
    if (num_tiles(rows) == 1 && normed == nullptr) {
        // one tile is one worker's work: that each does it for itself costs no more, and nobody waits
        uint32_t* packed = reinterpret_cast<uint32_t*>(own + (width + kPanel - 1) / kPanel * kPanel);
        pack(0, packed);
        return packed;
    }
    for (int64_t begin, end; take(worker, num_tiles(rows), 1, &begin, &end);) {
        for (int64_t idx = begin; idx < end; ++idx) {
            pack(idx, run.packed);
        }
    }
    wait_for_all(worker);
    return run.packed;
}

void norm(const NormStep& step, const RunContext& run, View view, const Worker& worker) {
    const int64_t size = step.norm.size;
    for (int64_t begin, end; take(worker, run.views[view].num_rows, 1, &begin, &end);) {
        for (int64_t row = begin; row < end; ++row) {
            float* out = run.places[step.out] + row * size;
            norm_row(step.norm, run.places[step.in] + row * size, out);
            if (step.residual != kNoPlace) {
                const float* residual = run.places[step.residual] + row * size;
                for (int64_t k = 0; k < size; ++k) {
                    out[k] += residual[k];
                }
            }
        }
    }
    wait_for_all(worker);
}

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
