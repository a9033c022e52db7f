#include "parallel.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <mutex>
#include <system_error>
#include <thread>

namespace pyruntime {
namespace {

// A number that threads wait on. They look at it for a while, because being woken takes longer than a phase of a small
// model; then they sleep, so that a thread they wait for, which lost its processor, can have theirs.
class alignas(64) Turnstile {
public:
    explicit Turnstile(int spins) : spins_(spins) {}

    std::uint32_t value() const { return value_.load(std::memory_order_acquire); }

    void advance() {
        value_.fetch_add(1);
        if (sleepers_.load() != 0) {
            futex(FUTEX_WAKE_PRIVATE, INT_MAX);
        }
    }

    void wait_while(std::uint32_t seen) {
        for (int turns = 0; turns < spins_; ++turns) {
            if (value() != seen) {
                return;
            }
            _mm_pause();
            // the thread that is waited for may stand in the queue of this very processor
            if (turns % kSpinsBetweenYields == kSpinsBetweenYields - 1) {
                sched_yield();
            }
        }
        // counted before the kernel looks at the value: an advance after that look finds the sleeper
        sleepers_.fetch_add(1);
        while (value_.load() == seen) {
            futex(FUTEX_WAIT_PRIVATE, seen);
        }
        sleepers_.fetch_sub(1);
    }

private:
    void futex(int operation, std::uint32_t argument) {
        static_assert(sizeof(value_) == sizeof(std::uint32_t), "the kernel looks at the bare number");
        syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&value_), operation, argument, nullptr, nullptr, 0);
    }

    static constexpr int kSpinsBetweenYields = 256;

    const int spins_;
    std::atomic<std::uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
};

// Looks at a number before sleep, some 20 nanoseconds each: within a run the wait is rarely longer; between two runs a
// processor that spins is one that somebody else could use.
constexpr int kSpinsInRun = 1 << 16;
constexpr int kSpinsBetweenRuns = 1 << 12;

}  // namespace

// What the workers of one run share. Each word that is written often has a cache line of its own.
class Team {
public:
    explicit Team(int count) : count_(count) {}

    bool take(std::int64_t total, std::int64_t grain, std::int64_t* begin, std::int64_t* end) {
        std::int64_t at = next_.load(std::memory_order_relaxed);
        std::int64_t size = 0;
        do {
            if (at >= total) {
                return false;
            }
            // an equal share of half of what is left
            const std::int64_t grains = (total - at) / (2 * count_ * grain);
            size = std::min(std::max<std::int64_t>(grains, 1) * grain, total - at);
        } while (!next_.compare_exchange_weak(at, at + size, std::memory_order_relaxed));
        *begin = at;
        *end = at + size;
        return true;
    }

    void wait_for_all() {
        const std::uint32_t phase = phase_.value();
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.advance();
            return;
        }
        phase_.wait_while(phase);
    }

private:
    const int count_;
    alignas(64) std::atomic<std::int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    Turnstile phase_{kSpinsInRun};
};

namespace {

thread_local bool inside_run = false;

// Moves this thread to another processor that it may use, if it is on `processor`. The kernel likes to wake a thread
// where its waker runs, and two threads of a team that share a processor wait for each other at every phase.
void leave(int processor) {
    cpu_set_t allowed;
    if (sched_getcpu() != processor || sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
        return;
    }
    cpu_set_t others = allowed;
    CPU_CLR(static_cast<std::size_t>(processor), &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0) {
        sched_setaffinity(0, sizeof allowed, &allowed);
    }
}

struct Job {
    TeamBody body;
    const void* context;
    Team team;
    int count;
    int processor;  // where the caller runs

    void work(int index) {
        inside_run = true;
        body(context, Worker{&team, index});
        inside_run = false;
    }
};

class Pool {
public:
    void run(TeamBody body, const void* context, int num_threads) {
        std::lock_guard<std::mutex> one_run_at_a_time(submit_);
        grow(num_threads - 1);
        const int count = std::min(num_threads, size_ + 1);
        Job job{body, context, Team(count), count, sched_getcpu()};
        job_ = &job;
        running_.store(size_, std::memory_order_relaxed);
        const std::uint32_t before = done_.value();
        start_.advance();
        job.work(0);
        // the helpers left the last phase together with this thread, so they are about to be done
        if (size_ > 0) {
            done_.wait_while(before);
        }
    }

    int start(int num_threads) {
        std::lock_guard<std::mutex> no_run_meanwhile(submit_);
        grow(num_threads - 1);
        return std::min(num_threads, size_ + 1);
    }

private:
    // a machine that gives no more threads makes the run slower, not wrong; start_team says how many there are
    void grow(int helpers) {
        while (size_ < helpers && !refused_) {
            try {
                std::thread(&Pool::serve, this, size_ + 1, start_.value()).detach();
                ++size_;
            } catch (const std::system_error&) {
                refused_ = true;
            }
        }
    }

    // Every helper answers every run, also those of a smaller team: so none can meet the next run's job by accident.
    void serve(int index, std::uint32_t seen) {
        for (;; ++seen) {
            start_.wait_while(seen);
            if (index < job_->count) {
                leave(job_->processor);
                job_->work(index);
            }
            if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                done_.advance();
            }
        }
    }

    std::mutex submit_;
    Job* job_ = nullptr;
    int size_ = 0;
    bool refused_ = false;
    std::atomic<int> running_{0};
    Turnstile start_{kSpinsBetweenRuns};
    Turnstile done_{kSpinsInRun};
};

// Never destroyed: its sleeping threads may outlive every static object. A forked child has none of them, so it starts
// over with an empty pool.
std::atomic<Pool*> pool{nullptr};

Pool& current_pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    static_cast<void>(registered);
    Pool* existing = pool.load();
    if (existing == nullptr) {
        Pool* fresh = new Pool;
        if (pool.compare_exchange_strong(existing, fresh)) {
            return *fresh;
        }
        delete fresh;
    }
    return *existing;
}

}  // namespace

void run_team(int num_threads, TeamBody body, const void* context) {
    if (num_threads <= 1 || inside_run) {
        // a team of one is a team too: what its body calls runs on this thread alone
        const bool nested = inside_run;
        inside_run = true;
        Team alone(1);
        body(context, Worker{&alone, 0});
        inside_run = nested;
        return;
    }
    current_pool().run(body, context, num_threads);
}

int start_team(int num_threads) {
    return num_threads <= 1 ? 1 : current_pool().start(num_threads);
}

bool take(const Worker& worker, std::int64_t total, std::int64_t grain, std::int64_t* begin, std::int64_t* end) {
    return worker.team->take(total, grain, begin, end);
}

void wait_for_all(const Worker& worker) {
    worker.team->wait_for_all();
}

}  // namespace pyruntime
