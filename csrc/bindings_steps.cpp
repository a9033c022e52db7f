// The steps of a CPU plan from Python: unpack the fields of each op and check them against the places of the program.
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <utility>

#include "bindings.h"
#include "cpu/plan.h"
#include "pyruntime/check.h"

namespace py = pybind11;

namespace pyruntime {

std::int64_t size_of(const py::handle& from, const char* name, std::int64_t least) {
    const auto value = from.attr(name).cast<std::int64_t>();
    PYRUNTIME_CHECK(value >= least && value <= kMaxSize, name, " is ", value, "; expected ", least, " to ", kMaxSize);
    return value;
}

namespace {

std::int32_t dtype_of(const py::handle& from, const char* name) {
    const auto value = from.attr(name).cast<std::string>();
    PYRUNTIME_CHECK(value == "float32" || value == "bfloat16", name, " is '", value, "'; expected float32 or bfloat16");
    return value == "float32" ? kFloat32 : kBfloat16;
}

float finite(const py::handle& from, const char* name) {
    const auto value = from.attr(name).cast<double>();
    PYRUNTIME_CHECK(std::isfinite(value), name, " is ", value, "; expected a finite number");
    return static_cast<float>(value);
}

// memory of exactly `elements` elements, given as (address, number of elements); None gives null
template <class T>
const T* memory(const py::handle& from, const char* name, std::int64_t elements) {
    const py::object given = from.attr(name);
    if (given.is_none()) {
        return nullptr;
    }
    const auto [address, found] = given.cast<std::pair<std::uintptr_t, std::int64_t>>();
    PYRUNTIME_CHECK(address != 0 && address % alignof(T) == 0, name, " is at address ", address,
                    "; expected memory aligned to ", alignof(T), " bytes");
    PYRUNTIME_CHECK(found == elements, name, " holds ", found, " elements; expected ", elements);
    return reinterpret_cast<const T*>(address);
}

NormWeights norm_of(const py::handle& from) {
    if (from.is_none()) {
        return {nullptr, nullptr, 0, 0.0f, kNoNorm};
    }
    NormWeights norm{};
    norm.size = size_of(from, "size", 1);
    norm.eps = finite(from, "eps");
    PYRUNTIME_CHECK(norm.eps >= 0.0f, "eps is ", norm.eps, "; expected at least 0");
    norm.kind = from.attr("centered").cast<bool>() ? kLayerNorm : kRms;
    norm.gain = memory<float>(from, "gain", norm.size);
    norm.bias = memory<float>(from, "bias", norm.size);
    return norm;
}

// the starts of groups of panels, from 0 to the number of words; each group has whole units, at most those of all
// inputs
const std::int64_t* starts_of(const py::handle& from, const Panels& panels) {
    const auto* starts = memory<std::int64_t>(from, "starts", num_groups(panels) + 1);
    if (starts == nullptr) {
        return nullptr;
    }
    const std::int64_t most = units_of(panels.dtype, panels.inputs);
    PYRUNTIME_CHECK(starts[0] == 0, "the first panel starts at word ", starts[0], "; expected 0");
    for (std::int64_t group = 0; group < num_groups(panels); ++group) {
        const std::int64_t left = num_panels(panels) - group * kGroup;
        const std::int64_t unit = (left < kGroup ? left : kGroup) * kPanel;
        PYRUNTIME_CHECK(starts[group + 1] >= starts[group] && starts[group + 1] <= starts[group] + most * unit &&
                            (starts[group + 1] - starts[group]) % unit == 0,
                        "panels from ", group * kGroup, " on lie from word ", starts[group], " to ", starts[group + 1],
                        "; expected up to ", most, " units of ", unit, " words");
    }
    return starts;
}

Panels panels_of(const py::handle& from) {
    Panels panels{};
    panels.inputs = size_of(from, "inputs", 1);
    panels.outputs = size_of(from, "outputs", 0);
    panels.dtype = dtype_of(from, "dtype");
    const std::int64_t padded = num_panels(panels) * kPanel;
    panels.starts = starts_of(from, panels);
    const std::int64_t words =
        panels.starts == nullptr ? padded * units_of(panels.dtype, panels.inputs) : panels.starts[num_groups(panels)];
    panels.words = memory<std::uint32_t>(from, "words", words);
    PYRUNTIME_CHECK(panels.words != nullptr || padded == 0, "a matrix of ", panels.outputs, " outputs has no words");
    panels.bias = memory<float>(from, "bias", padded);
    return panels;
}

void check_norm(const NormWeights& norm, std::int64_t width) {
    PYRUNTIME_CHECK(norm.kind == kNoNorm || norm.size == width, "a norm spans ", norm.size, " values; its input has ",
                    width);
}

// Unpacks the fields of one step and checks that its places hold what it reads and writes.
class Step {
public:
    Step(const Program& program, const py::handle& from) : program_(program), from_(from) {
        view_ = from.attr("wanted").cast<bool>() ? kWantedRows : kAllRows;
    }

