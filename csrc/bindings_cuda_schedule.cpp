// Who computes what, for tests: the arithmetic of kernels/schedule.h.
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings_cuda.h"
#include "schedule.h"

namespace py = pybind11;

namespace pyruntime {
namespace {

std::pair<std::int64_t, std::int64_t> part(std::int32_t total, std::int32_t parts, std::int32_t part) {
    check_size("part_of", "total", total, 0, kMostWidth);
    check_size("part_of", "parts", parts, 1, kMostWidth);
    check_size("part_of", "part", part, 0, parts - 1);
    const Range range = part_of(total, parts, part);
    return {range.begin, range.end};
}

// both rows of every pair
std::vector<std::pair<std::int64_t, std::int64_t>> row_pairs(int pairing, std::int32_t outputs, std::int32_t head_dim,
                                                             std::int32_t rope_dim, std::int32_t num_roped) {
    check_size("row_pairs", "pairing", pairing, 0, 2);
    check_size("row_pairs", "outputs", outputs, 1, kMostWidth);
    check_size("row_pairs", "head_dim", head_dim, 1, outputs);
    const Pairs pairs = pairing == static_cast<int>(Pairing::kHeads)
                            ? pairs_of_heads(outputs / head_dim, head_dim, rope_dim, num_roped)
                            : pairs_of_rows(outputs, pairing == static_cast<int>(Pairing::kHalves));
    std::vector<std::pair<std::int64_t, std::int64_t>> found;
    for (std::int32_t pair = 0; pair < pairs.count; ++pair) {
        const RowPair rows = rows_of(pairs, pair);
        found.emplace_back(rows.first, rows.second);
    }
    return found;
}

py::dict tile(int rows) {
    check_size("product_tile", "rows", rows, 1, 64);
    const ProductTile found = product_tile(rows);
    py::dict out;
    out["group_pairs"] = found.group_pairs;
    out["step"] = found.step;
    out["warps"] = kProductWarps;
    out["blocks_per_sm"] = found.blocks_per_sm;
    return out;
}

std::int32_t shared_bytes(int rows, std::int32_t inputs, std::int32_t splits) {
    check_size("product_shared_bytes", "rows", rows, 1, 64);
    check_size("product_shared_bytes", "inputs", inputs, 1, 1 << 20);
    check_size("product_shared_bytes", "splits", splits, 1, kMostProductSplits);
    const ProductTile found = product_tile(rows);
    const std::int64_t steps = divided_up(divided_up(inputs, found.step), splits);
    return product_memory(found, static_cast<std::int32_t>(steps)).bytes;
}

}  // namespace

void bind_schedule(py::module_& module) {
    module.def("part_of", &part, py::kw_only(), py::arg("total"), py::arg("parts"), py::arg("part"),
               "Begin and end of a part of 0..total.");
    module.def("row_pairs", &row_pairs, py::kw_only(), py::arg("pairing"), py::arg("outputs"), py::arg("head_dim") = 1,
               py::arg("rope_dim") = 0, py::arg("num_roped") = 0, "Both rows of every pair; -1 where there is none.");
    module.def("product_tile", &tile, py::kw_only(), py::arg("rows"), "How a product of so many rows is cut.");
    module.def("product_shared_bytes", &shared_bytes, py::kw_only(), py::arg("rows"), py::arg("inputs"),
               py::arg("splits"), "Shared memory that a block takes.");
}

}  // namespace pyruntime
