// One quantized linear layer, repacked for an instruction set and ready to run.
#pragma once

#include <cstdint>

#include "buffer.hpp"
#include "layout.hpp"
#include "pool.hpp"

namespace omega {

// What a pack says of a layer. Pointers are only read while the layer is made.
struct LinearSpec {
    int inputs = 0, outputs = 0;
    const uint8_t* qweight = nullptr;      // [outputs][ceil(inputs / 2)], low nibble first
    const float* weight_scale = nullptr;   // [outputs][weight_groups]
    int weight_group = 0;                  // inputs that share a weight scale; 0: all of them
    const float* bias = nullptr;           // [outputs] or null
    const float* multiplier = nullptr;     // [inputs] or null, in the permuted order
    const int32_t* permutation = nullptr;  // [inputs] or null
    Rotation rotation = Rotation::none;
    int block = 0;
    const float* matrix = nullptr;         // see Prologue
    size_t matrix_size = 0;
    int base = 1;
    int bits = 4;                          // of activations
    float clip = 1.0f;
    bool signed_scales = false;            // dynamic ones only; see Prologue
    int act_group = 0;                     // inputs that share an activation scale; 0: all
    const float* table = nullptr;          // [steps][activation groups] or null: dynamic
    int steps = 0;
    int rank = 0;                          // of a part kept in floats: y += (x' B) Aᵀ
    const float* lowrank_a = nullptr;      // [outputs][rank]
    const float* lowrank_b = nullptr;      // [inputs][rank]
};

class Linear {
public:
    // Throws std::invalid_argument for what the kernels cannot run.
    Linear(const LinearSpec& spec, const Isa& isa);

    int inputs() const { return prologue_.inputs; }
    int outputs() const { return outputs_; }
    int steps() const { return steps_; }
    int groups() const { return prologue_.groups; }
    const char* isa() const { return isa_->name; }
    size_t bytes() const;

    // x [rows][inputs] -> y [rows][outputs]; step: row of the static table. Any thread may call.
    void run(const float* x, int rows, float* y, int step, Pool& pool, int threads) const;

    // Only the integers [rows][inputs] and their scales [rows][groups], for checks.
    void quantize(const float* x, int rows, int step, int8_t* q, float* scale) const;

private:
    friend class Product;
    void set_segments(const LinearSpec& spec);
    void set_prologue(const LinearSpec& spec);
    void repack(const LinearSpec& spec);
    void set_scales(const LinearSpec& spec);
    void set_lowrank(const LinearSpec& spec);
    void find_ranks();

    const Isa* isa_;
    int outputs_, padded_outputs_, steps_;
    int mode_ = 0;
    Prologue prologue_;
    size_t strip_bytes_ = 0;
    Buffer<uint8_t> weight_;
    Buffer<float> row_scale_, weight_scale_, bias_;
    Buffer<float> multiplier_, matrix_, table_;
    Buffer<float> lowrank_a_, lowrank_b_;
    Buffer<int32_t> ranks_;  // [narrow strips][2]: first rank that is not zero there, and after the last
    Buffer<int32_t> permutation_;
};

}  // namespace omega