    View view() const { return view_; }
    py::object operator[](const char* name) const { return from_.attr(name); }
    std::int64_t size(const char* name, std::int64_t least = 1) const { return size_of(from_, name, least); }
    float number(const char* name) const { return finite(from_, name); }
    std::int32_t dtype(const char* name) const { return dtype_of(from_, name); }
    template <class T>
    const T* memory_of(const char* name, std::int64_t elements) const {
        return memory<T>(from_, name, elements);
    }
    NormWeights norm(const char* name) const { return norm_of(from_.attr(name)); }
    Panels panels(const char* name) const { return panels_of(from_.attr(name)); }

    Place place(const char* name, std::int64_t width) const { return place(name, width, view_); }
    Place place(const char* name, std::int64_t width, View view) const {
        const auto idx = from_.attr(name).cast<std::int64_t>();
        const auto count = static_cast<std::int64_t>(program_.places().size());
        PYRUNTIME_CHECK(idx >= 0 && idx < count, name, " is place ", idx, "; expected 0 to ", count - 1);
        const std::int64_t held = program_.places()[static_cast<std::size_t>(idx)].widths[view];
        PYRUNTIME_CHECK(held >= width, name, " is place ", idx, " of ", held, " values a row; expected ", width);
        return static_cast<Place>(idx);
    }
    Place maybe_place(const char* name, std::int64_t width) const {
        return from_.attr(name).is_none() ? kNoPlace : place(name, width);
    }
    // number of a table of angles of this step's view, or -1; `half` gets its pairs
    std::int32_t rotary(const char* name, std::int64_t* half) const {
        const py::object given = from_.attr(name);
        if (given.is_none()) {
            return -1;
        }
        const auto idx = given.cast<std::int64_t>();
        const auto count = static_cast<std::int64_t>(program_.rotaries().size());
        PYRUNTIME_CHECK(idx >= 0 && idx < count, "table of angles ", idx, " of ", count);
        const Rotary& table = program_.rotaries()[static_cast<std::size_t>(idx)];
        PYRUNTIME_CHECK(table.view == view_, "table of angles ", idx, " is of the other view");
        *half = table.half;
        return static_cast<std::int32_t>(idx);
    }

private:
    const Program& program_;
    const py::handle& from_;
    View view_;
};

StepParams embed_step(const Program& program, const Step& step) {
    EmbedStep params{};
    const std::int64_t vocab = program.vocab_size();
    params.size = step.size("size");
    params.dtype = step.dtype("dtype");
    params.in_panels = step["in_panels"].cast<bool>();
    params.scale = step.number("scale");
    params.out = step.place("out", params.size);
    if (params.in_panels) {
        const std::int64_t padded = (vocab + kPanel - 1) / kPanel * kPanel;
        params.table = step.memory_of<std::uint32_t>("table", padded * units_of(params.dtype, params.size));
    } else if (params.dtype == kFloat32) {
        params.table = step.memory_of<float>("table", vocab * params.size);
    } else {
        params.table = step.memory_of<std::uint16_t>("table", vocab * params.size);
    }
    PYRUNTIME_CHECK(params.table != nullptr, "the embedding has no table");
    params.num_positions = step.size("num_positions", 0);
    const std::int64_t values = params.num_positions * params.size;
    params.position_table = params.dtype == kFloat32
                                ? static_cast<const void*>(step.memory_of<float>("position_table", values))
                                : step.memory_of<std::uint16_t>("position_table", values);
    return params;
}

StepParams norm_step(const Program&, const Step& step) {
    NormStep params{};
    params.norm = step.norm("norm");
    PYRUNTIME_CHECK(params.norm.kind != kNoNorm, "a norm step has no norm");
    params.in = step.place("input", params.norm.size);
    params.residual = step.maybe_place("residual", params.norm.size);
    params.out = step.place("out", params.norm.size);
    return params;
}

StepParams linear_step(const Program&, const Step& step) {
    LinearStep params{};
    params.norm = step.norm("norm");
    params.matrix = step.panels("matrix");
    check_norm(params.norm, params.matrix.inputs);
    params.in = step.place("input", params.matrix.inputs);
    params.residual = step.maybe_place("residual", params.matrix.outputs);
    params.out = step.place("out", params.matrix.outputs);
    return params;
}

StepParams head_step(const Program& program, const Step& step) {
    HeadStep params{};
    params.norm = step.norm("norm");
    params.matrix = step.panels("matrix");
    check_norm(params.norm, params.matrix.inputs);
    PYRUNTIME_CHECK(params.matrix.outputs == program.vocab_size(), "the head gives ", params.matrix.outputs,
                    " logits; the vocabulary has ", program.vocab_size());
    params.softcap = step.number("softcap");
    params.in = step.place("input", params.matrix.inputs);
    params.out = step.place("out", params.matrix.outputs);
    return params;
}

void check_heads(std::int64_t num_heads, std::int64_t num_kv_heads) {
    PYRUNTIME_CHECK(num_heads % num_kv_heads == 0, num_heads, " heads are not a multiple of ", num_kv_heads,
                    " key heads");
}

// `width` values of the input and of the product behind it: neighbours within one of them, or each by its number
ValueSource source_of(const Step& step, const std::string& role, std::int64_t width, const QkvRopeStep& params) {
    const std::int64_t known = params.in_size + params.matrix.outputs;
    const std::string name = role + "_column", scattered = role + "_columns";
    const auto column = step[name.c_str()].cast<std::int64_t>();
    const auto* columns = step.memory_of<std::int32_t>(scattered.c_str(), width);
    PYRUNTIME_CHECK(column >= kNotComputed && column <= known, name, " is ", column, "; expected 0 to ", known,
                    ", or -1 (not computed)");
    PYRUNTIME_CHECK(columns == nullptr || column == 0, name, " is ", column, " beside ", scattered, "; expected 0");
    for (std::int64_t k = 0; columns != nullptr && k < width; ++k) {
        PYRUNTIME_CHECK(columns[k] >= 0 && columns[k] < known, scattered, " holds ", columns[k], "; expected 0 to ",
                        known - 1);
    }
    const std::int64_t room = column < params.in_size ? params.in_size - column : known - column;
    PYRUNTIME_CHECK(columns != nullptr || column == kNotComputed || room >= width, name, " is ", column,
                    " with room for ", room, " values; expected ", width);
    return {column, columns};
}

StepParams qkv_rope_step(const Program& program, const Step& step) {
    QkvRopeStep params{};
    params.norm = step.norm("norm");
    params.matrix = step.panels("matrix");
    params.in_size = params.matrix.inputs;
    check_norm(params.norm, params.in_size);
    params.num_heads = step.size("num_heads");
    params.num_kv_heads = step.size("num_kv_heads");
    params.head_dim = step.size("head_dim");
    check_heads(params.num_heads, params.num_kv_heads);
    const std::int64_t q_size = params.num_heads * params.head_dim, kv_size = params.num_kv_heads * params.head_dim;
    params.q = source_of(step, "q", q_size, params);
    params.k = source_of(step, "k", kv_size, params);
    params.v = source_of(step, "v", kv_size, params);
    PYRUNTIME_CHECK((params.k.column == kNotComputed) == (params.v.column == kNotComputed),
                    "keys and values must both be computed, or neither");
    params.q_norm = step.norm("q_norm");
    params.k_norm = step.norm("k_norm");
    check_norm(params.q_norm, params.q_norm.size == params.head_dim ? params.head_dim : q_size);
    params.v_norm = step.norm("v_norm");
    check_norm(params.k_norm, params.k_norm.size == params.head_dim ? params.head_dim : kv_size);
    check_norm(params.v_norm, params.v_norm.size == params.head_dim ? params.head_dim : kv_size);
    params.rotary = step.rotary("rotary", &params.rope_half);
    PYRUNTIME_CHECK(2 * params.rope_half <= params.head_dim, "rope turns ", 2 * params.rope_half, " of ",
                    params.head_dim, " values");
    params.slot = static_cast<std::int32_t>(step.size("slot", 0));
    PYRUNTIME_CHECK(params.slot < program.num_slots(), "cache slot ", params.slot, " of ", program.num_slots());
    params.cache_dtype = step.dtype("cache_dtype");
    params.in = step.place("input", params.in_size);
    params.out = params.q.column == kNotComputed ? kNoPlace : step.place("out", q_size);
    return params;
}

StepParams attention_step(const Program& program, const Step& step) {
    AttentionStep params{};
    params.num_heads = step.size("num_heads");
    params.num_kv_heads = step.size("num_kv_heads");
    params.head_dim = step.size("head_dim");
    check_heads(params.num_heads, params.num_kv_heads);
    params.window = step.size("window", 0);
    params.scale = step.number("scale");
    params.softcap = step.number("softcap");
    params.slopes = step.memory_of<float>("slopes", params.num_heads);
    params.softmax_gain = step.memory_of<float>("softmax_gain", params.num_heads);
    params.identity_gain = step.memory_of<float>("identity_gain", params.num_heads);
    params.centre_gain = step.memory_of<float>("centre_gain", params.num_heads);
    PYRUNTIME_CHECK((params.softmax_gain == nullptr) == (params.identity_gain == nullptr) &&
                        (params.softmax_gain == nullptr) == (params.centre_gain == nullptr),
                    "shaped attention has some of its three gains; expected all or none");
    params.slot = static_cast<std::int32_t>(step.size("slot", 0));
    PYRUNTIME_CHECK(params.slot < program.num_slots(), "cache slot ", params.slot, " of ", program.num_slots());
    params.cache_dtype = step.dtype("cache_dtype");
    params.in = step.place("input", params.num_heads * params.head_dim);
    params.out = step.place("out", params.num_heads * params.head_dim);
    return params;
}

std::int32_t activation_of(const std::string& name) {
    constexpr std::pair<const char*, Activation> kKnown[] = {
        {"silu", kSilu}, {"gelu", kGelu}, {"gelu_tanh", kGeluTanh}, {"relu", kRelu}, {"relu2", kRelu2}};
    for (const auto& [known, activation] : kKnown) {
        if (name == known) {
            return activation;
        }
    }
    PYRUNTIME_CHECK(false, "activation is '", name, "'; expected silu, gelu, gelu_tanh, relu or relu2");
    return -1;
}

StepParams mlp_step(const Program&, const Step& step) {
    MlpStep params{};
    params.norm = step.norm("norm");
    params.sub = step.norm("sub");
    params.gate_up = step.panels("gate_up");
    params.down = step.panels("down");
    params.gated = step["gated"].cast<bool>();
    params.activation = activation_of(step["activation"].cast<std::string>());
    check_norm(params.norm, params.gate_up.inputs);
    check_norm(params.sub, params.down.inputs);
    PYRUNTIME_CHECK(params.gate_up.dtype == params.down.dtype, "gate, up and down have different dtypes");
    // gated: each panel of gate is followed by the same panel of up, padding included
    const std::int64_t panels = (params.down.inputs + kPanel - 1) / kPanel;
    const std::int64_t expected = params.gated ? 2 * panels * kPanel : params.down.inputs;
    PYRUNTIME_CHECK(params.gate_up.outputs == expected, "gate_up gives ", params.gate_up.outputs,
                    " values; down needs ", expected);
    params.in = step.place("input", params.gate_up.inputs);
    params.residual = step.maybe_place("residual", params.down.outputs);
    params.out = step.place("out", params.down.outputs);
    return params;
}

StepParams add_step(const Program&, const Step& step) {
    const std::int64_t width = step.size("width");
    return AddStep{width, step.place("input", width), step.place("other", width), step.place("out", width)};
}

StepParams gather_step(const Program&, const Step& step) {
    const std::int64_t width = step.size("width");
    PYRUNTIME_CHECK(step.view() == kWantedRows, "a gather gives the wanted rows");
    return GatherStep{width, step.place("input", width, kAllRows), step.place("out", width)};
}

}  // namespace

PlannedStep unpack_step(const Program& program, const std::string& op, const py::handle& fields) {
    using Unpack = StepParams (*)(const Program&, const Step&);
    const std::pair<const char*, Unpack> known[] = {
        {"embed", embed_step},       {"norm", norm_step},           {"linear", linear_step},
        {"qkv_rope", qkv_rope_step}, {"attention", attention_step}, {"mlp", mlp_step},
        {"add", add_step},           {"gather", gather_step},       {"head", head_step}};
    const Step step(program, fields);
    for (const auto& [name, unpack] : known) {
        if (op == name) {
            return {unpack(program, step), step.view()};
        }
    }
    PYRUNTIME_CHECK(false, "op '", op, "' is not known");
    return {};
}

Rotary unpack_rotary(const py::handle& fields) {
    Rotary rotary{};
    rotary.half = size_of(fields, "half", 1);
    rotary.frequencies = memory<double>(fields, "frequencies", rotary.half);
    PYRUNTIME_CHECK(rotary.frequencies != nullptr, "a rope has no frequencies");
    rotary.factor = finite(fields, "factor");
    rotary.view = fields.attr("wanted").cast<bool>() ? kWantedRows : kAllRows;
    return rotary;
}

}  // namespace pyruntime
