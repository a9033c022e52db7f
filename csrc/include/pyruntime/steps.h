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

// positions that attention takes between two updates of its running maximum
constexpr std::int64_t kAttentionBlock = 64;

enum NormKind : std::int32_t { kNoNorm = 0, kRms = 1, kLayerNorm = 2 };
enum Activation : std::int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };

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
// and the last unit is zero. `bias` has a value for each output of each panel, or is null.
struct Panels {
    const std::uint32_t* words;
    const float* bias;
    std::int64_t inputs;
    std::int64_t outputs;
    std::int32_t dtype;  // kFloat32 or kBfloat16
};

inline std::int64_t num_panels(const Panels& panels) {
    return (panels.outputs + kPanel - 1) / kPanel;
}

inline std::int64_t units_of(std::int32_t dtype, std::int64_t inputs) {
    return dtype == kFloat32 ? inputs : (inputs + 1) / 2;
}

// out = table[token] * scale; the table is row-major, or in panels where the head shares it
struct EmbedStep {
    const void* table;
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

// where the values of queries, keys or values come from: a column of the product, or one of these
constexpr std::int64_t kNotComputed = -1;
constexpr std::int64_t kMergedAway = -2;  // the normed input itself

// queries to `out`, keys and values to cache slot `slot`
struct QkvRopeStep {
    NormWeights norm;
    Panels matrix;  // the projections that exist, one after the other; no outputs where none does
    NormWeights q_norm, k_norm;
    std::int64_t in_size;
    std::int64_t q_column, k_column, v_column;
    std::int64_t num_heads, num_kv_heads, head_dim;
    std::int64_t rope_half;  // pairs of values that turn
    std::int32_t rotary;     // number of the table of angles, or -1
    std::int32_t slot;
    std::int32_t cache_dtype;
    Place in, out;
};

// whether a projection was merged away, so that the normed input is needed as it is
inline bool takes_input(const QkvRopeStep& step) {
    return step.q_column == kMergedAway || step.k_column == kMergedAway || step.v_column == kMergedAway;
}

// out = attention of the queries `in` over cache slot `slot`; softcap 0 and window 0 are none
struct AttentionStep {
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
