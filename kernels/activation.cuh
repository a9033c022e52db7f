// Activations of an MLP.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.cuh"
#include "pyruntime/params.h"

namespace pyruntime {
namespace {

__device__ inline float activated(float x, std::int32_t activation) {
    switch (activation) {
        case kSilu:
            return x / (1.0f + expf(-x));
        case kGelu:
            return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case kGeluTanh:
            return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case kRelu:
            return fmaxf(x, 0.0f);
        case kRelu2:
            return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);
        default:
            return x;
    }
}

}  // namespace
}  // namespace pyruntime
