// The Python module pyruntime._C: unpack, check, call. Tensors arrive as addresses and sizes, so no tensor library is
// linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "pyruntime/check.h"
#include "pyruntime/params.h"

namespace py = pybind11;

namespace {

// larger than any memory, small enough that products of a size and sizeof(float) stay inside 64 bit
constexpr std::int64_t kMaxElements = std::int64_t{1} << 48;

struct Span {
    const char* name;
    std::uintptr_t address;
    std::int64_t elements;

    std::uintptr_t end() const { return address + static_cast<std::uintptr_t>(elements) * sizeof(float); }
};

std::int64_t elements(const char* op, const char* name, std::int64_t a, std::int64_t b) {
    PYRUNTIME_CHECK(a > 0 && b > 0, op, ": ", name, " is ", a, " x ", b, "; expected sizes of at least 1");
    PYRUNTIME_CHECK(a <= kMaxElements / b, op, ": ", name, " is ", a, " x ", b, ", more than fits in memory");
    return a * b;
}

void check_span(const char* op, const Span& span) {
    PYRUNTIME_CHECK(span.address != 0, op, ": ", span.name, " is a null pointer; expected ", span.elements, " floats");
    PYRUNTIME_CHECK(span.address % alignof(float) == 0, op, ": ", span.name, " is not aligned to ", alignof(float),
                    " bytes");
    PYRUNTIME_CHECK(span.end() > span.address, op, ": ", span.name, " runs past the end of the address space");
}

void check_disjoint(const char* op, const Span& written, const Span& other) {
    PYRUNTIME_CHECK(written.end() <= other.address || other.end() <= written.address, op, ": ", written.name,
                    " overlaps ", other.name, "; pass separate memory");
}

void check_mlp(const Span& x, const std::vector<Span>& weights, const Span& residual, const Span& scratch,
               const Span& out, float eps) {
    const char* op = "mlp";
    PYRUNTIME_CHECK(std::isfinite(eps) && eps >= 0.0f, op, ": eps is ", eps,
                    "; expected a finite number of at least 0");
    check_span(op, out);
    check_span(op, scratch);
    check_disjoint(op, out, scratch);
    for (const Span& state : {x, residual}) {
        check_span(op, state);
        check_disjoint(op, scratch, state);
        // an element is written after everything that needs it was read: the same memory is fine, shifted memory is not
        if (state.address != out.address) {
            check_disjoint(op, out, state);
        }
    }
    for (const Span& weight : weights) {
        check_span(op, weight);
        check_disjoint(op, scratch, weight);
        check_disjoint(op, out, weight);
    }
}

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void mlp(const std::string& isa_name, std::uintptr_t x, std::uintptr_t norm_weight, float eps, std::uintptr_t gate,
         std::uintptr_t up, std::uintptr_t down, std::uintptr_t residual, std::uintptr_t scratch,
         std::int64_t scratch_size, std::uintptr_t out, std::int64_t rows, std::int64_t hidden, std::int64_t ffn,
         int num_threads) {
    const pyruntime::Isa isa = pyruntime::isa_from_name(isa_name);
    const std::int64_t states = elements("mlp", "x", rows, hidden);
    const std::int64_t weights = elements("mlp", "gate", ffn, hidden);
    const std::int64_t needed = states + elements("mlp", "scratch", rows, ffn);
    PYRUNTIME_CHECK(scratch_size >= needed, "mlp: scratch holds ", scratch_size, " floats; expected at least ", needed);
    PYRUNTIME_CHECK(num_threads >= 0, "mlp: num_threads is ", num_threads,
                    "; expected 0 (all that are allowed) or more");
    check_mlp(
        {"x", x, states},
        {{"norm_weight", norm_weight, hidden}, {"gate", gate, weights}, {"up", up, weights}, {"down", down, weights}},
        {"residual", residual, states}, {"scratch", scratch, needed}, {"out", out, states}, eps);
    pyruntime::MlpParams params{};
    params.x = pointer<const float>(x);
    params.norm_weight = pointer<const float>(norm_weight);
    params.gate = pointer<const float>(gate);
    params.up = pointer<const float>(up);
    params.down = pointer<const float>(down);
    params.residual = pointer<const float>(residual);
    params.scratch = pointer<float>(scratch);
    params.out = pointer<float>(out);
    params.rows = rows;
    params.hidden = hidden;
    params.ffn = ffn;
    params.eps = eps;
    params.num_threads = num_threads == 0 ? pyruntime::num_threads_allowed() : num_threads;
    py::gil_scoped_release unlocked;
    pyruntime::mlp(isa, params);
}

std::vector<std::string> available_names() {
    std::vector<std::string> names;
    for (const pyruntime::Isa isa : pyruntime::isa_available()) {
        names.emplace_back(pyruntime::isa_name(isa));
    }
    return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled CPU kernels. Use them through pyruntime.ops.";
    module.def(
        "isa_detected", [] { return pyruntime::isa_name(pyruntime::isa_detected()); },
        "Best CPU path this machine can run.");
    module.def("isa_available", &available_names, "Every CPU path this machine can run, slowest first.");
    module.def("num_threads", &pyruntime::num_threads_allowed, "Threads that affinity and the cgroup's quota allow.");
    module.def("cgroup_cpus", &pyruntime::cgroup_cpus, py::arg("membership"), py::arg("mount"),
               "CPUs that the cgroups listed in the file `membership` allow, rounded up; 0 for no limit.");
    module.def(
        "mlp", &mlp, py::kw_only(), py::arg("isa"), py::arg("x"), py::arg("norm_weight"), py::arg("eps"),
        py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("residual"), py::arg("scratch"),
        py::arg("scratch_size"), py::arg("out"), py::arg("rows"), py::arg("hidden"), py::arg("ffn"),
        py::arg("num_threads"),
        "out = residual + down(silu(gate(n)) * up(n)), n = RMSNorm(x), float32. Pointers are addresses of float32 "
        "memory that the caller keeps alive. Raises ValueError for null or overlapping memory and impossible sizes.");
}
