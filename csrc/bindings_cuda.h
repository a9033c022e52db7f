// The parts of the Python module pyruntime._C_cuda and of its host twin. Only bindings_cuda*.cpp include this; none of
// them needs CUDA's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "pyruntime/check.h"
#include "pyruntime/params.h"

namespace pyruntime {

void bind_norm(pybind11::module_& module);       // bindings_cuda.cpp
void bind_schedule(pybind11::module_& module);   // bindings_cuda_schedule.cpp
void bind_product(pybind11::module_& module);    // bindings_cuda_product.cpp
void bind_attention(pybind11::module_& module);  // bindings_cuda_attention.cpp
void bind_mlp_chain(pybind11::module_& module);  // bindings_cuda_mlp_chain.cpp
void bind_twin(pybind11::module_& module);       // bindings_cuda_twin.cpp, in the twin only

// float32, float16 or bfloat16; throws std::invalid_argument, which begins with `op`
std::int32_t dtype_from_name(const char* op, const std::string& name);
std::int64_t bytes_of(std::int32_t dtype);

// throws std::invalid_argument unless least <= value <= most
void check_size(const char* op, const char* name, std::int64_t value, std::int64_t least, std::int64_t most);

// `address` as a pointer; throws std::invalid_argument where it is null or no multiple of `alignment`
void* checked_pointer(const char* op, const char* name, std::uintptr_t address, std::uintptr_t alignment);
// the same, but 0 is a null pointer
void* optional_pointer(const char* op, const char* name, std::uintptr_t address, std::uintptr_t alignment);

// throws std::runtime_error where a launch returned something else than 0
void check_launched(const char* op, int status);

// larger than any tensor's dimension, small enough that the products of two stay inside 64 bit
constexpr std::int64_t kMostWidth = std::int64_t{1} << 30;
// blocks along x of one launch
constexpr std::int64_t kMostBlocks = 0x7fffffff;

}  // namespace pyruntime
