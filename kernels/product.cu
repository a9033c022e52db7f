// Matrix products of up to 64 rows with what stands in front of them and behind (CUDA). The weights, read once, stream
// from memory; schedule.h says which warp reads what. A thread copies the weights that it multiplies itself, so nothing
// but the activations has to wait for other threads.
#include <type_traits>

#include "device.cuh"
#include "product_finish.cuh"
#include "product_stage.cuh"
#include "pyruntime/params.h"
#include "schedule.h"

namespace pyruntime {
namespace {

// A thread's copies of weights, some steps ahead of what is multiplied, from one group of pairs to the next.
template <typename T, int kRows>
class Weights {
    static constexpr ProductTile kTile = product_tile(kRows);
    static constexpr bool kTensor = kTile.group_pairs > 1;
    static constexpr int kLines = kTile.words / kTile.halves;  // rows of the weight that a thread reads at once
    static constexpr int kStageBytes = kProductThreads * kTile.words * sizeof(Words);

public:
    __device__ Weights(const ProductParams& p, const Pairs& pairs, int num_groups, int first_group, Range steps,
                       unsigned char* ring)
        : p_(p),
          pairs_(pairs),
          num_groups_(num_groups),
          group_(first_group),
          begin_(input_of(steps.begin)),
          end_(input_of(steps.end)),
          input_(begin_),
          ring_(ring + thread_idx() * sizeof(Words)) {
        point();
        for (int stage = 0; stage < kTile.stages - 1; ++stage) {
            begin_step();
        }
    }

    // Waits for the oldest step's weights and reads them: its halves, in each the thread's rows.
    __device__ void next(Words (&words)[kTile.words]) {
        wait_copies<kTile.stages - 2>();
        const unsigned char* from = ring_ + read_ * kStageBytes;
#pragma unroll
        for (int idx = 0; idx < kTile.words; ++idx) {
            words[idx] = load_16(from + idx * kProductThreads * sizeof(Words));
        }
        read_ = read_ + 1 == kTile.stages ? 0 : read_ + 1;
        // into what the step before this one has read
        begin_step();
    }

private:
    // the first input that this thread reads in a step
    __device__ static int input_of(int step) { return step * kTile.step + (kTensor ? lane_idx() % 4 : lane_idx()) * 8; }

    // starts the copies of one step, or none behind the last; either way they are one group
    __device__ void begin_step() {
        if (group_ < num_groups_) {
            unsigned char* to = ring_ + write_ * kStageBytes;
#pragma unroll
            for (int idx = 0; idx < kTile.words; ++idx) {
                const int line = idx % kLines, input = input_ + idx / kLines * (kTile.step / kTile.halves);
                copy_async_weights(to + idx * kProductThreads * sizeof(Words), lines_[line] + input,
                                   input < limits_[line]);
            }
            input_ += kTile.step;
            if (input_ == end_) {
                input_ = begin_;
                group_ += p_.columns * kProductWarps;
                point();
            }
        }
        commit_copies();
        write_ = write_ + 1 == kTile.stages ? 0 : write_ + 1;
    }

    // the rows of the weight that this thread reads for its group; no inputs of them where there are none
    __device__ void point() {
#pragma unroll
        for (int slab = 0; slab < kLines / 2; ++slab) {
            const int pair = group_ * kTile.group_pairs + (kTensor ? 8 * slab + lane_idx() / 4 : 0);
            const bool valid = pair < pairs_.count;
            const RowPair rows = valid ? rows_of(pairs_, pair) : RowPair{-1, -1};
            point(2 * slab, rows.first);
            point(2 * slab + 1, rows.second);
        }
    }
    __device__ void point(int line, std::int32_t row) {
        lines_[line] = static_cast<const T*>(p_.weight) + static_cast<std::int64_t>(row < 0 ? 0 : row) * p_.inputs;
        limits_[line] = row < 0 ? 0 : p_.inputs;
    }

