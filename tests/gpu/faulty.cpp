// Kernels with one fault each: the host twin must name it. Prints what the kernel given by number wrote, or the error.
#include <cstdio>
#include <cstdlib>

#include "device.cuh"

namespace pyruntime {
namespace {

struct Params {
    const float* in;
    float* out;
    std::uint32_t* counter;
};
constexpr int kThreads = 64;

float* shared_floats() {
    return reinterpret_cast<float*>(shared_memory());
}

void sound(Params p) {
    copy_async_weights(shared_memory() + 16 * thread_idx(), p.in + 4 * thread_idx());
    commit_copies();
    wait_for_inputs();
    wait_copies<0>();
    sync_threads();
    const float value = warp_sum(shared_floats()[4 * (kThreads - 1 - thread_idx())]);
    if (thread_idx() == 0) {
        store(p.out, value);
    }
}
// the thread that reads did not wait for the one that wrote
void without_barrier(Params p) {
    wait_for_inputs();
    shared_floats()[thread_idx()] = 1.0f;
    if (thread_idx() == 0) {
        store(p.out, shared_floats()[kThreads - 1]);
    }
}
void without_waiting_for_copies(Params p) {
    wait_for_inputs();
    copy_async_weights(shared_memory() + 16 * thread_idx(), p.in);
    commit_copies();
    sync_threads();
    store(p.out, shared_floats()[0]);
}
// one group less than was begun
void waiting_for_too_few_copies(Params p) {
    wait_for_inputs();
    for (int stage = 0; stage < 2; ++stage) {
        copy_async_weights(shared_memory() + 16 * (thread_idx() + kThreads * stage), p.in);
        commit_copies();
    }
    wait_copies<1>();
    store(p.out, shared_floats()[4 * (thread_idx() + kThreads)]);
}
void reading_too_early(Params p) {
    const float value = load_input(p.in);
    wait_for_inputs();
    store(p.out, value);
}
void writing_too_early(Params p) {
    store(p.out, 1.0f);
    wait_for_inputs();
}
void never_waiting(Params) {}
void divergent_barrier(Params) {
    wait_for_inputs();
    if (thread_idx() < 40) {
        sync_threads();
    }
}
void lanes_that_differ(Params p) {
    wait_for_inputs();
    store(p.out, shuffle_xor(1.0f, lane_idx() < 8 ? 1 : 2));
}
void lanes_that_are_missing(Params p) {
    wait_for_inputs();
    if (lane_idx() < 8) {
        store(p.out, warp_sum(1.0f));
    }
}
void beyond_shared_memory(Params) {
    wait_for_inputs();
    shared_floats()[512 + thread_idx()] = 0.0f;
}
void copy_beyond_shared_memory(Params p) {
    wait_for_inputs();
    copy_async_weights(shared_memory() + 2048, p.in);
}
void unaligned_load(Params p) {
    wait_for_inputs();
    store(p.out, as_float(load_input_16(p.in + 1).word[0]));
}
// only the first block of a launch that is not cooperative is there
void spinning_for_ever(Params p) {
    wait_for_inputs();
    GridBarrier barrier{p.counter};
    barrier.sync();
}

constexpr struct {
    const char* name;
    void (*kernel)(Params);
} kKernels[] = {
    {"sound", sound},
    {"without_barrier", without_barrier},
    {"without_waiting_for_copies", without_waiting_for_copies},
    {"waiting_for_too_few_copies", waiting_for_too_few_copies},
    {"reading_too_early", reading_too_early},
    {"writing_too_early", writing_too_early},
    {"never_waiting", never_waiting},
    {"divergent_barrier", divergent_barrier},
    {"lanes_that_differ", lanes_that_differ},
    {"lanes_that_are_missing", lanes_that_are_missing},
    {"beyond_shared_memory", beyond_shared_memory},
    {"copy_beyond_shared_memory", copy_beyond_shared_memory},
    {"unaligned_load", unaligned_load},
    {"spinning_for_ever", spinning_for_ever},
};

}  // namespace
}  // namespace pyruntime

int main() {
    using namespace pyruntime;
    alignas(16) float in[4 * kThreads];
    for (float& value : in) {
        value = 2.0f;
    }
    for (const auto& each : kKernels) {
        float out = 0.0f;
        std::uint32_t counter[2] = {};
        LaunchShape shape{};
        shape.blocks = 2;
        shape.threads = kThreads;
        shape.shared_bytes = 2048;
        try {
            launch(each.name, each.kernel, shape, Params{in, &out, counter}, nullptr);
            // without its sign, which no kernel means
            std::printf("%s|%g\n", each.name, std::fabs(out));
        } catch (const std::exception& error) {
            std::printf("%s|%s\n", each.name, error.what());
        }
    }
}
