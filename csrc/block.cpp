#include "block.hpp"

#include <algorithm>
#include <stdexcept>

namespace omega {
namespace {

// Kept by each calling thread, so that it allocates once.
struct Workspace {
    Buffer<float> normed, projected, attended, inner, active;
};

Workspace& workspace() {
    thread_local Workspace space;
    return space;
}

}  // namespace

Block::Block(const BlockSpec& spec) : spec_(spec) {
    const int wide = spec.heads * spec.dim, width = spec.in->inputs();
    const int projected = wide + (spec.cross ? 0 : 2 * spec.kv_heads * spec.dim);
    const int inner = spec.up->outputs() / (spec.gated ? 2 : 1);
    if (spec.kv_heads < 1 || spec.heads % spec.kv_heads || spec.in->outputs() != projected ||
        spec.out->inputs() != wide || spec.out->outputs() != width ||
        spec.up->inputs() != width || spec.down->inputs() != inner ||
        spec.down->outputs() != width || (spec.gated && spec.up->outputs() % 2)) {
        throw std::invalid_argument("the layers of this block do not fit together");
    }
}

int Block::steps() const {
    return std::max({spec_.in->steps(), spec_.out->steps(), spec_.up->steps(),
                     spec_.down->steps()});
}

void Block::attend(const BlockArgs& a, const float* projected, float* to, const Isa& isa,
                   Pool& pool, int threads) const {
    const size_t row = size_t(spec_.in->outputs()), batch = row * a.rows;
    AttendArgs args{};
    args.q = projected;
    args.q_batch = batch, args.q_head = size_t(spec_.dim), args.q_row = row;
    args.batch = a.batch, args.heads = spec_.heads, args.kv_heads = spec_.kv_heads;
    args.rows = a.rows, args.dim = spec_.dim;
    args.scale = spec_.scale;
    args.out = to;
    if (a.cache.count) args.keys[args.sources++] = a.cache;
    if (!spec_.cross) {
        const size_t head = size_t(spec_.dim);
        const float* k = projected + spec_.heads * head;
        const float* v = k + spec_.kv_heads * head;
        args.keys[args.sources++] = {k, v, batch, head, row, batch, head, row, a.rows, 1};
    }
    run_attend(args, isa, pool, threads);
}

void Block::run(const BlockArgs& a, const Isa& isa, Pool& pool, int threads) const {
    const int n = a.batch * a.rows, width = spec_.in->inputs(), wide = spec_.heads * spec_.dim;
    const int projected = spec_.in->outputs(), inner = spec_.down->inputs();
    if (n <= 0) return;
    Workspace& w = workspace();
    w.normed.reserve(size_t(n) * width);
    w.projected.reserve(size_t(n) * projected);
    w.attended.reserve(size_t(n) * wide);
    w.inner.reserve(size_t(n) * spec_.up->outputs());
    w.active.reserve(size_t(n) * inner);
    const size_t per = size_t(n) / a.modulations;
    const auto norm = [&](const float* x, const Modulation& m) {
        const NormArgs args{x, size_t(n), size_t(width), 1, width, m.gain, m.shift, per, 1.0f,
                            spec_.eps, spec_.center, w.normed.data()};
        run_norm(args, isa, pool, threads);
    };
    const auto residual = [&](const float* x, const float* gate) {
        const ResidualArgs args{x, w.normed.data(), gate, size_t(n), per, width, a.y};
        run_residual(args, isa, pool, threads);
    };
    norm(a.x, a.before);
    spec_.in->run(w.normed.data(), n, w.projected.data(), a.step, pool, threads);
    if (a.cos) {
        const int heads = spec_.heads + (spec_.cross ? 0 : spec_.kv_heads);
        const RotateArgs args{w.projected.data(), size_t(n), size_t(projected), heads, spec_.dim,
                              a.cos, a.sin, a.table, w.projected.data(), size_t(projected)};
        run_rotate(args, isa, pool, threads);
    }
    attend(a, w.projected.data(), w.attended.data(), isa, pool, threads);
    spec_.out->run(w.attended.data(), n, w.normed.data(), a.step, pool, threads);
    residual(a.x, a.before.gate);
    norm(a.y, a.after);
    spec_.up->run(w.normed.data(), n, w.inner.data(), a.step, pool, threads);
    const size_t from = size_t(spec_.up->outputs());
    const GateArgs gate{w.inner.data(), spec_.gated ? w.inner.data() + inner : nullptr, size_t(n),
                        from, from, inner, spec_.kind, w.active.data()};
    run_gate(gate, isa, pool, threads);
    spec_.down->run(w.active.data(), n, w.normed.data(), a.step, pool, threads);
    residual(a.y, a.after.gate);
}

}  // namespace omega
