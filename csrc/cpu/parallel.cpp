#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace pyruntime {
namespace {

thread_local bool inside_job = false;

struct Job {
    RangeBody body;
    void* context;
    std::int64_t n;
    std::int64_t grain;
    std::atomic<std::int64_t> next{0};

    void work() {
        inside_job = true;
        for (std::int64_t begin = next.fetch_add(grain); begin < n; begin = next.fetch_add(grain)) {
            body(context, begin, std::min(begin + grain, n));
        }
        inside_job = false;
    }
};

class Pool {
public:
    void run(Job& job, int helpers) {
        std::lock_guard<std::mutex> one_job_at_a_time(submit_);
        grow(helpers);
        const int joined = std::min(helpers, size_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = joined;
            running_ = joined;
            ++generation_;
        }
        start_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

private:
    // a machine that gives no more threads makes the job slower, not wrong
    void grow(int helpers) {
        while (size_ < helpers) {
            try {
                std::thread(&Pool::serve, this, size_, generation_).detach();
            } catch (const std::system_error&) {
                return;
            }
            ++size_;
        }
    }

    void serve(int idx, std::uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            start_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (idx >= wanted_) {
                continue;
            }
            Job* job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--running_ == 0) {
                done_.notify_one();
            }
        }
    }

    std::mutex submit_;
    std::mutex mutex_;
    std::condition_variable start_;
    std::condition_variable done_;
    Job* job_ = nullptr;
    int size_ = 0;
    int wanted_ = 0;
    int running_ = 0;
    std::uint64_t generation_ = 0;
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

void parallel_for(std::int64_t n, std::int64_t grain, int num_threads, RangeBody body, void* context) {
    if (n <= 0) {
        return;
    }
    const std::int64_t tasks = (n - 1) / grain + 1;
    const int threads = static_cast<int>(std::min<std::int64_t>(tasks, num_threads));
    if (threads <= 1 || inside_job) {
        body(context, 0, n);
        return;
    }
    Job job{body, context, n, grain};
    current_pool().run(job, threads - 1);
}

}  // namespace pyruntime
