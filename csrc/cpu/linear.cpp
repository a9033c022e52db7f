// A linear map with its norm before and its residual add behind; the head is one with a soft cap.
#include "cpu/matmul.h"

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {

void linear(const LinearStep& step, const RunContext& run, View view, const Worker& worker) {
    const int64_t rows = run.views[view].num_rows;
    const Panels& matrix = step.matrix;
    const uint32_t* packed =
        norm_and_pack(step.norm, run.places[step.in], matrix.inputs, rows, matrix.dtype, nullptr, run, worker);
    const float* residual = step.residual == kNoPlace ? nullptr : run.places[step.residual];
    const RowsOut to{run.places[step.out], residual, matrix.outputs};
    matmul(matrix, packed, rows, store_rows, &to, worker);
}

void head(const HeadStep& step, const RunContext& run, View view, const Worker& worker) {
    linear({step.norm, step.matrix, step.in, kNoPlace, step.out}, run, view, worker);
    if (step.softcap == 0.0f) {
        return;
    }
    float* logits = run.places[step.out];
    const int64_t count = run.views[view].num_rows * step.matrix.outputs;
    for (int64_t begin, end; take(worker, count, 1024, &begin, &end);) {
        int64_t k = begin;
        for (; k + kLanes <= end; k += kLanes) {
            store(logits + k, step.softcap * tanh(load(logits + k) / step.softcap));
        }
        if (k < end) {
            // through the same function: which logits stand at an end depends on the number of rows
            const size_t rest = static_cast<size_t>(end - k) * sizeof(float);
            float last[kLanes] = {};
            __builtin_memcpy(last, logits + k, rest);
            store(last, step.softcap * tanh(load(last) / step.softcap));
            __builtin_memcpy(logits + k, last, rest);
        }
    }
    wait_for_all(worker);
}

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
