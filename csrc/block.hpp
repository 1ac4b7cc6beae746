// One pre-norm transformer block, its products in 4 bits or in full precision: one call in place
// of a dozen.
#pragma once

#include "dense.hpp"
#include "linear.hpp"
#include "rows.hpp"

namespace omega {

// One of the two kinds of layer, or neither.
struct Layer {
    const Linear* quantized = nullptr;
    const Dense* dense = nullptr;

    explicit operator bool() const { return quantized || dense; }
    int inputs() const { return quantized ? quantized->inputs() : dense->inputs(); }
    int outputs() const { return quantized ? quantized->outputs() : dense->outputs(); }
    int steps() const { return quantized ? quantized->steps() : 0; }
    void run(const float* x, int rows, float* y, int step, Pool& pool, int threads) const {
        if (quantized) {
            quantized->run(x, rows, y, step, pool, threads);
        } else {
            dense->run(x, rows, y, pool, threads);
        }
    }
};

struct BlockSpec {
    Layer in;                      // -> queries, keys and values, or queries only (cross)
    Layer out;
    Layer up;                      // -> gate and up, or the inner layer alone
    Layer down;
    Layer query;                   // -> queries, where `in` gives keys and values only
    int heads = 0, kv_heads = 0, dim = 0;
    bool cross = false;            // attends to the cache only
    bool causal = false;           // a row attends to those up to itself
    bool center = false;           // LayerNorm; else RMSNorm
    float plus = 1.0f;             // norms multiply by plus + gain
    bool gated = false;            // `up` has two halves
    int kind = 0;                  // of the gate, see GateArgs
    float eps = 0.0f, scale = 1.0f;
    const float* q_gain = nullptr;  // [dim]: RMSNorm of each head of queries and of keys, or null;
    const float* k_gain = nullptr;  // copied
};

// What norms and residuals take, from their weights or the denoising step: rows of `width`, or null.
struct Modulation {
    const float *gain, *shift, *gate;
};

struct BlockArgs {
    const float* x;        // [batch][rows][width]
    float* y;              // [batch][keep][width]
    int batch, rows;
    int keep;              // the last rows of each entry that y has
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
    int width() const { return spec_.in.inputs(); }
    int steps() const;
    // Throws std::invalid_argument for fewer rows of a causal or cross block, for a cache of a
    // causal one, for none of a cross one, for normalized heads without a rotary table, for
    // `query` with one.
    void run(const BlockArgs& args, const Isa& isa, Pool& pool, int threads) const;

private:
    struct Run;
    void check(const BlockArgs& args) const;
    BlockSpec spec_;
    Buffer<float> gains_;
};

}  // namespace omega
