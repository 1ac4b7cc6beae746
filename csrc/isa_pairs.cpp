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
#include "strips512.inl"

constexpr int kRows = 6;  // of a tile: what it needs fills the registers
constexpr unsigned kDirect = 0x24;  // pieces of a line
constexpr int kPanels = Vec::narrow;  // of a strip
constexpr int kOutputs = kPanels * kPanel;
constexpr int kPieceWeights = 2 * kPanels * kPieceBytes;  // of a strip, unpacked
constexpr int kRunLines = 16;  // of weights: unpacked, two thirds of the first-level cache
static_assert((kRunLines + 1) * kOutputs <= kStripWords, "a start for every sum of a run");

constexpr bool is_direct(int piece) { return kDirect >> piece & 1; }

#define OMEGA_INLINE inline __attribute__((always_inline))
#define OMEGA_LAMBDA_INLINE __attribute__((always_inline))

// A piece of one panel to u and v of 4 inputs each: w + 8, and w + 16 for the u of pairs, so that
// u + b stays positive. The u v of pairs are added to `products`.
OMEGA_INLINE void split_piece(bool direct, const uint8_t* from, __m512i& u, __m512i& v,
                              __m512i& products) {
    Vec::split(from, u, v);
    if (direct) return;
    u = _mm512_add_epi8(u, _mm512_set1_epi8(8));
    Vec::dot(products, u, v);
}

// sum += a piece of a row, times that of each panel.
template <int PIECE>
OMEGA_INLINE void dot_row(const int8_t* codes, const __m512i (&u)[kPanels],
                          const __m512i (&v)[kPanels], __m512i (&sum)[kPanels]) {
    const __m512i a = Vec::splat4(codes), b = Vec::splat4(codes + 4);
    UNROLL for (int n = 0; n < kPanels; ++n) {
        if (is_direct(PIECE)) {
            Vec::dot(sum[n], u[n], a);
            Vec::dot(sum[n], v[n], b);
        } else {
            Vec::dot(sum[n], _mm512_add_epi8(u[n], b), _mm512_add_epi8(v[n], a));
        }
    }
}

// total + value * row scale * column scale of segment s, as Tile::accumulate.
template <int MODE>
OMEGA_INLINE __m512 add_segment(const TileArgs& t, const float* act_scale, int s, int row,
                                int panel, __m512 value, __m512 total) {
    if (MODE & kActSegments) {
        const __m512 scale = Vec::splatf(act_scale[row]);
        if (MODE == kActSegments) return Vec::fma(value, scale, total);
        value = Vec::mul(value, scale);
    }
    const __m512 column = Vec::load(t.weight_scale + size_t(s) * t.outputs + panel * kPanel);
    return Vec::addf(total, Vec::mul(value, column));
}

#include "pairs_runs.inl"
#include "pairs_few.inl"

// What the activations of a segment bring to a sum besides the products wanted: 8 of each, for the
// 8 in the weights, and for pairs (u + b)(v + a) with u raised by 8, another 8 a and a b. (Half of
// a sum of bytes: (a + 8) b and (b + 8) a, and the rest by weights.)
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
        made.strips = {[](int) {}, &run_strip, [] {}, false, kRunLines, 512 * 1024, 32};
        return made;
    };
    static const Isa some = few();
    static const Isa some_worth = [] { Isa made = some; made.least_rows = 5; return made; }();
    static const Isa worth = make(&some_worth, 25, nullptr), always = make(&some, 25, &worth);
    return &always;
}

}  // namespace omega
OMEGA_TARGET_END
#else
namespace omega {
const Isa* isa_pairs() { return nullptr; }
}  // namespace omega
#endif
