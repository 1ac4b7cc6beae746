// Tiles whose products are summed in 16 bits, as many as fit, and then go on in 32: an addition
// takes the place of the instruction that widens every product. Included after tile.inl.
//
// A product of bytes is at most 15 * 8 (or 15 * 128), and 16 bits take four of them a piece:
// TileArgs::short_pieces. Few rows unpack the weights on the way; more rows meet runs of them
// that were unpacked once (Strips in layout.hpp).

#include "strips.inl"

constexpr int kRunLines = 16;  // of weights: unpacked, half of the first-level cache
constexpr size_t kLineBytes = kLine / 2 * kPanel;  // of a strip's weights
constexpr int kStripRows = 7;  // from so many rows on

// What a tile does with weights: unpacks them, keeps them too for the tiles after it, or finds them
// so: [pieces][2][64].
enum class Unpack { each, first, done };

struct Weights {
    const uint8_t* from;
    uint8_t* kept;  // with Unpack::first
};

template <int R, int P, int MODE, Unpack HOW>
struct ShortTile : Tile<R, P, MODE> {
    using Base = Tile<R, P, MODE>;
    using I = typename Base::I;
    using Sums = I[R][Base::N];
    static constexpr int N = Base::N;

    static inline void move_on(Weights& w, int pieces) {
        w.from += pieces * (HOW == Unpack::done ? 2 * kPieceBytes : Base::kStep);
        if (HOW == Unpack::first) w.kept += pieces * 2 * kPieceBytes;
    }

    // The first or the last 4 inputs of a piece; BEGIN: there are no sums yet. PAIRS: row by row, as
    // GCC runs out of registers where it may choose; with sums that are not widened it does not.
    template <int HALF, bool PAIRS, bool BEGIN = false>
    static inline __attribute__((always_inline)) void add_half(
        const TileArgs& t, const Weights& weights, const int8_t* acts, Sums& shorts) {
        I w[N];
        OMEGA_UNROLL for (int n = 0; n < N; ++n) {
            const size_t place = HALF * kPieceBytes + n * sizeof(I);
            if (HOW == Unpack::done) {
                w[n] = *reinterpret_cast<const I*>(weights.from + place);
                continue;
            }
            w[n] = Vec::half<HALF>(weights.from + Base::place(t.strip_bytes, n));
            if (HOW == Unpack::first) *reinterpret_cast<I*>(weights.kept + place) = w[n];
        }
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            const int8_t* four = acts + 4 * (HALF * Base::S + r);
            if constexpr (PAIRS && N == 2 && !BEGIN) {
                Vec::dot_two(shorts[r][0], shorts[r][1], w[0], w[1], four);
                continue;
            }
            const I a = Vec::splat4(four);
            OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                if (BEGIN) shorts[r][n] = Vec::product(w[n], a);
                else Vec::dot(shorts[r][n], w[n], a);
            }
        }
    }

    template <bool PAIRS, bool BEGIN>
    static inline __attribute__((always_inline)) void add_piece(
        const TileArgs& t, Weights& weights, const int8_t*& acts, Sums& shorts) {
        add_half<0, PAIRS, BEGIN>(t, weights, acts, shorts);
        if (HOW != Unpack::done) Base::prefetch(weights.from, t.strip_bytes);
        add_half<1, PAIRS>(t, weights, acts, shorts);
        move_on(weights, 1);
        acts += kPiece * Base::S;
    }

    // Sums of as many pieces as 16 bits suffice for, one at least.
    template <bool PAIRS>
    static inline __attribute__((always_inline)) void multiply(
        const TileArgs& t, Weights weights, const int8_t* acts, int pieces, Sums& shorts) {
        add_piece<PAIRS, true>(t, weights, acts, shorts);
        for (int p = 1; p < pieces; ++p) add_piece<PAIRS, false>(t, weights, acts, shorts);
    }

    // Integer sums of one segment.
    static inline __attribute__((always_inline)) void segment(
        const TileArgs& t, Weights weights, const int8_t* acts, const int32_t* offset,
        int pieces, Sums& sum) {
        __asm__ volatile("" : : : "memory");  // GCC would keep copies of totals elsewhere
        if (pieces > t.short_pieces) return long_segment(t, weights, acts, offset, pieces, sum);
        Sums shorts;
        multiply<false>(t, weights, acts, pieces, shorts);
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                sum[r][n] = Vec::add(Vec::splat(offset[r]), Vec::widen(shorts[r][n]));
            }
        }
    }

    // The same of more pieces than 16 bits suffice for.
    static __attribute__((noinline)) void long_segment(const TileArgs& t, Weights weights,
                                                       const int8_t* acts, const int32_t* offset,
                                                       int pieces, Sums& sum) {
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            OMEGA_UNROLL for (int n = 0; n < N; ++n) sum[r][n] = Vec::splat(offset[r]);
        }
        while (pieces > 0) {
            const int count = pieces < t.short_pieces ? pieces : t.short_pieces;
            Sums shorts;
            multiply<true>(t, weights, acts, count, shorts);
            OMEGA_UNROLL for (int r = 0; r < R; ++r) {
                OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                    sum[r][n] = Vec::add(sum[r][n], Vec::widen(shorts[r][n]));
                }
            }
            move_on(weights, count);
            acts += count * kPiece * Base::S;
            pieces -= count;
        }
    }

    static inline __attribute__((always_inline)) void segment(
        const TileArgs& t, const uint8_t* weight, const int8_t* acts, const int32_t* offset,
        int pieces, Sums& sum) {
        segment(t, Weights{weight, nullptr}, acts, offset, pieces, sum);
    }

    static void run(const TileArgs& t) { Base::template run_by<ShortTile>(t); }

    // A run of a strip. Totals are kept in the scratch.
    static void meet(const Run& run, int tile, float* y) {
        static constexpr int32_t none[R] = {};
        const TileArgs t = point_at(run, tile, y);
        const QuantTile& q = run.tiles[tile];
        const int lines = MODE ? t.pieces / kPiecesPerLine : run.lines;
        const int first = run.first_line / lines, end = first + run.lines / lines;
        auto* kept = reinterpret_cast<uint8_t*>(run.scratch.weights);
        const uint8_t* packed = t.weight + run.first_line * kLineBytes;
        Weights weights{HOW == Unpack::first ? packed : kept, kept};
        const int8_t* acts = q.acts + size_t(run.first_line) * kLine * Base::S;
        float* total = run.scratch.sums + size_t(tile) * Vec::max_rows * N * Vec::lanes;
        if (run.last) Base::expect_writes(t);
        OMEGA_UNROLL for (int i = 0; i < R * N * Vec::lanes; i += Vec::lanes) {
            if (run.first) Vec::store(total + i, Vec::splatf(0.0f));
        }
        for (int s = first; s < end; ++s) {
            Sums sum;
            const int32_t* offset = MODE ? q.offset + s * R : run.first ? q.offset : none;
            segment(t, weights, acts, offset, lines * kPiecesPerLine, sum);
            if (MODE) Base::accumulate(t, s, sum, total);
            else add_whole(sum, total);
            move_on(weights, lines * kPiecesPerLine);
            acts += lines * kLine * Base::S;
        }
        if (run.last) Base::write_totals(t, total);
    }

    // Whole numbers to the end.
    static inline void add_whole(const Sums& sum, float* total) {
        OMEGA_UNROLL for (int i = 0; i < R * N; ++i) {
            I* into = reinterpret_cast<I*>(total) + i;
            *into = Vec::add(*into, sum[i / N][i % N]);
        }
    }
};

