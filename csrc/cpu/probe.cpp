#include "pyruntime/probe.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "vec.h"

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {
namespace {

// small enough that workers finish together, large enough that the prefetchers of a stream pay
constexpr std::int64_t kReadGrain = 1 << 17;
constexpr std::int64_t kSteps = 4096;
// more than the latency of two units asks for, and few enough for the sixteen registers of the oldest copy
constexpr int kChains = 12;

// the sum of the words of one range
std::uint64_t read(const char* data, std::int64_t num_bytes) {
    constexpr int kSums = 8;
    constexpr std::int64_t kBytes = kLanes * 4;
    WordVec sums[kSums] = {};
    for (std::int64_t at = 0; at < num_bytes; at += kSums * kBytes) {
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) {
            sums[i] += load(reinterpret_cast<const std::uint32_t*>(data + at + i * kBytes));
        }
    }
    std::uint64_t total = 0;
    for (int i = 0; i < kSums; ++i) {
        for (int lane = 0; lane < kLanes; ++lane) {
            total += sums[i][lane];
        }
    }
    return total;
}

// Chains of y = y a + b that come to rest at 1. They live on from call to call, or a compiler would do one call for
// all.
void multiply(Vec* state) {
    const Vec a = splat(0.75f), b = splat(0.25f);
    Vec chains[kChains];
    for (int i = 0; i < kChains; ++i) {
        chains[i] = state[i];
    }
    for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) {
            chains[i] = chains[i] * a + b;
        }
    }
    for (int i = 0; i < kChains; ++i) {
        state[i] = chains[i];
    }
}

#ifdef __AVX512BF16__
// chains of y = y + (a0 b0 + a1 b1) whose products take each other away
void multiply_bfloat16(Vec* state) {
    const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f80bf80));
    const __m512bh b = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
    __m512 chains[kChains];
    for (int i = 0; i < kChains; ++i) {
        chains[i] = reinterpret_cast<__m512>(state[i]);
    }
    for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) {
            chains[i] = _mm512_dpbf16_ps(chains[i], a, b);
        }
    }
    for (int i = 0; i < kChains; ++i) {
        state[i] = reinterpret_cast<Vec>(chains[i]);
    }
}
#endif

// operations of one round
std::int64_t multiply_round(std::int32_t dtype, Vec* state) {
#ifdef __AVX512BF16__
    if (dtype == kBfloat16) {
        multiply_bfloat16(state);
        return kSteps * kChains * kLanes * 4;
    }
#endif
    static_cast<void>(dtype);
    multiply(state);
    return kSteps * kChains * kLanes * 2;
}

}  // namespace

void read_probe(const ReadProbe& probe, const Worker& worker) {
    const char* data = static_cast<const char*>(probe.data);
    ProbeResult result = {};
    std::int64_t begin = 0, end = 0;
    while (take(worker, probe.num_bytes, kReadGrain, &begin, &end)) {
        result.witness += read(data + begin, end - begin);
        result.amount += end - begin;
    }
    probe.results[worker.index] = result;
    wait_for_all(worker);
}

void multiply_probe(const MultiplyProbe& probe, const Worker& worker) {
    ProbeResult result = {};
    Vec state[kChains];
    for (int i = 0; i < kChains; ++i) {
        state[i] = splat(static_cast<float>(worker.index + i));
    }
    std::int64_t begin = 0, end = 0;
    while (take(worker, probe.rounds, 1, &begin, &end)) {
        for (std::int64_t round = begin; round < end; ++round) {
            result.amount += multiply_round(probe.dtype, state);
        }
    }
    for (int i = 0; i < kChains; ++i) {
        result.witness += static_cast<std::uint64_t>(add_lanes(state[i]));
    }
    probe.results[worker.index] = result;
    wait_for_all(worker);
}

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
