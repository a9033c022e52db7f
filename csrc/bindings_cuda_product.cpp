// Matrix products for Python: unpack, check, launch.
#include <cmath>
#include <string>

#include "bindings_cuda.h"
#include "schedule.h"

namespace py = pybind11;

extern "C" int pyruntime_launch_product(const pyruntime::ProductParams* params, void* stream);

namespace pyruntime {
namespace {

constexpr const char* kOp = "product";
constexpr std::int64_t kMostRows = 64;
constexpr std::uintptr_t kAlignment = 16;

// Keyword arguments, each read once; finish() refuses what nobody read.
class Fields {
public:
    explicit Fields(const py::kwargs& fields) : fields_(fields) {}

    template <typename Value>
    Value read(const char* name) {
        PYRUNTIME_CHECK(fields_.contains(name), kOp, ": ", name, " is missing");
        ++num_read_;
        return fields_[name].cast<Value>();
    }
    std::int32_t size(const char* name, std::int64_t least, std::int64_t most = kMostWidth) {
        const auto value = read<std::int64_t>(name);
        check_size(kOp, name, value, least, most);
        return static_cast<std::int32_t>(value);
    }
    std::int64_t stride(const char* name, std::int64_t least) {
        const auto value = read<std::int64_t>(name);
        check_size(kOp, name, value, least, std::int64_t{1} << 40);
        return value;
    }
    template <typename T>
    T* pointer(const char* name, std::uintptr_t alignment, bool needed) {
        const auto address = read<std::uintptr_t>(name);
        return static_cast<T*>((needed ? checked_pointer : optional_pointer)(kOp, name, address, alignment));
    }
    float number(const char* name) {
        const auto value = read<float>(name);
        PYRUNTIME_CHECK(std::isfinite(value) && value >= 0.0f, kOp, ": ", name, " is ", value,
                        "; expected a finite number of at least 0");
        return value;
    }
    void finish() const {
        PYRUNTIME_CHECK(num_read_ == fields_.size(), kOp, ": got ", fields_.size(), " arguments; expected ", num_read_);
    }

private:
    const py::kwargs& fields_;
    std::size_t num_read_ = 0;
};

std::int32_t activation_from_name(const std::string& name) {
    constexpr const char* kNames[] = {"none", "silu", "gelu", "gelu_tanh", "relu", "relu2"};
    for (std::int32_t idx = 0; idx < 6; ++idx) {
        if (name == kNames[idx]) {
            return idx;
        }
    }
    PYRUNTIME_CHECK(false, kOp, ": activation is '", name, "'; expected none, silu, gelu, gelu_tanh, relu or relu2");
    return kNone;
}

// head_dim 0: the columns are no heads, and nothing else is looked at
HeadParams unpack_heads(Fields& fields, std::int32_t outputs, std::uintptr_t element) {
    HeadParams heads{};
    heads.head_dim = fields.size("head_dim", 0);
    const bool given = heads.head_dim > 0;
    heads.num_heads = fields.size("num_heads", 0);
    heads.num_kv_heads = fields.size("num_kv_heads", 0);
    heads.rope_dim = fields.size("rope_dim", 0, heads.head_dim);
    const bool cached = given && heads.num_kv_heads > 0;
    heads.positions = fields.pointer<std::int32_t>("positions", 4, given);
    heads.sequences = fields.pointer<std::int32_t>("sequences", 4, cached);
    heads.page_table = fields.pointer<std::int32_t>("page_table", 4, cached);
    heads.cos = fields.pointer<float>("cos", 4, heads.rope_dim > 0);
    heads.sin = fields.pointer<float>("sin", 4, heads.rope_dim > 0);
    heads.keys = fields.pointer<void>("keys", element, cached);
    heads.values = fields.pointer<void>("values", element, cached);
    heads.page_stride = fields.stride("page_stride", 0);
    heads.page_size = fields.size("page_size", cached ? 1 : 0);
    PYRUNTIME_CHECK(heads.rope_dim % 2 == 0, kOp, ": rope_dim is ", heads.rope_dim, "; expected an even number");
    const std::int64_t columns = (heads.num_heads + 2 * static_cast<std::int64_t>(heads.num_kv_heads)) * heads.head_dim;
    PYRUNTIME_CHECK(!given || columns == outputs, kOp, ": ", heads.num_heads, " heads and twice ", heads.num_kv_heads,
                    " of ", heads.head_dim, " values are not ", outputs, " outputs");
    return heads;
}

Pairs pairs_of(const ProductParams& p) {
    const HeadParams& heads = p.heads;
    if (heads.head_dim > 0) {
        return pairs_of_heads(heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim, heads.rope_dim,
                              heads.num_heads + heads.num_kv_heads);
    }
    return pairs_of_rows(p.outputs, p.gated != 0);
}

// splits, their memory, and what the kernel holds in shared memory
void check_plan(const ProductParams& p, std::int64_t num_partials, std::int64_t num_squares,
                std::int64_t num_counters) {
    const ProductTile tile = product_tile(p.rows);
    const std::int64_t pairs = pairs_of(p).count, all_steps = divided_up(p.inputs, tile.step);
    check_size(kOp, "columns", p.columns, 1, divided_up(pairs, tile.group_pairs));
    check_size(kOp, "splits", p.splits, 1, smaller(all_steps, kMostProductSplits));
    check_size(kOp, "columns * splits", static_cast<std::int64_t>(p.columns) * p.splits, 1, kMostBlocks);
    const std::int64_t steps = divided_up(all_steps, p.splits);
    check_size(kOp, "steps of a split", steps, 1, kMostProductSteps);
    const std::int64_t bytes = product_memory(tile, static_cast<std::int32_t>(steps)).bytes;
    PYRUNTIME_CHECK(bytes <= kMostShared, kOp, ": ", p.splits, " splits take ", bytes, " bytes of shared memory; ",
                    kMostShared, " are there; take more splits");
    if (p.splits > 1) {
        check_size(kOp, "num_partials", num_partials, product_partials(p.rows, pairs, p.splits), kMostWidth << 8);
        check_size(kOp, "num_counters", num_counters, p.columns, kMostWidth);
        check_size(kOp, "num_squares", num_squares, std::int64_t{p.columns} * p.splits * p.rows, kMostWidth);
    }
}

void check_product(const ProductParams& p) {
    PYRUNTIME_CHECK(p.dtype != kFloat32, kOp, ": weights are float32; expected float16 or bfloat16");
    PYRUNTIME_CHECK(p.x_dtype == kFloat32 || p.x_dtype == p.dtype, kOp, ": x is neither float32 nor as the weights");
    PYRUNTIME_CHECK(p.out_dtype == kFloat32 || p.out_dtype == p.dtype, kOp,
                    ": out is neither float32 nor as the weights");
    PYRUNTIME_CHECK(p.inputs % 8 == 0 && p.x_stride % 8 == 0, kOp, ": inputs ", p.inputs, " and x_stride ", p.x_stride,
                    " must be multiples of 8");
    PYRUNTIME_CHECK(!p.norm || p.dtype == kBfloat16, kOp, ": a norm inside the product overflows float16");
    PYRUNTIME_CHECK(!p.gain || p.norm, kOp, ": a gain without a norm");
    PYRUNTIME_CHECK(!p.gated || (p.outputs % 2 == 0 && p.heads.head_dim == 0), kOp,
                    ": gated outputs must be even and no heads");
    PYRUNTIME_CHECK(p.heads.head_dim == 0 || (p.activation == kNone && p.residual == nullptr && p.softcap == 0.0f), kOp,
                    ": heads take no activation, residual or softcap");
}

void product(const py::kwargs& arguments) {
    Fields fields(arguments);
    ProductParams p{};
    p.dtype = dtype_from_name(kOp, fields.read<std::string>("dtype"));
    p.x_dtype = dtype_from_name(kOp, fields.read<std::string>("x_dtype"));
    p.out_dtype = dtype_from_name(kOp, fields.read<std::string>("out_dtype"));
    p.rows = fields.size("rows", 1, kMostRows);
    p.inputs = fields.size("inputs", 8);
    p.outputs = fields.size("outputs", 1);
    p.columns = fields.size("columns", 1);
    p.splits = fields.size("splits", 1);
    p.norm = fields.read<bool>("norm");
    p.gated = fields.read<bool>("gated");
    p.early = fields.read<bool>("early");
    p.activation = activation_from_name(fields.read<std::string>("activation"));
    p.eps = fields.number("eps");
    p.softcap = fields.number("softcap");
    p.heads = unpack_heads(fields, p.outputs, static_cast<std::uintptr_t>(bytes_of(p.dtype)));
    const HeadParams& heads = p.heads;
    const std::int64_t width =
        heads.head_dim > 0 ? std::int64_t{heads.num_heads} * heads.head_dim : p.outputs / (p.gated ? 2 : 1);
    p.x = fields.pointer<void>("x", kAlignment, true);
    p.gain = fields.pointer<float>("gain", kAlignment, false);
    p.weight = fields.pointer<void>("weight", kAlignment, true);
    p.bias = fields.pointer<float>("bias", 4, false);
    p.residual = fields.pointer<float>("residual", 4, false);
    p.out = fields.pointer<void>("out", static_cast<std::uintptr_t>(bytes_of(p.out_dtype)), width > 0);
    const bool split = p.splits > 1;
    p.partials = fields.pointer<float>("partials", 4, split);
    p.squares = fields.pointer<float>("squares", 4, split);
    p.counters = fields.pointer<std::uint32_t>("counters", 4, split);
    p.x_stride = fields.stride("x_stride", p.inputs);
    p.residual_stride = fields.stride("residual_stride", p.residual == nullptr ? 0 : width);
    p.out_stride = fields.stride("out_stride", width);
    check_product(p);
    check_plan(p, fields.stride("num_partials", 0), fields.stride("num_squares", 0), fields.stride("num_counters", 0));
    const auto stream = reinterpret_cast<void*>(fields.read<std::uintptr_t>("stream"));
    fields.finish();
    py::gil_scoped_release unlocked;
    check_launched(kOp, pyruntime_launch_product(&p, stream));
}

// how a product of `pairs` pairs of rows of the weight is cut, and the memory that it needs
py::dict plan(std::int64_t rows, std::int64_t pairs, std::int64_t inputs, std::int64_t num_sms,
              std::int64_t shared_bytes) {
    check_size(kOp, "rows", rows, 1, kMostRows);
    check_size(kOp, "pairs", pairs, 1, kMostWidth);
    check_size(kOp, "inputs", inputs, 1, kMostWidth);
    check_size(kOp, "num_sms", num_sms, 1, 1 << 16);
    check_size(kOp, "shared_bytes", shared_bytes, 1, kMostShared);
    const int num_rows = static_cast<int>(rows);
    const ProductPlan found = plan_product(num_rows, pairs, inputs, static_cast<int>(num_sms), shared_bytes);
    PYRUNTIME_CHECK(found.splits > 0, kOp, ": ", rows, " rows of ", inputs, " inputs find no room in shared memory");
    const bool split = found.splits > 1;
    py::dict out;
    out["columns"] = found.columns;
    out["splits"] = found.splits;
    out["num_partials"] = product_partials(num_rows, pairs, found.splits);
    out["num_squares"] = split ? found.columns * found.splits * rows : 0;
    out["num_counters"] = split ? found.columns : 0;
    return out;
}

}  // namespace

void bind_product(py::module_& module) {
    module.def("plan_product", &plan, py::kw_only(), py::arg("rows"), py::arg("pairs"), py::arg("inputs"),
               py::arg("num_sms"), py::arg("shared_bytes"), "Blocks and memory of a product, as arguments of it.");
    module.def("product", &product,
               "A matrix product of few rows, launched on `stream`; ProductParams in params.h says what the keyword "
               "arguments mean. Raises ValueError for impossible sizes, RuntimeError when the launch fails.");
}

}  // namespace pyruntime
