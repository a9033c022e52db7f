// The Python module pyruntime._C: unpack, check, call. Tensors arrive as addresses and sizes, so no tensor library is
// linked.
#include "bindings.h"

#include <pybind11/stl.h>

#include "cpu/isa.h"

namespace {

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
    module.def("cgroup_cpus", &pyruntime::cgroup_cpus, pybind11::arg("membership"), pybind11::arg("mount"),
               "CPUs that the cgroups listed in the file `membership` allow, rounded up; 0 for no limit.");
    pyruntime::bind_plan(module);
    pyruntime::bind_sample(module);
    pyruntime::bind_probe(module);
}
