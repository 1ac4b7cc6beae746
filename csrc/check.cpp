// A self-check without Python: every instruction set that runs here against plain loops, over
// random shapes and schemes, with helper threads and with several callers at once. It is what
// the sanitizer builds and the emulated AArch64 run (tests/kernels/test_native_builds.py).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu.hpp"
#include "linear.hpp"

namespace {

using omega::Linear;
using omega::LinearSpec;
using omega::Rotation;

struct Case {
    LinearSpec spec;
    std::vector<uint8_t> qweight;
    std::vector<float> weight_scale, bias, multiplier, table, matrix, lowrank_a, lowrank_b, x;
    std::vector<int32_t> permutation;
    int rows = 0, groups = 1;
};

class Draw {
public:
    explicit Draw(unsigned seed) : engine_(seed) {}
    int between(int low, int high) {
        return std::uniform_int_distribution<int>(low, high)(engine_);
    }
    float real(float low, float high) {
        return std::uniform_real_distribution<float>(low, high)(engine_);
    }
    template <class T>
    T of(std::initializer_list<T> choices) {
        return choices.begin()[between(0, int(choices.size()) - 1)];
    }
    std::vector<float> reals(size_t count, float low, float high) {
        std::vector<float> values(count);
        for (float& v : values) v = real(low, high);
        return values;
    }

private:
    std::mt19937 engine_;
};

int groups_of(int inputs, int group) { return group ? (inputs + group - 1) / group : 1; }

void draw_rotation(Draw& draw, Case& c) {
    LinearSpec& s = c.spec;
    s.rotation = draw.of({Rotation::none, Rotation::hadamard, Rotation::dense});
    s.block = draw.of({4, 16, 64});
    if (s.rotation == Rotation::dense) {
        size_t blocks = s.inputs / s.block;
        for (int rest = s.inputs % s.block; rest; rest &= rest - 1) ++blocks;
        c.matrix = draw.reals(blocks * s.block * s.block, -0.2f, 0.2f);
    } else if (s.rotation == Rotation::none && draw.between(0, 2) == 0) {
        s.base = draw.of({1, 12});
        s.inputs = s.base * (1 << draw.between(1, 7));
        s.rotation = Rotation::full;
        c.matrix = draw.reals(size_t(s.base) * s.base, -1.0f, 1.0f);
    }
}

// Signed scales, and inputs on which their sign turns: zeros, one sign, both as large.
void draw_signs(Draw& draw, Case& c) {
    c.spec.signed_scales = !c.spec.steps && draw.between(0, 1);
    if (!c.spec.signed_scales) return;
    for (int m = 0; m < c.rows; ++m) {
        float* row = c.x.data() + size_t(m) * c.spec.inputs;
        const int kind = draw.between(0, 5);
        for (int k = 0; k < c.spec.inputs; ++k) {
            if (kind == 0) row[k] = 0.0f;
            if (kind == 1) row[k] = -std::fabs(row[k]);
            if (kind == 2) row[k] = k % 3 ? 2.0f : -2.0f;
        }
    }
}

Case draw_case(Draw& draw) {
    Case c;
    LinearSpec& s = c.spec;
    s.inputs = draw.of({64, draw.between(1, 500), 16 * draw.between(1, 40)});
    s.outputs = draw.between(1, 150);
    c.rows = draw.between(1, 40);
    draw_rotation(draw, c);
    s.bits = draw.of({4, 8});
    s.clip = draw.of({1.0f, 0.9f});
    s.weight_group = draw.of({0, 16, 48, 64, 128});
    s.act_group = draw.of({0, 32, 64});
    c.groups = groups_of(s.inputs, s.act_group);
    c.qweight.resize(size_t(s.outputs) * ((s.inputs + 1) / 2));
    for (uint8_t& v : c.qweight) v = uint8_t(draw.between(0, 255));
    const size_t scales = size_t(s.outputs) * groups_of(s.inputs, s.weight_group);
    c.weight_scale = draw.reals(scales, 0.01f, 0.1f);
    c.bias = draw.reals(s.outputs, -1.0f, 1.0f);
    c.x = draw.reals(size_t(c.rows) * s.inputs, -3.0f, 3.0f);
    if (draw.between(0, 1)) c.multiplier = draw.reals(s.inputs, -2.0f, 2.0f);
    if (draw.between(0, 2) == 0) {
        for (int i = 0; i < s.inputs; ++i) c.permutation.push_back(s.inputs - 1 - i);
    }
    if (draw.between(0, 2) == 0) {
        // Runs; its value is compared in Python, as it needs the input before rounding.
        s.rank = draw.between(1, 5);
        c.lowrank_a.assign(size_t(s.outputs) * s.rank, 0.0f);
        c.lowrank_b = draw.reals(size_t(s.inputs) * s.rank, -1.0f, 1.0f);
    }
    if (draw.between(0, 1)) {
        s.steps = 3;
        c.table = draw.reals(size_t(3) * c.groups, 0.1f, 1.0f);
    }
    draw_signs(draw, c);
    return c;
}

template <class T>
const T* or_null(const std::vector<T>& v) {
    return v.empty() ? nullptr : v.data();
}

Linear build(const Case& c, const omega::Isa& isa) {
    LinearSpec s = c.spec;
    s.qweight = c.qweight.data();
    s.weight_scale = c.weight_scale.data();
    s.bias = c.bias.data();
    s.multiplier = or_null(c.multiplier);
    s.permutation = or_null(c.permutation);
    s.table = or_null(c.table);
    s.matrix = or_null(c.matrix);
    s.lowrank_a = or_null(c.lowrank_a);
    s.lowrank_b = or_null(c.lowrank_b);
    s.matrix_size = c.matrix.size();
    return Linear(s, isa);
}

int weight(const Case& c, int n, int k) {
    const uint8_t byte = c.qweight[size_t(n) * ((c.spec.inputs + 1) / 2) + k / 2];
    return (k % 2 ? byte >> 4 : byte & 15) - 8;
}

// Largest error of y over the sum of the magnitudes of its terms, given the layer's integers.
double error_of(const Case& c, const std::vector<int8_t>& q, const std::vector<float>& scale,
                const std::vector<float>& y) {
    const LinearSpec& s = c.spec;
    const int weight_groups = groups_of(s.inputs, s.weight_group);
    double worst = 0.0;
    for (int m = 0; m < c.rows; ++m) {
        for (int n = 0; n < s.outputs; ++n) {
            double sum = c.bias[n], size = std::fabs(c.bias[n]);
            for (int k = 0; k < s.inputs; ++k) {
                const int g = s.act_group ? k / s.act_group : 0;
                const int w = s.weight_group ? k / s.weight_group : 0;
                const double term = double(q[size_t(m) * s.inputs + k]) * weight(c, n, k) *
                                    scale[size_t(m) * c.groups + g] *
                                    c.weight_scale[size_t(n) * weight_groups + w];
                sum += term;
                size += std::fabs(term);
            }
            worst = std::fmax(worst, std::fabs(sum - y[size_t(m) * s.outputs + n]) / size);
        }
    }
    return worst;
}

// Whether the scale's sign takes each group's largest value below zero, and its size some value to
// an end of the grid; groups of zeros have a positive scale.
bool signs_hold(const Case& c, const std::vector<int8_t>& q, const std::vector<float>& scale) {
    const LinearSpec& s = c.spec;
    const int width = s.act_group ? s.act_group : s.inputs;
    for (int m = 0; s.signed_scales && m < c.rows; ++m) {
        for (int g = 0; g < c.groups; ++g) {
            const int8_t* from = q.data() + size_t(m) * s.inputs + g * width;
            const int8_t* end = from + std::min(width, s.inputs - g * width);
            const auto ends = std::minmax_element(from, end);
            const int lowest = *ends.first, highest = *ends.second;
            const int low = -(1 << (s.bits - 1));
            const float step = scale[size_t(m) * c.groups + g];
            const bool zeros = std::all_of(from, end, [](int8_t v) { return v == 0; });
            const bool turned = lowest <= -highest && (lowest == low || highest == -low - 1);
            if (zeros ? step <= 0.0f : !turned) return false;
        }
    }
    return true;
}

int failures = 0;
// Of the bits of every result: the same on every architecture.
uint64_t digest = 14695981039346656037ull;

void digest_bits(const std::vector<float>& y) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(y.data());
    for (size_t i = 0; i < y.size() * 4; ++i) digest = (digest ^ bytes[i]) * 1099511628211ull;
}

