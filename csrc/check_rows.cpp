// A self-check without Python of what runs between quantized layers: norms, gates, rotary
// embeddings, residuals, attention and small layers in full precision against plain loops in
// double precision, on every instruction set that runs here. Then whole blocks (check_block.cpp).
// The sanitizer builds and the emulated AArch64 run it (tests/kernels/test_native_builds.py).
#include "check_rows.hpp"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "cpu.hpp"
#include "dense.hpp"
#include "rows.hpp"

namespace check {
namespace {

int failures = 0;

struct Place {
    const omega::Isa& isa;
    omega::Pool& pool;
    int threads;
};

// Values of up to a few dozen terms of size 2 and functions of them: 1e-5 leaves room for
// rounding (seen: 2e-6), not for a wrong element.
void compare(const Place& at, const char* what, const Floats& found, const std::vector<double>& y,
             double allowed = 1e-5) {
    double worst = 0.0;
    for (size_t i = 0; i < y.size(); ++i) {
        const double error = std::fabs(double(found[i]) - y[i]) / (1.0 + std::fabs(y[i]));
        worst = error > worst || std::isnan(error) ? error : worst;
    }
    expect(worst < allowed, at.isa.name, what, worst);
}

void check_norm(Draw& draw, const Place& at) {
    const int outer = draw.between(1, 9), inner = draw.of({1, 1, 3}), width = draw.between(2, 70);
    const int per_gain = draw.between(1, outer), gains = (outer + per_gain - 1) / per_gain;
    const size_t stride = size_t(inner) * width + draw.between(0, 3);
    const bool center = draw.coin();
    const float plus = float(draw.between(0, 1));
    const Floats x = draw.reals(stride * (outer - 1) + size_t(inner) * width);
    const Floats gain = draw.reals(draw.coin() ? size_t(gains) * width : 0);
    const Floats shift = draw.reals(gain.empty() || draw.coin() ? 0 : gain.size());
    Floats y(size_t(outer) * inner * width, NAN);
    omega::run_norm({x.data(), size_t(outer), stride, inner, width, or_null(gain), or_null(shift),
                     size_t(per_gain), plus, 1e-3f, center, y.data()},
                    at.isa, at.pool, at.threads);
    std::vector<double> expected(y.size());
    for (int o = 0; o < outer; ++o) {
        for (int i = 0; i < inner; ++i) {
            const float* row = x.data() + o * stride + size_t(i) * width;
            double mean = 0.0, square = 0.0;
            for (int k = 0; k < width; ++k) mean += center ? double(row[k]) / width : 0.0;
            for (int k = 0; k < width; ++k) square += (row[k] - mean) * (row[k] - mean) / width;
            for (int k = 0; k < width; ++k) {
                const size_t g = size_t(o / per_gain) * width + k;
                const double scale = gain.empty() ? 1.0 : double(gain[g]) + plus;
                expected[(size_t(o) * inner + i) * width + k] =
                    (row[k] - mean) / std::sqrt(square + 1e-3) * scale +
                    (shift.empty() ? 0.0 : double(shift[g]));
            }
        }
    }
    compare(at, center ? "layer norm" : "rms norm", y, expected);
}

void check_gate(Draw& draw, const Place& at) {
    const int rows = draw.between(1, 9), width = draw.between(1, 70), kind = draw.between(0, 2);
    const size_t stride = size_t(width) + draw.between(0, 3);
    const Floats gate = draw.reals(stride * (rows - 1) + width, 12.0f);
    const Floats up = draw.reals(draw.coin() ? gate.size() : 0);
    Floats y(size_t(rows) * width, NAN);
    omega::run_gate({gate.data(), or_null(up), size_t(rows), stride, stride, width, kind, y.data()},
                    at.isa, at.pool, at.threads);
    std::vector<double> expected(y.size());
    for (int r = 0; r < rows; ++r) {
        for (int k = 0; k < width; ++k) {
            const double v = gate[r * stride + k];
            const double u = std::sqrt(8.0 / M_PI) * (v + 0.044715 * v * v * v);
            const double f = kind == 2 ? std::fmax(v, 0.0) : v / (1.0 + std::exp(-(kind ? v : u)));
            expected[size_t(r) * width + k] = f * (up.empty() ? 1.0 : double(up[r * stride + k]));
        }
    }
    compare(at, kind == 2 ? "relu" : kind ? "silu" : "gelu", y, expected);
}

void check_rotate(Draw& draw, const Place& at) {
    const int tokens = draw.between(1, 9), heads = draw.between(1, 4);
    const int half = draw.between(1, 35), table = draw.of({1, tokens});
    const size_t row = size_t(heads) * 2 * half, stride = row + draw.between(0, 3);
    Floats x = draw.reals(stride * (tokens - 1) + row);
    const Floats cos = draw.reals(size_t(table) * half), sin = draw.reals(cos.size());
    std::vector<double> expected(x.begin(), x.end());
    for (int t = 0; t < tokens; ++t) {
        for (int h = 0; h < heads; ++h) {
            for (int k = 0; k < half; ++k) {
                const size_t at = t * stride + size_t(h) * 2 * half + k;
                const double c = cos[t % table * half + k], s = sin[t % table * half + k];
                expected[at] = x[at] * c - x[at + half] * s;
                expected[at + half] = x[at + half] * c + x[at] * s;
            }
        }
    }
    omega::run_rotate({x.data(), size_t(tokens), stride, heads, 2 * half, cos.data(), sin.data(),
                       size_t(table), x.data(), stride},
                      at.isa, at.pool, at.threads);
    compare(at, "rotary embedding in place", x, expected);
}

void check_residual(Draw& draw, const Place& at) {
    const int rows = draw.between(1, 9), width = draw.between(1, 70);
    const int per_gate = draw.between(1, rows), gates = (rows + per_gate - 1) / per_gate;
    Floats x = draw.reals(size_t(rows) * width);
    const Floats add = draw.reals(x.size());
    const Floats gate = draw.reals(draw.coin() ? size_t(gates) * width : 0);
    std::vector<double> expected(x.begin(), x.end());
    for (size_t i = 0; i < x.size(); ++i) {
        const size_t g = i / width / per_gate * width + i % width;
        expected[i] += double(add[i]) * (gate.empty() ? 1.0 : double(gate[g]));
    }
    omega::run_residual({x.data(), add.data(), or_null(gate), size_t(rows), size_t(per_gate), width,
                         x.data()},
                        at.isa, at.pool, at.threads);
    compare(at, "residual in place", x, expected);
}

// `exact`: in float32; else of as many keys and queries as are met by whole numbers.
void check_attend(Draw& draw, const Place& at, bool exact) {
    omega::AttendArgs a{};
    a.exact = exact;
    const int repeats = draw.between(1, 2);
    a.kv_heads = draw.between(1, 3);
    a.batch = repeats * draw.between(1, 2), a.heads = a.kv_heads * draw.between(1, 3);
    a.rows = exact ? draw.between(1, 12) : draw.between(32, 60), a.dim = draw.between(1, 40);
    a.scale = 0.3f, a.sources = draw.between(1, 2), a.causal = draw.coin();
    const size_t dim = size_t(a.dim), row = dim * a.heads;
    const Floats q = draw.reals(size_t(a.batch) * a.rows * row);
    a.q = q.data(), a.q_batch = a.rows * row, a.q_head = dim, a.q_row = row;
    Floats k[2], v[2];
    for (int s = 0; s < a.sources; ++s) {
        const int count = s + 1 == a.sources && a.causal ? a.rows
                          : exact                        ? draw.between(1, 60)
                                                         : draw.between(256, 300);
        const int shared = s ? 1 : repeats;
        const size_t head = dim * count, entry = head * a.kv_heads;
        k[s] = draw.reals(entry * (a.batch / shared)), v[s] = draw.reals(k[s].size());
        a.keys[s] = {k[s].data(), v[s].data(), entry, head, dim, entry, head, dim, count, shared};
    }
    Floats y(q.size(), NAN);
    a.out = y.data();
    omega::run_attend(a, at.isa, at.pool, at.threads);
    std::vector<double> expected(y.size(), 0.0);
    for (int unit = 0; unit < a.batch * a.heads * a.rows; ++unit) {
        const int i = unit % a.rows, h = unit / a.rows % a.heads, b = unit / a.rows / a.heads;
        double* to = expected.data() + (size_t(b) * a.rows + i) * row + h * dim;
        double sum = 0.0;
        for (int s = 0; s < a.sources; ++s) {
            const bool part = a.causal && s + 1 == a.sources;
            for (int j = 0; j < (part ? i + 1 : a.keys[s].count); ++j) {
                const size_t from = b / a.keys[s].repeats * a.keys[s].k_batch +
                                    h / (a.heads / a.kv_heads) * a.keys[s].k_head + j * dim;
                double score = 0.0;
                const float* query = q.data() + (size_t(b) * a.rows + i) * row + h * dim;
                for (size_t d = 0; d < dim; ++d) score += double(query[d]) * k[s][from + d];
                const double weight = std::exp(double(a.scale) * score);
                sum += weight;
                for (size_t d = 0; d < dim; ++d) to[d] += weight * v[s][from + d];
            }
        }
        for (size_t d = 0; d < dim; ++d) to[d] /= sum;
    }
    const char* what = !exact ? "attention on whole numbers" : a.causal ? "causal attention"
                                                                         : "attention";
    compare(at, what, y, expected, exact ? 1e-5 : 1e-3);
}

void check_dense(Draw& draw, const Place& at) {
    const int rows = draw.between(1, 70), inputs = draw.between(1, 60);
    const int outputs = draw.between(1, 120);
    const Floats weight = draw.reals(size_t(inputs) * outputs);
    const Floats bias = draw.reals(draw.coin() ? outputs : 0);
    const Floats x = draw.reals(size_t(rows) * inputs);
    const omega::Dense layer(weight.data(), or_null(bias), inputs, outputs, at.isa);
    Floats y(size_t(rows) * outputs, NAN), again(y.size(), NAN);
    layer.run(x.data(), rows, y.data(), at.pool, 1);
    layer.run(x.data(), rows, again.data(), at.pool, at.threads);
    std::vector<double> expected(y.size());
    for (size_t i = 0; i < y.size(); ++i) {
        const size_t r = i / outputs, n = i % outputs;
        double sum = bias.empty() ? 0.0 : double(bias[n]);
        for (int k = 0; k < inputs; ++k) sum += double(x[r * inputs + k]) * weight[n * inputs + k];
        expected[i] = sum;
    }
    compare(at, "small layer", y, expected);
    expect(!std::memcmp(y.data(), again.data(), y.size() * 4), at.isa.name, "threads differ", 0);
}

}  // namespace

void expect(bool good, const char* isa, const char* what, double value) {
    if (good) return;
    ++failures;
    std::printf("%s: %s %g\n", isa, what, value);
}

}  // namespace check

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::stoi(argv[1]) : 200;
    omega::Pool pool;
    for (const omega::Isa* isa : omega::usable_isas()) {
        check::Draw draw(7);
        for (int i = 0; i < cases; ++i) {
            const check::Place at{*isa, pool, 1 + i % 3};
            check::check_norm(draw, at);
            check::check_gate(draw, at);
            check::check_rotate(draw, at);
            check::check_residual(draw, at);
            check::check_attend(draw, at, true);
            if (i % 4 == 0) check::check_attend(draw, at, false);
            check::check_dense(draw, at);
        }
        check::check_blocks(draw, *isa, pool, cases);
        for (int i = 0; i < 3; ++i) check::check_block_callers(draw, *isa, pool);
        std::printf("%s ", isa->name);
    }
    std::printf("- %d cases, %d failures\n", cases, check::failures);
    return check::failures != 0;
}
