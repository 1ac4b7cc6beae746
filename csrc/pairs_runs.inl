// Products by pairs of many tiles: a run of a strip's weights is unpacked once, and every tile
// meets it. Included by isa_pairs.cpp.

// A run of weights to [pieces][panels][u, v][64]. words [segments][outputs]: where sums start from,
// `start` less the products u v.
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
                    split_piece(is_direct(p), from, u, v, products[n]);
                    _mm512_store_si512(to, u);
                    _mm512_store_si512(to + kPieceBytes, v);
                    from += kPieceBytes;
                    to += 2 * kPieceBytes;
                }
            }
        }
        UNROLL for (int n = 0; n < kPanels; ++n) {
            const __m512i from_here = _mm512_sub_epi32(Vec::splat(start), products[n]);
            _mm512_store_si512(words + n * kPanel, from_here);
        }
    }
}

// A tile of R rows and a run of a strip. Sums of a segment and totals stay in registers.
template <int R, int MODE>
struct Meeting {
    using Sums = __m512i[R][kPanels];
    using Totals = __m512[R][kPanels];

    // The pieces of a line from PIECE on; done(r, sum) follows the last of them for each row.
    template <int PIECE, class Done>
    static OMEGA_INLINE void pieces(const int8_t* weights, const int8_t* acts, Sums& sum,
                                    const Done& done) {
        __m512i u[kPanels], v[kPanels];
        const int8_t* w = weights + PIECE * kPieceWeights;
        UNROLL for (int n = 0; n < kPanels; ++n) {
            u[n] = _mm512_load_si512(w + n * 2 * kPieceBytes);
            v[n] = _mm512_load_si512(w + (n * 2 + 1) * kPieceBytes);
        }
        UNROLL for (int r = 0; r < R; ++r) {
            dot_row<PIECE>(acts + (PIECE * R + r) * kPiece, u, v, sum[r]);
            if (PIECE + 1 == kPiecesPerLine) done(r, sum);
        }
        if constexpr (PIECE + 1 < kPiecesPerLine) pieces<PIECE + 1>(weights, acts, sum, done);
    }

    // Not the intrinsic: GCC would load once for all rows, and has no registers left to keep it.
    static OMEGA_INLINE void begin(const int32_t* start, __m512i (&sum)[kPanels]) {
        UNROLL for (int n = 0; n < kPanels; ++n) {
            __asm__ volatile("vmovdqa64 %1, %0"
                             : "=v"(sum[n])
                             : "m"(*reinterpret_cast<const __m512i*>(start + n * kPanel)));
        }
    }

    // Segment after segment of the run; the last one's sums are left.
    static OMEGA_INLINE void multiply(const Run& run, const QuantTile& q, const uint8_t* next,
                                      int fetch, Sums& sum, Totals& total) {
        const int per = lines_per_segment(run), first = run.first_line / per;
        const int8_t* weights = run.scratch.weights;
        const int8_t* acts = q.acts + size_t(run.first_line) * kLine * R;
        const int32_t* start = run.scratch.words;
        UNROLL for (int r = 0; r < R; ++r) begin(start, sum[r]);
        for (int s = first; s < first + run.lines / per; ++s) {
            start += kOutputs;
            for (int i = 0; i < fetch * per; ++i, next += kPieceBytes) {
                __builtin_prefetch(next, 0, 2);
            }
            for (int i = 1; i < per; ++i) {
                pieces<0>(weights, acts, sum, [](int, Sums&) {});
                weights += kPiecesPerLine * kPieceWeights;
                acts += kLine * R;
            }
            const auto add = [&](int r, Sums& sum) OMEGA_LAMBDA_INLINE {
                if (!MODE) return;
                const __m512 less = Vec::as_float(Vec::splat(q.offset[s * R + r]));
                UNROLL for (int n = 0; n < kPanels; ++n) {
                    const __m512 value = Vec::sub(Vec::as_float(sum[r][n]), less);
                    total[r][n] = add_segment<MODE>(run.strip, q.act_scale, s, s * R + r, n, value,
                                                    total[r][n]);
                }
                begin(start, sum[r]);
            };
            pieces<0>(weights, acts, sum, add);
            weights += kPiecesPerLine * kPieceWeights;
            acts += kLine * R;
        }
    }

    static int lines_per_segment(const Run& run) {
        return MODE ? run.strip.pieces / kPiecesPerLine : run.lines;
    }

    static OMEGA_INLINE void write(const Run& run, int tile, float* y, const Totals& total) {
        const TileArgs t = point_at(run, tile, y);
        UNROLL for (int n = 0; n < kPanels; ++n) {
            __m512 value[R];
            UNROLL for (int r = 0; r < R; ++r) {
                value[r] = total[r][n];
                if (MODE) continue;
                const __m512i whole = _mm512_castps_si512(total[r][n]);
                const __m512i less = Vec::splat(run.tiles[tile].offset[r]);
                value[r] = Vec::to_float(_mm512_sub_epi32(whole, less));
            }
            write_rows<R>(t, R, n, value);
        }
    }

    static void run(const Run& run, int tile, float* y) {
        float* kept = run.scratch.sums + size_t(tile) * kRows * kOutputs;
        if (run.last) {
            const TileArgs t = point_at(run, tile, y);
            UNROLL for (int n = 0; n < kPanels; ++n) expect_writes<R>(t, n);
        }
        // The next run's weights come while this one's are multiplied, a share with every tile;
        // among many tiles that would cost more than it saves.
        constexpr int pieces = kPiecesPerLine * kPanels;
        const int fetch = run.count < 20 ? (pieces + run.count - 1) / run.count : 0;
        const size_t ahead = size_t(run.first_line + run.lines) * pieces +
                             size_t(tile) * run.lines * fetch;
        Sums sum;
        Totals total;
        UNROLL for (int r = 0; r < R; ++r) {
            UNROLL for (int n = 0; n < kPanels; ++n) {
                total[r][n] = run.first ? __m512() : Vec::load(kept + r * kOutputs + n * kPanel);
            }
        }
        multiply(run, run.tiles[tile], run.strip.weight + ahead * kPieceBytes, fetch, sum, total);
        UNROLL for (int r = 0; r < R; ++r) {
            UNROLL for (int n = 0; n < kPanels; ++n) {
                if (!MODE) {  // whole numbers to the end
                    const __m512i before = _mm512_castps_si512(total[r][n]);
                    total[r][n] = _mm512_castsi512_ps(Vec::add(before, sum[r][n]));
                }
                if (!run.last) Vec::store(kept + r * kOutputs + n * kPanel, total[r][n]);
            }
        }
        if (run.last) write(run, tile, y, total);
    }
};

template <int MODE>
void strip(const TileArgs& t, const QuantTile* tiles, int count, Lines lines,
           const StripScratch& scratch) {
    constexpr void (*meet[])(const Run&, int, float*) = {
        &Meeting<1, MODE>::run, &Meeting<2, MODE>::run, &Meeting<3, MODE>::run,
        &Meeting<4, MODE>::run, &Meeting<5, MODE>::run, &Meeting<6, MODE>::run};
    static_assert(sizeof meet / sizeof meet[0] == kRows, "every height");
    for_runs(MODE, t, tiles, count, lines, kRunLines, scratch, [&](const Run& run) {
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
