// Whole blocks against the same kernels called one by one on buffers of their own: bit for bit,
// with helpers, and with several callers at once. See check_rows.cpp.
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>

#include "block.hpp"
#include "check_rows.hpp"

namespace check {
namespace {

using omega::Block;
using omega::BlockArgs;
using omega::BlockSpec;
using omega::Layer;

// A layer with what it was made of.
struct Owned {
    std::unique_ptr<omega::Linear> quantized;
    std::unique_ptr<omega::Dense> dense;
    Layer layer() const { return {quantized.get(), dense.get()}; }
};

Owned make_layer(Draw& draw, int inputs, int outputs, bool quantized, const omega::Isa& isa) {
    Owned made;
    const Floats bias = draw.reals(draw.coin() ? size_t(outputs) : 0);
    if (!quantized) {
        const Floats weight = draw.reals(size_t(inputs) * outputs, 0.3f);
        made.dense =
            std::make_unique<omega::Dense>(weight.data(), or_null(bias), inputs, outputs, isa);
        return made;
    }
    omega::LinearSpec spec;
    spec.inputs = inputs, spec.outputs = outputs;
    std::vector<uint8_t> weight(size_t(outputs) * ((inputs + 1) / 2));
    for (uint8_t& v : weight) v = draw.byte();
    const Floats scale = draw.reals(size_t(outputs), 0.05f);
    const Floats a = draw.reals(size_t(outputs)), b = draw.reals(size_t(inputs), 0.1f);
    spec.qweight = weight.data(), spec.weight_scale = scale.data(), spec.bias = or_null(bias);
    spec.act_group = draw.of({0, 32});
    spec.rotation = draw.coin() ? omega::Rotation::hadamard : omega::Rotation::none;
    spec.block = 16;
    if (draw.coin()) spec.rank = 1, spec.lowrank_a = a.data(), spec.lowrank_b = b.data();
    made.quantized = std::make_unique<omega::Linear>(spec, isa);
    return made;
}

// A block and one input of it.
struct Case {
    Owned in, out, up, down, query;
    Floats x, q_gain, k_gain, rows[6], cos, sin, keys, values;
    BlockSpec spec;
    BlockArgs args{};
    std::unique_ptr<Block> block;
    size_t results() const { return size_t(args.batch) * args.keep * spec.in.inputs(); }
};

void draw_spec(Draw& draw, BlockSpec& s) {
    s.kv_heads = draw.between(1, 2), s.heads = s.kv_heads * draw.between(1, 2);
    s.dim = 2 * draw.between(1, 12);
    s.cross = draw.between(0, 3) == 0;
    s.causal = !s.cross && draw.between(0, 2) == 0;
    s.center = draw.coin(), s.gated = draw.coin(), s.kind = draw.between(0, 1);
    s.plus = float(draw.between(0, 1)), s.eps = 1e-5f, s.scale = 0.4f;
}

void draw_layers(Draw& draw, Case& c, const omega::Isa& isa) {
    BlockSpec& s = c.spec;
    const bool quantized = draw.coin(), apart = !s.cross && draw.between(0, 2) == 0;
    const int width = draw.between(4, 50), inner = draw.between(4, 60);
    const int wide = s.heads * s.dim, others = s.cross ? 0 : 2 * s.kv_heads * s.dim;
    c.in = make_layer(draw, width, (apart ? 0 : wide) + others, quantized, isa);
    c.out = make_layer(draw, wide, width, quantized, isa);
    c.up = make_layer(draw, width, s.gated ? 2 * inner : inner, quantized, isa);
    c.down = make_layer(draw, inner, width, quantized, isa);
    if (apart) c.query = make_layer(draw, width, wide, quantized, isa);
    s.in = c.in.layer(), s.out = c.out.layer(), s.up = c.up.layer(), s.down = c.down.layer();
    s.query = c.query.layer();
    if (!s.cross && !apart && draw.coin()) {
        c.q_gain = draw.reals(s.dim), c.k_gain = draw.reals(s.dim);
        s.q_gain = c.q_gain.data(), s.k_gain = c.k_gain.data();
    }
    c.block = std::make_unique<Block>(s);
}

void draw_args(Draw& draw, Case& c) {
    const BlockSpec& s = c.spec;
    BlockArgs& a = c.args;
    const int width = s.in.inputs(), repeats = draw.between(1, 2);
    a.batch = repeats * draw.between(1, 2);
    a.rows = draw.between(1, 20), a.keep = a.rows;
    if (!s.cross && !s.causal && draw.coin()) a.keep = draw.between(1, a.rows);
    c.x = draw.reals(size_t(a.batch) * a.rows * width);
    a.x = c.x.data();
    a.modulations = draw.of({1, a.batch});
    const float** places[6] = {&a.before.gain, &a.before.shift, &a.before.gate,
                               &a.after.gain,  &a.after.shift,  &a.after.gate};
    for (int i = 0; i < 6; ++i) {
        const bool given = draw.coin() && (i % 3 != 1 || *places[i - 1]);
        c.rows[i] = draw.reals(given ? size_t(a.modulations) * width : 0);
        *places[i] = or_null(c.rows[i]);
    }
    if (s.q_gain || (!s.query && draw.coin())) {
        a.table = size_t(draw.coin() ? a.rows : a.batch * a.rows);
        c.cos = draw.reals(a.table * (s.dim / 2)), c.sin = draw.reals(c.cos.size());
        a.cos = c.cos.data(), a.sin = c.sin.data();
    }
    if (s.cross || draw.coin()) {
        const int count = draw.between(1, 40);
        const size_t dim = size_t(s.dim), head = dim * count, entry = head * s.kv_heads;
        c.keys = draw.reals(entry * (a.batch / repeats)), c.values = draw.reals(c.keys.size());
        a.cache = {c.keys.data(), c.values.data(), entry, head, dim, entry, head, dim,
                   count, repeats};
    }
}

// Columns [first, first + width) of the last `keep` rows of each entry of x [batch][rows][stride].
Floats cut(const Floats& x, const BlockArgs& a, int keep, int stride, int first, int width) {
    Floats part;
    for (int b = 0; b < a.batch; ++b) {
        for (int r = a.rows - keep; r < a.rows; ++r) {
            const float* row = x.data() + (size_t(b) * a.rows + r) * stride + first;
            part.insert(part.end(), row, row + width);
        }
    }
    return part;
}

// The kernels one by one.
struct Parts {
    const Case& c;
    const omega::Isa& isa;
    omega::Pool& pool;
    const BlockSpec& s = c.spec;
    const BlockArgs& a = c.args;
    int width = s.in.inputs(), kept = a.batch * a.keep;

