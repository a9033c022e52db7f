// The fused MLP block: norm, gate and up, activation, down, residual.
#include "cpu/matmul.h"

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {
namespace {

Vec activate(Vec x, int32_t activation) {
    switch (activation) {
        case kSilu:
            return x / (1.0f + exp(-x));
        case kGeluTanh:
            // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)
            return 0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case kGelu:
            for (int lane = 0; lane < kLanes; ++lane) {
                x[lane] = 0.5f * x[lane] * (1.0f + erff(x[lane] * 0.70710678118654752f));
            }
            return x;
        default:
            // written so that a NaN stays one
            const Vec relu = x < 0.0f ? Vec{} : x;
            return activation == kRelu2 ? relu * relu : relu;
    }
}

struct HiddenOut {
    uint32_t* packed;  // input of down, in tiles
    float* wide;       // or row-major, where a norm comes between
    int64_t size;
    int64_t units;
    int32_t dtype;
    int32_t gated;
    int32_t activation;
};

// one panel of hidden values of a tile's row
void store_panel(const HiddenOut& to, const Tile& tile, int64_t r, int64_t column, const float* values) {
    const int64_t left = to.size - column;
    const int64_t count = left < kPanel ? left : kPanel;
    if (to.wide != nullptr) {
        float* row = to.wide + (tile.first_row + r) * to.size + column;
        __builtin_memcpy(row, values, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    const int64_t unit = to.dtype == kFloat32 ? column : column / 2;
    pack_row(values, count, to.dtype, to.packed + tile.first_row * to.units, tile.rows, r, unit);
}

void store_hidden(const void* context, const Tile& tile, int64_t first_panel, int64_t panels, const float* values) {
    const HiddenOut& to = *static_cast<const HiddenOut*>(context);
    const int64_t width = to.gated ? 2 : 1;
    for (int64_t panel = 0; panel < panels; panel += width) {
        const int64_t column = (first_panel + panel) / width * kPanel;
        for (int64_t r = 0; r < tile.rows; ++r) {
            const float* gate = values + (r * kGroup + panel) * kPanel;
            float hidden[kPanel];
            for (int64_t k = 0; k < kPanel; k += kLanes) {
                const Vec activated = activate(load(gate + k), to.activation);
                store(hidden + k, to.gated ? activated * load(gate + kPanel + k) : activated);
            }
            store_panel(to, tile, r, column, hidden);
        }
    }
}

}  // namespace

void mlp(const MlpStep& step, const RunContext& run, View view, const Worker& worker) {
    const int64_t rows = run.views[view].num_rows;
    const int32_t dtype = step.down.dtype;
    const uint32_t* packed =
        norm_and_pack(step.norm, run.places[step.in], step.gate_up.inputs, rows, dtype, nullptr, run, worker);
    const int64_t size = step.down.inputs;
    const bool normed = step.sub.kind != kNoNorm;
    const HiddenOut hidden{run.hidden,     normed ? run.wide : nullptr, size, units_of(dtype, size), dtype, step.gated,
                           step.activation};
    matmul(step.gate_up, packed, rows, store_hidden, &hidden, worker);
    const uint32_t* normed_hidden =
        normed ? norm_and_pack(step.sub, run.wide, size, rows, dtype, nullptr, run, worker) : run.hidden;
    const float* residual = step.residual == kNoPlace ? nullptr : run.places[step.residual];
    const RowsOut to{run.places[step.out], residual, step.down.outputs};
    matmul(step.down, normed_hidden, rows, store_rows, &to, worker);
}

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
