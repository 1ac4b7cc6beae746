// AVX-512 with VNNI, products by pairs: half of the multiplications, for additions in their place.
//
// Of two inputs a, b with weights u, v: a u + b v = (u + b)(v + a) - u v - a b (Winograd, "A New
// Algorithm for Inner Product", IEEE Transactions on Computers C-17, 1968). The last two belong to
// the weights alone and to the activations alone: they are summed once. Codes of 4 bits leave room
// for a sum of two in the bytes that are multiplied, so all of it is exact.
// Per 128 products that is one instruction of byte products and two additions, where it was two of
// the former: a gain where additions have execution units of their own (cpu.cpp). Some pieces of
// 8 inputs are multiplied as ever (kDirect), so that neither kind of unit waits for the other.
#include "layout.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.hpp"
OMEGA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")

namespace omega {
namespace {

#include "isa_avx512.inl"
#include "strips.inl"

constexpr int kRows = 6;  // of a tile: sums, totals, a piece and two sums of codes fill the registers
constexpr unsigned kDirect = 0x24;  // pieces of a line
constexpr int kPanels = Vec::narrow;  // of a strip
constexpr int kOutputs = kPanels * kPanel;
constexpr int kPieceWeights = 2 * kPanels * kPieceBytes;  // of a strip, unpacked
constexpr int kFewRows = 10;  // of a tile that is met by itself
constexpr int kAhead = 4096;  // bytes
static_assert((kRunLines + 1) * kOutputs <= kStripWords, "a start for every sum of a run");

constexpr bool is_direct(int piece) { return kDirect >> piece & 1; }

// A run of weights to [pieces][panels][u, v][64]: w + 8, and w + 16 for the u of pairs, so that
// u + b stays positive. words [segments][outputs]: where sums start from, `start` less the u v.
void unpack(const Run& run, int per, int32_t start) {
    const uint8_t* from = run.strip.weight +
                          size_t(run.first_line) * kPiecesPerLine * kPanels * kPieceBytes;
    int8_t* to = run.scratch.weights;
    int32_t* words = run.scratch.words;
    for (int line = 0; line < run.lines; line += per, words += kOutputs) {
        __m512i products[kPanels] = {};
        for (int i = 0; i < per; ++i) {
            UNROLL for (int p = 0; p < kPiecesPerLine; ++p) {
                UNROLL for (int n = 0; n < kPanels; ++n) {
                    __m512i u, v;
                    Vec::split(from, u, v);
                    if (!is_direct(p)) {
                        u = _mm512_add_epi8(u, _mm512_set1_epi8(8));
                        Vec::dot(products[n], u, v);
                    }
                    _mm512_store_si512(to, u);
                    _mm512_store_si512(to + kPieceBytes, v);
                    from += kPieceBytes;
                    to += 2 * kPieceBytes;
                }
            }
        }
        UNROLL for (int n = 0; n < kPanels; ++n) {
            _mm512_store_si512(words + n * kPanel, _mm512_sub_epi32(Vec::splat(start), products[n]));
        }
    }
}

// A tile of R rows and a run of a strip.
template <int R, int MODE>
struct Meeting {
    using Sums = __m512i[R][kPanels];
    using Totals = __m512[R][kPanels];

    // The pieces of a line from PIECE on; done(r) follows the last of them for each row.
    template <int PIECE, class Done>
    static inline __attribute__((always_inline)) void pieces(
        const int8_t* weights, const int8_t* acts, Sums& sum, const Done& done) {
        __m512i u[kPanels], v[kPanels];
        const int8_t* w = weights + PIECE * kPieceWeights;
        UNROLL for (int n = 0; n < kPanels; ++n) {
            u[n] = _mm512_load_si512(w + n * 2 * kPieceBytes);
            v[n] = _mm512_load_si512(w + (n * 2 + 1) * kPieceBytes);
        }
        UNROLL for (int r = 0; r < R; ++r) {
            const int8_t* codes = acts + (PIECE * R + r) * kPiece;
            const __m512i a = Vec::splat4(codes), b = Vec::splat4(codes + 4);
            UNROLL for (int n = 0; n < kPanels; ++n) {
                if (is_direct(PIECE)) {
                    Vec::dot2(sum[r][n], u[n], v[n], a, b);
                } else {
                    Vec::dot(sum[r][n], _mm512_add_epi8(u[n], b), _mm512_add_epi8(v[n], a));
                }
            }
            if (PIECE + 1 == kPiecesPerLine) done(r, sum);
        }
        if constexpr (PIECE + 1 < kPiecesPerLine) pieces<PIECE + 1>(weights, acts, sum, done);
    }

