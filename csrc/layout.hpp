// Shapes and memory layouts that the driver and every instruction set agree on.
//
// A layer computes y[m, n] = sum_k a[m, k] w[n, k], a: signed activations of 4 or 8 bits,
// w: 4-bit weights. Weights are kept as w + 8 in 0..15 (what the byte products take), so each
// sum starts from -8 * sum_k a[m, k] ("offset"); all of it stays in exact 32-bit integers.
//
// Weights: panels of 16 outputs, cut into pieces of 8 inputs, 64 bytes each: byte 4 * n + j
// holds w[n, 8p + j] in its low nibble and w[n, 8p + 4 + j] in its high nibble, j < 4. The panels
// that one tile meets at a time (a strip) lie piece beside piece: [strip][inputs / 8][panels][64],
// so that the whole matrix is read front to back.
// Activations: tiles of up to 8 rows, [inputs / 4][8][4] bytes, so a tile is read front to back
// (a tile of one row: [inputs / 4][1][4]).
// Other paths take the same weights, and tiles of their own: see Order.
// Segments: runs of inputs within which both scales are constant. One segment: a plain sum.
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.hpp"
#include "rows.hpp"

namespace omega {

constexpr int kPanel = 16;     // outputs of a panel
constexpr int kPiece = 8;      // inputs of a 64-byte piece
constexpr int kPieceBytes = 64;
constexpr int kSegment = 16;   // segments are multiples of this many inputs
constexpr int kVectorRows = 8;  // rows of the tallest tile of vectors
constexpr int kRowStride = 8;   // rows that such a tile of more than one has room for
constexpr int kMatrixRows = 16;  // rows that a tile of a matrix unit has room for
constexpr int kMaxRows = 16;    // rows of the tallest tile of any instruction set
constexpr int kLine = 64;       // inputs that a run of weights has a whole number of
constexpr int kSegmentLines = 4;  // of the longest segment that such paths take
constexpr int kStripWords = 1024;  // of StripScratch
constexpr int kModes = 4;

// Bits of a tile's mode: which scales change from segment to segment.
constexpr int kActSegments = 1;
constexpr int kWeightSegments = 2;

// One tile times one strip, or two (a wide strip) where a tile is too low to be busy with one.
struct TileArgs {
    const uint8_t* weight;     // the strip
    size_t strip_bytes;        // from one strip to the next
    const int8_t* acts;        // [inputs / 4][8 or 1][4]
    const int32_t* offset;     // [segments][rows]: -8 * the segment's sum of activations
    const float* act_scale;    // [segments][rows], with kActSegments
    const float* weight_scale; // [segments][outputs] from the strip's first, with kWeightSegments
    size_t outputs;            // row length of weight_scale and lowrank_a
    const float* token_scale;  // [rows]; ones with kActSegments
    const float* row_scale;    // [outputs] from the strip's first; ones with kWeightSegments
    const float* bias;         // [outputs] from the strip's first
    int rank;                  // of the part kept in floats that reaches this strip
    const float* lowrank;      // [rows][rank]: the input's share, from the strip's first
    int lowrank_stride;        // from one row of shares to the next
    const float* lowrank_a;    // [rank][outputs] from the strip's first: the output's
    int segments;
    int pieces;                // per segment
    int short_pieces;          // so many at most have sums of 16 bits: see shorts.inl
    float* y;                  // first row, the strip's first column
    size_t y_stride;           // floats from one row of y to the next
    int columns;               // columns of y that exist; the strip may reach beyond
};
using TileFn = void (*)(const TileArgs&);

enum class Rotation : int { none = 0, hadamard = 1, full = 2, dense = 3 };

// How an input becomes integers. Pointers live as long as the layer.
struct Prologue {
    int inputs = 0;                      // real width
    int padded = 0;                      // rounded up to whole segments
    const float* multiplier = nullptr;   // [inputs] (after the permutation), or null
    const int32_t* permutation = nullptr;  // [inputs]: x'[j] = x[permutation[j]], or null
    Rotation rotation = Rotation::none;
    int block = 0;                       // hadamard, dense: width of a block
    const float* matrix = nullptr;       // dense [blocks][block][block]; full [base][base]
    int base = 1;                        // full: order of the factor that is no power of two
    float norm = 1.0f;                   // factor that the butterflies leave out
    float low = -8.0f, high = 7.0f;      // range of the integers
    float factor = 1.0f;                 // dynamic: scale = absmax * factor, `norm` included
    bool signed_scales = false;          // dynamic: negative where the largest value is positive,
    float first_factor = 1.0f;           // max(absmax * first_factor, other side's * factor)
    const float* table = nullptr;        // static: [steps][groups], else null
    int groups = 1;                      // groups of activations with a scale of their own
    int group = 0;                       // inputs per group (a multiple of `segment`)
    int segments = 1;
    int segment = 0;                     // inputs per segment
    int rank = 0;
    const float* lowrank_b = nullptr;    // [rank][padded], for rows before `norm`
    int32_t start = 0;                   // what sums start from, besides their offset
};

// Sums of segments start from the bits of this float: read as a float, such a sum is itself plus
// 1.5 * 2^23 while it is below 2^22. (A subtraction then replaces the conversion, which on some
// CPUs competes with the products.)
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;
constexpr int kMaxSegmentSum = 1 << 22;
// Sums up to here times a scale of 8 bits are exact floats.
constexpr int kMaxExactSum = 1 << 16;

// How a tile's integers lie.
enum class Order : int {
    vectors,  // [padded / 4][8 or 1][4]
    lines,    // [padded / 64][16][64]: isa_amx.cpp
    pairs,    // [padded / 8][rows][8]: isa_pairs.cpp
};

// Where a tile's integers go.
struct QuantTile {
    int rows;
    Order order;
    int8_t* acts;
    int32_t* offset;     // [segments][stride()]
    float* act_scale;    // [segments][stride()], null when the scale is per token
    float* token_scale;  // [rows]
    float* lowrank;      // [rows][rank]

