// The fused MLP block in float32. Compiled once per ISA; calls nothing but the C library and parallel_for.
#include <math.h>

#include "parallel.h"
#include "pyruntime/params.h"
#include "vec.h"

namespace pyruntime {
namespace {

// rows handled by one pass over the weights: their inputs stay in the L2 cache while a weight row is read once
constexpr int64_t kRowBlock = 16;
// outputs per task: large enough that waking a thread pays, small enough to share out evenly
constexpr int64_t kGrain = 16;

struct Block {
    const MlpParams* params;
    int64_t first_row;
    int64_t rows;

    const float* normed() const { return params->scratch + first_row * params->hidden; }
    float* activated() const { return params->scratch + params->rows * params->hidden + first_row * params->ffn; }
};

void norm_rows(void* context, int64_t begin, int64_t end) {
    const MlpParams& p = *static_cast<const MlpParams*>(context);
    for (int64_t row = begin; row < end; ++row) {
        const float* x = p.x + row * p.hidden;
        float* normed = p.scratch + row * p.hidden;
        float squares = 0.0f;
        dot_rows<1>(x, x, p.hidden, p.hidden, &squares);
        const float scale = 1.0f / sqrtf(squares / static_cast<float>(p.hidden) + p.eps);
        for (int64_t k = 0; k < p.hidden; ++k) {
            normed[k] = x[k] * scale * p.norm_weight[k];
        }
    }
}

float silu(float value) {
    return value / (1.0f + expf(-value));
}

void gate_up(void* context, int64_t begin, int64_t end) {
    const Block& block = *static_cast<const Block*>(context);
    const MlpParams& p = *block.params;
    float gates[kRowBlock];
    float ups[kRowBlock];
    for (int64_t unit = begin; unit < end; ++unit) {
        dot_many(p.gate + unit * p.hidden, block.normed(), p.hidden, p.hidden, block.rows, gates);
        dot_many(p.up + unit * p.hidden, block.normed(), p.hidden, p.hidden, block.rows, ups);
        for (int64_t row = 0; row < block.rows; ++row) {
            block.activated()[row * p.ffn + unit] = silu(gates[row]) * ups[row];
        }
    }
}

void down(void* context, int64_t begin, int64_t end) {
    const Block& block = *static_cast<const Block*>(context);
    const MlpParams& p = *block.params;
    float sums[kRowBlock];
    for (int64_t column = begin; column < end; ++column) {
        dot_many(p.down + column * p.ffn, block.activated(), p.ffn, p.ffn, block.rows, sums);
        for (int64_t row = 0; row < block.rows; ++row) {
            const int64_t at = (block.first_row + row) * p.hidden + column;
            p.out[at] = p.residual[at] + sums[row];
        }
    }
}

}  // namespace

namespace PYRUNTIME_ISA_NAMESPACE {

void mlp(const MlpParams& params) {
    MlpParams p = params;
    parallel_for(p.rows, 1, p.num_threads, norm_rows, &p);
    for (int64_t first = 0; first < p.rows; first += kRowBlock) {
        const int64_t rest = p.rows - first;
        Block block{&p, first, rest < kRowBlock ? rest : kRowBlock};
        parallel_for(p.ffn, kGrain, p.num_threads, gate_up, &block);
        parallel_for(p.hidden, kGrain, p.num_threads, down, &block);
    }
}

}  // namespace PYRUNTIME_ISA_NAMESPACE
}  // namespace pyruntime
