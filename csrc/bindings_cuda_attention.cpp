// Decode attention of the CUDA module: unpack, check, launch.
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "attention_schedule.h"
#include "bindings_cuda.h"
#include "pyruntime/attention_params.h"

namespace py = pybind11;

extern "C" int pyruntime_launch_attention(const pyruntime::AttentionParams* params, void* stream);

namespace pyruntime {
namespace {

constexpr const char* kOp = "attention";
constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();

std::int32_t sized(const char* name, std::int64_t value, std::int64_t least, std::int64_t most = kMost) {
    check_size(kOp, name, value, least, most);
    return static_cast<std::int32_t>(value);
}

void check_heads(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim) {
    check_size(kOp, "num_heads", num_heads, 1, kMostWidth);
    check_size(kOp, "num_kv_heads", num_kv_heads, 1, num_heads);
    PYRUNTIME_CHECK(num_heads % num_kv_heads == 0, kOp, ": ", num_heads, " heads are not a multiple of ", num_kv_heads,
                    " key heads");
    PYRUNTIME_CHECK(head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256, kOp, ": head_dim is ",
                    head_dim, "; expected 64, 96, 128 or 256");
}

void check_attention(const AttentionParams& p) {
    PYRUNTIME_CHECK(p.dtype != kFloat32, kOp, ": dtype is float32; expected float16 or bfloat16");
    PYRUNTIME_CHECK(p.page_size % kSlab == 0, kOp, ": page_size is ", p.page_size, "; expected a multiple of ", kSlab);
    PYRUNTIME_CHECK(std::isfinite(p.scale) && std::isfinite(p.softcap) && p.softcap >= 0.0f, kOp, ": scale is ",
                    p.scale, " and softcap ", p.softcap, "; expected finite numbers, softcap at least 0");
    const std::int64_t width = static_cast<std::int64_t>(p.num_heads) * p.head_dim;
    for (const std::int64_t stride : {p.q_stride, p.out_stride}) {
        PYRUNTIME_CHECK(stride >= width && stride % 8 == 0, kOp, ": row stride ", stride, " is below ", width,
                        " or not a multiple of 8");
    }
}

void attention(std::uintptr_t q, std::uintptr_t out, std::uintptr_t keys, std::uintptr_t values,
               std::uintptr_t contexts, std::uintptr_t page_table, std::uintptr_t partials, std::uintptr_t counters,
               std::uintptr_t prefetch, std::int64_t prefetch_bytes, std::int64_t q_stride, std::int64_t out_stride,
               std::int64_t table_stride, std::int64_t num_sequences, std::int64_t num_heads, std::int64_t num_kv_heads,
               std::int64_t head_dim, std::int64_t page_size, std::int64_t window, std::int64_t blocks,
               std::int64_t least_tiles, float scale, float softcap, const std::string& dtype, bool early,
               std::uintptr_t stream) {
    check_heads(num_heads, num_kv_heads, head_dim);
    AttentionParams params{};
    params.q = checked_pointer(kOp, "q", q, 16);
    params.out = checked_pointer(kOp, "out", out, 16);
    params.keys = checked_pointer(kOp, "keys", keys, 16);
    params.values = checked_pointer(kOp, "values", values, 16);
    params.contexts = static_cast<const std::int32_t*>(checked_pointer(kOp, "contexts", contexts, 4));
    params.page_table = static_cast<const std::int32_t*>(checked_pointer(kOp, "page_table", page_table, 4));
    params.partials = static_cast<float*>(checked_pointer(kOp, "partials", partials, 16));
    params.counters = static_cast<std::uint32_t*>(checked_pointer(kOp, "counters", counters, 4));
    check_size(kOp, "prefetch_bytes", prefetch_bytes, 0, kMostWidth);
    params.prefetch = prefetch_bytes > 0 ? checked_pointer(kOp, "prefetch", prefetch, 1) : nullptr;
    params.prefetch_bytes = prefetch_bytes;
    params.q_stride = q_stride;
    params.out_stride = out_stride;
    check_size(kOp, "table_stride", table_stride, 0, kMost);
    params.table_stride = table_stride;
    params.num_sequences = sized("num_sequences", num_sequences, 1);
    params.num_heads = static_cast<std::int32_t>(num_heads);
    params.num_kv_heads = static_cast<std::int32_t>(num_kv_heads);
    params.head_dim = static_cast<std::int32_t>(head_dim);
    params.page_size = sized("page_size", page_size, kSlab, kMostWidth);
    params.window = sized("window", window, 0);
    params.blocks = sized("blocks", blocks, 1, 1 << 16);
    params.least_tiles = sized("least_tiles", least_tiles, 1, 1 << 16);
    params.dtype = dtype_from_name(kOp, dtype);
    params.early = early ? 1 : 0;
    params.scale = scale;
    params.softcap = softcap;
    check_attention(params);
    py::gil_scoped_release unlocked;
    check_launched(kOp, pyruntime_launch_attention(&params, reinterpret_cast<void*>(stream)));
}

std::int64_t partials(std::int64_t blocks, std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim) {
    check_heads(num_heads, num_kv_heads, head_dim);
    const int heads = heads_per_item(static_cast<int>(num_heads), static_cast<int>(num_kv_heads));
    return attention_partials(sized("blocks", blocks, 1, 1 << 16), heads, static_cast<int>(head_dim));
}

int items(std::int64_t num_heads, std::int64_t num_kv_heads) {
    check_heads(num_heads, num_kv_heads, 64);
    return items_per_sequence(static_cast<int>(num_heads), static_cast<int>(num_kv_heads));
}

int shared_bytes(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim) {
    check_heads(num_heads, num_kv_heads, head_dim);
    const int heads = heads_per_item(static_cast<int>(num_heads), static_cast<int>(num_kv_heads));
    return attention_shared_bytes(static_cast<int>(head_dim), heads);
}

std::pair<int, int> tiles(std::int64_t context, std::int64_t window, std::int64_t tile) {
    const Tiles found = visible_tiles(sized("context", context, 0), sized("window", window, 0), sized("tile", tile, 1));
    return {found.begin, found.end};
}

// first block, and the place of each part
std::pair<int, std::vector<std::int64_t>> parts(std::int64_t begin, std::int64_t end, std::int64_t per_block) {
    const Parts found =
        parts_of(sized("begin", begin, 0), sized("end", end, begin + 1), sized("per_block", per_block, 1));
    std::vector<std::int64_t> places;
    for (int part = 0; part < found.count; ++part) {
        places.push_back(partial_place(found, part));
    }
    return {found.first_block, places};
}

}  // namespace

void bind_attention(py::module_& module) {
    module.def("attention", &attention, py::kw_only(), py::arg("q"), py::arg("out"), py::arg("keys"), py::arg("values"),
               py::arg("contexts"), py::arg("page_table"), py::arg("partials"), py::arg("counters"),
               py::arg("prefetch"), py::arg("prefetch_bytes"), py::arg("q_stride"), py::arg("out_stride"),
               py::arg("table_stride"), py::arg("num_sequences"), py::arg("num_heads"), py::arg("num_kv_heads"),
               py::arg("head_dim"), py::arg("page_size"), py::arg("window"), py::arg("blocks"), py::arg("least_tiles"),
               py::arg("scale"), py::arg("softcap"), py::arg("dtype"), py::arg("early"), py::arg("stream"),
               "Attention of one row a sequence, launched on `stream`; see attention_params.h. Raises ValueError for "
               "impossible sizes, RuntimeError when the launch fails.");
    module.def("attention_partials", &partials, py::kw_only(), py::arg("blocks"), py::arg("num_heads"),
               py::arg("num_kv_heads"), py::arg("head_dim"), "Floats of the partial results.");
    module.def("attention_items", &items, py::kw_only(), py::arg("num_heads"), py::arg("num_kv_heads"),
               "Items of a sequence, each of which has a counter.");
    module.def("attention_shared_bytes", &shared_bytes, py::kw_only(), py::arg("num_heads"), py::arg("num_kv_heads"),
               py::arg("head_dim"), "Bytes of shared memory of a block.");
    module.def("attention_tile", &attention_tile, py::arg("head_dim"), "Positions of a tile.");
    module.def("attention_tiles", &tiles, py::kw_only(), py::arg("context"), py::arg("window"), py::arg("tile"),
               "The first tile with a visible position, and the one behind the last.");
    module.def("attention_tiles_per_block", &tiles_per_block, py::kw_only(), py::arg("num_tiles"), py::arg("blocks"),
               py::arg("least"), "Tiles in each block's run.");
    module.def("attention_parts", &parts, py::kw_only(), py::arg("begin"), py::arg("end"), py::arg("per_block"),
               "The first block of an item with these tiles, and where the result of each part lies.");
}

}  // namespace pyruntime
