// The primitives of device.cuh on the CPU, for tests: every thread is a fiber, every block runs to its end before the
// next one starts (or some at once, see Order), in an order that a seed decides. What a GPU forgives now and then is an
// error or a NaN here: threads that reach different barriers, lanes that disagree about a shuffle, reading shared
// memory that nobody wrote or whose copy was not waited for, writing beyond it, touching inputs before
// wait_for_inputs(), a block that never calls it, endless spinning. Errors are exceptions with the kernel's name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "twin_threads.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace pyruntime {
namespace twin {

inline std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

}  // namespace twin

struct Float16 {
    std::uint16_t bits;
};
struct Bfloat16 {
    std::uint16_t bits;
};
inline int thread_idx() {
    return twin::self().idx;
}
inline int num_threads() {
    return static_cast<int>(twin::current->shape.threads);
}
inline int block_idx() {
    return twin::self().block->x;
}
inline int block_idx_y() {
    return twin::self().block->y;
}
inline int block_idx_z() {
    return twin::self().block->z;
}
inline int num_blocks() {
    return static_cast<int>(twin::current->shape.blocks);
}

inline unsigned char* shared_memory() {
    return twin::self().block->shared;
}
inline void sync_threads() {
    twin::Block& block = *twin::self().block;
    if (++block.at_barrier < num_threads()) {
        twin::leave(twin::State::kAtBlock);
        return;
    }
    block.at_barrier = 0;
    for (twin::Thread& thread : block.threads) {
        thread.state = twin::State::kReady;
    }
}
inline void sync_warp() {
    const int nothing = 0;
    twin::exchange("sync_warp", 0, &nothing, sizeof(nothing));
}

inline float to_float(float value) {
    return value;
}
inline float to_float(Bfloat16 value) {
    return twin::float_of(static_cast<std::uint32_t>(value.bits) << 16);
}
inline float to_float(Float16 value) {
    const std::uint32_t sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t exponent = (value.bits >> 10) & 31u;
    const std::uint32_t fraction = value.bits & 0x3ffu;
    if (exponent == 0) {
        const float size = std::ldexp(static_cast<float>(fraction), -24);
        return sign ? -size : size;
    }
    return twin::float_of(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}
template <typename T>
inline T from_float(float value);
template <>
inline float from_float<float>(float value) {
    return value;
}
template <>
inline Bfloat16 from_float<Bfloat16>(float value) {
    const std::uint32_t bits = twin::float_bits(value);
    if (std::isnan(value)) {
        return {0x7fff};
    }
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float value) {
    const std::uint32_t sign = (twin::float_bits(value) >> 16) & 0x8000u;
    const float size = std::fabs(value);
    std::uint32_t bits;
    if (std::isnan(value)) {
        bits = 0x7fff;
    } else if (size >= 65520.0f) {
        bits = 0x7c00;
    } else if (size < 6.103515625e-05f) {
        // subnormal: a multiple of 2^-24; nearbyint rounds ties to even
        bits = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, 24)));
    } else {
        const std::uint32_t whole = twin::float_bits(size);
        bits = (whole + 0xfffu + ((whole >> 13) & 1u) - (112u << 23)) >> 13;
    }
    return {static_cast<std::uint16_t>(sign | bits)};
}
template <typename T>
inline Pair unpack(std::uint32_t word) {
    return {to_float(T{static_cast<std::uint16_t>(word)}), to_float(T{static_cast<std::uint16_t>(word >> 16)})};
}
template <typename T>
inline std::uint32_t pack(float low, float high) {
    return static_cast<std::uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

template <typename T>
T shuffle_xor(T value, int mask) {
    const auto& slots = twin::exchange("shuffle_xor", mask, &value, sizeof(value));
    return twin::read<T>(slots[(thread_idx() % twin::kLanes) ^ mask]);
}
template <typename T>
T shuffle_down(T value, int offset) {
    const auto& slots = twin::exchange("shuffle_down", offset, &value, sizeof(value));
    const int from = thread_idx() % twin::kLanes + offset;
    return from < twin::kLanes ? twin::read<T>(slots[from]) : value;
}
template <typename T>
T shuffle(T value, int lane) {
    // lanes may ask for different ones
    const auto& slots = twin::exchange("shuffle", 0, &value, sizeof(value));
    return twin::read<T>(slots[lane % twin::kLanes]);
}

template <typename T>
T load_input(const T* from) {
    twin::require_waited("load_input");
    twin::require_aligned<T>(from);
    return *from;
}
inline Words load_16(const void* from) {
    twin::require_aligned<Words>(from);
    return *static_cast<const Words*>(from);
}
inline Words load_input_16(const void* from) {
    twin::require_waited("load_input_16");
    return load_16(from);
}
inline float load_l2(const float* from) {
    return load_input(from);
}
inline Words load_l2_16(const void* from) {
    return load_input_16(from);
}
template <typename T>
void store(T* to, T value) {
    twin::require_waited("store");
    twin::require_aligned<T>(to);
    *to = value;
}
inline void store_16(void* to, Words value) {
    twin::require_waited("store_16");
    twin::require_aligned<Words>(to);
    *static_cast<Words*>(to) = value;
}
inline Words load_weights_16(const void* from) {
    return load_16(from);
}
inline void prefetch_l2(const void*) {}

inline void copy_async_weights(void* shared, const void* from, bool valid = true) {
    twin::begin_copy(shared, from, valid);
}
inline void copy_async_input(void* shared, const void* from, bool valid = true) {
    twin::require_waited("copy_async_input");
    twin::begin_copy(shared, from, valid);
}
inline void commit_copies() {
    twin::Thread& me = twin::self();
    me.pending.push_back(std::exchange(me.open, {}));
}
template <int kPending>
void wait_copies() {
    auto& pending = twin::self().pending;
    while (pending.size() > kPending) {
        twin::finish_copies(pending.front());
        pending.erase(pending.begin());
    }
}

namespace twin {
template <int kMatrices>
void load_matrix(std::uint32_t (&out)[kMatrices], const void* row, bool transposed) {
    require_aligned<Words>(row);
    const auto& slots = exchange("load_matrix", 2 * kMatrices + (transposed ? 1 : 0), &row, sizeof(row));
    const int lane = self().idx % kLanes;
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
        std::uint32_t word = 0;
        for (int half = 0; half < 2; ++half) {
            const int major = lane / 4, minor = lane % 4 * 2 + half;
            const auto* from = read<const std::uint16_t*>(slots[8 * matrix + (transposed ? minor : major)]);
            word |= static_cast<std::uint32_t>(from[transposed ? major : minor]) << (16 * half);
        }
        out[matrix] = word;
    }
    // nobody may overwrite the rows before all lanes have read them
    sync_warp();
}
}  // namespace twin