void expect(bool good, const Case& c, const char* isa, const char* what, double value) {
    if (good) return;
    ++failures;
    std::printf("%s: %s %g: rows %d, %d -> %d, rotation %d, groups %d and %d, %d bits%s\n", isa,
                what, value, c.rows, c.spec.inputs, c.spec.outputs, int(c.spec.rotation),
                c.spec.act_group, c.spec.weight_group, c.spec.bits,
                c.spec.signed_scales ? ", signed" : "");
}

// One case on every instruction set: right, the same with helpers, the same bits everywhere.
void check_case(const Case& c, omega::Pool& pool) {
    const size_t in = size_t(c.rows) * c.spec.inputs, out = size_t(c.rows) * c.spec.outputs;
    std::vector<int8_t> first;
    std::vector<float> first_y;
    for (const omega::Isa* isa : omega::usable_isas()) {
        const Linear layer = build(c, *isa);
        const int step = c.spec.steps ? 2 : 0;
        std::vector<int8_t> q(in);
        std::vector<float> scale(size_t(c.rows) * c.groups), y(out, NAN), again(out, NAN);
        layer.quantize(c.x.data(), c.rows, step, q.data(), scale.data());
        layer.run(c.x.data(), c.rows, y.data(), step, pool, 1);
        layer.run(c.x.data(), c.rows, again.data(), step, pool, 3);
        const double error = error_of(c, q, scale, y);
        expect(error < 1e-5, c, isa->name, "error", error);
        expect(signs_hold(c, q, scale), c, isa->name, "a scale has the wrong sign", 0);
        expect(!std::memcmp(y.data(), again.data(), out * 4), c, isa->name, "threads differ", 3);
        if (first_y.empty()) {
            first = q;
            first_y = y;
            digest_bits(y);
        }
        expect(q == first, c, isa->name, "integers differ from the first path's", 0);
        expect(!std::memcmp(y.data(), first_y.data(), out * 4), c, isa->name,
               "bits differ from the first path's", 0);
    }
}

