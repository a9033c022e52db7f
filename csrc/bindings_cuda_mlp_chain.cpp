// Chains of MLPs of the CUDA module: unpack, check, launch.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "bindings_cuda.h"
#include "mlp_chain_schedule.h"
#include "pyruntime/mlp_chain_params.h"

namespace py = pybind11;

extern "C" int pyruntime_launch_mlp_chain(const pyruntime::MlpChainParams* params, void* stream);

namespace pyruntime {
namespace {

constexpr const char* kOp = "mlp_chain";
constexpr std::int64_t kMostChainBlocks = 1024;
// so that units times blocks stays inside 31 bit
constexpr std::int64_t kMostChainWidth = 1 << 20;

void check_width(const char* name, std::int64_t value) {
    check_size(kOp, name, value, kChainWord, kMostChainWidth);
    PYRUNTIME_CHECK(value % kChainWord == 0, kOp, ": ", name, " is ", value, "; expected a multiple of ", kChainWord);
}

// the phases of the layers added so far
class Chain {
public:
    Chain(std::int64_t rows, std::int64_t width, std::int64_t blocks) {
        check_size(kOp, "rows", rows, 1, kMostChainRows);
        check_size(kOp, "blocks", blocks, 1, kMostChainBlocks);
        check_width("width", width);
        rows_ = static_cast<int>(rows);
        blocks_ = static_cast<int>(blocks);
        width_ = static_cast<int>(width);
    }

    // the layer's slices of gate and up's inputs, and of down's
    std::pair<int, int> add(std::int64_t hidden) {
        check_width("hidden", hidden);
        const int down_rows = chain_down_rows(rows_);
        const int inner = phase(static_cast<int>(hidden), width_);
        const int outer = phase(width_ / down_rows, static_cast<int>(hidden));
        outputs_ = std::int64_t{1} * most_chain_units(width_ / down_rows, blocks_) * down_rows;
        return {inner, outer};
    }
    ChainMemory memory() const { return chain_memory(rows_, inputs_, jobs_, outputs_); }

private:
    int phase(int units, int inputs) {
        const int most = most_chain_units(units, blocks_);
        const int bits = chain_slice_bits(most, inputs / kChainWord);
        inputs_ = std::max<std::int64_t>(inputs_, inputs);
        jobs_ = std::max<std::int64_t>(jobs_, std::int64_t{most} << bits);
        return bits;
    }

