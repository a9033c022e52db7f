// Sampling for Python: rows of one tensor of logits, by number.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "pyruntime/check.h"
#include "pyruntime/sample.h"

namespace py = pybind11;

namespace pyruntime {
namespace {

constexpr std::int64_t kMostIds = 0x7fffffff;
// a product with kMostIds stays inside 64 bit, and no address space holds as many rows
constexpr std::int64_t kMostRows = std::int64_t{1} << 28;
constexpr std::int64_t kAlignment = 64;

using Ids = std::vector<std::int32_t>;

// What Python asks of one row; pyruntime/ops/sample.py says what the fields mean.
struct SampleRequest {
    double temperature, min_p, top_p, uniform;
    std::int64_t top_k;
    double repetition, presence, frequency;
    std::optional<Ids> allowed;
    Ids biased;
    std::vector<float> bias;
    Ids banned, prompt, output;
    std::int64_t given, num_top;
};

// Logits [rows, vocab], the memory of the workers, and how to run.
struct SampleCall {
    Isa isa;
    const float* logits;
    std::int64_t num_rows, vocab;
    std::uintptr_t scratch;
    int num_threads;
};

std::int64_t rounded_up(std::int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Lays out the memory of one worker from `address` on; the bytes that it takes.
std::int64_t lay_out(std::int64_t vocab, std::uintptr_t address, SampleScratch* scratch) {
    const std::int64_t blocks = (vocab + kSampleBlock - 1) / kSampleBlock;
    std::int64_t used = 0;
    const auto part = [&](auto*& pointer, std::int64_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(address + used);
        used += rounded_up(count * static_cast<std::int64_t>(sizeof *pointer));
    };
    // greedy rows touch only the first
    part(scratch->block_best, blocks);
    part(scratch->block_sums, blocks);
    part(scratch->row, vocab);
    part(scratch->ids, vocab);
    part(scratch->distances, vocab);
    part(scratch->weights, vocab);
    return used;
}

void check_vocab(std::int64_t vocab) {
    PYRUNTIME_CHECK(vocab > 0 && vocab <= kMostIds, "sample: vocab is ", vocab, "; expected 1 to ", kMostIds);
}

std::int64_t scratch_bytes(std::int64_t vocab, std::int64_t num_threads) {
    check_vocab(vocab);
    check_threads("sample", num_threads);
    SampleScratch unused;
    return lay_out(vocab, 0, &unused) * num_threads;
}

void check_memory(const char* name, std::uintptr_t address, std::int64_t bytes, std::uintptr_t alignment) {
    PYRUNTIME_CHECK(address != 0, "sample: ", name, " is a null pointer; expected ", bytes, " bytes");
    PYRUNTIME_CHECK(address % alignment == 0, "sample: ", name, " is not aligned to ", alignment, " bytes");
    PYRUNTIME_CHECK(address + static_cast<std::uintptr_t>(bytes) > address, "sample: ", name,
                    " runs past the end of the address space");
}

SampleCall checked_call(const std::string& isa, std::uintptr_t logits, std::int64_t num_rows, std::int64_t vocab,
                        const std::vector<std::int64_t>& rows, std::uintptr_t scratch, std::int64_t scratch_size,
                        std::int64_t num_threads) {
    const std::int64_t needed = scratch_bytes(vocab, num_threads);
    PYRUNTIME_CHECK(num_rows > 0 && num_rows <= kMostRows, "sample: num_rows is ", num_rows, "; expected 1 to ",
                    kMostRows);
    const std::int64_t logit_bytes = num_rows * vocab * static_cast<std::int64_t>(sizeof(float));
    check_memory("logits", logits, logit_bytes, alignof(float));
    PYRUNTIME_CHECK(scratch_size >= needed, "sample: scratch holds ", scratch_size, " bytes; expected at least ",
                    needed);
    check_memory("scratch", scratch, needed, kAlignment);
    PYRUNTIME_CHECK(scratch + needed <= logits || logits + logit_bytes <= scratch,
                    "sample: scratch overlaps logits; pass separate memory");
    for (const std::int64_t row : rows) {
        PYRUNTIME_CHECK(row >= 0 && row < num_rows, "sample: row is ", row, "; expected 0 to ", num_rows - 1);
    }
    return {isa_from_name(isa),           reinterpret_cast<const float*>(logits), num_rows, vocab, scratch,
            static_cast<int>(num_threads)};
}

TokenIds checked_ids(const char* name, const Ids& ids, std::int64_t vocab) {
    for (const std::int32_t id : ids) {
        PYRUNTIME_CHECK(id >= 0 && id < vocab, "sample: ", name, " has the id ", id, "; expected 0 to ", vocab - 1);
    }
    return {ids.data(), static_cast<std::int64_t>(ids.size())};
}

void check_numbers(const SampleRequest& request, std::int64_t vocab) {
    // a comparison with NaN is false, so NaN is refused everywhere
    PYRUNTIME_CHECK(request.temperature >= 0.0 && std::isfinite(request.temperature), "sample: temperature is ",
                    request.temperature, "; expected a finite number of at least 0");
    PYRUNTIME_CHECK(request.min_p >= 0.0 && request.min_p <= 1.0, "sample: min_p is ", request.min_p,
                    "; expected 0 to 1");
    PYRUNTIME_CHECK(request.top_p > 0.0, "sample: top_p is ", request.top_p, "; expected a number above 0");
    PYRUNTIME_CHECK(request.uniform >= 0.0 && request.uniform < 1.0, "sample: uniform is ", request.uniform,
                    "; expected a number from 0 up to 1, without 1");
    PYRUNTIME_CHECK(!std::isnan(request.repetition) && !std::isnan(request.presence) && !std::isnan(request.frequency),
                    "sample: a penalty is NaN; expected a number");
    PYRUNTIME_CHECK(request.given >= -1 && request.given < vocab, "sample: given is ", request.given,
                    "; expected an id up to ", vocab - 1, ", or -1 for none");
    PYRUNTIME_CHECK(request.bias.size() == request.biased.size(), "sample: bias has ", request.bias.size(),
                    " values; expected ", request.biased.size(), ", one for each id");
}

SampleRow row_for(const SampleRequest& request, const SampleCall& call, std::int64_t row) {
    check_numbers(request, call.vocab);
    SampleRow out{};
    out.logits = call.logits + row * call.vocab;
    if (request.allowed) {
        // no id at all is also a list, and its address must not be null
        static constexpr std::int32_t kNone = 0;
        out.allowed = checked_ids("allowed", *request.allowed, call.vocab);
        out.allowed.ids = request.allowed->empty() ? &kNone : out.allowed.ids;
    }
    out.biased = checked_ids("biased", request.biased, call.vocab);
    out.bias = request.bias.data();
    out.banned = checked_ids("banned", request.banned, call.vocab);
    out.prompt = checked_ids("prompt", request.prompt, call.vocab);
    out.output = checked_ids("output", request.output, call.vocab);
    out.repetition = static_cast<float>(request.repetition);
    out.presence = static_cast<float>(request.presence);
    out.frequency = static_cast<float>(request.frequency);
    out.temperature = request.temperature;
    out.min_p = request.min_p;
    out.top_p = request.top_p;
    out.uniform = request.uniform;
    out.top_k = request.top_k;
    out.given = request.given;
    out.num_top = std::min(request.num_top, call.vocab);
    return out;
}

SampleRow greedy_row(const SampleCall& call, std::int64_t row) {
    SampleRow out{};
    out.logits = call.logits + row * call.vocab;
    out.repetition = 1.0f;
    out.top_p = 1.0;
    out.given = -1;
    out.num_top = -1;
    return out;
}

struct Job {
    const Kernels* kernels;
    SampleParams params;
};

void run(const SampleCall& call, std::vector<SampleRow>& rows) {
    std::vector<SampleScratch> scratch(call.num_threads);
    std::uintptr_t address = call.scratch;
    for (SampleScratch& own : scratch) {
        address += lay_out(call.vocab, address, &own);
    }
    const std::int64_t num_rows = static_cast<std::int64_t>(rows.size());
    const Job job = {&kernels_of(call.isa), {rows.data(), num_rows, call.vocab, scratch.data()}};
    const TeamBody body = [](const void* context, const Worker& worker) {
        const Job& own = *static_cast<const Job*>(context);
        own.kernels->sample(own.params, worker);
    };
    py::gil_scoped_release unlocked;
    run_team(call.num_threads, body, &job);
}

std::vector<std::int64_t> sample_greedy(const std::string& isa, std::uintptr_t logits, std::int64_t num_rows,
                                        std::int64_t vocab, const std::vector<std::int64_t>& rows,
                                        std::uintptr_t scratch, std::int64_t scratch_size, std::int64_t num_threads) {
    const SampleCall call = checked_call(isa, logits, num_rows, vocab, rows, scratch, scratch_size, num_threads);
    std::vector<SampleRow> work;
    work.reserve(rows.size());
    for (const std::int64_t row : rows) {
        work.push_back(greedy_row(call, row));
    }
    run(call, work);
    std::vector<std::int64_t> found;
    found.reserve(rows.size());
    for (const SampleRow& row : work) {
        found.push_back(row.status == kSampled ? row.token : -row.status);
    }
    return found;
}

// status, token, log of the sum of e^logit, the token's logit, its rank, and ids and logits of the best
using SampleOutcome = std::tuple<int, std::int64_t, double, float, std::int64_t, Ids, std::vector<float>>;

std::vector<SampleOutcome> sample_requests(const std::string& isa, std::uintptr_t logits, std::int64_t num_rows,
                                           std::int64_t vocab, const std::vector<std::int64_t>& rows,
                                           const std::vector<const SampleRequest*>& requests, std::uintptr_t scratch,
                                           std::int64_t scratch_size, std::int64_t num_threads) {
    const SampleCall call = checked_call(isa, logits, num_rows, vocab, rows, scratch, scratch_size, num_threads);
    PYRUNTIME_CHECK(requests.size() == rows.size(), "sample: requests has ", requests.size(), " entries; expected ",
                    rows.size(), ", one per row");
    std::vector<SampleRow> work;
    std::vector<SampleOutcome> found(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        PYRUNTIME_CHECK(requests[i] != nullptr, "sample: request ", i, " is None");
        SampleRow row = row_for(*requests[i], call, rows[i]);
        Ids& top_ids = std::get<5>(found[i]);
        std::vector<float>& top_values = std::get<6>(found[i]);
        top_ids.resize(std::max<std::int64_t>(row.num_top, 0));
        top_values.resize(top_ids.size());
        row.top_ids = top_ids.data();
        row.top_values = top_values.data();
        work.push_back(row);
    }
    run(call, work);
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const SampleRow& row = work[i];
        std::tie(std::get<0>(found[i]), std::get<1>(found[i])) = std::tuple(row.status, row.token);
        std::tie(std::get<2>(found[i]), std::get<3>(found[i]), std::get<4>(found[i])) =
            std::tuple(row.log_sum, row.value, row.rank);
    }
    return found;
}

}  // namespace

void bind_sample(py::module_& module) {
    const py::kw_only by_name;
    py::class_<SampleRequest>(module, "SampleRequest", "What is asked of one row of logits.")
        .def(py::init<double, double, double, double, std::int64_t, double, double, double, std::optional<Ids>, Ids,
                      std::vector<float>, Ids, Ids, Ids, std::int64_t, std::int64_t>(),
             by_name, py::arg("temperature"), py::arg("min_p"), py::arg("top_p"), py::arg("uniform"), py::arg("top_k"),
             py::arg("repetition"), py::arg("presence"), py::arg("frequency"), py::arg("allowed"), py::arg("biased"),
             py::arg("bias"), py::arg("banned"), py::arg("prompt"), py::arg("output"), py::arg("given"),
             py::arg("num_top"));
    module.def("sample_scratch_size", &scratch_bytes, by_name, py::arg("vocab"), py::arg("num_threads"),
               "Bytes of memory, aligned to 64, that sampling needs.");
    module.def("sample_greedy", &sample_greedy, by_name, py::arg("isa"), py::arg("logits"), py::arg("num_rows"),
               py::arg("vocab"), py::arg("rows"), py::arg("scratch"), py::arg("scratch_size"), py::arg("num_threads"),
               "First highest id of each of `rows` of float32 logits [num_rows, vocab], or the negative status. "
               "`logits` and `scratch` are addresses of memory that the caller keeps alive. Raises ValueError for null "
               "or overlapping memory and impossible sizes.");
    module.def("sample", &sample_requests, by_name, py::arg("isa"), py::arg("logits"), py::arg("num_rows"),
               py::arg("vocab"), py::arg("rows"), py::arg("requests"), py::arg("scratch"), py::arg("scratch_size"),
               py::arg("num_threads"),
               "For each of `rows`: status, token, log of the sum of e^logit, the token's logit, its rank, ids and "
               "logits of the best. The last five only for a request with num_top >= 0. Raises as sample_greedy does.");
}

}  // namespace pyruntime