    static inline __attribute__((always_inline)) void begin(const int32_t* start, __m512i (&sum)[kPanels]) {
        UNROLL for (int n = 0; n < kPanels; ++n) {
            __asm__ volatile("vmovdqa64 %1, %0"
                             : "=v"(sum[n])
                             : "m"(*reinterpret_cast<const __m512i*>(start + n * kPanel)));
        }
    }

    static void run(const Run& run, int tile, float* y) {
        const QuantTile& q = run.tiles[tile];
        const int per = MODE ? run.strip.pieces / kPiecesPerLine : run.lines;
        const int8_t* weights = run.scratch.weights;
        const int8_t* acts = q.acts + size_t(run.first_line) * kLine * R;
        const int32_t* start = run.scratch.words;
        float* kept = run.scratch.sums + size_t(tile) * kRows * kOutputs;
        const size_t first = run.first_line / per;
        const int32_t* offset = q.offset + first * R;
        const float* row_scale = q.act_scale + first * R;
        const float* column_scale = run.strip.weight_scale + first * run.strip.outputs;
        if (run.last) {
            const TileArgs t = point_at(run, tile, y);
            UNROLL for (int n = 0; n < kPanels; ++n) expect_writes<R>(t, n);
        }
        // The next run's weights come while this one's are multiplied.
        const int fetch = (kPiecesPerLine * kPanels + run.count - 1) / run.count;  // per line
        const uint8_t* next =
            run.strip.weight +
            (size_t(run.first_line + run.lines) * kPiecesPerLine * kPanels +
             size_t(tile) * run.lines * fetch) * kPieceBytes;
        Sums sum;
        Totals total;
        UNROLL for (int r = 0; r < R; ++r) {
            UNROLL for (int n = 0; n < kPanels; ++n) {
                total[r][n] = run.first ? __m512() : Vec::load(kept + r * kOutputs + n * kPanel);
            }
            begin(start, sum[r]);
        }
        for (int line = 0; line < run.lines; line += per) {
            start += kOutputs;
            // Among many tiles it would cost more than it saves.
            for (int i = 0; run.count < 20 && i < fetch * per; ++i, next += kPieceBytes) {
                __builtin_prefetch(next, 0, 2);
            }
            for (int i = 1; i < per; ++i) {
                pieces<0>(weights, acts, sum, [](int, Sums&) {});
                weights += kPiecesPerLine * kPieceWeights;
                acts += kLine * R;
            }
            pieces<0>(weights, acts, sum, [&](int r, Sums& sum) __attribute__((always_inline)) {
                if (!MODE) return;
                const __m512 less = Vec::as_float(Vec::splat(offset[r]));
                const __m512 row = MODE & kActSegments ? Vec::splatf(row_scale[r]) : less;
                UNROLL for (int n = 0; n < kPanels; ++n) {
                    const __m512 value = Vec::sub(Vec::as_float(sum[r][n]), less);
                    if (MODE == kActSegments) {
                        total[r][n] = Vec::fma(value, row, total[r][n]);
                    } else {
                        const __m512 scaled = MODE & kActSegments ? Vec::mul(value, row) : value;
                        const __m512 column = Vec::load(column_scale + n * kPanel);
                        total[r][n] = Vec::addf(total[r][n], Vec::mul(scaled, column));
                    }
                }
                begin(start, sum[r]);
            });
            weights += kPiecesPerLine * kPieceWeights;
            acts += kLine * R;
            offset += R;
            row_scale += R;
            column_scale += run.strip.outputs;
        }
        if (!MODE) {
            UNROLL for (int r = 0; r < R; ++r) {
                UNROLL for (int n = 0; n < kPanels; ++n) {
                    const __m512i before = _mm512_castps_si512(total[r][n]);
                    total[r][n] = _mm512_castsi512_ps(Vec::add(before, sum[r][n]));
                }
            }
        }
        if (!run.last) {
            UNROLL for (int r = 0; r < R; ++r) {
                UNROLL for (int n = 0; n < kPanels; ++n) {
                    Vec::store(kept + r * kOutputs + n * kPanel, total[r][n]);
                }
            }
            return;
        }
        const TileArgs t = point_at(run, tile, y);
        UNROLL for (int n = 0; n < kPanels; ++n) {
            __m512 value[R];
            UNROLL for (int r = 0; r < R; ++r) {
                value[r] = total[r][n];
                if (MODE) continue;
                const __m512i whole = _mm512_castps_si512(total[r][n]);
                value[r] = Vec::to_float(_mm512_sub_epi32(whole, Vec::splat(q.offset[r])));
            }
            write_rows<R>(t, R, n, value);
        }
    }
};

// A tile of few rows and a strip, whose weights are unpacked on the way: what is worth it for up
// to two tiles.
template <int R, int MODE>
struct Few {
    using Sums = __m512i[R][kPanels];
    using Products = __m512i[kPanels];

