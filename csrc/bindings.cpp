// The Python module pyruntime._C: unpack, check, call. Tensors arrive as addresses and sizes, so no tensor library is
// linked.
#include "bindings.h"

#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "pyruntime/check.h"

namespace {

std::vector<std::string> available_names() {
    std::vector<std::string> names;
    for (const pyruntime::Isa isa : pyruntime::isa_available()) {
        names.emplace_back(pyruntime::isa_name(isa));
    }
    return names;
}

}  // namespace

void pyruntime::check_threads(const char* what, std::int64_t num_threads) {
    PYRUNTIME_CHECK(num_threads >= 1 && num_threads <= kMaxThreads, what, ": num_threads is ", num_threads,
                    "; expected 1 to ", kMaxThreads);
}

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled CPU kernels. Use them through pyruntime.ops.";
    module.def(
        "isa_detected", [] { return pyruntime::isa_name(pyruntime::isa_detected()); },
        "Best CPU path this machine can run.");
    module.def("isa_available", &available_names, "Every CPU path this machine can run, slowest first.");
    module.def("num_threads", &pyruntime::num_threads_allowed, "Threads that affinity and the cgroup's quota allow.");
    module.def(
        "start_team",
        [](int num_threads) {
            pyruntime::check_threads("start_team", num_threads);
            return pyruntime::start_team(num_threads);
        },
        pybind11::arg("num_threads"), "Starts a team and returns its threads: fewer where the machine gives no more.");
    module.def("cgroup_cpus", &pyruntime::cgroup_cpus, pybind11::arg("membership"), pybind11::arg("mount"),
               "CPUs that the cgroups listed in the file `membership` allow, rounded up; 0 for no limit.");
    pyruntime::bind_plan(module);
    pyruntime::bind_sample(module);
    pyruntime::bind_probe(module);
}
