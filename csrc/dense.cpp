#include "dense.hpp"

#include <algorithm>
#include <stdexcept>

#include "layout.hpp"
#include "pool.hpp"
#include "rows.hpp"

namespace omega {

Dense::Dense(const float* weight, const float* bias, int inputs, int outputs, const Isa& isa)
    : isa_(isa), inputs_(inputs), outputs_(outputs) {
    if (inputs < 1 || outputs < 1) throw std::invalid_argument("a layer without inputs or outputs");
    const int lanes = isa.rows->lanes, panel = isa.rows->dense_panel;
    const int padded = (outputs + lanes - 1) / lanes * lanes;
    weight_.reserve(size_t(padded) * inputs);
    weight_.fill(0.0f);
    bias_.reserve(size_t(padded));
    bias_.fill(0.0f);
    if (bias) std::copy(bias, bias + outputs, bias_.data());
    for (int first = 0; first < outputs; first += panel) {
        const int width = std::min(panel, padded - first);
        float* to = weight_.data() + size_t(first) * inputs;
        for (int n = 0; n < std::min(width, outputs - first); ++n) {
            const float* from = weight + size_t(first + n) * inputs;
            for (int k = 0; k < inputs; ++k) to[size_t(k) * width + n] = from[k];
        }
    }
}

void Dense::run(const float* x, int rows, float* y, Pool& pool, int threads) const {
    const DenseArgs args{x, size_t(rows), inputs_, outputs_, weight_.data(), bias_.data(), y};
    run_dense(args, isa_, pool, threads);
}

}  // namespace omega