    template <int PIECE, class Done>
    static inline __attribute__((always_inline)) void pieces(
        const uint8_t* weights, const int8_t* acts, Products& products, Sums& sum,
        const Done& done) {
        __m512i u[kPanels], v[kPanels];
        UNROLL for (int n = 0; n < kPanels; ++n) {
            const uint8_t* from = weights + (PIECE * kPanels + n) * kPieceBytes;
            Vec::split(from, u[n], v[n]);
            __builtin_prefetch(from + kAhead, 0, 2);
            if (is_direct(PIECE)) continue;
            u[n] = _mm512_add_epi8(u[n], _mm512_set1_epi8(8));
            Vec::dot(products[n], u[n], v[n]);
        }
        UNROLL for (int r = 0; r < R; ++r) {
            const int8_t* codes = acts + (PIECE * R + r) * kPiece;
            const __m512i a = Vec::splat4(codes), b = Vec::splat4(codes + 4);
            UNROLL for (int n = 0; n < kPanels; ++n) {
                if (is_direct(PIECE)) {
                    Vec::dot2(sum[r][n], u[n], v[n], a, b);
                } else {
                    Vec::dot(sum[r][n], _mm512_add_epi8(u[n], b), _mm512_add_epi8(v[n], a));
                }
            }
            if (PIECE + 1 == kPiecesPerLine) done(r, products, sum);
        }
        if constexpr (PIECE + 1 < kPiecesPerLine) {
            pieces<PIECE + 1>(weights, acts, products, sum, done);
        }
    }

