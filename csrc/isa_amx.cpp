// AMX: tiles of 16 rows of 64 bytes, whose product adds 16 x 16 sums of 64 inputs in 16 cycles.
//
// Rows of activations meet a strip of four panels. A run of inputs at a time, its weights are
// unpacked once, as bytes with a sign, to where the first-level cache keeps them; then every tile
// of rows meets them. A piece of 8 inputs, unpacked, is two rows of a tile of weights.
// Sums of a segment leave the matrix unit by memory, the only way out. That takes a while, so four
// are under way at any time (`segment_run`).
#include "layout.hpp"

#if defined(__x86_64__) && (defined(OMEGA_HAVE_AMX) || defined(OMEGA_EMULATE_TILES))
#include <immintrin.h>

#include "target.hpp"
OMEGA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")

namespace omega {
namespace {

#include "isa_avx512.inl"

#include "strips512.inl"

constexpr int kPanels = Vec::wide;  // of a strip
constexpr int kTileBytes = kMatrixRows * kLine;  // of activations, weights or sums
constexpr int kSums = kMatrixRows * kPanel;      // of a tile
constexpr int kRunLines = 4;                     // of weights, unpacked
constexpr int kRing = 4;                         // tiles of sums on their way out
static_assert(kPanels == 4 && kRing == 4, "tiles 0 to 3 hold sums");
static_assert(kRing * kSums <= kStripWords, "the ring is the scratch's words");

#include "tiles.inl"

// Tiles 0 to 3 hold sums, 4 and 6 activations, 5 and 7 weights; only weights always have 16 rows.
void configure(int rows) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.bytes[i] = kLine;
        config.rows[i] = uint8_t(i == 5 || i == 7 ? kMatrixRows : rows);
    }
    tile_configure(config);
}

// `lines` lines of a strip's weights from the `first` on, to [panels][lines][16][64].
void unpack(const TileArgs& t, int first, int lines, int8_t* to) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (int panel = 0; panel < kPanels; ++panel) {
        const uint8_t* from = t.weight + (panel / Vec::narrow) * t.strip_bytes +
                              (panel % Vec::narrow) * kPieceBytes +
                              size_t(first) * kPiecesPerLine * Vec::narrow * kPieceBytes;
        for (int p = 0; p < lines * kPiecesPerLine; ++p) {
            const __m512i both = _mm512_load_si512(from);
            const __m512i even = _mm512_and_si512(both, low);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            _mm512_store_si512(to, _mm512_sub_epi8(even, eight));
            _mm512_store_si512(to + kLine, _mm512_sub_epi8(odd, eight));
            __builtin_prefetch(from + 4096, 0, 2);
            from += Vec::narrow * kPieceBytes;
            to += 2 * kLine;
        }
    }
}

// total += sums * row scales * column scales of a segment, as Tile::accumulate.
template <int R, int MODE>
inline __attribute__((always_inline)) void add(const int32_t* sums, const float* row_scale,
                                               const float* column_scale, __m512 (&y)[R]) {
    __m512 column = _mm512_setzero_ps();
    if (MODE & kWeightSegments) column = Vec::load(column_scale);
    UNROLL for (int r = 0; r < R; ++r) {
        __m512 value = Vec::to_float(_mm512_load_si512(sums + r * kPanel));
        if (MODE == kActSegments) {
            y[r] = Vec::fma(value, Vec::splatf(row_scale[r]), y[r]);
            continue;
        }
        if (MODE & kActSegments) value = Vec::mul(value, Vec::splatf(row_scale[r]));
        y[r] = Vec::addf(y[r], Vec::mul(value, column));
    }
}

// Where the next sum's bytes are: segments of the panels of the tiles of rows, in this order.
struct Cursor {
    const int8_t *acts, *weights, *acts_end, *weights_end;
    int tile;
};

inline void move_on(const Run& run, Cursor& c) {
    if (c.acts != c.acts_end) return;
    if (c.weights == c.weights_end) {
        c.weights = run.scratch.weights;
        if (++c.tile == run.count) --c.tile;  // what follows is begun and not used
    }
    c.acts = run.tiles[c.tile].acts + size_t(run.first_line) * kTileBytes;
    c.acts_end = c.acts + size_t(run.lines) * kTileBytes;
}

