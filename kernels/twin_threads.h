// The threads of the host twin (see twin.h): each is a fiber, and a scheduler lets them run. Include device.cuh.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace pyruntime {

namespace twin {

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN in every type, -1 in integers
constexpr int kMostIdlePasses = 100000;

// The order of a launch's blocks, and how many are under way at once (a cooperative launch has all).
struct Order {
    std::uint64_t seed = 0;  // 0: ascending
    unsigned at_once = 1;
};
inline Order order;

// a thread's stack, with a page below that must not be touched
class Stack {
public:
    Stack() : base_(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
        if (base_ == MAP_FAILED || mprotect(base_, kGuardBytes, PROT_NONE) != 0) {
            throw std::runtime_error("host twin: no memory for a thread's stack");
        }
    }
    Stack(Stack&& other) noexcept : base_(std::exchange(other.base_, MAP_FAILED)) {}
    Stack& operator=(Stack&&) = delete;
    ~Stack() {
        if (base_ != MAP_FAILED) {
            munmap(base_, kStackBytes);
        }
    }
    void* base() const { return base_; }

private:
    void* base_;
};
inline std::vector<Stack> free_stacks;

enum class State { kReady, kSpinning, kAtWarp, kAtBlock, kEnded };

struct Copy {
    void* to;
    const void* from;  // null: zeros
};

struct Block;

struct Thread {
    Block* block = nullptr;
    int idx = 0;
    State state = State::kReady;
    bool waited = false;  // called wait_for_inputs()
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> pending;  // oldest group first
    ucontext_t context{};
    Stack stack;
};

using Slot = std::array<unsigned char, 64>;

// What the lanes of a warp hand each other. Slots alternate: a lane that runs ahead to the next exchange cannot finish
// it before all others have read this one.
struct Warp {
    int arrived = 0;
    unsigned turn = 0;
    const char* what = "";
    int detail = 0;
    std::array<std::array<Slot, kLanes>, 2> slots;
};

struct Block {
    int x = 0, y = 0, z = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    int at_barrier = 0;
    int ended = 0;
    std::size_t shared_bytes = 0;
    unsigned char* shared = nullptr;  // in `memory`, aligned to 128
    std::vector<unsigned char> memory;
};

struct Launch {
    const char* name = "";
    LaunchShape shape;
    std::function<void()> body;
    ucontext_t scheduler{};
    Thread* thread = nullptr;
    std::string error;  // the first thing that went wrong
};
inline Launch* current = nullptr;

[[noreturn]] inline void fail(const std::string& what) {
    throw std::runtime_error(std::string("host twin: kernel ") + current->name + ": " + what);
}
inline Thread& self() {
    return *current->thread;
}
inline std::string place(const Thread& thread) {
    const Block& b = *thread.block;
    return "thread " + std::to_string(thread.idx) + " of block (" + std::to_string(b.x) + ", " + std::to_string(b.y) +
           ", " + std::to_string(b.z) + ")";
}

// gives the CPU back to the scheduler; `state` says what has to happen first
inline void leave(State state) {
    Thread& me = self();
    me.state = state;
    swapcontext(&me.context, &current->scheduler);
}

inline void run_thread() {
    try {
        current->body();
        if (!self().waited) {
            fail(place(self()) + " never called wait_for_inputs()");
        }
    } catch (const std::exception& error) {
        if (current->error.empty()) {
            current->error = error.what();
        }
    }
    ++self().block->ended;
    leave(State::kEnded);
}

// Every lane puts `bytes` at `in`; returns the slots of all 32 once they are there.
inline const std::array<Slot, kLanes>& exchange(const char* what, int detail, const void* in, std::size_t bytes) {
    Thread& me = self();
    const int lane = me.idx % kLanes;
    Warp& warp = me.block->warps[me.idx / kLanes];
    if (warp.arrived == 0) {
        warp.what = what;
        warp.detail = detail;
    } else if (std::strcmp(warp.what, what) != 0 || warp.detail != detail) {
        fail(place(me) + " is at " + what + "(" + std::to_string(detail) + ") while its warp is at " + warp.what + "(" +
             std::to_string(warp.detail) + ")");
    }
    auto& slots = warp.slots[warp.turn % 2];
    std::memcpy(slots[lane].data(), in, bytes);
    if (++warp.arrived < kLanes) {
        leave(State::kAtWarp);
        return slots;
    }
    warp.arrived = 0;
    ++warp.turn;
    Thread* first = &me - lane;
    for (int other = 0; other < kLanes; ++other) {
        first[other].state = State::kReady;
    }
    return slots;
}

template <typename T>
T read(const Slot& slot) {
    static_assert(sizeof(T) <= sizeof(Slot) && std::is_trivially_copyable_v<T>);
    T value;
    std::memcpy(&value, slot.data(), sizeof(T));
    return value;
}

inline void require_waited(const char* what) {
    if (!self().waited) {
        fail(place(self()) + " calls " + what + " before wait_for_inputs()");
    }
}

inline void finish_copies(const std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        if (copy.from == nullptr) {
            std::memset(copy.to, 0, 16);
        } else {
            std::memcpy(copy.to, copy.from, 16);
        }
    }
}

