// Tiles whose products are summed in 16 bits, as many as fit, and then go on in 32: an addition
// takes the place of the instruction that widens every product. Included after tile.inl.
//
// A product of bytes is at most 15 * 8 (or 15 * 128), and 16 bits take four of them a piece:
// TileArgs::short_pieces. Few rows unpack the weights on the way; more rows meet runs of them
// that were unpacked once (Strips in layout.hpp).

#include "strips.inl"

constexpr int kRunLines = 16;  // of weights: unpacked, half of the first-level cache
constexpr int kStripRows = 12;  // from so many rows on

template <int R, int P, int MODE, bool UNPACKED>
struct ShortTile : Tile<R, P, MODE> {
    using Base = Tile<R, P, MODE>;
    using I = typename Base::I;
    using Sums = I[R][Base::N];
    static constexpr int N = Base::N;
    static constexpr int kStep = UNPACKED ? 2 * kPieceBytes : Base::kStep;

    // The first or the last 4 inputs of a piece.
    template <int HALF>
    static inline __attribute__((always_inline)) void add_half(
        const TileArgs& t, const uint8_t* weight, const int8_t* acts, Sums& shorts) {
        I w[N];
        OMEGA_UNROLL for (int n = 0; n < N; ++n) {
            const uint8_t* from = weight + HALF * kPieceBytes + n * sizeof(I);
            w[n] = UNPACKED ? *reinterpret_cast<const I*>(from)
                            : Vec::half<HALF>(weight + Base::place(t.strip_bytes, n));
        }
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            const I a = Vec::splat4(acts + 4 * (HALF * Base::S + r));
            OMEGA_UNROLL for (int n = 0; n < N; ++n) Vec::dot(shorts[r][n], w[n], a);
        }
    }

    // As many pieces as 16 bits suffice for.
    static inline __attribute__((always_inline)) void multiply(
        const TileArgs& t, const uint8_t* weight, const int8_t* acts, int pieces, Sums& shorts) {
        for (int p = 0; p < pieces; ++p) {
            add_half<0>(t, weight, acts, shorts);
            if (!UNPACKED) Base::prefetch(weight, t.strip_bytes);
            add_half<1>(t, weight, acts, shorts);
            weight += kStep;
            acts += kPiece * Base::S;
        }
    }

    // Integer sums of one segment.
    static inline __attribute__((always_inline)) void segment(
        const TileArgs& t, const uint8_t* weight, const int8_t* acts, const int32_t* offset,
        int pieces, Sums& sum) {
        __asm__ volatile("" : : : "memory");  // GCC would keep copies of totals elsewhere
        if (pieces > t.short_pieces) return long_segment(t, weight, acts, offset, pieces, sum);
        Sums shorts = {};
        multiply(t, weight, acts, pieces, shorts);
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                sum[r][n] = Vec::add(Vec::splat(offset[r]), Vec::widen(shorts[r][n]));
            }
        }
    }

    // The same of more pieces than 16 bits suffice for.
    static __attribute__((noinline)) void long_segment(const TileArgs& t, const uint8_t* weight,
                                                       const int8_t* acts, const int32_t* offset,
                                                       int pieces, Sums& sum) {
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            OMEGA_UNROLL for (int n = 0; n < N; ++n) sum[r][n] = Vec::splat(offset[r]);
        }
        while (pieces > 0) {
            const int count = pieces < t.short_pieces ? pieces : t.short_pieces;
            Sums shorts = {};
            multiply(t, weight, acts, count, shorts);
            OMEGA_UNROLL for (int r = 0; r < R; ++r) {
                OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                    sum[r][n] = Vec::add(sum[r][n], Vec::widen(shorts[r][n]));
                }
            }
            weight += count * kStep;
            acts += count * kPiece * Base::S;
            pieces -= count;
        }
    }

    static void run(const TileArgs& t) { Base::template run_by<ShortTile>(t); }

    // A run of a strip's weights, unpacked. Totals are kept in the scratch.
    static void meet(const Run& run, int tile, float* y) {
        static constexpr int32_t none[R] = {};
        const TileArgs t = point_at(run, tile, y);
        const QuantTile& q = run.tiles[tile];
        const int lines = MODE ? t.pieces / kPiecesPerLine : run.lines;
        const int first = run.first_line / lines;
        const auto* weight = reinterpret_cast<const uint8_t*>(run.scratch.weights);
        const int8_t* acts = q.acts + size_t(run.first_line) * kLine * Base::S;
        float* total = run.scratch.sums + size_t(tile) * Vec::max_rows * N * Vec::lanes;
        if (run.last) Base::expect_writes(t);
        OMEGA_UNROLL for (int i = 0; i < R * N * Vec::lanes; i += Vec::lanes) {
            if (run.first) Vec::store(total + i, Vec::splatf(0.0f));
        }
        for (int s = first; s < first + run.lines / lines; ++s) {
            Sums sum;
            const int32_t* offset = MODE ? q.offset + s * R : run.first ? q.offset : none;
            segment(t, weight, acts, offset, lines * kPiecesPerLine, sum);
            if (MODE) Base::accumulate(t, s, sum, total);
            else add_whole(sum, total);
            weight += lines * kPiecesPerLine * kStep;
            acts += lines * kLine * Base::S;
        }
        if (run.last) write_totals(t, total);
    }

    // Whole numbers to the end.
    static inline void add_whole(const Sums& sum, float* total) {
        OMEGA_UNROLL for (int i = 0; i < R * N; ++i) {
            I* into = reinterpret_cast<I*>(total) + i;
            *into = Vec::add(*into, sum[i / N][i % N]);
        }
    }

    static inline void write_totals(const TileArgs& t, const float* total) {
        for (int r = 0; r < R; ++r) {
            for (int n = 0; n < N; ++n, total += Vec::lanes) {
                const auto value = Vec::load(total);
                Base::write(t, r, n, MODE ? value : Vec::to_float(I(value)));
            }
        }
    }
};