template <int T>
inline __attribute__((always_inline)) void begin(const Run& run, int per, Cursor& c) {
    constexpr int a = T % 2 ? 6 : 4, b = a + 1;
    tile_zero<T>();
    int i = 0;
    do {
        tile_load<a>(c.acts);
        tile_load<b>(c.weights);
        tile_dot<T, a, b>();
        c.acts += kTileBytes;
        c.weights += kTileBytes;
    } while (++i < per);
    move_on(run, c);
}

template <int T>
inline __attribute__((always_inline)) void take(const Run& run) {
    tile_store<T>(run.scratch.words + T * kSums);
}

// Segments with scales of their own, for tiles of up to R rows: a sequence of sums, one for each
// segment of each panel of each tile of rows. One is begun, leaves the matrix unit three later,
// and is added up one later still.
template <int R, int MODE>
void segment_run(const Run& run) {
    const int per = run.strip.pieces / kPiecesPerLine, segments = run.lines / per;
    Cursor c{nullptr, run.scratch.weights, nullptr,
             run.scratch.weights + size_t(kPanels) * run.lines * kTileBytes, 0};
    move_on(run, c);
    begin<0>(run, per, c);
    begin<1>(run, per, c);
    begin<2>(run, per, c);
    begin<3>(run, per, c);
    take<0>(run);
    float* out = run.strip.y;
    const size_t first = size_t(run.first_line / per);
    int at = 0;
    for (int tile = 0; tile < run.count; ++tile) {
        const TileArgs t = point_at(run, tile, out);
        for (int panel = 0; panel < kPanels; ++panel) {
            float* kept = run.scratch.sums + (size_t(tile) * kPanels + panel) * kSums;
            const float* row = t.act_scale + first * kMatrixRows;
            const float* column = t.weight_scale + first * t.outputs + panel * kPanel;
            __m512 y[R];
            UNROLL for (int r = 0; r < R; ++r) {
                y[r] = run.first ? _mm512_setzero_ps() : _mm512_load_ps(kept + r * kPanel);
            }
            if (run.last) expect_writes<R>(t, panel);
            for (int s = 0; s < segments; ++s, at = (at + 1) % kRing) {
                switch (at) {
                    case 0: begin<0>(run, per, c); take<1>(run); break;
                    case 1: begin<1>(run, per, c); take<2>(run); break;
                    case 2: begin<2>(run, per, c); take<3>(run); break;
                    default: begin<3>(run, per, c); take<0>(run);
                }
                add<R, MODE>(run.scratch.words + at * kSums, row, column, y);
                row += kMatrixRows;
                column += t.outputs;
            }
            if (run.last) {
                write_rows(t, run.tiles[tile].rows, panel, y);
            } else {
                UNROLL for (int r = 0; r < R; ++r) _mm512_store_ps(kept + r * kPanel, y[r]);
            }
        }
        out += size_t(run.tiles[tile].rows) * t.y_stride;
    }
}

// One sum over all inputs: it stays in the matrix unit for a run of lines.
template <int R>
void plain_run(const Run& run) {
    float* out = run.strip.y;
    for (int tile = 0; tile < run.count; ++tile) {
        int32_t* kept = reinterpret_cast<int32_t*>(run.scratch.sums) + tile * kPanels * kSums;
        if (run.first) {
            tile_zero<0>();
            tile_zero<1>();
            tile_zero<2>();
            tile_zero<3>();
        } else {
            tile_load<0>(kept);
            tile_load<1>(kept + kSums);
            tile_load<2>(kept + 2 * kSums);
            tile_load<3>(kept + 3 * kSums);
        }
        const int8_t* acts = run.tiles[tile].acts + size_t(run.first_line) * kTileBytes;
        const int8_t* weights = run.scratch.weights;
        const size_t panel = size_t(run.lines) * kTileBytes;
        for (int i = 0; i < run.lines; ++i, acts += kTileBytes, weights += kTileBytes) {
            tile_load<4>(acts);
            tile_load<5>(weights);
            tile_dot<0, 4, 5>();
            tile_load<7>(weights + panel);
            tile_dot<1, 4, 7>();
            tile_load<5>(weights + 2 * panel);
            tile_dot<2, 4, 5>();
            tile_load<7>(weights + 3 * panel);
            tile_dot<3, 4, 7>();
        }
        tile_store<0>(kept);
        tile_store<1>(kept + kSums);
        tile_store<2>(kept + 2 * kSums);
        tile_store<3>(kept + 3 * kSums);
        if (!run.last) continue;
        const TileArgs t = point_at(run, tile, out);
        for (int panel = 0; panel < kPanels; ++panel) {
            __m512 y[R];
            UNROLL for (int r = 0; r < R; ++r) {
                y[r] = Vec::to_float(_mm512_load_si512(kept + panel * kSums + r * kPanel));
            }
            write_rows(t, run.tiles[tile].rows, panel, y);
        }
        out += size_t(run.tiles[tile].rows) * t.y_stride;
    }
}

