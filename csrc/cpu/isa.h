// Which compiled copy of the CPU kernels this machine can run, and the entries of each copy.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "pyruntime/probe.h"
#include "pyruntime/sample.h"
#include "pyruntime/steps.h"

namespace pyruntime {

// ordered: each one includes everything before it
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// Every worker of a team calls an entry with the same arguments; when it returns to one, all have done their part.
struct Kernels {
    void (*embed)(const EmbedStep&, const RunContext&, View, const Worker&);
    void (*norm)(const NormStep&, const RunContext&, View, const Worker&);
    void (*linear)(const LinearStep&, const RunContext&, View, const Worker&);
    void (*qkv_rope)(const QkvRopeStep&, const RunContext&, View, const Worker&);
    void (*attention)(const AttentionStep&, const RunContext&, View, const Worker&);
    void (*mlp)(const MlpStep&, const RunContext&, View, const Worker&);
    void (*add)(const AddStep&, const RunContext&, View, const Worker&);
    void (*gather)(const GatherStep&, const RunContext&, View, const Worker&);
    void (*head)(const HeadStep&, const RunContext&, View, const Worker&);
    void (*sample)(const SampleParams&, const Worker&);
    void (*read_probe)(const ReadProbe&, const Worker&);
    void (*multiply_probe)(const MultiplyProbe&, const Worker&);
};

const char* isa_name(Isa isa);

// best ISA that both the processor and the operating system's saved register state allow
Isa isa_detected();

// every ISA up to the detected one, slowest first
std::vector<Isa> isa_available();

// throws std::invalid_argument, listing what this CPU has, when `name` is unknown or not available here
Isa isa_from_name(const std::string& name);

// the copy compiled for `isa`, which must be available
const Kernels& kernels_of(Isa isa);

}  // namespace pyruntime
