// The Python module omega_qvla.kernels._native: layers, the pool, what this machine runs.
//
// Layers are made from arrays (DLPack or buffers, checked here). Runs take plain addresses, so
// that a call costs about a microsecond; `kernels/cpu.py` is their only caller and checks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <variant>
#include <vector>

#include "block.hpp"
#include "cpu.hpp"
#include "dense.hpp"
#include "linear.hpp"
#include "rows.hpp"
#include "tape.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Maybe = std::optional<Array<T>>;

template <class T>
const T* pointer(const Maybe<T>& array, size_t count, const char* name) {
    if (!array) return nullptr;
    if (array->size() != count) {
        throw std::invalid_argument(std::string(name) + " has a wrong size");
    }
    return array->data();
}

omega::Rotation rotation_of(const std::string& kind) {
    if (kind == "none") return omega::Rotation::none;
    if (kind == "hadamard") return omega::Rotation::hadamard;
    if (kind == "full_hadamard") return omega::Rotation::full;
    if (kind == "dense") return omega::Rotation::dense;
    throw std::invalid_argument("unknown rotation " + kind);
}

void make_layer(omega::Linear* self, const Array<uint8_t>& qweight, int inputs,
                const Array<float>& weight_scale, int weight_group, const Maybe<float>& bias,
                const Maybe<float>& multiplier, const Maybe<int32_t>& permutation,
                const std::string& rotation, int block, const Maybe<float>& matrix, int base,
                int bits, float clip, bool signed_scales, int act_group,
                const Maybe<float>& table, int rank, const Maybe<float>& lowrank_a,
                const Maybe<float>& lowrank_b, const std::string& isa) {
    omega::LinearSpec spec;
    if (qweight.ndim() != 2 || qweight.shape(1) != size_t(inputs + 1) / 2) {
        throw std::invalid_argument("qweight must be [outputs, ceil(inputs / 2)]");
    }
    const auto groups = [inputs](int group) {
        return size_t(group ? (inputs + group - 1) / group : 1);
    };
    spec.inputs = inputs;
    spec.outputs = int(qweight.shape(0));
    spec.qweight = qweight.data();
    spec.weight_group = weight_group;
    if (weight_scale.size() != spec.outputs * groups(weight_group)) {
        throw std::invalid_argument("weight_scale has a wrong size");
    }
    spec.weight_scale = weight_scale.data();
    spec.bias = pointer(bias, spec.outputs, "bias");
    spec.multiplier = pointer(multiplier, inputs, "multiplier");
    spec.permutation = pointer(permutation, inputs, "permutation");
    for (int i = 0; spec.permutation && i < inputs; ++i) {
        if (spec.permutation[i] < 0 || spec.permutation[i] >= inputs) {
            throw std::invalid_argument("permutation points outside the inputs");
        }
    }
    spec.rotation = rotation_of(rotation);
    spec.block = block;
    spec.base = base;
    if (matrix) {
        spec.matrix = matrix->data();
        spec.matrix_size = matrix->size();
    }
    spec.bits = bits;
    spec.clip = clip;
    spec.signed_scales = signed_scales;
    spec.act_group = act_group;
    if (table) {
        spec.steps = int(table->size() / groups(act_group));
        spec.table = pointer(table, spec.steps * groups(act_group), "table");
    }
    if (rank < 0 || (rank && (!lowrank_a || !lowrank_b))) {
        throw std::invalid_argument("a rank needs both low-rank matrices");
    }
    spec.rank = rank;
    spec.lowrank_a = pointer(lowrank_a, size_t(spec.outputs) * rank, "lowrank_a");
    spec.lowrank_b = pointer(lowrank_b, size_t(inputs) * rank, "lowrank_b");
    new (self) omega::Linear(spec, omega::find_isa(isa));
}

void check_step(const omega::Linear& layer, int step) {
    if (step < 0 || (layer.steps() && step >= layer.steps())) {
        throw std::out_of_range("no such step in the layer's table");
    }
}

