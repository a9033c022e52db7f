// The parts of the Python module pyruntime._C. Only bindings*.cpp include this.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/plan.h"

namespace pyruntime {

void bind_plan(pybind11::module_& module);    // bindings_plan.cpp
void bind_sample(pybind11::module_& module);  // bindings_sample.cpp
void bind_probe(pybind11::module_& module);   // bindings_probe.cpp

// larger than any memory, small enough that products of two sizes stay inside 64 bit
constexpr std::int64_t kMaxSize = std::int64_t{1} << 30;

// the integer attribute `name`; throws std::invalid_argument below `least` or above kMaxSize
std::int64_t size_of(const pybind11::handle& from, const char* name, std::int64_t least);

// throws std::invalid_argument, which begins with `what`, unless a team can have so many threads
void check_threads(const char* what, std::int64_t num_threads);

// A step of the op from the attributes of `fields`, which are named as in steps.h; throws std::invalid_argument where
// sizes, memory or places do not fit together. bindings_steps.cpp
PlannedStep unpack_step(const Program& program, const std::string& op, const pybind11::handle& fields);
Rotary unpack_rotary(const pybind11::handle& fields);

}  // namespace pyruntime