    const ProductParams& p_;
    const Pairs& pairs_;
    const int num_groups_;
    int group_;
    const int begin_;
    const int end_;
    int input_;
    unsigned char* ring_;
    int read_ = 0;
    int write_ = 0;
    const T* lines_[kLines];
    int limits_[kLines];
};

// Up to 4 rows of activations: 8 inputs of one pair a thread. Sums are [rows][2], each a part that a lane computed.
template <typename T, int kRows>
struct VectorSums {
    static constexpr ProductTile kTile = product_tile(kRows);
    float sums[kRows][2] = {};

    // `x`: this step's activations in shared memory, rows `stride` apart
    __device__ void add(const Words (&words)[kTile.words], const T* x, int stride) {
#pragma unroll
        for (int half = 0; half < kTile.halves; ++half) {
            float first[8], second[8], values[8];
            unpack_8<T>(words[2 * half], first);
            unpack_8<T>(words[2 * half + 1], second);
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                unpack_8<T>(load_16(x + row * stride + half * (kTile.step / kTile.halves) + lane_idx() * 8), values);
#pragma unroll
                for (int idx = 0; idx < 8; ++idx) {
                    sums[row][0] += first[idx] * values[idx];
                    sums[row][1] += second[idx] * values[idx];
                }
            }
        }
    }

    // into [rows][3]
    __device__ void put(int, float* to) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const float first = warp_sum(sums[row][0]), second = warp_sum(sums[row][1]);
            if (lane_idx() == 0) {
                to[row * 3] = first;
                to[row * 3 + 1] = second;
            }
        }
    }
};

// More rows: slabs of 8 pairs, whose first rows are rows 0-7 of the tensor core's tile and whose second ones rows 8-15.
// A thread's 8 neighbouring inputs stand for k = t, t+1, t+8, t+9 of two products, of weights and activations alike: in
// which order inputs are added does not matter, and both sides are read 16 bytes at once.
template <typename T, int kRows>
struct TensorSums {
    static constexpr ProductTile kTile = product_tile(kRows);
    static constexpr int kSlabs = kTile.group_pairs / 8;
    static constexpr int kUnits = kRows / 8;
    float sums[kSlabs][kUnits][4] = {};

    __device__ void add(const Words (&words)[kTile.words], const T* x, int stride) {
#pragma unroll
        for (int half = 0; half < kTile.halves; ++half) {
            const T* from = x + lane_idx() / 4 * stride + half * 32 + lane_idx() % 4 * 8;
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                const Words values = load_16(from + 8 * unit * stride);
#pragma unroll
                for (int slab = 0; slab < kSlabs; ++slab) {
                    multiply(sums[slab][unit], words[2 * (half * kSlabs + slab)], words[2 * (half * kSlabs + slab) + 1],
                             values);
                }
            }
        }
    }

    // those of a slab, into [rows][17]
    __device__ void put(int slab, float* to) {
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
            for (int idx = 0; idx < 4; ++idx) {
                const int row = 8 * unit + lane_idx() % 4 * 2 + idx % 2;
                to[row * 17 + lane_idx() / 4 * 2 + idx / 2] = sums[slab][unit][idx];
            }
        }
    }

private:
    __device__ static void multiply(float (&to)[4], const Words& first, const Words& second, const Words& values) {
#pragma unroll
        for (int word = 0; word < 4; word += 2) {
            const std::uint32_t a[4] = {first.word[word], second.word[word], first.word[word + 1],
                                        second.word[word + 1]};
            const std::uint32_t b[2] = {values.word[word], values.word[word + 1]};
            matrix_multiply<T>(to, a, b);
        }
    }
};

__device__ inline Pairs pairs_of(const ProductParams& p) {
    const HeadParams& heads = p.heads;
    if (heads.head_dim > 0) {
        return pairs_of_heads(heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim, heads.rope_dim,
                              heads.num_heads + heads.num_kv_heads);
    }
    return pairs_of_rows(p.outputs, p.gated != 0);
}