    int rows_, blocks_, width_;
    std::int64_t inputs_ = 0, jobs_ = 0, outputs_ = 0;
};

std::int32_t gate_activation(const std::string& name) {
    constexpr std::pair<const char*, Activation> kKnown[] = {
        {"silu", kSilu}, {"gelu", kGelu}, {"gelu_tanh", kGeluTanh}, {"relu", kRelu}, {"relu2", kRelu2}};
    for (const auto& [known, activation] : kKnown) {
        if (name == known) {
            return activation;
        }
    }
    PYRUNTIME_CHECK(false, kOp, ": activation is '", name, "'; expected silu, gelu, gelu_tanh, relu or relu2");
    return kNone;
}

MlpChainLayer unpack_layer(const py::dict& fields, Chain& chain) {
    const auto pointer = [&fields](const char* name) { return fields[name].cast<std::uintptr_t>(); };
    const auto hidden = fields["hidden"].cast<std::int64_t>();
    const auto [inner, outer] = chain.add(hidden);
    MlpChainLayer layer{};
    layer.gate_up = checked_pointer(kOp, "gate_up", pointer("gate_up"), 16);
    layer.down = checked_pointer(kOp, "down", pointer("down"), 16);
    layer.gain = static_cast<const float*>(optional_pointer(kOp, "gain", pointer("gain"), 16));
    layer.gate_up_bias = static_cast<const float*>(optional_pointer(kOp, "gate_up_bias", pointer("gate_up_bias"), 4));
    layer.down_bias = static_cast<const float*>(optional_pointer(kOp, "down_bias", pointer("down_bias"), 4));
    layer.hidden = static_cast<std::int32_t>(hidden);
    layer.activation = gate_activation(fields["activation"].cast<std::string>());
    layer.norm = fields["norm"].cast<bool>() ? 1 : 0;
    layer.eps = fields["eps"].cast<float>();
    PYRUNTIME_CHECK(std::isfinite(layer.eps) && layer.eps >= 0.0f, kOp, ": eps is ", layer.eps,
                    "; expected a finite number of at least 0");
    PYRUNTIME_CHECK(layer.norm != 0 || layer.gain == nullptr, kOp, ": a gain without a norm");
    layer.inner_slice_bits = static_cast<std::int16_t>(inner);
    layer.outer_slice_bits = static_cast<std::int16_t>(outer);
    return layer;
}

void mlp_chain(std::uintptr_t x, std::uintptr_t out, std::uintptr_t hidden, std::uintptr_t counters,
               std::int64_t x_stride, std::int64_t out_stride, std::int64_t rows, std::int64_t width,
               const std::vector<py::dict>& layers, std::int64_t blocks, std::int64_t prefetch_bytes,
               const std::string& dtype, std::uintptr_t stream) {
    Chain chain(rows, width, blocks);
    check_size(kOp, "the number of layers", static_cast<std::int64_t>(layers.size()), 1, kMostChainLayers);
    MlpChainParams params{};
    for (std::size_t idx = 0; idx < layers.size(); ++idx) {
        params.layers[idx] = unpack_layer(layers[idx], chain);
    }
    params.x = static_cast<const float*>(checked_pointer(kOp, "x", x, 16));
    params.out = static_cast<float*>(checked_pointer(kOp, "out", out, 16));
    params.hidden = checked_pointer(kOp, "hidden", hidden, 16);
    params.counters = static_cast<std::uint32_t*>(checked_pointer(kOp, "counters", counters, 4));
    for (const std::int64_t stride : {x_stride, out_stride}) {
        PYRUNTIME_CHECK(stride >= width && stride % 4 == 0, kOp, ": row stride ", stride, " is below ", width,
                        " or not a multiple of 4");
    }
    params.x_stride = x_stride;
    params.out_stride = out_stride;
    check_size(kOp, "prefetch_bytes", prefetch_bytes, 0, kMostWidth);
    params.prefetch_bytes = prefetch_bytes;
    const ChainMemory memory = chain.memory();
    params.sums_at = memory.sums;
    params.stream_at = memory.stream;
    params.squares_at = memory.squares;
    params.shared_bytes = memory.bytes;
    PYRUNTIME_CHECK(memory.bytes <= kMostShared, kOp, ": ", rows, " rows need ", memory.bytes,
                    " bytes of shared memory; a block has ", kMostShared);
    params.rows = static_cast<std::int32_t>(rows);
    params.width = static_cast<std::int32_t>(width);
    params.num_layers = static_cast<std::int32_t>(layers.size());
    params.blocks = static_cast<std::int32_t>(blocks);
    params.dtype = dtype_from_name(kOp, dtype);
    PYRUNTIME_CHECK(params.dtype != kFloat32, kOp, ": dtype is float32; expected float16 or bfloat16");
    py::gil_scoped_release unlocked;
    check_launched(kOp, pyruntime_launch_mlp_chain(&params, reinterpret_cast<void*>(stream)));
}

std::int64_t shared_bytes(std::int64_t rows, std::int64_t width, const std::vector<std::int64_t>& hidden,
                          std::int64_t blocks) {
    Chain chain(rows, width, blocks);
    for (const std::int64_t each : hidden) {
        chain.add(each);
    }
    return chain.memory().bytes;
}

std::pair<int, int> units(std::int64_t units, std::int64_t blocks, std::int64_t block) {
    check_size(kOp, "units", units, 0, kMostChainWidth);
    check_size(kOp, "blocks", blocks, 1, kMostChainBlocks);
    check_size(kOp, "block", block, 0, blocks - 1);
    const Units found = chain_units(static_cast<int>(units), static_cast<int>(blocks), static_cast<int>(block));
    return {found.begin, found.end};
}

std::vector<std::pair<int, int>> slices(std::int64_t words, std::int64_t bits) {
    check_size(kOp, "words", words, 1, kMostChainWidth);
    check_size(kOp, "bits", bits, 0, kMostSliceBits);
    std::vector<std::pair<int, int>> found;
    for (int slice = 0; slice < 1 << bits; ++slice) {
        const Units own = chain_slice(static_cast<int>(words), static_cast<int>(bits), slice);
        found.emplace_back(own.begin, own.end);
    }
    return found;
}

}  // namespace

void bind_mlp_chain(py::module_& module) {
    module.def("mlp_chain", &mlp_chain, py::kw_only(), py::arg("x"), py::arg("out"), py::arg("hidden"),
               py::arg("counters"), py::arg("x_stride"), py::arg("out_stride"), py::arg("rows"), py::arg("width"),
               py::arg("layers"), py::arg("blocks"), py::arg("prefetch_bytes"), py::arg("dtype"), py::arg("stream"),
               "A run of MLPs, launched on `stream`; see mlp_chain_params.h. Raises ValueError for impossible sizes, "
               "RuntimeError when the launch fails, as it does if the blocks cannot run all at once.");
    module.def("mlp_chain_shared_bytes", &shared_bytes, py::kw_only(), py::arg("rows"), py::arg("width"),
               py::arg("hidden"), py::arg("blocks"), "Bytes of shared memory of a block.");
    module.def("mlp_chain_units", &units, py::kw_only(), py::arg("units"), py::arg("blocks"), py::arg("block"),
               "Begin and end of a block's units.");
    module.def("mlp_chain_slices", &slices, py::kw_only(), py::arg("words"), py::arg("bits"),
               "Begin and end of every slice.");
    module.def("mlp_chain_slice_bits", &chain_slice_bits, py::kw_only(), py::arg("units"), py::arg("words"),
               "The base-2 logarithm of the number of slices.");
    module.def("mlp_chain_cost", &chain_cost, py::kw_only(), py::arg("units"), py::arg("words"), py::arg("bits"),
               "Loads of each thread of the busiest warp, and one for each of its jobs.");
    module.attr("mlp_chain_most_layers") = kMostChainLayers;
}

}  // namespace pyruntime
