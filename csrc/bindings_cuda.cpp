// The Python module pyruntime._C_cuda: unpack, check, launch. It imports on a machine without a GPU driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "pyruntime/check.h"
#include "pyruntime/params.h"

namespace py = pybind11;

extern "C" int pyruntime_launch_norm(const pyruntime::NormParams* params, void* stream);

namespace {

using pyruntime::concat;

// 0 where there is no driver or no device: that is an answer, not an error
int device_count() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
        cudaGetLastError();  // the runtime keeps the error for whoever asks next
        return 0;
    }
    if (status != cudaSuccess) {
        throw std::runtime_error(concat("counting GPUs failed: ", cudaGetErrorString(status)));
    }
    return count;
}

std::int32_t dtype_from_name(const std::string& name) {
    if (name == "float32") {
        return pyruntime::kFloat32;
    }
    if (name == "float16") {
        return pyruntime::kFloat16;
    }
    PYRUNTIME_CHECK(name == "bfloat16", "norm: dtype is '", name, "'; expected float32, float16 or bfloat16");
    return pyruntime::kBfloat16;
}

void check_norm(const pyruntime::NormParams& p) {
    PYRUNTIME_CHECK(p.rows > 0 && p.rows <= std::numeric_limits<std::int32_t>::max(), "norm: rows is ", p.rows,
                    "; expected 1 to 2147483647");
    PYRUNTIME_CHECK(p.hidden > 0, "norm: hidden is ", p.hidden, "; expected at least 1");
    PYRUNTIME_CHECK(std::isfinite(p.eps) && p.eps >= 0.0f, "norm: eps is ", p.eps,
                    "; expected a finite number of at least 0");
    PYRUNTIME_CHECK(p.x != nullptr && p.weight != nullptr && p.out != nullptr,
                    "norm: x, weight or out is a null pointer");
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
    pyruntime::NormParams params{};
    params.x = reinterpret_cast<const void*>(x);
    params.residual = reinterpret_cast<const void*>(residual);
    params.weight = reinterpret_cast<const void*>(weight);
    params.sum_out = reinterpret_cast<void*>(sum_out);
    params.out = reinterpret_cast<void*>(out);
    params.rows = rows;
    params.hidden = hidden;
    params.x_stride = x_stride;
    params.residual_stride = residual_stride;
    params.sum_out_stride = sum_out_stride;
    params.out_stride = out_stride;
    params.eps = eps;
    params.dtype = dtype_from_name(dtype);
    check_norm(params);
    py::gil_scoped_release unlocked;
    const int status = pyruntime_launch_norm(&params, reinterpret_cast<void*>(stream));
    if (status != cudaSuccess) {
        throw std::runtime_error(concat("norm: launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(status))));
    }
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
    module.doc() = "Compiled CUDA kernels. Use them through pyruntime.ops.";
    module.def("device_count", &device_count, "GPUs this process can use; 0 without a driver.");
    module.def(
        "norm", &norm, py::kw_only(), py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("sum_out"),
        py::arg("out"), py::arg("rows"), py::arg("hidden"), py::arg("x_stride"), py::arg("residual_stride"),
        py::arg("sum_out_stride"), py::arg("out_stride"), py::arg("eps"), py::arg("dtype"), py::arg("stream"),
        "sum_out = x + residual; out = RMSNorm(sum_out) * weight, launched on `stream`. Addresses are device memory; "
        "residual and sum_out may both be 0. Raises ValueError for impossible sizes, RuntimeError when the launch fails.");
}