// The sums of what a warp finishes at once over each split's inputs, in global memory.
template <int kRows>
class Parts {
public:
    __device__ explicit Parts(const ProductParams& p) : p_(p), size_(p.rows * kWidth) {}

    __device__ void put(int slab, int split, const float* sums) const {
        float* to = p_.partials + (static_cast<std::int64_t>(slab) * p_.splits + split) * size_;
        for (int idx = lane_idx(); idx < size_; idx += kWarpSize) {
            store(to + idx, sums[place(idx)]);
        }
    }

    // in the order of the splits
    __device__ void add_up(int slab, float* sums) const {
        const float* from = p_.partials + static_cast<std::int64_t>(slab) * p_.splits * size_;
        for (int begin = lane_idx(); begin < size_; begin += kTogether * kWarpSize) {
            float found[kTogether] = {};
#pragma unroll 4
            for (int split = 0; split < p_.splits; ++split) {
#pragma unroll
                for (int each = 0; each < kTogether; ++each) {
                    const int idx = begin + each * kWarpSize;
                    found[each] += idx < size_ ? load_l2(from + static_cast<std::int64_t>(split) * size_ + idx) : 0.0f;
                }
            }
#pragma unroll
            for (int each = 0; each < kTogether; ++each) {
                const int idx = begin + each * kWarpSize;
                if (idx < size_) {
                    sums[place(idx)] = found[each];
                }
            }
        }
    }

private:
    static constexpr int kWidth = 2 * finished_pairs(product_tile(kRows));
    // sums that a lane adds up side by side, so that it need not wait for one load after the other
    static constexpr int kTogether = kRows * kWidth < 16 * kWarpSize ? (kRows * kWidth + 31) / kWarpSize : 16;

    __device__ static int place(int idx) { return idx / kWidth * (kWidth + 1) + idx % kWidth; }

    const ProductParams& p_;
    int size_;
};

// blocks of a processor that must find registers
constexpr int resident(const ProductTile& tile) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    // no kernel starts early there
    return tile.blocks_per_sm;
#else
    return tile.resident;
#endif
}