// The helper threads of this process. Never destroyed: at exit they may still be asleep in it.
omega::Pool& pool() {
    static auto* const threads = new omega::Pool;
    return *threads;
}

void run_layer(const omega::Linear& layer, uintptr_t x, int rows, uintptr_t y, int step,
               int threads) {
    check_step(layer, step);
    const auto call = [=, &layer] {
        layer.run(reinterpret_cast<const float*>(x), rows, reinterpret_cast<float*>(y), step,
                  pool(), threads);
    };
    Tape::perform(call, layer);
}

void quantize(const omega::Linear& layer, uintptr_t x, int rows, int step, uintptr_t q,
              uintptr_t scale) {
    check_step(layer, step);
    nb::gil_scoped_release release;
    layer.quantize(reinterpret_cast<const float*>(x), rows, step, reinterpret_cast<int8_t*>(q),
                   reinterpret_cast<float*>(scale));
}

// Billions of operations (two a product) a second, with nothing but products: a loop of
// registers, the best of several short ones.
double peak_rate(const std::string& isa) {
    const omega::Isa& set = omega::find_isa(isa);
    double best = 0.0;
    for (int i = 0; i < 200; ++i) {
        const auto start = std::chrono::steady_clock::now();
        const long products = set.peak(2000);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        best = std::max(best, 2e-9 * double(products) / took.count());
    }
    return best;
}

const omega::Isa& fastest() {
    static const omega::Isa& isa = omega::find_isa("");
    return isa;
}

// Float rows between the layers; see rows.hpp. Addresses and strides are checked in kernels/rows.py.
const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

void norm(uintptr_t x, size_t outer, size_t stride, int inner, int width, uintptr_t gain,
          uintptr_t shift, size_t per_gain, float plus, float eps, bool center, uintptr_t y,
          int threads) {
    const omega::NormArgs args{floats(x), outer, stride, inner, width, floats(gain), floats(shift),
                               per_gain, plus, eps, center, reinterpret_cast<float*>(y)};
    Tape::perform([=] { omega::run_norm(args, fastest(), pool(), threads); });
}

void gate(uintptr_t gate, uintptr_t up, size_t rows, size_t gate_stride, size_t up_stride,
          int width, int kind, uintptr_t y, int threads) {
    const omega::GateArgs args{floats(gate), floats(up), rows, gate_stride, up_stride, width, kind,
                               reinterpret_cast<float*>(y)};
    Tape::perform([=] { omega::run_gate(args, fastest(), pool(), threads); });
}

void rotate(uintptr_t x, size_t tokens, size_t stride, int heads, int dim, uintptr_t cos,
            uintptr_t sin, size_t table, uintptr_t y, int threads) {
    const omega::RotateArgs args{floats(x), tokens, stride, heads, dim, floats(cos), floats(sin),
                                 table, reinterpret_cast<float*>(y), size_t(heads) * dim};
    Tape::perform([=] { omega::run_rotate(args, fastest(), pool(), threads); });
}

void residual(uintptr_t x, uintptr_t add, uintptr_t gate, size_t rows, size_t per_gate, int width,
              uintptr_t y, int threads) {
    const omega::ResidualArgs args{floats(x), floats(add), floats(gate), rows, per_gate, width,
                                   reinterpret_cast<float*>(y)};
    Tape::perform([=] { omega::run_residual(args, fastest(), pool(), threads); });
}

// Of k and v: address, strides over batch, head and row; then count and repeats.
using KeysTuple = std::array<uintptr_t, 10>;

omega::Keys keys_of(const KeysTuple& t) {
    return {floats(t[0]), floats(t[4]), t[1], t[2], t[3], t[5], t[6], t[7], int(t[8]), int(t[9])};
}