inline void load_matrix_x4(std::uint32_t (&out)[4], const void* row) {
    twin::load_matrix(out, row, false);
}
inline void load_matrix_x4_transposed(std::uint32_t (&out)[4], const void* row) {
    twin::load_matrix(out, row, true);
}
inline void load_matrix_x2(std::uint32_t (&out)[2], const void* row) {
    twin::load_matrix(out, row, false);
}
inline void load_matrix_x2_transposed(std::uint32_t (&out)[2], const void* row) {
    twin::load_matrix(out, row, true);
}

template <typename T>
void matrix_multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    struct Fragments {
        std::uint32_t a[4], b[2];
    } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const auto& slots = twin::exchange("matrix_multiply", 0, &mine, sizeof(mine));
    const int lane = thread_idx() % twin::kLanes;
    for (int idx = 0; idx < 4; ++idx) {
        const int row = lane / 4 + 8 * (idx / 2), column = lane % 4 * 2 + idx % 2;
        for (int k = 0; k < 16; k += 2) {
            const auto left = twin::read<Fragments>(slots[row % 8 * 4 + k % 8 / 2]);
            const auto right = twin::read<Fragments>(slots[column * 4 + k % 8 / 2]);
            const Pair x = unpack<T>(left.a[row / 8 + 2 * (k / 8)]);
            const Pair y = unpack<T>(right.b[k / 8]);
            sums[idx] += x.low * y.low + x.high * y.high;
        }
    }
}

inline std::uint32_t atomic_add_acq_rel(std::uint32_t* to, std::uint32_t value) {
    twin::require_waited("atomic_add_acq_rel");
    const std::uint32_t before = *to;
    *to += value;
    return before;
}
inline std::uint32_t load_acquire(const std::uint32_t* from) {
    twin::require_waited("load_acquire");
    // whoever is waited for must get its turn
    twin::leave(twin::State::kSpinning);
    return *from;
}

inline void wait_for_inputs() {
    twin::self().waited = true;
}
inline void let_next_start() {}

template <typename Params>
int launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, const Params& params, void*) {
    return twin::run(name, shape, [kernel, &params] { kernel(params); });
}

}  // namespace pyruntime
