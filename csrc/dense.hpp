// A linear layer in full precision, its weights laid out for an instruction set: what stays
// float32 between the quantized parts of a policy. Meant for small layers: at a few dozen rows, a
// library spends as long on calls and on reordering weights as on products.
#pragma once

#include <cstddef>

#include "buffer.hpp"

namespace omega {

class Pool;
struct Isa;

class Dense {
public:
    // weight [outputs][inputs], bias [outputs] or null; both are copied.
    Dense(const float* weight, const float* bias, int inputs, int outputs, const Isa& isa);

    int inputs() const { return inputs_; }
    int outputs() const { return outputs_; }
    size_t bytes() const { return (weight_.size() + bias_.size()) * sizeof(float); }

    // x [rows][inputs] -> y [rows][outputs]. Any thread may call. Every element is summed in
    // order of the inputs, so its bits depend on neither the number of rows nor of threads.
    void run(const float* x, int rows, float* y, Pool& pool, int threads) const;

private:
    const Isa& isa_;
    int inputs_, outputs_;
    Buffer<float> weight_;  // see DenseArgs
    Buffer<float> bias_;
};

}  // namespace omega