template <int R, int MODE>
void strip(const TileArgs& t, const QuantTile* tiles, int count, Lines lines,
           const StripScratch& scratch) {
    for_runs(MODE, t, tiles, count, lines, kRunLines, scratch, [](const Run& run) {
        unpack(run.strip, run.first_line, run.lines, run.scratch.weights);
        if constexpr (MODE == 0) {
            plain_run<R>(run);
        } else {
            segment_run<R, MODE>(run);
        }
    });
}

template <int R>
void strip_of_mode(int mode, const TileArgs& t, const QuantTile* tiles, int count,
                   Lines lines, const StripScratch& scratch) {
    switch (mode) {
        case 0: strip<R, 0>(t, tiles, count, lines, scratch); break;
        case 1: strip<R, 1>(t, tiles, count, lines, scratch); break;
        case 2: strip<R, 2>(t, tiles, count, lines, scratch); break;
        default: strip<R, 3>(t, tiles, count, lines, scratch);
    }
}

// All tiles of `rows` rows or one fewer.
void run_strip(int mode, int rows, const TileArgs& t, const QuantTile* tiles, int count,
               Lines lines, const StripScratch& scratch) {
    switch ((rows - 1) / 4) {
        case 0: strip_of_mode<4>(mode, t, tiles, count, lines, scratch); break;
        case 1: strip_of_mode<8>(mode, t, tiles, count, lines, scratch); break;
        case 2: strip_of_mode<12>(mode, t, tiles, count, lines, scratch); break;
        default: strip_of_mode<16>(mode, t, tiles, count, lines, scratch);
    }
}


// The rows' bytes, [rows][padded], to lines of 64.
void put_lines(const int8_t* q, int padded, const QuantTile& to) {
    for (int r = 0; r < to.rows; ++r, q += padded) {
        int8_t* out = to.acts + r * kLine;
        for (int k = 0; k < padded; k += kLine, out += kMatrixRows * kLine) {
            __builtin_memcpy(out, q + k, kLine);
        }
    }
}

void prologue_lines(const Prologue& pro, const float* x, size_t x_stride, int step,
                    const QuantTile& to, const Scratch& scratch) {
    isa_avx512vnni()->prologue(pro, x, x_stride, step, to, scratch);
    put_lines(scratch.bytes, pro.padded, to);
}

long peak_products(int rounds) {
    configure(kMatrixRows);
    tile_zero<4>();
    tile_zero<5>();
    for (int round = 0; round < rounds; ++round) {
        tile_dot<0, 4, 5>();
        tile_dot<1, 4, 5>();
        tile_dot<2, 4, 5>();
        tile_dot<3, 4, 5>();
    }
    tile_release();
    return long(rounds) * 4 * kSums * kLine;
}

}  // namespace

const Isa* isa_amx() {
    const auto make = [](int rows, double work, const Isa* automatic) {
        Isa made = *isa_avx512vnni();
        made.name = "amx-int8";
        made.plain = isa_avx512vnni();
        made.automatic = automatic;
        made.max_rows = kMatrixRows;
        made.least_rows = rows;
        made.least_work = work;
        made.line = kLine;
        made.order = Order::lines;
        made.prologue = &prologue_lines;
        made.peak = &peak_products;
        // Its CPUs have a large second-level cache, and it waits long for weights to be unpacked.
        made.strips = {&configure, &run_strip, &tile_release, true, kRunLines, 1024 * 1024,
                       1 << 30};
        return made;
    };
    static const Isa worth = make(12, 5e7, nullptr), always = make(1, 0.0, &worth);
    return &always;
}

}  // namespace omega
OMEGA_TARGET_END
#else
namespace omega {
const Isa* isa_amx() { return nullptr; }
}  // namespace omega
#endif
