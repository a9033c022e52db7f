#include "isa.h"

#include <cpuid.h>

#include <cstdint>

#include "pyruntime/check.h"

namespace pyruntime {

// defined by csrc/cpu/*.cpp, compiled once per ISA into its own namespace
#define PYRUNTIME_DECLARE(isa)                                                                      \
    namespace cpu_##isa {                                                                           \
        void embed(const EmbedStep&, const RunContext&, View, const Worker&);                       \
        void norm(const NormStep&, const RunContext&, View, const Worker&);                         \
        void linear(const LinearStep&, const RunContext&, View, const Worker&);                     \
        void qkv_rope(const QkvRopeStep&, const RunContext&, View, const Worker&);                  \
        void attention(const AttentionStep&, const RunContext&, View, const Worker&);               \
        void mlp(const MlpStep&, const RunContext&, View, const Worker&);                           \
        void add(const AddStep&, const RunContext&, View, const Worker&);                           \
        void gather(const GatherStep&, const RunContext&, View, const Worker&);                     \
        void head(const HeadStep&, const RunContext&, View, const Worker&);                         \
        void sample(const SampleParams&, const Worker&);                                            \
        void read_probe(const ReadProbe&, const Worker&);                                           \
        void multiply_probe(const MultiplyProbe&, const Worker&);                                   \
        constexpr Kernels kKernels = {embed, norm,   linear, qkv_rope, attention,  mlp,             \
                                      add,   gather, head,   sample,   read_probe, multiply_probe}; \
    }
PYRUNTIME_DECLARE(generic)
PYRUNTIME_DECLARE(avx2)
PYRUNTIME_DECLARE(avx512)
PYRUNTIME_DECLARE(avx512_bf16)
#undef PYRUNTIME_DECLARE

namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};
constexpr std::uint64_t kXmmYmmState = 0x6;
constexpr std::uint64_t kZmmState = 0xe6;

struct Leaf {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// all zero when the processor does not have the leaf
Leaf leaf(unsigned number, unsigned sub) {
    Leaf regs;
    if (__get_cpuid_count(number, sub, &regs.eax, &regs.ebx, &regs.ecx, &regs.edx) == 0) {
        return Leaf{};
    }
    return regs;
}

bool bit(unsigned value, int idx) {
    return ((value >> idx) & 1u) != 0;
}

// only legal when CPUID says OSXSAVE
std::uint64_t saved_state() {
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
}

Isa detect() {
    const Leaf basic = leaf(1, 0);
    const bool fma = bit(basic.ecx, 12), osxsave = bit(basic.ecx, 27), avx = bit(basic.ecx, 28);
    // the operating system must save the wide registers on a task switch, or using them corrupts other programs
    const std::uint64_t state = osxsave ? saved_state() : 0;
    const Leaf extended = leaf(7, 0);
    const bool avx2 = avx && fma && bit(extended.ebx, 5) && (state & kXmmYmmState) == kXmmYmmState;
    if (!avx2) {
        return Isa::kGeneric;
    }
    // F, DQ, CD, BW, VL: what CMakeLists.txt lets the compiler use for the avx512 copy
    const bool avx512 = bit(extended.ebx, 16) && bit(extended.ebx, 17) && bit(extended.ebx, 28) &&
                        bit(extended.ebx, 30) && bit(extended.ebx, 31) && (state & kZmmState) == kZmmState;
    if (!avx512) {
        return Isa::kAvx2;
    }
    const bool bf16 = extended.eax >= 1 && bit(leaf(7, 1).eax, 5);
    return bf16 ? Isa::kAvx512Bf16 : Isa::kAvx512;
}

}  // namespace

const char* isa_name(Isa isa) {
    return kNames[static_cast<int>(isa)];
}

Isa isa_detected() {
    static const Isa detected = detect();
    return detected;
}

std::vector<Isa> isa_available() {
    std::vector<Isa> available;
    for (int idx = 0; idx <= static_cast<int>(isa_detected()); ++idx) {
        available.push_back(static_cast<Isa>(idx));
    }
    return available;
}

Isa isa_from_name(const std::string& name) {
    std::string names;
    for (const Isa isa : isa_available()) {
        if (name == isa_name(isa)) {
            return isa;
        }
        names += names.empty() ? "" : ", ";
        names += isa_name(isa);
    }
    PYRUNTIME_CHECK(false, "CPU path '", name, "' cannot run here; this CPU has ", names);
    return Isa::kGeneric;
}

const Kernels& kernels_of(Isa isa) {
    switch (isa) {
        case Isa::kAvx2:
            return cpu_avx2::kKernels;
        case Isa::kAvx512:
            return cpu_avx512::kKernels;
        case Isa::kAvx512Bf16:
            return cpu_avx512_bf16::kKernels;
        case Isa::kGeneric:
            break;
    }
    return cpu_generic::kKernels;
}

}  // namespace pyruntime
