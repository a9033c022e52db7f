// What the machine can do at best: reading memory and multiplying.
#pragma once

#include <cstdint>

#include "pyruntime/params.h"

namespace pyruntime {

// of the first byte that is read, and of the number of bytes
constexpr std::int64_t kProbeAlignment = 64;
constexpr std::int64_t kProbeBlock = 4096;

// What one worker did, on a cache line of its own.
struct alignas(64) ProbeResult {
    std::int64_t amount;    // bytes read, or floating-point operations
    std::uint64_t witness;  // depends on everything that was read or computed, so that none of it can be left out
};

// Reads `num_bytes` at `data`, shared out over the team; a result for each worker.
struct ReadProbe {
    const void* data;
    std::int64_t num_bytes;
    ProbeResult* results;
};

// Multiplies and adds in registers, `rounds` times 4096 steps of independent chains, shared out over the team; a result
// for each worker. dtype: kFloat32, or in the avx512_bf16 copy alone kBfloat16 (pairs of products, added in float32).
struct MultiplyProbe {
    std::int64_t rounds;
    std::int32_t dtype;
    ProbeResult* results;
};

}  // namespace pyruntime
