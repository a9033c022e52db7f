// Which compiled copy of the CPU kernels this machine can run.
#pragma once

#include <string>
#include <vector>

#include "pyruntime/params.h"

namespace pyruntime {

// ordered: each one includes everything before it
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

const char* isa_name(Isa isa);

// best ISA that both the processor and the operating system's saved register state allow
Isa isa_detected();

// every ISA up to the detected one, slowest first
std::vector<Isa> isa_available();

// throws std::invalid_argument, listing what this CPU has, when `name` is unknown or not available here
Isa isa_from_name(const std::string& name);

// runs the copy of the kernel compiled for `isa`, which must be available
void mlp(Isa isa, const MlpParams& params);

}  // namespace pyruntime
