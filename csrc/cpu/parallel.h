// A small thread pool. Workers sleep on a condition variable between jobs: an idle pool costs no processor time.
#pragma once

#include <cstdint>
#include <string>

namespace pyruntime {

// must not throw: it may run on a thread that nobody waits on with a handler
using RangeBody = void (*)(void* context, std::int64_t begin, std::int64_t end);

// Calls body over disjoint ranges that cover [0, n), at most `grain` long, on at most `num_threads` threads, and
// returns when all are done. The caller works too. A call from inside a body runs on that thread alone. Not a template:
// a copy of it in each per-ISA object is what vec.h warns of.
void parallel_for(std::int64_t n, std::int64_t grain, int num_threads, RangeBody body, void* context);

// threads that the scheduler affinity and the cgroup's CPU quota allow, at least 1; asked once
int num_threads_allowed();

// CPUs that the quota of a cgroup (version 1 or 2) allows, rounded up, or 0 for no limit. `membership` is the text file
// that lists this process's groups (/proc/self/cgroup), `mount` the folder where the hierarchies are (/sys/fs/cgroup).
int cgroup_cpus(const std::string& membership, const std::string& mount);

}  // namespace pyruntime