    Floats run(const Layer& layer, const Floats& x) {
        const int rows = int(x.size() / layer.inputs());
        Floats y(size_t(rows) * layer.outputs());
        layer.run(x.data(), rows, y.data(), 0, pool, 1);
        return y;
    }
    Floats norm(const Floats& x, const float* gain, const float* shift, int wide, size_t per_gain,
                float plus, bool center) {
        Floats y(x.size());
        omega::run_norm({x.data(), x.size() / wide, size_t(wide), 1, wide, gain, shift, per_gain,
                         plus, s.eps, center, y.data()},
                        isa, pool, 1);
        return y;
    }
    Floats residual(const Floats& x, const Floats& add, const float* gate) {
        Floats y(x.size());
        omega::run_residual({x.data(), add.data(), gate, size_t(kept),
                             size_t(kept / a.modulations), width, y.data()},
                            isa, pool, 1);
        return y;
    }
    // Heads [batch][rows][heads * dim], normed and turned where the block does so.
    Floats turn(Floats x, int heads, const float* gain) {
        if (gain) x = norm(x, gain, nullptr, s.dim, x.size(), 0.0f, false);
        if (!a.cos) return x;
        const size_t row = size_t(heads) * s.dim;
        omega::run_rotate({x.data(), x.size() / row, row, heads, s.dim, a.cos, a.sin, a.table,
                           x.data(), row},
                          isa, pool, 1);
        return x;
    }
    Floats attention(const Floats& normed) {
        const int wide = s.heads * s.dim, narrow = s.kv_heads * s.dim, all = s.in.outputs();
        const Floats joint = run(s.in, normed);
        Floats q = s.query ? run(s.query, cut(normed, a, a.keep, width, 0, width))
                           : cut(turn(cut(joint, a, a.rows, all, 0, wide), s.heads, s.q_gain), a,
                                 a.keep, wide, 0, wide);
        omega::AttendArgs t{};
        const size_t dim = size_t(s.dim);
        t.q = q.data(), t.q_batch = size_t(a.keep) * wide, t.q_head = dim, t.q_row = size_t(wide);
        t.batch = a.batch, t.heads = s.heads, t.kv_heads = s.kv_heads, t.rows = a.keep;
        t.dim = s.dim, t.scale = s.scale, t.causal = s.causal;
        t.exact = !s.in.quantized;
        if (a.cache.count) t.keys[t.sources++] = a.cache;
        Floats k, v;
        if (!s.cross) {
            const int first = s.query ? 0 : wide;
            k = turn(cut(joint, a, a.rows, all, first, narrow), s.kv_heads, s.k_gain);
            v = cut(joint, a, a.rows, all, first + narrow, narrow);
            const size_t row = size_t(narrow), entry = row * a.rows;
            t.keys[t.sources++] = {k.data(), v.data(), entry, dim, row, entry, dim, row, a.rows, 1};
        }
        Floats y(size_t(kept) * wide);
        t.out = y.data();
        omega::run_attend(t, isa, pool, 1);
        return y;
    }
    Floats all() {
        const size_t share = size_t(a.batch / a.modulations);
        const Floats normed = norm(c.x, a.before.gain, a.before.shift, width, share * a.rows,
                                   s.plus, s.center);
        Floats x = residual(cut(c.x, a, a.keep, width, 0, width), run(s.out, attention(normed)),
                            a.before.gate);
        const Floats inner = run(s.up, norm(x, a.after.gain, a.after.shift, width, share * a.keep,
                                            s.plus, s.center));
        const size_t from = size_t(s.up.outputs());
        Floats active(size_t(kept) * s.down.inputs());
        omega::run_gate({inner.data(), s.gated ? inner.data() + s.down.inputs() : nullptr,
                         size_t(kept), from, from, s.down.inputs(), s.kind, active.data()},
                        isa, pool, 1);
        return residual(x, run(s.down, active), a.after.gate);
    }
};

void draw_case(Draw& draw, Case& c, const omega::Isa& isa) {
    draw_spec(draw, c.spec);
    draw_layers(draw, c, isa);
    draw_args(draw, c);
}

bool refuses(const Case& c, BlockArgs args, const omega::Isa& isa, omega::Pool& pool) {
    Floats y(c.results());
    args.y = y.data();
    try {
        c.block->run(args, isa, pool, 1);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

}  // namespace

void check_blocks(Draw& draw, const omega::Isa& isa, omega::Pool& pool, int cases) {
    for (int i = 0; i < cases; ++i) {
        Case c;
        draw_case(draw, c, isa);
        const Floats expected = Parts{c, isa, pool}.all();
        for (int threads : {1, 3}) {
            Floats y(c.results(), NAN);
            BlockArgs args = c.args;
            args.y = y.data();
            c.block->run(args, isa, pool, threads);
            const bool same = !std::memcmp(y.data(), expected.data(), y.size() * 4);
            expect(same, isa.name, "a block differs from its parts, threads", threads);
        }
        BlockArgs wrong = c.args;
        wrong.keep = c.args.rows + 1;
        expect(refuses(c, wrong, isa, pool), isa.name, "runs more rows than there are", i);
        wrong = c.args;
        wrong.cache.count = c.spec.cross ? 0 : 1;
        wrong.cache.repeats = 0;
        expect(refuses(c, wrong, isa, pool), isa.name, "runs with such a cache", i);
    }
}

void check_block_callers(Draw& draw, const omega::Isa& isa, omega::Pool& pool) {
    Case c;
    draw_case(draw, c, isa);
    const Floats expected = Parts{c, isa, pool}.all();
    std::vector<std::thread> callers;
    std::vector<int> wrong(4, 0);
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&, i] {
            Floats y(c.results());
            BlockArgs args = c.args;
            args.y = y.data();
            for (int round = 0; round < 20; ++round) {
                c.block->run(args, isa, pool, 1 + round % 3);
                wrong[i] += std::memcmp(y.data(), expected.data(), y.size() * 4) != 0;
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (int count : wrong) expect(count == 0, isa.name, "wrong among callers", count);
}

}  // namespace check
