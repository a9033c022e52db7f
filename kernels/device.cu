// What the bindings ask of the CUDA runtime: they are compiled without its headers, so that the host twin can use them.
#include "device.cuh"

// GPUs this process can use, 0 where there is no driver or no device, or a negative error
extern "C" int pyruntime_device_count() {
#if defined(__CUDACC__)
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
        cudaGetLastError();  // the runtime keeps the error for whoever asks next
        return 0;
    }
    return status == cudaSuccess ? count : -static_cast<int>(status);
#else
    return 0;
#endif
}

// what the number that a launch returned means
extern "C" const char* pyruntime_error_text(int status) {
#if defined(__CUDACC__)
    return cudaGetErrorString(static_cast<cudaError_t>(status));
#else
    return status == 0 ? "no error" : "the host twin has no such kernel";
#endif
}
