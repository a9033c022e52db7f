// Products of tiles of rows with panels of weights, kept in registers over the whole length of the inputs.
#include "cpu/matmul.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {
namespace {

struct Float32Dot {
    struct Input {
        float value;
    };
    static Input input(uint32_t word) {
        Input in;
        __builtin_memcpy(&in.value, &word, sizeof word);
        return in;
    }
    static Vec add(Vec sum, WordVec weights, Input in) { return sum + reinterpret_cast<Vec>(weights) * in.value; }
};

#if defined(__AVX512BF16__)
struct Bfloat16Dot {
    using Input = __m512bh;
    static Input input(uint32_t word) {
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(word)));
    }
    static Vec add(Vec sum, WordVec weights, Input in) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), in);
    }
};
#else
struct Bfloat16Dot {
    struct Input {
        float even, odd;
    };
    static Input input(uint32_t word) {
        return {widen_bfloat16(static_cast<uint16_t>(word)), widen_bfloat16(static_cast<uint16_t>(word >> 16))};
    }
    static Vec add(Vec sum, WordVec weights, Input in) {
        sum += reinterpret_cast<Vec>(weights << 16) * in.even;
        return sum + reinterpret_cast<Vec>(weights & 0xffff0000u) * in.odd;
    }
};
#endif

// what one task multiplies: panels of `units` units each, with one tile of rows
struct Operands {
    const uint32_t* words;
    const float* bias;  // or null
    const uint32_t* x;
    int64_t units;
};

template <class Dot, int M, int P>
void multiply(const Operands& at, float* out) {
    const int64_t panel_words = at.units * kPanel;
    Vec sums[M][P * kVecs];
#pragma GCC unroll 32
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 32
        for (int v = 0; v < P * kVecs; ++v) {
            sums[r][v] = at.bias == nullptr ? Vec{} : load(at.bias + v * kLanes);
        }
    }
    const uint32_t* words = at.words;
    const uint32_t* x = at.x;
    for (int64_t unit = 0; unit < at.units; ++unit, words += kPanel, x += M) {
        WordVec weights[P * kVecs];
#pragma GCC unroll 32
        for (int v = 0; v < P * kVecs; ++v) {
            weights[v] = load(words + v / kVecs * panel_words + v % kVecs * kLanes);
        }
#pragma GCC unroll 32
        for (int r = 0; r < M; ++r) {
            const typename Dot::Input in = Dot::input(x[r]);
#pragma GCC unroll 32
            for (int v = 0; v < P * kVecs; ++v) {
                sums[r][v] = Dot::add(sums[r][v], weights[v], in);
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 32
        for (int v = 0; v < P * kVecs; ++v) {
            store(out + r * kGroup * kPanel + v * kLanes, sums[r][v]);
        }
    }
}

constexpr int panels_at_once(int rows) {
    const int fit = kSums / (rows * kVecs);
    return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <class Dot, int M>
void multiply_group(Operands at, int64_t panels, float* out) {
    constexpr int kAtOnce = panels_at_once(M);
    int64_t panel = 0;
    const auto advance = [&](int by) {
        panel += by;
        at.words += by * at.units * kPanel;
        at.bias += at.bias == nullptr ? 0 : by * kPanel;
    };
    for (; panel + kAtOnce <= panels; advance(kAtOnce)) {
        multiply<Dot, M, kAtOnce>(at, out + panel * kPanel);
    }
    for (; panel < panels; advance(1)) {
        multiply<Dot, M, 1>(at, out + panel * kPanel);
    }
}

using MultiplyGroup = void (*)(Operands at, int64_t panels, float* out);

// the function for tiles of `rows` rows, 1 to kTileRows
template <class Dot, int M = kTileRows>
MultiplyGroup group_of(int64_t rows) {
    if constexpr (M > 1) {
        return rows == M ? multiply_group<Dot, M> : group_of<Dot, M - 1>(rows);
    } else {
        return multiply_group<Dot, 1>;
    }
}

// the group of `count` panels from `panel` on; `units` are those of all inputs
Operands operands_of(const Panels& panels, int64_t units, int64_t panel, int64_t count) {
    const float* bias = panels.bias == nullptr ? nullptr : panels.bias + panel * kPanel;
    if (panels.starts == nullptr) {
        return {panels.words + panel * units * kPanel, bias, nullptr, units};
    }
    const int64_t* start = panels.starts + panel / kGroup;
    return {panels.words + start[0], bias, nullptr, (start[1] - start[0]) / (count * kPanel)};
}

}  // namespace

void matmul(const Panels& panels, const uint32_t* packed, int64_t rows, StoreTile store, const void* context,
            const Worker& worker) {
    const int64_t units = units_of(panels.dtype, panels.inputs);
    const int64_t count = num_panels(panels);
    const int64_t tiles = num_tiles(rows);
    const auto group = panels.dtype == kFloat32 ? group_of<Float32Dot> : group_of<Bfloat16Dot>;
    alignas(64) float values[kTileRows * kGroup * kPanel];
    for (int64_t begin, end; take(worker, count, kGroup, &begin, &end);) {
        for (int64_t panel = begin; panel < end; panel += kGroup) {
            const int64_t in_group = panel + kGroup <= end ? kGroup : end - panel;
            Operands at = operands_of(panels, units, panel, in_group);
            for (int64_t idx = 0; idx < tiles; ++idx) {
                const Tile tile = tile_at(rows, idx);
                at.x = packed + tile.first_row * units;
                group(tile.rows)(at, in_group, values);
                store(context, tile, panel, in_group, values);
            }
        }
    }
    wait_for_all(worker);
}

void store_rows(const void* rows_out, const Tile& tile, int64_t first_panel, int64_t panels, const float* values) {
    const RowsOut& to = *static_cast<const RowsOut*>(rows_out);
    const int64_t column = first_panel * kPanel;
    const int64_t left = to.width - column;
    const int64_t count = left < panels * kPanel ? left : panels * kPanel;
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t at = (tile.first_row + r) * to.width + column;
        const float* from = values + r * kGroup * kPanel;
        if (to.residual == nullptr) {
            __builtin_memcpy(to.out + at, from, static_cast<size_t>(count) * sizeof(float));
            continue;
        }
        for (int64_t k = 0; k < count; ++k) {
            to.out[at + k] = to.residual[at + k] + from[k];
        }
    }
}

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