inline void begin_copy(void* shared, const void* from, bool valid) {
    const Block& block = *self().block;
    const auto* to = static_cast<const unsigned char*>(shared);
    if (to < block.shared || to + 16 > block.shared + block.shared_bytes) {
        fail(place(self()) + " copies to an address outside shared memory");
    }
    if ((to - block.shared) % 16 != 0 || (valid && reinterpret_cast<std::uintptr_t>(from) % 16 != 0)) {
        fail(place(self()) + " copies 16 bytes from or to an address that is not a multiple of 16");
    }
    std::memset(shared, kPoison, 16);
    self().open.push_back({shared, valid ? from : nullptr});
}

template <typename T>
void require_aligned(const void* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) {
        fail(place(self()) + " touches an address that is not a multiple of " + std::to_string(sizeof(T)));
    }
}

inline std::vector<int> shuffled(int count, std::uint64_t salt) {
    std::vector<int> found(count);
    for (int idx = 0; idx < count; ++idx) {
        found[idx] = idx;
    }
    if (order.seed != 0) {
        std::mt19937_64 random(order.seed * 0x9e3779b97f4a7c15u + salt);
        for (int idx = count - 1; idx > 0; --idx) {
            std::swap(found[idx], found[random() % static_cast<std::uint64_t>(idx + 1)]);
        }
    }
    return found;
}

inline std::unique_ptr<Block> start_block(int number) {
    const LaunchShape& shape = current->shape;
    auto block = std::make_unique<Block>();
    block->x = number % static_cast<int>(shape.blocks);
    block->y = number / static_cast<int>(shape.blocks) % static_cast<int>(shape.blocks_y);
    block->z = number / static_cast<int>(shape.blocks * shape.blocks_y);
    block->shared_bytes = shape.shared_bytes;
    block->memory.assign(shape.shared_bytes + kGuardBytes + 128, kPoison);
    const auto address = reinterpret_cast<std::uintptr_t>(block->memory.data());
    block->shared = block->memory.data() + (128 - address % 128) % 128;
    block->warps.resize(shape.threads / kLanes);
    block->threads.reserve(shape.threads);
    for (int idx = 0; idx < static_cast<int>(shape.threads); ++idx) {
        if (free_stacks.empty()) {
            free_stacks.emplace_back();
        }
        block->threads.push_back({block.get(), idx, State::kReady, false, {}, {}, {}, std::move(free_stacks.back())});
        free_stacks.pop_back();
        Thread& thread = block->threads.back();
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.base();
        thread.context.uc_stack.ss_size = kStackBytes;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
    }
    return block;
}

// what the threads of a block that cannot go on wait for
inline std::string stuck(const Block& block) {
    std::array<int, 5> count{};
    const char* at = "";
    for (const Thread& thread : block.threads) {
        ++count[static_cast<int>(thread.state)];
        if (thread.state == State::kAtWarp) {
            at = block.warps[thread.idx / kLanes].what;
        }
    }
    return "the threads of block " + std::to_string(block.x) +
           " wait for each other: " + std::to_string(count[static_cast<int>(State::kAtBlock)]) + " at sync_threads, " +
           std::to_string(count[static_cast<int>(State::kAtWarp)]) + " at " + (*at ? at : "a warp's exchange") + ", " +
           std::to_string(count[static_cast<int>(State::kSpinning)]) + " spin, " + std::to_string(block.ended) +
           " ended";
}

