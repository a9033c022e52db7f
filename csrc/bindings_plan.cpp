// Plans of the CPU target in Python: steps are added one by one with addresses of their weights, then run in one call.
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "bindings.h"
#include "pyruntime/check.h"

namespace py = pybind11;

namespace pyruntime {
namespace {

// of a run: with kMaxSize values in each, a place still has fewer bytes than 64 bits can count
constexpr std::int64_t kMaxRows = std::int64_t{1} << 24;

Program make_program(const std::string& isa, int num_threads, std::int64_t vocab_size, std::int64_t num_slots,
                     const std::vector<std::pair<std::int64_t, std::int64_t>>& widths) {
    check_threads("Program", num_threads);
    PYRUNTIME_CHECK(vocab_size > 0 && vocab_size <= kMaxSize, "vocab_size is ", vocab_size, "; expected 1 to ",
                    kMaxSize);
    PYRUNTIME_CHECK(!widths.empty(), "a program needs a place for its logits");
    std::vector<PlaceWidths> places;
    for (const auto& [all, wanted] : widths) {
        PYRUNTIME_CHECK(all >= 0 && wanted >= 0 && all <= kMaxSize && wanted <= kMaxSize, "a place of ", all, " and ",
                        wanted, " values a row");
        places.push_back({{all, wanted}});
    }
    return Program(isa_from_name(isa), num_threads, vocab_size, num_slots, std::move(places));
}

using SliceTuple =
    std::tuple<std::vector<std::int64_t>, std::int64_t, std::vector<std::int64_t>, std::vector<std::int64_t>>;

std::vector<SequenceSlice> slices_of(std::vector<SliceTuple> given) {
    std::vector<SequenceSlice> slices;
    slices.reserve(given.size());
    for (auto& [token_ids, start, pages, wanted] : given) {
        slices.push_back({std::move(token_ids), start, std::move(pages), std::move(wanted)});
    }
    return slices;
}

Cache cache_of(const Program& program, const py::handle& from) {
    Cache cache{{}, size_of(from, "num_pages", 0), size_of(from, "page_size", 1)};
    PYRUNTIME_CHECK(cache.page_size % kPanel == 0, "page_size is ", cache.page_size, "; expected a multiple of ",
                    kPanel);
    for (const auto& [keys, values] :
         from.attr("addresses").cast<std::vector<std::pair<std::uintptr_t, std::uintptr_t>>>()) {
        cache.pools.push_back({reinterpret_cast<void*>(keys), reinterpret_cast<void*>(values)});
    }
    PYRUNTIME_CHECK(static_cast<std::int64_t>(cache.pools.size()) == program.num_slots(), "the cache has ",
                    cache.pools.size(), " slots; the plan has ", program.num_slots());
    return cache;
}

void run_program(const Program& program, std::int64_t begin, std::int64_t end, std::vector<SliceTuple> given,
                 const py::handle& cache_fields, std::pair<std::uintptr_t, std::int64_t> workspace,
                 std::pair<std::uintptr_t, std::int64_t> logits) {
    PYRUNTIME_CHECK(begin >= 0 && begin <= end && end <= program.num_steps(), "steps ", begin, " to ", end, " of ",
                    program.num_steps());
    const std::vector<SequenceSlice> slices = slices_of(std::move(given));
    const Cache cache = cache_of(program, cache_fields);
    const Batch batch(slices, cache, program.vocab_size());
    for (const SequenceSlice& slice : slices) {
        const std::int64_t end = slice.start + static_cast<std::int64_t>(slice.token_ids.size());
        PYRUNTIME_CHECK(end <= program.position_limit(), "a slice ends at position ", end, "; the model embeds ",
                        program.position_limit());
    }
    const std::int64_t needed =
        Program::workspace_bytes(program.regions({batch.num_rows(kAllRows), batch.num_rows(kWantedRows)}));
    PYRUNTIME_CHECK(workspace.first != 0 && workspace.first % 64 == 0 && workspace.second >= needed, "a workspace of ",
                    workspace.second, " bytes at address ", workspace.first, "; expected ", needed,
                    " bytes aligned to 64");
    const std::int64_t wanted = batch.num_rows(kWantedRows) * program.vocab_size();
    PYRUNTIME_CHECK(logits.second == wanted && (logits.first != 0 || wanted == 0), "logits hold ", logits.second,
                    " values; expected ", wanted);
    py::gil_scoped_release unlocked;
    program.run(begin, end, batch, cache, reinterpret_cast<char*>(workspace.first),
                reinterpret_cast<float*>(logits.first));
}

std::vector<Region> checked_regions(const Program& program, std::int64_t rows, std::int64_t wanted) {
    PYRUNTIME_CHECK(rows >= 0 && wanted >= 0 && rows <= kMaxRows && wanted <= kMaxRows, rows, " and ", wanted,
                    " rows; expected 0 to ", kMaxRows, " of each");
    return program.regions({rows, wanted});
}

std::vector<std::pair<std::int64_t, std::int64_t>> regions_of(const Program& program, std::int64_t rows,
                                                              std::int64_t wanted) {
    std::vector<std::pair<std::int64_t, std::int64_t>> found;
    for (const Region& region : checked_regions(program, rows, wanted)) {
        found.emplace_back(region.offset, region.num_bytes);
    }
    return found;
}

std::int64_t workspace_bytes_of(const Program& program, std::int64_t rows, std::int64_t wanted) {
    return Program::workspace_bytes(checked_regions(program, rows, wanted));
}

}  // namespace

void bind_plan(py::module_& module) {
    py::class_<Program>(module, "Program", "The steps of a plan that run in one call. Made by pyruntime.ops.program.")
        .def(py::init(&make_program), py::kw_only(), py::arg("isa"), py::arg("num_threads"), py::arg("vocab_size"),
             py::arg("num_slots"), py::arg("widths"))
        .def(
            "add",
            [](Program& program, const std::string& op, const py::handle& fields) {
                program.add(unpack_step(program, op, fields));
            },
            py::arg("op"), py::arg("fields"),
            "Append a step. Addresses in `fields` are of memory that the caller keeps alive. Raises ValueError for "
            "impossible sizes and places.")
        .def(
            "add_rotary",
            [](Program& program, const py::handle& fields) { return program.add_rotary(unpack_rotary(fields)); },
            py::arg("fields"), "Number of a new table of angles.")
        .def("regions", &regions_of, py::arg("rows"), py::arg("wanted"), "(offset, bytes) of all that a run writes.")
        .def("workspace_bytes", &workspace_bytes_of, py::arg("rows"), py::arg("wanted"))
        .def("run", &run_program, py::arg("begin"), py::arg("end"), py::arg("slices"), py::arg("cache"),
             py::arg("workspace"), py::arg("logits"),
             "Run steps [begin, end). Raises ValueError for ids, pages and memory that do not fit.")
        .def_property_readonly("num_steps", &Program::num_steps)
        .def_property_readonly("num_threads", &Program::num_threads);
}

}  // namespace pyruntime