// Several callers share one layer and one pool.
void check_callers(Draw& draw, omega::Pool& pool) {
    Case c;
    c.rows = 24;
    c.spec.inputs = 512;
    c.spec.outputs = 400;
    c.spec.act_group = 64;
    c.groups = 8;
    c.qweight.assign(size_t(400) * 256, 0x3c);
    c.weight_scale.assign(400, 0.01f);
    c.bias.assign(400, 0.5f);
    c.x = draw.reals(size_t(24) * 512, -1.0f, 1.0f);
    const Linear layer = build(c, omega::find_isa(""));
    std::vector<float> expected(size_t(24) * 400);
    layer.run(c.x.data(), 24, expected.data(), 0, pool, 1);
    std::vector<std::thread> callers;
    std::vector<int> wrong(4, 0);
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&, i] {
            std::vector<float> y(expected.size());
            for (int round = 0; round < 50; ++round) {
                layer.run(c.x.data(), 24, y.data(), 0, pool, 1 + round % 3);
                wrong[i] += std::memcmp(y.data(), expected.data(), y.size() * 4) != 0;
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (int count : wrong) expect(count == 0, c, "", "wrong among callers", count);
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::stoi(argv[1]) : 200;
    omega::Pool pool;
    Draw draw(7);
    for (const omega::Isa* isa : omega::usable_isas()) std::printf("%s ", isa->name);
    for (int i = 0; i < cases; ++i) check_case(draw_case(draw), pool);
    for (int i = 0; i < 3; ++i) check_callers(draw, pool);
    std::printf("- %d cases, digest %016llx, %d failures\n", cases,
                static_cast<unsigned long long>(digest), failures);
    return failures != 0;
}
