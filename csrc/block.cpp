#include "block.hpp"

#include <algorithm>
#include <stdexcept>

namespace omega {
namespace {

// Kept by each calling thread, so that it allocates once.
struct Workspace {
    Buffer<float> normed, projected, queries, heads, attended, inner, active;
};

Workspace& workspace() {
    thread_local Workspace space;
    return space;
}

// The last `keep` of `rows` rows of each entry, side by side; `to` may be `from`.
void take_last(const float* from, int batch, int rows, int keep, int width, float* to) {
    if (from == to && keep == rows) return;
    const size_t part = size_t(keep) * width;
    for (int b = 0; b < batch; ++b, to += part) {
        const float* last = from + (size_t(b) * rows + (rows - keep)) * width;
        std::copy(last, last + part, to);
    }
}

}  // namespace

// One call.
struct Block::Run {
    const BlockSpec& spec;
    const BlockArgs& a;
    const Isa& isa;
    Pool& pool;
    int threads;
    Workspace& w = workspace();
    int width = spec.in.inputs(), wide = spec.heads * spec.dim;
    int kept = a.batch * a.keep;

    void layer(const Layer& layer, const float* x, int rows, float* y) {
        layer.run(x, rows, y, a.step, pool, threads);
    }
    void norm(const float* x, int rows, const Modulation& m) {
        const NormArgs args{x, size_t(rows), size_t(width), 1, width, m.gain, m.shift,
                            size_t(rows / a.modulations), spec.plus, spec.eps, spec.center,
                            w.normed.data()};
        run_norm(args, isa, pool, threads);
    }
    void residual(const float* x, const float* gate) {
        const ResidualArgs args{x, w.normed.data(), gate, size_t(kept),
                                size_t(kept / a.modulations), width, a.y};
        run_residual(args, isa, pool, threads);
    }
    // Norm and rotary embedding of `heads` heads of every token of the joint product.
    void turn(float* x, int heads, const float* gain) {
        const size_t n = size_t(a.batch) * a.rows, row = size_t(spec.in.outputs());
        const float* from = x;
        size_t stride = row;
        if (gain) {
            const NormArgs args{x, n, row, heads, spec.dim, gain, nullptr, n, 0.0f, spec.eps,
                                false, w.heads.data()};
            run_norm(args, isa, pool, threads);
            from = w.heads.data();
            stride = size_t(heads) * spec.dim;
        }
        const RotateArgs args{from, n, stride, heads, spec.dim, a.cos, a.sin, a.table, x, row};
        run_rotate(args, isa, pool, threads);
    }
    void attend() {
        const size_t row = size_t(spec.in.outputs()), batch = row * a.rows, head = size_t(spec.dim);
        AttendArgs args{};
        args.q = w.projected.data() + row * size_t(a.rows - a.keep);
        args.q_batch = batch, args.q_head = head, args.q_row = row;
        if (spec.query) {
            args.q = w.queries.data();
            args.q_batch = size_t(a.keep) * wide, args.q_row = size_t(wide);
        }
        args.batch = a.batch, args.heads = spec.heads, args.kv_heads = spec.kv_heads;
        args.rows = a.keep, args.dim = spec.dim;
        args.scale = spec.scale, args.causal = spec.causal, args.exact = !spec.in.quantized;
        args.out = w.attended.data();
        if (a.cache.count) args.keys[args.sources++] = a.cache;
        if (!spec.cross) {
            const float* k = w.projected.data() + (spec.query ? 0 : wide);
            const float* v = k + spec.kv_heads * head;
            args.keys[args.sources++] = {k, v, batch, head, row, batch, head, row, a.rows, 1};
        }
        run_attend(args, isa, pool, threads);
    }
    void attention() {
        const int n = a.batch * a.rows;
        norm(a.x, n, a.before);
        layer(spec.in, w.normed.data(), n, w.projected.data());
        if (spec.query) {
            // What the queries read is moved to the front, where the norm is not needed any more.
            take_last(w.normed.data(), a.batch, a.rows, a.keep, width, w.normed.data());
            layer(spec.query, w.normed.data(), kept, w.queries.data());
        }
        if (a.cos && spec.q_gain) {
            turn(w.projected.data(), spec.heads, spec.q_gain);
            turn(w.projected.data() + wide, spec.kv_heads, spec.k_gain);
        } else if (a.cos) {
            turn(w.projected.data(), spec.heads + (spec.cross ? 0 : spec.kv_heads), nullptr);
        }
        attend();
        layer(spec.out, w.attended.data(), kept, w.normed.data());
        if (a.keep == a.rows) {
            residual(a.x, a.before.gate);
        } else {
            take_last(a.x, a.batch, a.rows, a.keep, width, a.y);
            residual(a.y, a.before.gate);
        }
    }
    void feed_forward() {
        const int inner = spec.down.inputs();
        norm(a.y, kept, a.after);
        layer(spec.up, w.normed.data(), kept, w.inner.data());
        const size_t from = size_t(spec.up.outputs());
        const GateArgs gate{w.inner.data(), spec.gated ? w.inner.data() + inner : nullptr,
                            size_t(kept), from, from, inner, spec.kind, w.active.data()};
        run_gate(gate, isa, pool, threads);
        layer(spec.down, w.active.data(), kept, w.normed.data());
        residual(a.y, a.after.gate);
    }
};

Block::Block(const BlockSpec& spec) : spec_(spec) {
    const int wide = spec.heads * spec.dim, width = spec.in.inputs();
    const int others = spec.cross ? 0 : 2 * spec.kv_heads * spec.dim;
    const int projected = (spec.query ? 0 : wide) + others;
    const int inner = spec.up.outputs() / (spec.gated ? 2 : 1);
    const bool query = !spec.query || (!spec.cross && !spec.q_gain &&
                                       spec.query.inputs() == width &&
                                       spec.query.outputs() == wide);
    if (spec.kv_heads < 1 || spec.heads % spec.kv_heads || spec.in.outputs() != projected ||
        !query || !spec.q_gain != !spec.k_gain || (spec.cross && (spec.q_gain || spec.causal)) ||
        spec.out.inputs() != wide || spec.out.outputs() != width ||
        spec.up.inputs() != width || spec.down.inputs() != inner ||
        spec.down.outputs() != width || (spec.gated && spec.up.outputs() % 2)) {
        throw std::invalid_argument("the layers of this block do not fit together");
    }
    if (spec.q_gain) {
        gains_.reserve(2 * size_t(spec.dim));
        std::copy(spec.q_gain, spec.q_gain + spec.dim, gains_.data());
        std::copy(spec.k_gain, spec.k_gain + spec.dim, gains_.data() + spec.dim);
        spec_.q_gain = gains_.data();
        spec_.k_gain = gains_.data() + spec.dim;
    }
}

int Block::steps() const {
    return std::max({spec_.in.steps(), spec_.out.steps(), spec_.up.steps(), spec_.down.steps(),
                     spec_.query ? spec_.query.steps() : 0});
}

void Block::check(const BlockArgs& a) const {
    const bool part = a.keep != a.rows;
    if (a.keep < 1 || a.keep > a.rows || (part && (spec_.cross || spec_.causal)) ||
        (spec_.cross && !a.cache.count) || (a.cache.count && a.cache.repeats < 1) ||
        (spec_.q_gain && !a.cos) || (spec_.query && a.cos)) {
        throw std::invalid_argument("this block does not run so");
    }
}

void Block::run(const BlockArgs& a, const Isa& isa, Pool& pool, int threads) const {
    const size_t n = size_t(a.batch) * a.rows;
    if (a.batch <= 0 || a.rows <= 0) return;
    check(a);
    Run run{spec_, a, isa, pool, threads};
    const size_t wide = size_t(run.wide), kept = size_t(run.kept);
    run.w.normed.reserve(n * run.width);
    run.w.projected.reserve(n * spec_.in.outputs());
    run.w.queries.reserve(spec_.query ? kept * wide : 0);
    run.w.heads.reserve(spec_.q_gain ? n * wide : 0);
    run.w.attended.reserve(kept * wide);
    run.w.inner.reserve(kept * spec_.up.outputs());
    run.w.active.reserve(kept * spec_.down.inputs());
    run.attention();
    run.feed_forward();
}

}  // namespace omega