void attend(const std::array<uintptr_t, 4>& q, int batch, int heads, int kv_heads, int rows,
            int dim, const KeysTuple& keys, const std::optional<KeysTuple>& more, float scale,
            bool causal, bool exact, uintptr_t out, int threads) {
    omega::AttendArgs args{};
    args.q = floats(q[0]);
    args.q_batch = q[1], args.q_head = q[2], args.q_row = q[3];
    args.batch = batch, args.heads = heads, args.kv_heads = kv_heads;
    args.rows = rows, args.dim = dim;
    args.keys[0] = keys_of(keys);
    args.sources = more ? 2 : 1;
    if (more) args.keys[1] = keys_of(*more);
    args.scale = scale, args.causal = causal, args.exact = exact;
    args.out = reinterpret_cast<float*>(out);
    Tape::perform([=] { omega::run_attend(args, fastest(), pool(), threads); });
}

void make_dense(omega::Dense* self, const Array<float>& weight, const Maybe<float>& bias) {
    if (weight.ndim() != 2) throw std::invalid_argument("weight must be [outputs, inputs]");
    const int outputs = int(weight.shape(0)), inputs = int(weight.shape(1));
    new (self) omega::Dense(weight.data(), pointer(bias, weight.shape(0), "bias"), inputs, outputs,
                            fastest());
}

void run_dense(const omega::Dense& layer, uintptr_t x, int rows, uintptr_t y, int threads) {
    const auto call = [=, &layer] {
        layer.run(floats(x), rows, reinterpret_cast<float*>(y), pool(), threads);
    };
    Tape::perform(call, layer);
}

using AnyLayer = std::variant<const omega::Linear*, const omega::Dense*>;

omega::Layer layer_of(const AnyLayer& any) {
    omega::Layer layer;
    if (any.index() == 0) layer.quantized = std::get<0>(any);
    if (any.index() == 1) layer.dense = std::get<1>(any);
    return layer;
}

void make_block(omega::Block* self, const AnyLayer& in, const AnyLayer& out, const AnyLayer& up,
                const AnyLayer& down, const std::optional<AnyLayer>& query, int heads,
                int kv_heads, int dim, bool cross, bool causal, bool center, float plus,
                bool gated, int kind, float eps, float scale, const Maybe<float>& q_gain,
                const Maybe<float>& k_gain) {
    omega::BlockSpec spec;
    spec.in = layer_of(in), spec.out = layer_of(out);
    spec.up = layer_of(up), spec.down = layer_of(down);
    if (query) spec.query = layer_of(*query);
    spec.heads = heads, spec.kv_heads = kv_heads, spec.dim = dim;
    spec.cross = cross, spec.causal = causal, spec.center = center, spec.plus = plus;
    spec.gated = gated, spec.kind = kind, spec.eps = eps, spec.scale = scale;
    spec.q_gain = pointer(q_gain, size_t(dim), "q_gain");
    spec.k_gain = pointer(k_gain, size_t(dim), "k_gain");
    new (self) omega::Block(spec);
}

using Addresses = std::array<uintptr_t, 3>;

omega::Modulation modulation_of(const Addresses& t) {
    return {floats(t[0]), floats(t[1]), floats(t[2])};
}

void run_block(const omega::Block& block, uintptr_t x, uintptr_t y, int batch, int rows, int keep,
               const Addresses& before, const Addresses& after, int modulations, uintptr_t cos,
               uintptr_t sin, size_t table, const std::optional<KeysTuple>& cache, int step,
               int threads) {
    if (step < 0 || (block.steps() && step >= block.steps())) {
        throw std::out_of_range("no such step in the layers' tables");
    }
    omega::BlockArgs args{};
    args.x = floats(x), args.y = reinterpret_cast<float*>(y);
    args.batch = batch, args.rows = rows, args.keep = keep;
    args.before = modulation_of(before), args.after = modulation_of(after);
    args.modulations = modulations;
    args.cos = floats(cos), args.sin = floats(sin), args.table = table;
    if (cache) args.cache = keys_of(*cache);
    args.step = step;
    Tape::perform([=, &block] { block.run(args, fastest(), pool(), threads); }, block);
}

