// The probes of what the machine can do: unpack, check, call.
#include <vector>

#include "bindings.h"
#include "cpu/isa.h"
#include "pyruntime/check.h"

namespace pyruntime {
namespace {

// what all workers did together
std::int64_t total(const std::vector<ProbeResult>& results) {
    std::int64_t amount = 0;
    for (const ProbeResult& each : results) {
        amount += each.amount;
    }
    return amount;
}

// Runs one entry of a copy on the team; Probe is what it takes.
template <typename Probe>
std::int64_t run(void (*entry)(const Probe&, const Worker&), Probe probe, int num_threads) {
    struct Call {
        void (*entry)(const Probe&, const Worker&);
        Probe probe;
    };
    std::vector<ProbeResult> results(static_cast<std::size_t>(num_threads));
    probe.results = results.data();
    const Call call = {entry, probe};
    const TeamBody body = [](const void* context, const Worker& worker) {
        const Call& each = *static_cast<const Call*>(context);
        each.entry(each.probe, worker);
    };
    {
        const pybind11::gil_scoped_release unlocked;
        run_team(num_threads, body, &call);
    }
    return total(results);
}

std::int64_t read_probe(const std::string& isa, std::uintptr_t data, std::int64_t num_bytes, int num_threads) {
    const Isa copy = isa_from_name(isa);
    PYRUNTIME_CHECK(data != 0 && data % kProbeAlignment == 0, "read_probe: data is at ", data,
                    "; expected a multiple of ", kProbeAlignment, " that is not 0");
    PYRUNTIME_CHECK(num_bytes > 0 && num_bytes % kProbeBlock == 0, "read_probe: num_bytes is ", num_bytes,
                    "; expected a positive multiple of ", kProbeBlock);
    check_threads("read_probe", num_threads);
    const ReadProbe probe = {reinterpret_cast<const void*>(data), num_bytes, nullptr};
    return run(kernels_of(copy).read_probe, probe, num_threads);
}

std::int64_t multiply_probe(const std::string& isa, const std::string& dtype, std::int64_t rounds, int num_threads) {
    const Isa copy = isa_from_name(isa);
    PYRUNTIME_CHECK(dtype == "float32" || (dtype == "bfloat16" && copy == Isa::kAvx512Bf16),
                    "multiply_probe: dtype is ", dtype, " on ", isa, "; expected float32, or bfloat16 on avx512_bf16");
    // more would take years, and its operations could not be counted
    PYRUNTIME_CHECK(rounds > 0 && rounds <= (std::int64_t{1} << 32), "multiply_probe: rounds is ", rounds,
                    "; expected 1 to 2^32");
    check_threads("multiply_probe", num_threads);
    const MultiplyProbe probe = {rounds, dtype == "float32" ? kFloat32 : kBfloat16, nullptr};
    return run(kernels_of(copy).multiply_probe, probe, num_threads);
}

}  // namespace

void bind_probe(pybind11::module_& module) {
    namespace py = pybind11;
    module.def("read_probe", &read_probe, py::kw_only(), py::arg("isa"), py::arg("data"), py::arg("num_bytes"),
               py::arg("num_threads"), "Reads memory with all threads and returns the bytes read, to be timed.");
    module.def("multiply_probe", &multiply_probe, py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("rounds"),
               py::arg("num_threads"),
               "Multiplies and adds in registers with all threads and returns the operations done, to be timed.");
}

}  // namespace pyruntime
