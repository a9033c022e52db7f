// Teams of threads under ThreadSanitizer: several callers at once, calls from inside a team, teams of changing sizes,
// many short runs, and a small program on all of it. Exits with 1 where a result is wrong; the sanitizer says the rest.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace {

using namespace pyruntime;

constexpr int kCallers = 4;
constexpr int kRuns = 150;
constexpr std::int64_t kItems = 103;

// Each phase adds to plain memory what the phase before left at another place: a missing wait is a race.
struct Relay {
    std::vector<std::int64_t> values[2];
    std::vector<int> nested;
    int phases;
};

void count_one(const void* context, const Worker& worker) {
    ++*static_cast<int*>(const_cast<void*>(context));
    wait_for_all(worker);
}

void relay(const void* context, const Worker& worker) {
    Relay& relay = *static_cast<Relay*>(const_cast<void*>(context));
    for (int phase = 0; phase < relay.phases; ++phase) {
        const std::vector<std::int64_t>& from = relay.values[phase % 2];
        std::vector<std::int64_t>& to = relay.values[1 - phase % 2];
        for (std::int64_t begin, end; take(worker, kItems, 1 + phase % 5, &begin, &end);) {
            for (std::int64_t i = begin; i < end; ++i) {
                to[static_cast<std::size_t>(i)] = from[static_cast<std::size_t>(kItems - 1 - i)] + 1;
            }
        }
        wait_for_all(worker);
    }
    // a team of its own: just this thread
    run_team(4, count_one, &relay.nested[static_cast<std::size_t>(worker.index)]);
}

bool relay_is_right(int num_threads, int phases) {
    Relay given{{std::vector<std::int64_t>(kItems), std::vector<std::int64_t>(kItems)}, {}, phases};
    given.nested.resize(static_cast<std::size_t>(num_threads));
    run_team(num_threads, relay, &given);
    for (const std::int64_t value : given.values[phases % 2]) {
        if (value != phases) {
            return false;
        }
    }
    // a machine that gives fewer threads runs fewer of them, each one once
    for (const int calls : given.nested) {
        if (calls > 1) {
            return false;
        }
    }
    return given.nested[0] == 1;
}

// Logits whose values are known, through most kinds of steps: the embedding x; x + x by a linear map that is the
// identity; twice that by an MLP that writes over what it reads and adds; attention of queries that are zero, which is
// the mean of the values so far. Maps that are merged away stand for keys and values.
struct Tiny {
    static constexpr std::int64_t kVocab = 40, kSize = 16;
    std::vector<float> table, identity, zero;
    Program program;

    explicit Tiny(int num_threads)
        : table(kVocab * kSize),
          identity(kVocab / 16 * 16 * kSize + 16 * kSize),
          zero(kSize * kSize),
          program(Isa::kGeneric, num_threads, kVocab, 1,
                  {{{kSize, 0}}, {{kSize, 0}}, {{kSize, 0}}, {{kSize, 0}}, {{0, kSize}}, {{0, kVocab}}}) {
        for (std::size_t i = 0; i < table.size(); ++i) {
            table[i] = static_cast<float>(i % 97);
        }
        for (std::int64_t k = 0; k < kSize; ++k) {
            identity[static_cast<std::size_t>(k * kPanel + k)] = 1.0f;
        }
        const NormWeights none{nullptr, nullptr, 0, 0.0f, kNoNorm};
        const auto* words = reinterpret_cast<const std::uint32_t*>(identity.data());
        const auto* zeros = reinterpret_cast<const std::uint32_t*>(zero.data());
        const Panels square{words, nullptr, nullptr, kSize, kSize, kFloat32};
        const Panels head{words, nullptr, nullptr, kSize, kVocab, kFloat32};
        const Panels nothing{zeros, nullptr, nullptr, kSize, kSize, kFloat32};
        program.add({EmbedStep{table.data(), nullptr, 0, kSize, kFloat32, 0, 1.0f, 0}, kAllRows});
        program.add({LinearStep{none, square, 0, 0, 1}, kAllRows});
        program.add({MlpStep{none, none, square, square, 0, kRelu, 1, 1, 1}, kAllRows});
        const ValueSource product{kSize, nullptr}, input{0, nullptr};
        program.add({QkvRopeStep{none, nothing, none, none, none, kSize, product, input, input, 1, 1, kSize, 0, -1, 0,
                                 kFloat32, 1, 2},
                     kAllRows});
        program.add({AttentionStep{nullptr, nullptr, nullptr, nullptr, 1, 1, kSize, 0, 1.0f, 0.0f, 0, kFloat32, 2, 3},
                     kAllRows});
        program.add({GatherStep{kSize, 3, 4}, kWantedRows});
        program.add({HeadStep{none, head, 0.0f, 4, 5}, kWantedRows});
    }
};

bool tiny_is_right(const Tiny& tiny, std::int64_t rows) {
    SequenceSlice slice{{}, 0, {}, {}};
    for (std::int64_t row = 0; row < rows; ++row) {
        slice.token_ids.push_back(row * 7 % Tiny::kVocab);
        slice.pages.push_back(row);
        slice.wanted.push_back(row);
    }
    const std::vector<SequenceSlice> slices{slice};
    std::vector<float> keys(static_cast<std::size_t>(rows * 16 * Tiny::kSize), NAN), values = keys;
    const Cache cache{{{keys.data(), values.data()}}, rows, 16};
    const Batch batch(slices, cache, Tiny::kVocab);
    const std::int64_t num_bytes = Program::workspace_bytes(tiny.program.regions({rows, rows}));
    std::vector<char> memory(static_cast<std::size_t>(num_bytes) + 64);
    char* workspace = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
    std::vector<float> logits(static_cast<std::size_t>(rows * Tiny::kVocab), -1.0f);
    tiny.program.run(0, tiny.program.num_steps(), batch, cache, workspace, logits.data());
    std::vector<double> sums(Tiny::kVocab);
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t k = 0; k < Tiny::kVocab; ++k) {
            const std::int64_t token = row * 7 % Tiny::kVocab;
            double& sum = sums[static_cast<std::size_t>(k)];
            sum += k < Tiny::kSize ? 4.0 * tiny.table[static_cast<std::size_t>(token * Tiny::kSize + k)] : 0.0;
            const double expected = sum / static_cast<double>(row + 1);
            const double found = logits[static_cast<std::size_t>(row * Tiny::kVocab + k)];
            // written so that a NaN is wrong
            if (!(std::abs(found - expected) <= 1e-4 * expected)) {
                return false;
            }
        }
    }
    return true;
}

}  // namespace

int main() {
    int wrong[kCallers] = {};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kCallers; ++caller) {
        callers.emplace_back([caller, &wrong] {
            const Tiny tiny(1 + caller);
            for (int turn = 0; turn < kRuns; ++turn) {
                const int num_threads = 1 + (turn + caller) % 5;
                wrong[caller] += relay_is_right(num_threads, 1 + turn % 7) ? 0 : 1;
                wrong[caller] += tiny_is_right(tiny, 1 + turn % 30) ? 0 : 1;
            }
        });
    }
    for (std::thread& each : callers) {
        each.join();
    }
    int total = 0;
    for (const int count : wrong) {
        total += count;
    }
    std::printf("%d callers, %d runs each: %d wrong\n", kCallers, 2 * kRuns, total);
    return total == 0 ? 0 : 1;
}
