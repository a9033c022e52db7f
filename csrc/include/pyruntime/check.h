// A check that prints the values it saw. It throws std::invalid_argument, which the bindings hand to Python as
// ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pyruntime {

// joins everything that can be streamed into one string
template <typename... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace pyruntime

// PYRUNTIME_CHECK(rows > 0, "mlp: rows is ", rows, "; expected at least 1");
#define PYRUNTIME_CHECK(condition, ...)                                    \
    do {                                                                   \
        if (!(condition)) {                                                \
            throw std::invalid_argument(::pyruntime::concat(__VA_ARGS__)); \
        }                                                                  \
    } while (false)
