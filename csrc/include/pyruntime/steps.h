// What the CPU executor runs: one plain struct per op, made once per plan, and what one run of a plan works on.
// Only fixed-width types stand here, so that every compiled copy of a kernel sees the same layout.
#pragma once

#include <cstdint>

#include "pyruntime/params.h"

namespace pyruntime {

// A buffer of the plan, by number; rows are contiguous float32.
using Place = std::int32_t;
constexpr Place kNoPlace = -1;

enum View : std::int32_t { kAllRows = 0, kWantedRows = 1 };
constexpr int kNumViews = 2;

// outputs of one panel, and the most rows that share one read of it
constexpr std::int64_t kPanel = 16;
constexpr std::int64_t kMaxTileRows = 16;
// panels that one task takes at least, and that are equally long; even, so that a gate and its up stay together
constexpr std::int64_t kGroup = 4;

// positions that attention takes between two updates of its running maximum
constexpr std::int64_t kAttentionBlock = 64;

enum NormKind : std::int32_t { kNoNorm = 0, kRms = 1, kLayerNorm = 2 };

// y = (x - mean) / sqrt(variance + eps) * gain + bias; RMS leaves the mean out. gain and bias may be null; a gain that
// is stored as 1 + weight has the 1 added already. kNoNorm: y = x.
struct NormWeights {
    const float* gain;
    const float* bias;
    std::int64_t size;
    float eps;
    std::int32_t kind;
};

// A matrix [outputs, inputs] in panels of 16 outputs; a panel holds 16 words of 32 bits for each unit of inputs. A unit
// is one input for float32, two for bfloat16 (the lower half of a word is the earlier input). What pads the last panel
// and the last unit is zero. `bias` has a value for each output of each panel, or is null. Where `starts` is not null,
// some outputs read only the first inputs (triangular maps): it counts the words before each group of kGroup panels,
// and all of them; the panels of a group are as long as its longest output needs.
struct Panels {
    const std::uint32_t* words;
    const float* bias;
    const std::int64_t* starts;
    std::int64_t inputs;
    std::int64_t outputs;
    std::int32_t dtype;  // kFloat32 or kBfloat16
};

inline std::int64_t num_panels(const Panels& panels) {
    return (panels.outputs + kPanel - 1) / kPanel;
}

inline std::int64_t num_groups(const Panels& panels) {
    return (num_panels(panels) + kGroup - 1) / kGroup;
}

inline std::int64_t units_of(std::int32_t dtype, std::int64_t inputs) {
    return dtype == kFloat32 ? inputs : (inputs + 1) / 2;
}

// out = table[token] * scale (+ position_table[position]); the table is row-major, or in panels where the head shares
// it
struct EmbedStep {
    const void* table;
    const void* position_table;  // [num_positions, size] or null
    std::int64_t num_positions;
    std::int64_t size;
    std::int32_t dtype;
    std::int32_t in_panels;
    float scale;
    Place out;
};

// out = norm(in) (+ residual)
struct NormStep {
    NormWeights norm;
    Place in, residual, out;
};

// out = matrix norm(in) + bias (+ residual)
struct LinearStep {
    NormWeights norm;
    Panels matrix;
    Place in, residual, out;
};

// out = softcap(matrix norm(in) + bias) on the wanted rows; softcap 0 is none
struct HeadStep {
    NormWeights norm;
    Panels matrix;
    float softcap;
    Place in, out;
};

constexpr std::int64_t kNotComputed = -1;

// Where the values of queries, keys or values come from. Values of the normed input are numbered from 0, those of the
// product behind them. `column` is the first of neighbours, or kNotComputed; `columns`, where it is not null, has a
// number for each value.
struct ValueSource {
    std::int64_t column;
    const std::int32_t* columns;
};

// queries to `out`, keys and values to cache slot `slot`
struct QkvRopeStep {
    NormWeights norm;
    Panels matrix;  // the projections that exist, one after the other; no outputs where none does
    NormWeights q_norm, k_norm, v_norm;
    std::int64_t in_size;
    ValueSource q, k, v;
    std::int64_t num_heads, num_kv_heads, head_dim;
    std::int64_t rope_half;  // pairs of values that turn
    std::int32_t rotary;     // number of the table of angles, or -1
    std::int32_t slot;
    std::int32_t cache_dtype;
    Place in, out;
};

// whether some of the values are those of the normed input
inline bool takes_input(const QkvRopeStep& step) {
    const auto reads = [&](const ValueSource& source) {
        return source.columns != nullptr || (source.column != kNotComputed && source.column < step.in_size);
    };
    return reads(step.q) || reads(step.k) || reads(step.v);
}

// out = attention of the queries `in` over cache slot `slot`; softcap 0 and window 0 are none. A score gets the head's
// slope times (position seen - own position). Shaped attention (He & Hofmann 2023) is softmax_gain * the softmax's mix
// + identity_gain * the own value - centre_gain * the mean of the visible values; the gains are all there, or none.
struct AttentionStep {
    const float* slopes;  // [num_heads] or null, like the gains
    const float *softmax_gain, *identity_gain, *centre_gain;
    std::int64_t num_heads, num_kv_heads, head_dim;
    std::int64_t window;
    float scale, softcap;
    std::int32_t slot;
    std::int32_t cache_dtype;
    Place in, out;
};

// out = down(sub(act(gate n) * (up n))) (+ residual), n = norm(in). Gated: panels of gate and up alternate in gate_up.
struct MlpStep {
    NormWeights norm, sub;
    Panels gate_up, down;
    std::int32_t gated;
    std::int32_t activation;
    Place in, residual, out;
};

// out = in + other
struct AddStep {
    std::int64_t width;
    Place in, other, out;
};

// out = the wanted rows of `in`
struct GatherStep {
    std::int64_t width;
    Place in, out;
};

// Cosines and sines of the angles position * frequency of one kind of rope, for the rows of one view.
struct Rotary {
    const double* frequencies;  // [half], radians per position
    std::int64_t half;
    double factor;  // multiplies cosines and sines
    std::int32_t view;
};

// Rows [begin, end) of a view belong to one sequence whose cache pages are listed.
// cache.
struct SpanRows {
    std::int64_t begin, end;
    const std::int64_t* pages;
};

struct ViewRows {
    std::int64_t num_rows;
    const std::int64_t* token_ids;
    const std::int64_t* positions;
    const std::int64_t* index;  // numbers among all rows
    const std::int64_t* slots;  // page * page_size + offset
    const SpanRows* spans;
    std::int64_t num_spans;
};

// keys [pages, kv heads, head_dim, page_size], values [pages, kv heads, page_size, head_dim]
struct KvPool {
    void* keys;
    void* values;
};

// What all workers of one run share; each has `own_floats` floats of its own at own + index * own_floats.
struct RunContext {
    ViewRows views[kNumViews];
    float* const* places;
    const KvPool* pools;
    const float* const* rotaries;  // per table: [rows][cosines of half pairs, sines of half pairs]
    std::int64_t page_size;        // a multiple of 16
    std::uint32_t* packed;         // input of a product, in tiles of rows
    std::uint32_t* hidden;         // the same, for the second product of an MLP
    float* wide;                   // row-major result of a product
    float* normed;                 // row-major normed input
    float* own;
    std::int64_t own_floats;
};

}  // namespace pyruntime
