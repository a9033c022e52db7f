// How many threads this process may use: what the scheduler allows, cut by the cgroup's quota.
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "parallel.h"

namespace pyruntime {
namespace {

int affinity_cpus() {
    // the kernel refuses a set smaller than its own, so grow until it fits
    for (int cpus = 1024; cpus <= (1 << 20); cpus *= 2) {
        cpu_set_t* set = CPU_ALLOC(cpus);
        if (set == nullptr) {
            break;
        }
        const std::size_t set_bytes = CPU_ALLOC_SIZE(cpus);
        CPU_ZERO_S(set_bytes, set);
        const int count = sched_getaffinity(0, set_bytes, set) == 0 ? CPU_COUNT_S(set_bytes, set) : 0;
        CPU_FREE(set);
        if (count > 0) {
            return count;
        }
    }
    return static_cast<int>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
}

// first two words of a file, as numbers; "max" and anything unreadable give 0
struct Pair {
    long long first = 0, second = 0;
};

Pair read_numbers(const std::string& path) {
    std::ifstream file(path);
    std::string first, second;
    file >> first >> second;
    Pair numbers;
    std::istringstream(first) >> numbers.first;
    std::istringstream(second) >> numbers.second;
    return numbers;
}

int cpus_of(long long quota, long long period) {
    return quota > 0 && period > 0 ? static_cast<int>(std::min<long long>((quota - 1) / period + 1, 1 << 20)) : 0;
}

int tighter(int a, int b) {
    return a == 0 ? b : b == 0 ? a : std::min(a, b);
}

// the limit holds for a group and all groups above it
int limit_up_to_root(const std::string& base, std::string group, bool version2) {
    int limit = 0;
    for (;;) {
        const std::string folder = base + group;
        if (version2) {
            const Pair quota = read_numbers(folder + "/cpu.max");
            limit = tighter(limit, cpus_of(quota.first, quota.second));
        } else {
            limit = tighter(limit, cpus_of(read_numbers(folder + "/cpu.cfs_quota_us").first,
                                           read_numbers(folder + "/cpu.cfs_period_us").first));
        }
        if (group.empty()) {
            return limit;
        }
        group.erase(group.find_last_of('/'));
    }
}

bool lists_cpu(const std::string& controllers) {
    std::istringstream words(controllers);
    for (std::string word; std::getline(words, word, ',');) {
        if (word == "cpu") {
            return true;
        }
    }
    return false;
}

}  // namespace

int cgroup_cpus(const std::string& membership, const std::string& mount) {
    std::ifstream file(membership);
    int limit = 0;
    // a line is <number>:<controllers>:<group>; version 2 has no controllers
    for (std::string line; std::getline(file, line);) {
        const std::size_t first = line.find(':');
        const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos || line.compare(second + 1, 1, "/") != 0) {
            continue;
        }
        const std::string controllers = line.substr(first + 1, second - first - 1);
        std::string group = line.substr(second + 1);
        group = group == "/" ? "" : group;
        if (controllers.empty()) {
            limit = tighter(limit, limit_up_to_root(mount, group, true));
        } else if (lists_cpu(controllers)) {
            limit = tighter(limit, limit_up_to_root(mount + "/" + controllers, group, false));
            limit = tighter(limit, limit_up_to_root(mount + "/cpu", group, false));
        }
    }
    return limit;
}

int num_threads_allowed() {
    static const int allowed = [] {
        const int quota = cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
        return std::clamp(tighter(affinity_cpus(), quota), 1, kMaxThreads);
    }();
    return allowed;
}

}  // namespace pyruntime
