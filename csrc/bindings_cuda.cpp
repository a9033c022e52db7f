// The Python module pyruntime._C_cuda: unpack, check, launch. It imports on a machine without a GPU driver.
#include "bindings_cuda.h"

#include <cmath>
#include <stdexcept>

namespace py = pybind11;

extern "C" int pyruntime_device_count();
extern "C" const char* pyruntime_error_text(int status);
extern "C" int pyruntime_launch_norm(const pyruntime::NormParams* params, void* stream);

namespace pyruntime {

std::int32_t dtype_from_name(const char* op, const std::string& name) {
    if (name == "float32") {
        return kFloat32;
    }
    if (name == "float16") {
        return kFloat16;
    }
    PYRUNTIME_CHECK(name == "bfloat16", op, ": dtype is '", name, "'; expected float32, float16 or bfloat16");
    return kBfloat16;
}

std::int64_t bytes_of(std::int32_t dtype) {
    return dtype == kFloat32 ? 4 : 2;
}

void check_size(const char* op, const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
    PYRUNTIME_CHECK(value >= least && value <= most, op, ": ", name, " is ", value, "; expected ", least, " to ", most);
}

void* checked_pointer(const char* op, const char* name, std::uintptr_t address, std::uintptr_t alignment) {
    PYRUNTIME_CHECK(address != 0, op, ": ", name, " is a null pointer");
    return optional_pointer(op, name, address, alignment);
}

void* optional_pointer(const char* op, const char* name, std::uintptr_t address, std::uintptr_t alignment) {
    PYRUNTIME_CHECK(address % alignment == 0, op, ": ", name, " is not aligned to ", alignment, " bytes");
    return reinterpret_cast<void*>(address);
}

void check_launched(const char* op, int status) {
    if (status != 0) {
        throw std::runtime_error(concat(op, ": launch failed: ", pyruntime_error_text(status)));
    }
}

namespace {

int device_count() {
    const int count = pyruntime_device_count();
    if (count < 0) {
        throw std::runtime_error(concat("counting GPUs failed: ", pyruntime_error_text(-count)));
    }
    return count;
}

void check_norm(const NormParams& p) {
    check_size("norm", "rows", p.rows, 1, kMostBlocks);
    check_size("norm", "hidden", p.hidden, 1, kMostWidth);
    PYRUNTIME_CHECK(std::isfinite(p.eps) && p.eps >= 0.0f, "norm: eps is ", p.eps,
                    "; expected a finite number of at least 0");
    PYRUNTIME_CHECK((p.residual == nullptr) == (p.sum_out == nullptr),
                    "norm: residual and sum_out must both be given or both be 0");
    for (const std::int64_t stride : {p.x_stride, p.out_stride}) {
        PYRUNTIME_CHECK(stride >= p.hidden, "norm: row stride ", stride, " is below hidden ", p.hidden);
    }
    if (p.residual != nullptr) {
        for (const std::int64_t stride : {p.residual_stride, p.sum_out_stride}) {
            PYRUNTIME_CHECK(stride >= p.hidden, "norm: row stride ", stride, " is below hidden ", p.hidden);
        }
    }
}

void norm(std::uintptr_t x, std::uintptr_t residual, std::uintptr_t weight, std::uintptr_t sum_out, std::uintptr_t out,
          std::int64_t rows, std::int64_t hidden, std::int64_t x_stride, std::int64_t residual_stride,
          std::int64_t sum_out_stride, std::int64_t out_stride, float eps, const std::string& dtype,
          std::uintptr_t stream) {
    NormParams params{};
    params.dtype = dtype_from_name("norm", dtype);
    const auto alignment = static_cast<std::uintptr_t>(bytes_of(params.dtype));
    params.x = checked_pointer("norm", "x", x, alignment);
    params.residual = optional_pointer("norm", "residual", residual, alignment);
    params.weight = checked_pointer("norm", "weight", weight, alignment);
    params.sum_out = optional_pointer("norm", "sum_out", sum_out, alignment);
    params.out = checked_pointer("norm", "out", out, alignment);
    params.rows = rows;
    params.hidden = hidden;
    params.x_stride = x_stride;
    params.residual_stride = residual_stride;
    params.sum_out_stride = sum_out_stride;
    params.out_stride = out_stride;
    params.eps = eps;
    check_norm(params);
    py::gil_scoped_release unlocked;
    check_launched("norm", pyruntime_launch_norm(&params, reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_norm(py::module_& module) {
    module.def(
        "norm", &norm, py::kw_only(), py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("sum_out"),
        py::arg("out"), py::arg("rows"), py::arg("hidden"), py::arg("x_stride"), py::arg("residual_stride"),
        py::arg("sum_out_stride"), py::arg("out_stride"), py::arg("eps"), py::arg("dtype"), py::arg("stream"),
        "sum_out = x + residual; out = RMSNorm(sum_out) * weight, launched on `stream`. Addresses are device memory; "
        "residual and sum_out may both be 0. Raises ValueError for impossible sizes, RuntimeError where it fails.");
}

}  // namespace pyruntime

// _C_cuda, or _C_cuda_twin where the kernels were compiled for the CPU
PYBIND11_MODULE(PYRUNTIME_CUDA_MODULE, module) {
    module.doc() = "Compiled CUDA kernels. Use them through pyruntime.ops.";
    module.def("device_count", &pyruntime::device_count, "GPUs this process can use; 0 without a driver.");
    pyruntime::bind_norm(module);
    pyruntime::bind_product(module);
    pyruntime::bind_schedule(module);
    pyruntime::bind_attention(module);
    pyruntime::bind_mlp_chain(module);
#if defined(PYRUNTIME_TWIN)
    pyruntime::bind_twin(module);
#endif
}
