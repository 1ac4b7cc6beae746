#include "rows.hpp"

#include <algorithm>

#include "layout.hpp"
#include "pool.hpp"

namespace omega {
namespace {

// Operations below which a second thread costs more than it saves.
constexpr double kWorthSharing = 1e4;
constexpr int kPartsPerThread = 4;

// Deals out [0, count) in ranges.
template <class Args>
class Ranges final : public Job {
public:
    Ranges(void (*fn)(const Args&, size_t, size_t), const Args& args, size_t count, int parts,
           int threads)
        : fn_(fn), args_(args), count_(count), parts_(size_t(parts)) {
        deal_.open(parts, threads);
    }
    void run(int participant) override {
        for (int i; (i = deal_.take(participant)) >= 0;) {
            fn_(args_, count_ * i / parts_, count_ * (i + 1) / parts_);
        }
    }

private:
    void (*fn_)(const Args&, size_t, size_t);
    const Args& args_;
    size_t count_, parts_;
    Deal deal_;
};

template <class Args>
void share(void (*fn)(const Args&, size_t, size_t), const Args& args, size_t count, double work,
           Pool& pool, int threads) {
    if (count == 0) return;
    if (threads <= 1 || count == 1 || work < kWorthSharing) {
        fn(args, 0, count);
        return;
    }
    const int parts = int(std::min<size_t>(count, size_t(threads) * kPartsPerThread));
    Ranges<Args> job(fn, args, count, parts, threads);
    pool.run(job, threads);
}

}  // namespace

void run_norm(const NormArgs& a, const Isa& isa, Pool& pool, int threads) {
    share(isa.rows->norm, a, a.outer, double(a.outer) * a.inner * a.width, pool, threads);
}

void run_gate(const GateArgs& a, const Isa& isa, Pool& pool, int threads) {
    share(isa.rows->gate, a, a.rows, 4.0 * double(a.rows) * a.width, pool, threads);
}

void run_rotate(const RotateArgs& a, const Isa& isa, Pool& pool, int threads) {
    share(isa.rows->rotate, a, a.tokens, double(a.tokens) * a.heads * a.dim, pool, threads);
}

void run_residual(const ResidualArgs& a, const Isa& isa, Pool& pool, int threads) {
    share(isa.rows->residual, a, a.rows, 0.5 * double(a.rows) * a.width, pool, threads);
}

void run_attend(const AttendArgs& a, const Isa& isa, Pool& pool, int threads) {
    const double keys = double(a.keys[0].count) + (a.sources > 1 ? a.keys[1].count : 0);
    const double work = double(a.batch) * a.heads * a.rows * keys * a.dim;
    share(isa.rows->attend, a, attend_units(a), work, pool, threads);
}

void run_dense(const DenseArgs& a, const Isa& isa, Pool& pool, int threads) {
    const double work = 0.1 * double(a.rows) * a.inputs * a.outputs;
    share(isa.rows->dense, a, dense_units(a, isa.rows->dense_panel), work, pool, threads);
}

}  // namespace omega