template <int R, int P, int MODE>
using PackedTile = ShortTile<R, P, MODE, Unpack::each>;

using MeetFn = void (*)(const Run&, int, float*);

// The same of every height.
template <int MODE, Unpack HOW, int R = 1>
inline MeetFn meeting(int rows) {
    if constexpr (R < Vec::max_rows) {
        if (rows > R) return meeting<MODE, HOW, R + 1>(rows);
    }
    return &ShortTile<R, Vec::narrow, MODE, HOW>::meet;
}

template <int MODE>
void strip(const TileArgs& t, const QuantTile* tiles, int count, Lines lines,
           const StripScratch& scratch) {
    for_runs(MODE, t, tiles, count, lines, kRunLines, scratch, [&](const Run& run) {
        float* y = t.y;
        for (int tile = 0; tile < count; ++tile) {
            const int rows = tiles[tile].rows;
            const MeetFn meet = tile ? meeting<MODE, Unpack::done>(rows)
                                     : meeting<MODE, Unpack::first>(rows);
            meet(run, tile, y);
            y += size_t(rows) * t.y_stride;
        }
    });
}

void run_strip(int mode, int, const TileArgs& t, const QuantTile* tiles, int count, Lines lines,
               const StripScratch& scratch) {
    constexpr decltype(&strip<0>) of_mode[] = {&strip<0>, &strip<1>, &strip<2>, &strip<3>};
    of_mode[mode](t, tiles, count, lines, scratch);
}

inline Isa strips_of(const Isa& tiles) {
    Isa isa = tiles;
    isa.plain = &tiles;
    isa.least_rows = kStripRows;
    isa.line = kLine;
    isa.strips = {[](int) {}, &run_strip, [] {}, false, kRunLines, 256 * 1024, 32};
    return isa;
}