    // From one segment's sums and scales to the next.
    int stride() const { return order == Order::lines ? kMatrixRows : rows; }
    // Of input k of a row.
    size_t place(int row, int k) const {
        switch (order) {
            case Order::lines: return (size_t(k / kLine) * kMatrixRows + row) * kLine + k % kLine;
            case Order::pairs: return (size_t(k / kPiece) * rows + row) * kPiece + k % kPiece;
            default: return (size_t(k / 4) * (rows == 1 ? 1 : kRowStride) + row) * 4 + k % 4;
        }
    }
};

// Scratch of one thread: rows of floats, kMaxRows of them for a dense rotation, and of bytes.
struct Scratch {
    float* rows;      // [kMaxRows or 1][padded]
    int8_t* bytes;    // [kMaxRows][padded]
};

using PrologueFn = void (*)(const Prologue&, const float* x, size_t x_stride, int step,
                            const QuantTile&, const Scratch&);

// Scratch of one thread for a strip's products.
struct StripScratch {
    int8_t* weights;  // a run of the strip, unpacked: its outputs' run_lines * kLine inputs
    int32_t* words;   // [kStripWords], for the path's own use
    float* sums;      // [tiles][room for rows * outputs of a strip], floats or integers, of what
                      // came before these lines
};

// A part of the inputs, in lines.
struct Lines {
    int begin, end;
};

// A path that unpacks a strip's weights once for many tiles: set up for tiles of up to `rows` rows,
// multiply tiles that are all as high or one row lower by a wide strip (`strip` points at the first
// tile's rows), and set what it used free.
struct Strips {
    void (*configure)(int rows);
    void (*multiply)(int mode, int rows, const TileArgs& strip, const QuantTile* tiles, int count,
                     Lines lines, const StripScratch& scratch);
    void (*release)();
    bool wide;           // which strips
    int run_lines;       // of weights that are unpacked at a time, at most
    size_t block_bytes;  // of activations that meet a strip's runs in turn
    int chunk_lines;     // at most that many lines of them, then those of the next strip
};

// What one instruction set offers.
struct Isa {
    const char* name;
    const Isa* plain;   // takes what this one does not: other segments, wider activations,
    int least_rows;     // products of fewer rows
    double least_work;  // or multiply-adds
    const Isa* automatic;  // the same for the products worth it, which the default is; null: itself
    int max_bits;       // of activations
    int line;           // inputs are padded to a multiple of this
    Order order;        // of activations
    Strips strips;      // nulls: tiles of vectors
    int max_rows;     // rows of its tallest tile
    int wide_rows;    // tiles up to this many rows take wide strips
    int panels[2];    // panels of a narrow and of a wide strip; the narrow one divides the wide
    TileFn tile[kModes][2][kMaxRows + 1];  // [mode][wide][rows]
    PrologueFn prologue;
    long (*peak)(int rounds);  // byte products in registers alone: returns how many it did
    const RowFns* rows;
};

// The tables, fastest first; null where this binary or this CPU lacks one.
const Isa* isa_amx();
const Isa* isa_pairs();
const Isa* isa_avx512vnni();
const Isa* isa_avxvnni();
const Isa* isa_avx2();
const Isa* isa_neon();
const Isa* isa_portable();

}  // namespace omega