template <int R, int P, int MODE>
using PackedTile = ShortTile<R, P, MODE, false>;

// A run of weights, [pieces][64], to [pieces][2][64].
void unpack(const Run& run) {
    constexpr int ahead = 8192;
    const uint8_t* from = run.strip.weight + size_t(run.first_line) * kLine / 2 * kPanel;
    int8_t* to = run.scratch.weights;
    for (int p = 0; p < run.lines * kPiecesPerLine; ++p) {
        OMEGA_UNROLL for (int i = 0; i < kPieceBytes; i += sizeof(Vec::I)) {
            *reinterpret_cast<Vec::I*>(to + i) = Vec::half<0>(from + i);
            *reinterpret_cast<Vec::I*>(to + kPieceBytes + i) = Vec::half<1>(from + i);
        }
        __builtin_prefetch(from + ahead, 0, 2);
        from += kPieceBytes;
        to += 2 * kPieceBytes;
    }
}

using MeetFn = void (*)(const Run&, int, float*);

// The same of every height.
template <int MODE, int R = 1>
inline MeetFn meeting(int rows) {
    if constexpr (R < Vec::max_rows) {
        if (rows > R) return meeting<MODE, R + 1>(rows);
    }
    return &ShortTile<R, Vec::narrow, MODE, true>::meet;
}

void run_strip(int mode, int, const TileArgs& t, const QuantTile* tiles, int count, Lines lines,
               const StripScratch& scratch) {
    constexpr MeetFn (*of_mode[])(int) = {&meeting<0>, &meeting<1>, &meeting<2>, &meeting<3>};
    for_runs(mode, t, tiles, count, lines, kRunLines, scratch, [&](const Run& run) {
        unpack(run);
        float* y = t.y;
        for (int tile = 0; tile < count; ++tile) {
            of_mode[mode](tiles[tile].rows)(run, tile, y);
            y += size_t(tiles[tile].rows) * t.y_stride;
        }
    });
}

inline Isa strips_of(const Isa& tiles) {
    Isa isa = tiles;
    isa.plain = &tiles;
    isa.least_rows = kStripRows;
    isa.line = kLine;
    isa.strips = {[](int) {}, &run_strip, [] {}, false, kRunLines, 256 * 1024, 32};
    return isa;
}