    static void run(const TileArgs& t) {
        UNROLL for (int n = 0; n < kPanels; ++n) expect_writes<R>(t, n);
        alignas(64) float total[R * kOutputs] = {};
        const int lines = t.segments * t.pieces / kPiecesPerLine;
        const int per = MODE ? t.pieces / kPiecesPerLine : lines;
        const uint8_t* weights = t.weight;
        const int8_t* acts = t.acts;
        const int32_t* offset = t.offset;
        const float *row_scale = t.act_scale, *column_scale = t.weight_scale;
        for (int line = 0; line < lines; line += per) {
            __asm__ volatile("" : : : "memory");  // totals stay in memory
            Products products = {};
            Sums sum;
            UNROLL for (int r = 0; r < R; ++r) {
                UNROLL for (int n = 0; n < kPanels; ++n) sum[r][n] = Vec::splat(MODE ? kMagicBits : 0);
            }
            for (int i = 1; i < per; ++i) {
                pieces<0>(weights, acts, products, sum, [](int, Products&, Sums&) {});
                weights += kPiecesPerLine * kPanels * kPieceBytes;
                acts += kLine * R;
            }
            pieces<0>(weights, acts, products, sum, [&](int r, Products& products, Sums& sum) __attribute__((always_inline)) {
                const __m512i less = Vec::splat(offset[r]);
                const __m512 row = MODE & kActSegments ? Vec::splatf(row_scale[r]) : __m512();
                UNROLL for (int n = 0; n < kPanels; ++n) {
                    float* into = total + r * kOutputs + n * kPanel;
                    const __m512i whole = _mm512_sub_epi32(sum[r][n], products[n]);
                    if (MODE == 0) {
                        Vec::store(into, Vec::to_float(_mm512_sub_epi32(whole, less)));
                        continue;
                    }
                    const __m512 value = Vec::sub(Vec::as_float(whole), Vec::as_float(less));
                    if (MODE == kActSegments) {
                        Vec::store(into, Vec::fma(value, row, Vec::load(into)));
                    } else {
                        const __m512 scaled = MODE & kActSegments ? Vec::mul(value, row) : value;
                        const __m512 column = Vec::load(column_scale + n * kPanel);
                        Vec::store(into, Vec::addf(Vec::load(into), Vec::mul(scaled, column)));
                    }
                }
            });
            weights += kPiecesPerLine * kPanels * kPieceBytes;
            acts += kLine * R;
            offset += R;
            row_scale += R;
            column_scale += t.outputs;
        }
        UNROLL for (int n = 0; n < kPanels; ++n) {
            __m512 value[R];
            UNROLL for (int r = 0; r < R; ++r) value[r] = Vec::load(total + r * kOutputs + n * kPanel);
            write_rows<R>(t, R, n, value);
        }
    }
};

template <int MODE, int R>
void fill_few(Isa& isa) {
    if constexpr (R > 0) {
        isa.tile[MODE][0][R] = isa.tile[MODE][1][R] = &Few<R, MODE>::run;
        fill_few<MODE, R - 1>(isa);
    }
}

template <int MODE>
void strip(const TileArgs& t, const QuantTile* tiles, int count, Lines lines,
           const StripScratch& scratch) {
    constexpr void (*meet[])(const Run&, int, float*) = {
        &Meeting<1, MODE>::run, &Meeting<2, MODE>::run, &Meeting<3, MODE>::run,
        &Meeting<4, MODE>::run, &Meeting<5, MODE>::run, &Meeting<6, MODE>::run};
    static_assert(sizeof meet / sizeof meet[0] == kRows, "every height");
    for_runs(MODE, t, tiles, count, lines, scratch, [&](const Run& run) {
        unpack(run, MODE ? t.pieces / kPiecesPerLine : run.lines, MODE ? kMagicBits : 0);
        float* y = t.y;
        for (int tile = 0; tile < count; ++tile) {
            meet[tiles[tile].rows - 1](run, tile, y);
            y += size_t(tiles[tile].rows) * t.y_stride;
        }
    });
}

void run_strip(int mode, int, const TileArgs& t, const QuantTile* tiles, int count,
               Lines lines, const StripScratch& scratch) {
    switch (mode) {
        case 0: strip<0>(t, tiles, count, lines, scratch); break;
        case 1: strip<1>(t, tiles, count, lines, scratch); break;
        case 2: strip<2>(t, tiles, count, lines, scratch); break;
        default: strip<3>(t, tiles, count, lines, scratch);
    }
}

// What the activations of a segment bring to a sum besides the products wanted: 8 of each, for the
// 8 in the weights, and for pairs (u + b)(v + a) with u raised by 8, another 8 a and a b. (Half of a
// sum of bytes: (a + 8) b and (b + 8) a, and the rest by weights.)
inline int32_t excess(const int8_t* q, int inputs) {
    struct Own {
        alignas(64) uint8_t of[kLine] = {};
        constexpr Own() {
            for (int k = 0; k < kLine; ++k) {
                of[k] = is_direct(k / kPiece) ? 16 : k % kPiece < 4 ? 24 : 8;
            }
        }
    };
    static constexpr Own weights;
    constexpr __mmask8 pairs = __mmask8(~kDirect);
    const __m512i eight = _mm512_set1_epi8(8), own = _mm512_load_si512(weights.of);
    __m512i sum = _mm512_setzero_si512();
    for (int k = 0; k < inputs; k += kLine) {
        const __m512i codes = _mm512_loadu_si512(q + k);
        const __m512i other = _mm512_rol_epi64(codes, 32);
        Vec::dot(sum, own, codes);
        Vec::dot(sum, _mm512_maskz_mov_epi64(pairs, _mm512_add_epi8(codes, eight)), other);
    }
    return _mm512_reduce_add_epi32(sum) / 2;
}

void prologue_pairs(const Prologue& pro, const float* x, size_t x_stride, int step,
                    const QuantTile& to, const Scratch& scratch) {
    isa_avx512vnni()->prologue(pro, x, x_stride, step, to, scratch);
    for (int r = 0; r < to.rows; ++r) {
        const int8_t* q = scratch.bytes + size_t(r) * pro.padded;
        for (int s = 0; s < pro.segments; ++s) {
            to.offset[s * to.rows + r] = pro.start + excess(q + s * pro.segment, pro.segment);
        }
        int8_t* out = to.acts + r * kPiece;
        for (int k = 0; k < pro.padded; k += kPiece, out += to.rows * kPiece) {
            __builtin_memcpy(out, q + k, kPiece);
        }
    }
}

long peak_products(int rounds) {
    Meeting<kRows, 1>::Sums sum;
    alignas(64) int8_t weights[kPiecesPerLine * kPieceWeights], acts[kLine * kRows];
    __builtin_memset(weights, rounds & 15, sizeof weights);
    __builtin_memset(acts, rounds & 7, sizeof acts);
    UNROLL for (int r = 0; r < kRows; ++r) {
        UNROLL for (int n = 0; n < kPanels; ++n) sum[r][n] = Vec::splat(r);
    }
    for (int round = 0; round < rounds; ++round) {
        Meeting<kRows, 1>::pieces<0>(weights, acts, sum, [](int, Meeting<kRows, 1>::Sums&) {});
        __asm__ volatile("" : : : "memory");
    }
    __m512i total = sum[0][0];
    UNROLL for (int r = 0; r < kRows; ++r) {
        UNROLL for (int n = 0; n < kPanels; ++n) total = Vec::add(total, sum[r][n]);
    }
    __asm__ volatile("" : "+v"(total));
    return long(rounds) * kRows * kOutputs * kLine;
}

}  // namespace

const Isa* isa_pairs() {
    const auto few = [] {
        Isa made = *isa_avx512vnni();
        made.name = "avx512-pairs";
        made.plain = isa_avx512vnni();
        made.max_rows = kFewRows;
        made.wide_rows = 0;
        made.max_bits = 4;
        made.line = kLine;
        made.order = Order::pairs;
        made.prologue = &prologue_pairs;
        made.peak = &peak_products;
        fill_few<0, kFewRows>(made);
        fill_few<1, kFewRows>(made);
        fill_few<2, kFewRows>(made);
        fill_few<3, kFewRows>(made);
        return made;
    };
    const auto make = [](const Isa* plain, int rows, const Isa* automatic) {
        Isa made = *plain;
        made.plain = plain;
        made.automatic = automatic;
        made.max_rows = kRows;
        made.least_rows = rows;
        made.strips = {[](int) {}, &run_strip, [] {}, false, 512 * 1024, 32};
        return made;
    };
    static const Isa some = few();
    static const Isa some_worth = [] { Isa made = some; made.least_rows = 4; return made; }();
    static const Isa worth = make(&some_worth, 21, nullptr), always = make(&some, 21, &worth);
    return &always;
}

}  // namespace omega
OMEGA_TARGET_END
#else
namespace omega {
const Isa* isa_pairs() { return nullptr; }
}  // namespace omega
#endif
