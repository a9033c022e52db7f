// A small team of threads that walk the same code. Between runs the helpers sleep: an idle team costs no processor
// time.
#pragma once

#include <cstdint>
#include <string>

namespace pyruntime {

class Team;

// one thread of a team while it runs
struct Worker {
    Team* team;
    int index;  // 0 is the thread that called run_team
};

// Must not throw: it may run on a thread that nobody waits on with a handler.
using TeamBody = void (*)(const void* context, const Worker& worker);

// Calls body once on each of up to `num_threads` threads, the caller among them, and returns when all are done. One
// team runs at a time; a call from inside a body runs on that thread alone. Not a template: a copy of it in each
// per-ISA object is what vec.h warns of.
void run_team(int num_threads, TeamBody body, const void* context);

// Shares out [0, total): true gives this worker a range of its own, in multiples of `grain` but for the last; ranges
// shrink towards the end, so that workers finish together. Every worker must ask until it gets false, then wait.
bool take(const Worker& worker, std::int64_t total, std::int64_t grain, std::int64_t* begin, std::int64_t* end);

// Returns when every worker of the team has come here; what they wrote before is then visible to all.
void wait_for_all(const Worker& worker);

// the most threads of a team
constexpr int kMaxThreads = 1024;

// Starts the helpers of a team of `num_threads` and returns how many threads it has: fewer where the machine gives no
// more, which is not tried again.
int start_team(int num_threads);

// threads that the scheduler affinity and the cgroup's CPU quota allow, 1 to kMaxThreads; asked once
int num_threads_allowed();

// CPUs that the quota of a cgroup (version 1 or 2) allows, rounded up, or 0 for no limit. `membership` is the text file
// that lists this process's groups (/proc/self/cgroup), `mount` the folder where the hierarchies are (/sys/fs/cgroup).
int cgroup_cpus(const std::string& membership, const std::string& mount);

}  // namespace pyruntime
