// One pre-norm transformer block of a denoising loop, its four products in 4 bits: one call in
// place of a dozen.
#pragma once

#include "linear.hpp"
#include "rows.hpp"

namespace omega {

struct BlockSpec {
    const Linear* in = nullptr;    // -> queries, keys and values, or queries only (cross)
    const Linear* out = nullptr;
    const Linear* up = nullptr;    // -> gate and up, or the inner layer alone
    const Linear* down = nullptr;
    int heads = 0, kv_heads = 0, dim = 0;
    bool cross = false;            // attends to the cache only
    bool center = false;           // LayerNorm; else RMSNorm
    bool gated = false;            // `up` has two halves
    int kind = 0;                  // of the gate, see GateArgs
    float eps = 0.0f, scale = 1.0f;
};

// What norms and residuals take from the denoising step: rows of `width`, or null.
struct Modulation {
    const float *gain, *shift, *gate;
};

struct BlockArgs {
    const float* x;        // [batch][rows][width]
    float* y;              // the same
    int batch, rows;
    Modulation before, after;
    int modulations;       // rows of each: 1, or a divisor of batch
    const float *cos, *sin;  // rotary table [table][dim / 2], or null
    size_t table;
    Keys cache;            // count 0: none
    int step;
};

class Block {
public:
    // The layers must outlive it. Throws std::invalid_argument where they do not fit together.
    explicit Block(const BlockSpec& spec);
    int width() const { return spec_.in->inputs(); }
    int steps() const;
    void run(const BlockArgs& args, const Isa& isa, Pool& pool, int threads) const;

private:
    void attend(const BlockArgs& args, const float* projected, float* to, const Isa& isa,
                Pool& pool, int threads) const;
    BlockSpec spec_;
};

}  // namespace omega