// Grid: columns, then splits. A warp takes the groups warp * columns + column, and so on.
template <typename T, int kRows>
__global__ void __launch_bounds__(kProductThreads, resident(product_tile(kRows)))
    product_kernel(const __grid_constant__ ProductParams p) {
    constexpr ProductTile kTile = product_tile(kRows);
    constexpr int kPairs = finished_pairs(kTile);
    constexpr int kSlabs = kTile.group_pairs / kPairs;
    using Sums = std::conditional_t<(kTile.group_pairs > 1), TensorSums<T, kRows>, VectorSums<T, kRows>>;

    const int column = block_idx() % p.columns, split = block_idx() / p.columns;
    const int all_steps = (p.inputs + kTile.step - 1) / kTile.step;
    const Range steps = part_of(all_steps, p.splits, split);
    const int most_steps = (all_steps + p.splits - 1) / p.splits;
    const ProductMemory memory = product_memory(kTile, most_steps);
    unsigned char* const shared = shared_memory();
    T* const x = reinterpret_cast<T*>(shared + memory.rows);
    float* const sums_of_warp =
        reinterpret_cast<float*>(shared + memory.sums) + warp_idx() * kTile.max_rows * (2 * kPairs + 1);
    float* const squares = reinterpret_cast<float*>(shared + memory.squares);
    const int stride = staged_stride(kTile, most_steps);

    const Pairs pairs = pairs_of(p);
    const int num_groups = (pairs.count + kTile.group_pairs - 1) / kTile.group_pairs;
    const int first_group = warp_idx() * p.columns + column, next_group = p.columns * kProductWarps;
    Weights<T, kRows> weights(p, pairs, num_groups, first_group, steps, shared);
    wait_for_inputs();

    if (p.x_dtype == kFloat32) {
        stage<float, T, kRows>(p, steps, x, stride, squares);
    } else {
        stage<T, T, kRows>(p, steps, x, stride, squares);
    }
    Finish finish(p, pairs, shared, memory);
    sync_threads();
    if (thread_idx() < p.rows) {
        const float sum = row_squares<kRows>(squares, thread_idx());
        if (p.splits == 1) {
            finish.set_scale(thread_idx(), sum);
        } else if (p.norm) {
            store(p.squares + (static_cast<std::int64_t>(column) * p.splits + split) * p.rows + thread_idx(), sum);
        }
    }
    sync_threads();

    const Parts<kRows> parts(p);
    for (int group = first_group; group < num_groups; group += next_group) {
        Sums sums;
        Words words[kTile.words];
        for (int step = 0; step < steps.end - steps.begin; ++step) {
            weights.next(words);
            sums.add(words, x + step * kTile.step, stride);
        }
        if (group + next_group >= num_groups) {
            let_next_start();
        }
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
            sums.put(slab, sums_of_warp);
            sync_warp();
            if (p.splits == 1) {
                finish.template pairs<T, kPairs>((group * kSlabs + slab) * kPairs, sums_of_warp);
            } else {
                parts.put(group * kSlabs + slab, split, sums_of_warp);
            }
            sync_warp();
        }
    }
    if (p.splits == 1 || !is_last_arrival(p.counters + column, p.splits, finish.flag())) {
        return;
    }

    if (p.norm && thread_idx() < p.rows) {
        float sum = 0.0f;
        for (int part = 0; part < p.splits; ++part) {
            sum += load_l2(p.squares + (static_cast<std::int64_t>(column) * p.splits + part) * p.rows + thread_idx());
        }
        finish.set_scale(thread_idx(), sum);
    }
    sync_threads();
    for (int group = first_group; group < num_groups; group += next_group) {
        for (int slab = group * kSlabs; slab < (group + 1) * kSlabs; ++slab) {
            parts.add_up(slab, sums_of_warp);
            sync_warp();
            finish.template pairs<T, kPairs>(slab * kPairs, sums_of_warp);
            sync_warp();
        }
    }
}

template <typename T, int kRows>
int launch_product(const ProductParams& params, void* stream) {
    constexpr ProductTile kTile = product_tile(kRows);
    const std::int64_t steps = divided_up(divided_up(params.inputs, kTile.step), params.splits);
    LaunchShape shape{};
    shape.blocks = static_cast<unsigned>(params.columns * params.splits);
    shape.threads = kProductThreads;
    shape.shared_bytes = static_cast<std::size_t>(product_memory(kTile, static_cast<std::int32_t>(steps)).bytes);
    shape.early = params.early != 0;
    return launch("product", product_kernel<T, kRows>, shape, params, stream);
}

template <typename T>
int launch_product(const ProductParams& params, void* stream) {
    switch (product_tile(params.rows).max_rows) {
        case 1:
            return launch_product<T, 1>(params, stream);
        case 2:
            return launch_product<T, 2>(params, stream);
        case 4:
            return launch_product<T, 4>(params, stream);
        case 8:
            return launch_product<T, 8>(params, stream);
        case 16:
            return launch_product<T, 16>(params, stream);
        case 32:
            return launch_product<T, 32>(params, stream);
        default:
            return launch_product<T, 64>(params, stream);
    }
}

}  // namespace
}  // namespace pyruntime

// plain C: returns a cudaError_t. The bindings have checked every size and address.
extern "C" int pyruntime_launch_product(const pyruntime::ProductParams* params, void* stream) {
    if (params->dtype == pyruntime::kFloat16) {
        return pyruntime::launch_product<pyruntime::Float16>(*params, stream);
    }
    return pyruntime::launch_product<pyruntime::Bfloat16>(*params, stream);
}
