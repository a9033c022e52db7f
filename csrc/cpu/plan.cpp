#include "cpu/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "pyruntime/check.h"

namespace pyruntime {
namespace {

constexpr std::int64_t kAlign = 64;

std::int64_t rounded_up(std::int64_t value, std::int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

template <class... Functions>
struct Overloaded : Functions... {
    using Functions::operator()...;
};
template <class... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

void check_slice(const SequenceSlice& slice, const Cache& cache, std::int64_t vocab_size) {
    const auto length = static_cast<std::int64_t>(slice.token_ids.size());
    PYRUNTIME_CHECK(length > 0 && slice.start >= 0, "a slice has ", length, " tokens from position ", slice.start,
                    "; expected at least one token, from position 0 or later");
    for (const std::int64_t token : slice.token_ids) {
        PYRUNTIME_CHECK(token >= 0 && token < vocab_size, "token id ", token, "; expected 0 to ", vocab_size - 1);
    }
    const auto pages = static_cast<std::int64_t>(slice.pages.size());
    // divided, not multiplied, and nothing added to a huge start: neither may overflow
    PYRUNTIME_CHECK(slice.start <= std::numeric_limits<std::int64_t>::max() - length &&
                        (slice.start + length - 1) / cache.page_size < pages,
                    "a slice of ", length, " tokens from position ", slice.start, " has ", pages, " pages of ",
                    cache.page_size);
    for (const std::int64_t page : slice.pages) {
        PYRUNTIME_CHECK(page >= 0 && page < cache.num_pages, "page ", page, "; expected 0 to ", cache.num_pages - 1);
    }
    std::int64_t before = -1;
    for (const std::int64_t offset : slice.wanted) {
        PYRUNTIME_CHECK(offset > before && offset < length, "wanted offset ", offset, " behind ", before,
                        "; expected ascending offsets below ", length);
        before = offset;
    }
}

}  // namespace

Batch::Batch(const std::vector<SequenceSlice>& slices, const Cache& cache, std::int64_t vocab_size) {
    for (const SequenceSlice& slice : slices) {
        check_slice(slice, cache, vocab_size);
        const std::int64_t first_row = num_rows(kAllRows), first_wanted = num_rows(kWantedRows);
        const auto length = static_cast<std::int64_t>(slice.token_ids.size());
        for (std::int64_t i = 0; i < length; ++i) {
            const std::int64_t position = slice.start + i;
            const std::int64_t page = slice.pages[static_cast<std::size_t>(position / cache.page_size)];
            add_row(kAllRows, slice.token_ids[static_cast<std::size_t>(i)], position, first_row + i,
                    page * cache.page_size + position % cache.page_size);
        }
        for (const std::int64_t offset : slice.wanted) {
            const auto at = static_cast<std::size_t>(first_row + offset);
            const Rows& all = rows_[kAllRows];
            add_row(kWantedRows, all.token_ids[at], all.positions[at], first_row + offset, all.slots[at]);
        }
        rows_[kAllRows].spans.push_back({first_row, first_row + length, slice.pages.data()});
        rows_[kWantedRows].spans.push_back({first_wanted, num_rows(kWantedRows), slice.pages.data()});
    }
}

void Batch::add_row(View view, std::int64_t token, std::int64_t position, std::int64_t index, std::int64_t slot) {
    Rows& rows = rows_[view];
    rows.token_ids.push_back(token);
    rows.positions.push_back(position);
    rows.index.push_back(index);
    rows.slots.push_back(slot);
}

ViewRows Batch::view(View view) const {
    const Rows& rows = rows_[view];
    return {num_rows(view),
            rows.token_ids.data(),
            rows.positions.data(),
            rows.index.data(),
            rows.slots.data(),
            rows.spans.data(),
            static_cast<std::int64_t>(rows.spans.size())};
}

Program::Program(Isa isa, int num_threads, std::int64_t vocab_size, std::int64_t num_slots,
                 std::vector<PlaceWidths> places)
    : kernels_(kernels_of(isa)),
      num_threads_(num_threads),
      vocab_size_(vocab_size),
      num_slots_(num_slots),
      places_(std::move(places)) {}

int Program::add_rotary(const Rotary& rotary) {
    rotaries_.push_back(rotary);
    return static_cast<int>(rotaries_.size()) - 1;
}

void Program::add(const PlannedStep& step) {
    grow_scratch(step.params);
    const EmbedStep* embed = std::get_if<EmbedStep>(&step.params);
    if (embed != nullptr && embed->position_table != nullptr) {
        position_limit_ = std::min(position_limit_, embed->num_positions);
    }
    steps_.push_back(step);
}

void Program::grow_scratch(const StepParams& params) {
    const auto grow = [](std::int64_t& most, std::int64_t needed) { most = std::max(most, needed); };
    const auto packs = [&](const Panels& panels, std::int64_t inputs) {
        grow(packed_words_, units_of(panels.dtype, inputs));
        // a worker norms one row at a time, and may pack a tile of its own
        grow(own_floats_, rounded_up(inputs, kPanel) + kMaxTileRows * units_of(panels.dtype, inputs));
    };
    std::visit(Overloaded{
                   [&](const LinearStep& step) { packs(step.matrix, step.matrix.inputs); },
                   [&](const HeadStep& step) { packs(step.matrix, step.matrix.inputs); },
                   [&](const MlpStep& step) {
                       packs(step.gate_up, step.gate_up.inputs);
                       grow(hidden_words_, units_of(step.down.dtype, step.down.inputs));
                       packs(step.down, step.down.inputs);
                       grow(wide_floats_, step.sub.kind == kNoNorm ? 0 : step.down.inputs);
                   },
                   [&](const QkvRopeStep& step) {
                       packs(step.matrix, step.in_size);
                       grow(wide_floats_, step.matrix.outputs);
                       grow(normed_floats_, takes_input(step) && step.norm.kind != kNoNorm ? step.in_size : 0);
                       grow(own_floats_, 2 * step.num_kv_heads * step.head_dim);
                   },
                   [&](const AttentionStep& step) {
                       // means of values, and which positions they are taken over
                       const std::int64_t shaped = step.softmax_gain == nullptr ? 0 : step.head_dim + kAttentionBlock;
                       grow(own_floats_, kMaxTileRows * (2 * step.head_dim + kAttentionBlock + shaped));
                   },
                   [](const auto&) {},
               },
               params);
}

std::vector<Region> Program::regions(const std::int64_t (&rows)[kNumViews]) const {
    std::vector<Region> regions;
    std::int64_t at = 0;
    const auto add = [&](std::int64_t num_bytes) {
        regions.push_back({at, num_bytes});
        at = rounded_up(at + num_bytes, kAlign) + kAlign;
    };
    for (std::size_t i = 0; i + 1 < places_.size(); ++i) {
        const auto& widths = places_[i].widths;
        add(4 * std::max(widths[kAllRows] * rows[kAllRows], widths[kWantedRows] * rows[kWantedRows]));
    }
    for (const std::int64_t words : {packed_words_, hidden_words_, wide_floats_, normed_floats_}) {
        add(4 * words * rows[kAllRows]);
    }
    add(4 * rounded_up(own_floats_, kAlign) * num_threads_);
    for (const Rotary& rotary : rotaries_) {
        add(4 * 2 * rotary.half * rows[rotary.view]);
    }
    return regions;
}

std::int64_t Program::workspace_bytes(const std::vector<Region>& regions) {
    return regions.empty() ? 0 : rounded_up(regions.back().offset + regions.back().num_bytes, kAlign) + kAlign;
}

namespace {

struct Run {
    const Kernels* kernels;
    const PlannedStep* steps;
    std::int64_t num_steps;
    const std::vector<Rotary>* rotaries;
    float* const* angles;
    RunContext context;
};

void turn(const Run& run, const Worker& worker) {
    for (std::size_t i = 0; i < run.rotaries->size(); ++i) {
        const Rotary& rotary = (*run.rotaries)[i];
        const ViewRows& rows = run.context.views[rotary.view];
        for (std::int64_t begin, end; take(worker, rows.num_rows, 1, &begin, &end);) {
            for (std::int64_t row = begin; row < end; ++row) {
                float* cosines = run.angles[i] + row * 2 * rotary.half;
                for (std::int64_t pair = 0; pair < rotary.half; ++pair) {
                    const double angle = static_cast<double>(rows.positions[row]) * rotary.frequencies[pair];
                    cosines[pair] = static_cast<float>(std::cos(angle) * rotary.factor);
                    cosines[rotary.half + pair] = static_cast<float>(std::sin(angle) * rotary.factor);
                }
            }
        }
        wait_for_all(worker);
    }
}

void walk(const void* context, const Worker& worker) {
    const Run& run = *static_cast<const Run*>(context);
    turn(run, worker);
    for (const PlannedStep* step = run.steps; step != run.steps + run.num_steps; ++step) {
        if (run.context.views[step->view].num_rows == 0) {
            return;
        }
        const auto call = [&](const auto& kernel, const auto& params) {
            kernel(params, run.context, step->view, worker);
        };
        const Kernels& kernels = *run.kernels;
        std::visit(Overloaded{
                       [&](const EmbedStep& params) { call(kernels.embed, params); },
                       [&](const NormStep& params) { call(kernels.norm, params); },
                       [&](const LinearStep& params) { call(kernels.linear, params); },
                       [&](const QkvRopeStep& params) { call(kernels.qkv_rope, params); },
                       [&](const AttentionStep& params) { call(kernels.attention, params); },
                       [&](const MlpStep& params) { call(kernels.mlp, params); },
                       [&](const AddStep& params) { call(kernels.add, params); },
                       [&](const GatherStep& params) { call(kernels.gather, params); },
                       [&](const HeadStep& params) { call(kernels.head, params); },
                   },
                   step->params);
    }
}

}  // namespace

void Program::run(std::int64_t begin, std::int64_t end, const Batch& batch, const Cache& cache, char* workspace,
                  float* logits) const {
    const std::vector<Region> found = regions({batch.num_rows(kAllRows), batch.num_rows(kWantedRows)});
    const auto floats = [&](std::size_t idx) { return reinterpret_cast<float*>(workspace + found[idx].offset); };
    const auto words = [&](std::size_t idx) { return reinterpret_cast<std::uint32_t*>(workspace + found[idx].offset); };
    std::vector<float*> places, angles;
    for (std::size_t i = 0; i + 1 < places_.size(); ++i) {
        places.push_back(floats(i));
    }
    const std::size_t scratch = places.size();
    places.push_back(logits);
    for (std::size_t i = 0; i < rotaries_.size(); ++i) {
        angles.push_back(floats(scratch + 5 + i));
    }
    Run run{&kernels_, steps_.data() + begin, end - begin, &rotaries_, angles.data(), {}};
    RunContext& context = run.context;
    context.views[kAllRows] = batch.view(kAllRows);
    context.views[kWantedRows] = batch.view(kWantedRows);
    context.places = places.data();
    context.pools = cache.pools.data();
    context.rotaries = angles.data();
    context.page_size = cache.page_size;
    context.packed = words(scratch);
    context.hidden = words(scratch + 1);
    context.wide = floats(scratch + 2);
    context.normed = floats(scratch + 3);
    context.own = floats(scratch + 4);
    context.own_floats = rounded_up(own_floats_, kAlign);
    run_team(num_threads_, walk, &run);
}

}  // namespace pyruntime
