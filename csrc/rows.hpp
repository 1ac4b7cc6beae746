// What a policy computes between its linear layers, on float32 rows: norms, gates, rotary
// embeddings, attention. One call each, where a framework needs a handful.
#pragma once

#include <cstddef>

namespace omega {

class Pool;
struct Isa;

// y = x / rms(x) * (plus + gain) + shift over `width`, for outer x inner rows of x; `center`
// takes the mean off x first (LayerNorm).
struct NormArgs {
    const float* x;
    size_t outer, stride;  // floats from one outer row to the next; inner rows lie side by side
    int inner, width;
    const float* gain;     // [gains][width] or null
    const float* shift;    // [gains][width] or null
    size_t per_gain;       // outer rows to a row of gain and shift
    float plus, eps;
    bool center;
    float* y;              // [outer][inner][width]
};

// y = f(gate) * up; f: the tanh approximation of GELU (kind 0), SiLU (kind 1), ReLU (kind 2).
struct GateArgs {
    const float* gate;
    const float* up;       // or null: nothing to multiply with
    size_t rows, gate_stride, up_stride;
    int width, kind;
    float* y;              // [rows][width]
};

// Rotary embedding of x [tokens][heads][dim], halves paired.
struct RotateArgs {
    const float* x;
    size_t tokens, stride;
    int heads, dim;
    const float* cos;      // [table][dim / 2]; token t has row t % table
    const float* sin;
    size_t table;
    float* y;              // may be x
    size_t y_stride;       // floats from token to token
};

// y = x + add * gate
struct ResidualArgs {
    const float* x;        // [rows][width], as add and y
    const float* add;
    const float* gate;     // [gates][width], or null: ones
    size_t rows, per_gate; // rows to a row of gate
    int width;
    float* y;              // may be x
};

// Keys and values of one source. Strides in floats; the last dimension is contiguous.
struct Keys {
    const float *k, *v;
    size_t k_batch, k_head, k_row, v_batch, v_head, v_row;
    int count, repeats;    // consecutive batch entries of the queries that share one of these
};

// softmax(scale q kᵀ) v over the keys of both sources; q [batch][heads][rows][dim] by strides.
struct AttendArgs {
    const float* q;
    size_t q_batch, q_head, q_row;
    int batch, heads, kv_heads, rows, dim;
    Keys keys[2];
    int sources;
    float scale;
    bool causal;           // query i sees keys 0 .. i of the last source, and all before
    bool exact;            // in float32; else products may be of 16 bits (attend_shorts.inl)
    float* out;            // [batch][rows][heads][dim]
};

// y = x wᵀ + bias, all of it float32. Weights lie in panels of `dense_panel` outputs (the last
// one narrower, whole vectors): [inputs][outputs of the panel]; bias is padded likewise.
struct DenseArgs {
    const float* x;        // [rows][inputs]
    size_t rows;
    int inputs, outputs;
    const float* weight;
    const float* bias;
    float* y;              // [rows][outputs]
};

// A range of outer rows, rows or tokens; for attention and dense layers of units (`*_units`).
struct RowFns {
    int lanes, dense_panel;
    void (*norm)(const NormArgs&, size_t begin, size_t end);
    void (*gate)(const GateArgs&, size_t begin, size_t end);
    void (*rotate)(const RotateArgs&, size_t begin, size_t end);
    void (*residual)(const ResidualArgs&, size_t begin, size_t end);
    void (*attend)(const AttendArgs&, size_t begin, size_t end);
    void (*dense)(const DenseArgs&, size_t begin, size_t end);
};

// Rows that one panel of a dense layer meets at a time, while both are in the caches.
constexpr size_t kDenseRows = 64;

inline size_t dense_units(const DenseArgs& a, int panel) {
    const size_t panels = size_t((a.outputs + panel - 1) / panel);
    return (a.rows + kDenseRows - 1) / kDenseRows * panels;
}

// Queries that are worked on together: their scores stay in the second-level cache.
inline int attend_block(const AttendArgs& a) {
    const int keys = a.keys[0].count + (a.sources > 1 ? a.keys[1].count : 0);
    const int fit = int((384 * 1024) / (sizeof(float) * size_t(keys + 64))) / 8 * 8;
    return fit < 8 ? 8 : fit > 128 ? 128 : fit;
}

// Blocks of queries per pair of batch entry and key head.
inline int attend_blocks(const AttendArgs& a) {
    const int block = attend_block(a);
    return (a.heads / a.kv_heads * a.rows + block - 1) / block;
}

inline size_t attend_units(const AttendArgs& a) {
    return size_t(a.batch) * a.kv_heads * attend_blocks(a);
}

void run_norm(const NormArgs& args, const Isa& isa, Pool& pool, int threads);
void run_gate(const GateArgs& args, const Isa& isa, Pool& pool, int threads);
void run_rotate(const RotateArgs& args, const Isa& isa, Pool& pool, int threads);
void run_residual(const ResidualArgs& args, const Isa& isa, Pool& pool, int threads);
void run_attend(const AttendArgs& args, const Isa& isa, Pool& pool, int threads);
void run_dense(const DenseArgs& args, const Isa& isa, Pool& pool, int threads);

}  // namespace omega