// By this thread alone: torch would share even 128 KiB among its own.
void copy(uintptr_t from, uintptr_t to, size_t bytes) {
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
}

// Rows of `bytes` from one place to another.
void copy_rows(uintptr_t from, size_t stride, uintptr_t to, size_t to_stride, size_t rows,
               size_t bytes) {
    Tape::perform([=] {
        const auto* source = reinterpret_cast<const char*>(from);
        auto* target = reinterpret_cast<char*>(to);
        for (size_t i = 0; i < rows; ++i) {
            std::memcpy(target + i * to_stride, source + i * stride, bytes);
        }
    });
}

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (const omega::Isa* isa : omega::usable_isas()) names.emplace_back(isa->name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Quantized linear layers on the integer units of the CPU.";
    m.def("peak_rate", &peak_rate, "isa"_a = "", "Most that an instruction set can do, in G/s.");
    m.def("isa_names", &isa_names, "Instruction sets that run here, fastest first.");
    m.def("norm", &norm);
    m.def("gate", &gate);
    m.def("rotate", &rotate);
    m.def("residual", &residual);
    m.def("attend", &attend);
    m.def("copy", &copy);
    m.def("copy_rows", &copy_rows);
    nb::class_<Tape>(m, "Tape", "Calls of kernels, kept to be made again.")
        .def(nb::init<>())
        .def("begin", &Tape::begin)
        .def("end", &Tape::end)
        .def("run", &Tape::run, "first"_a, "last"_a)
        .def("__len__", &Tape::size);
    nb::class_<omega::Linear>(m, "Linear", "A layer, repacked. See csrc/linear.hpp.")
        .def("__init__", &make_layer, nb::kw_only(), "qweight"_a, "inputs"_a, "weight_scale"_a,
             "weight_group"_a, "bias"_a.none(), "multiplier"_a.none(), "permutation"_a.none(),
             "rotation"_a, "block"_a, "matrix"_a.none(), "base"_a, "bits"_a, "clip"_a,
             "signed_scales"_a, "act_group"_a, "table"_a.none(), "rank"_a, "lowrank_a"_a.none(),
             "lowrank_b"_a.none(), "isa"_a)
        .def_prop_ro("isa", &omega::Linear::isa)
        .def_prop_ro("groups", &omega::Linear::groups)
        .def_prop_ro("nbytes", &omega::Linear::bytes)
        .def("run", &run_layer, "x"_a, "rows"_a, "y"_a, "step"_a, "threads"_a,
             "x [rows, inputs] -> y [rows, outputs], both float32, contiguous, by address.")
        .def("quantize", &quantize, "x"_a, "rows"_a, "step"_a, "q"_a, "scale"_a,
             "x [rows, inputs] -> q int8 [rows, inputs], scale [rows, groups], by address.");
    nb::class_<omega::Dense>(m, "Dense", "A layer in full precision. See csrc/dense.hpp.")
        .def("__init__", &make_dense, "weight"_a, "bias"_a.none())
        .def_prop_ro("nbytes", &omega::Dense::bytes)
        .def("run", &run_dense, "x"_a, "rows"_a, "y"_a, "threads"_a,
             "x [rows, inputs] -> y [rows, outputs], both float32, contiguous, by address.");
    nb::class_<omega::Block>(m, "Block", "A transformer block in one call: csrc/block.hpp.")
        .def("__init__", &make_block, nb::kw_only(), "in_"_a, "out"_a, "up"_a, "down"_a,
             "query"_a.none(), "heads"_a, "kv_heads"_a, "dim"_a, "cross"_a, "causal"_a, "center"_a,
             "plus"_a, "gated"_a, "kind"_a, "eps"_a, "scale"_a, "q_gain"_a.none(),
             "k_gain"_a.none(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
        .def("run", &run_block);
}
