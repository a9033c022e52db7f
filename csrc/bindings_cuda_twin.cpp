// What tests set in the host twin of the CUDA kernels.
#include "bindings_cuda.h"
#include "device.cuh"

namespace py = pybind11;

namespace pyruntime {

void bind_twin(py::module_& module) {
    module.def(
        "set_order",
        [](std::uint64_t seed, unsigned at_once) {
            check_size("set_order", "at_once", at_once, 1, 1024);
            twin::order = {seed, at_once};
        },
        py::kw_only(), py::arg("seed") = 0, py::arg("at_once") = 1,
        "The order of a launch's blocks and threads from now on: ascending for seed 0, else shuffled; `at_once` blocks "
        "are under way together.");
}

}  // namespace pyruntime