enum class Progress { kNone, kSpun, kSome };

// lets every thread of the block that can go on do so once
inline Progress run_block(Block& block, const std::vector<int>& order_of_threads) {
    Progress progress = Progress::kNone;
    for (const int idx : order_of_threads) {
        Thread& thread = block.threads[idx];
        if (thread.state != State::kReady && thread.state != State::kSpinning) {
            continue;
        }
        const bool spun = thread.state == State::kSpinning;
        current->thread = &thread;
        swapcontext(&current->scheduler, &thread.context);
        if (!current->error.empty()) {
            throw std::runtime_error(current->error);
        }
        if (!(spun && thread.state == State::kSpinning)) {
            progress = Progress::kSome;
        } else if (progress == Progress::kNone) {
            progress = Progress::kSpun;
        }
    }
    return progress;
}

inline void end_block(Block& block) {
    const auto* behind = block.shared + block.shared_bytes;
    if (!std::all_of(behind, behind + kGuardBytes, [](unsigned char byte) { return byte == kPoison; })) {
        fail("block " + std::to_string(block.x) + " wrote behind its " + std::to_string(block.shared_bytes) +
             " bytes of shared memory");
    }
}

inline void run_blocks(std::vector<std::unique_ptr<Block>>& alive, std::vector<int>& waiting, std::size_t at_once) {
    const std::vector<int> threads = shuffled(static_cast<int>(current->shape.threads), 1);
    int idle = 0;
    while (!alive.empty() || !waiting.empty()) {
        while (alive.size() < at_once && !waiting.empty()) {
            alive.push_back(start_block(waiting.back()));
            waiting.pop_back();
        }
        Progress best = Progress::kNone;
        for (auto& block : alive) {
            const Progress progress = run_block(*block, threads);
            const bool whole = block->ended == static_cast<int>(block->threads.size());
            if (progress == Progress::kNone && !whole) {
                fail(stuck(*block));
            }
            best = std::max(best, progress);
        }
        idle = best == Progress::kSome ? 0 : idle + 1;
        if (idle > kMostIdlePasses) {
            fail(stuck(*alive.front()));
        }
        for (std::size_t idx = alive.size(); idx-- > 0;) {
            if (alive[idx]->ended < static_cast<int>(alive[idx]->threads.size())) {
                continue;
            }
            end_block(*alive[idx]);
            for (Thread& thread : alive[idx]->threads) {
                free_stacks.push_back(std::move(thread.stack));
            }
            alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(idx));
        }
    }
}

inline int run(const char* name, const LaunchShape& shape, std::function<void()> body) {
    Launch launch;
    launch.name = name;
    launch.shape = shape;
    launch.body = std::move(body);
    current = &launch;
    struct Reset {
        ~Reset() { current = nullptr; }
    } reset;
    if (shape.threads == 0 || shape.threads % kLanes != 0 || shape.threads > 1024 || shape.blocks == 0) {
        fail("launched with " + std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) +
             " threads; expected whole warps, 32 to 1024 threads");
    }
    if (shape.shared_bytes > 227 * 1024) {
        fail("asks for " + std::to_string(shape.shared_bytes) + " bytes of shared memory; a block has 232448");
    }
    const int num_blocks = static_cast<int>(shape.blocks * shape.blocks_y * shape.blocks_z);
    std::vector<int> waiting = shuffled(num_blocks, 2);
    std::reverse(waiting.begin(), waiting.end());
    std::vector<std::unique_ptr<Block>> alive;
    run_blocks(alive, waiting, shape.cooperative ? static_cast<std::size_t>(num_blocks) : std::max(1u, order.at_once));
    return 0;
}

}  // namespace twin
}  // namespace pyruntime
