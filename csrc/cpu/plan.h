// A plan as the CPU runs it: the steps of one target with their weights in place, walked by a team without a word of
// Python.
#pragma once

#include <cstdint>
#include <limits>
#include <variant>
#include <vector>

#include "cpu/isa.h"
#include "pyruntime/steps.h"

namespace pyruntime {

using StepParams =
    std::variant<EmbedStep, NormStep, LinearStep, QkvRopeStep, AttentionStep, MlpStep, AddStep, GatherStep, HeadStep>;

struct PlannedStep {
    StepParams params;
    View view;
};

// values per row that a place must hold for the rows of each view; 0 where no buffer of that view lives there
struct PlaceWidths {
    std::int64_t widths[kNumViews];
};

// The part of one sequence that a run computes: tokens at positions start, start + 1, ..., its cache pages, and the
// offsets of the tokens whose logits are wanted.
struct SequenceSlice {
    std::vector<std::int64_t> token_ids;
    std::int64_t start;
    std::vector<std::int64_t> pages;
    std::vector<std::int64_t> wanted;
};

struct Cache {
    std::vector<KvPool> pools;
    std::int64_t num_pages;
    std::int64_t page_size;
};

// The rows of one run, in both views.
class Batch {
public:
    // throws std::invalid_argument for ids, pages or offsets out of bounds
    Batch(const std::vector<SequenceSlice>& slices, const Cache& cache, std::int64_t vocab_size);

    std::int64_t num_rows(View view) const { return static_cast<std::int64_t>(rows_[view].positions.size()); }
    ViewRows view(View view) const;

private:
    struct Rows {
        std::vector<std::int64_t> token_ids, positions, index, slots;
        std::vector<SpanRows> spans;
    };
    void add_row(View view, std::int64_t token, std::int64_t position, std::int64_t index, std::int64_t slot);

    Rows rows_[kNumViews];
};

// A piece of the workspace, in bytes.
struct Region {
    std::int64_t offset;
    std::int64_t num_bytes;
};

class Program {
public:
    Program(Isa isa, int num_threads, std::int64_t vocab_size, std::int64_t num_slots, std::vector<PlaceWidths> places);

    // number of the table, for QkvRopeStep::rotary
    int add_rotary(const Rotary& rotary);
    void add(const PlannedStep& step);

    std::int64_t num_steps() const { return static_cast<std::int64_t>(steps_.size()); }
    int num_threads() const { return num_threads_; }
    std::int64_t vocab_size() const { return vocab_size_; }
    std::int64_t num_slots() const { return num_slots_; }
    const std::vector<PlaceWidths>& places() const { return places_; }
    const std::vector<Rotary>& rotaries() const { return rotaries_; }
    // positions that a run may have, counted from 0
    std::int64_t position_limit() const { return position_limit_; }

    // Where everything lies in the workspace of a run with so many rows: the places but the last, then the scratch.
    // Between two regions lie 64 bytes or more that nothing writes.
    std::vector<Region> regions(const std::int64_t (&rows)[kNumViews]) const;
    static std::int64_t workspace_bytes(const std::vector<Region>& regions);

    // Runs steps [begin, end) over `batch`; the last place is `logits`. A step whose view has no row ends the run.
    // `workspace` is aligned to 64 bytes and holds workspace_bytes.
    void run(std::int64_t begin, std::int64_t end, const Batch& batch, const Cache& cache, char* workspace,
             float* logits) const;

private:
    void grow_scratch(const StepParams& params);

    const Kernels& kernels_;
    int num_threads_;
    std::int64_t vocab_size_;
    std::int64_t num_slots_;
    std::vector<PlaceWidths> places_;
    std::vector<Rotary> rotaries_;
    std::vector<PlannedStep> steps_;
    std::int64_t position_limit_ = std::numeric_limits<std::int64_t>::max();
    // the most that any step needs: 32-bit words a row, then floats a worker
    std::int64_t packed_words_ = 0, hidden_words_ = 0, wide_floats_ = 0, normed_floats_ = 0, own_floats_ = 0;
};

}  // namespace pyruntime
