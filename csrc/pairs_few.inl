// Products by pairs of few rows: a tile of up to kFewRows meets a strip, unpacks its weights on the
// way, and keeps totals in memory. Included by isa_pairs.cpp.

constexpr int kFewRows = 10;
constexpr int kAhead = 4096;  // bytes of weights

template <int R, int MODE>
struct Few {
    using Sums = __m512i[R][kPanels];
    using Products = __m512i[kPanels];  // of the weights of pairs

    // As Meeting::pieces.
    template <int PIECE, class Done>
    static OMEGA_INLINE void pieces(const uint8_t* weights, const int8_t* acts,
                                    Products& products, Sums& sum, const Done& done) {
        __m512i u[kPanels], v[kPanels];
        UNROLL for (int n = 0; n < kPanels; ++n) {
            const uint8_t* from = weights + (PIECE * kPanels + n) * kPieceBytes;
            __builtin_prefetch(from + kAhead, 0, 2);
            split_piece(is_direct(PIECE), from, u[n], v[n], products[n]);
        }
        UNROLL for (int r = 0; r < R; ++r) {
            dot_row<PIECE>(acts + (PIECE * R + r) * kPiece, u, v, sum[r]);
            if (PIECE + 1 == kPiecesPerLine) done(r, products, sum);
        }
        if constexpr (PIECE + 1 < kPiecesPerLine) {
            pieces<PIECE + 1>(weights, acts, products, sum, done);
        }
    }

    static OMEGA_INLINE void multiply(const TileArgs& t, float* total) {
        const int lines = t.segments * t.pieces / kPiecesPerLine;
        const int per = MODE ? t.pieces / kPiecesPerLine : lines;
        const uint8_t* weights = t.weight;
        const int8_t* acts = t.acts;
        for (int s = 0; s < lines / per; ++s) {
            __asm__ volatile("" : : : "memory");  // GCC would keep copies of totals elsewhere
            Products products = {};
            Sums sum;
            UNROLL for (int r = 0; r < R; ++r) {
                UNROLL for (int n = 0; n < kPanels; ++n) {
                    sum[r][n] = Vec::splat(MODE ? kMagicBits : 0);
                }
            }
            for (int i = 1; i < per; ++i) {
                pieces<0>(weights, acts, products, sum, [](int, Products&, Sums&) {});
                weights += kPiecesPerLine * kPanels * kPieceBytes;
                acts += kLine * R;
            }
            const auto add = [&](int r, Products& products, Sums& sum) OMEGA_LAMBDA_INLINE {
                const __m512i less = Vec::splat(t.offset[s * R + r]);
                UNROLL for (int n = 0; n < kPanels; ++n) {
                    float* into = total + r * kOutputs + n * kPanel;
                    const __m512i whole = _mm512_sub_epi32(sum[r][n], products[n]);
                    if (!MODE) {
                        Vec::store(into, Vec::to_float(_mm512_sub_epi32(whole, less)));
                        continue;
                    }
                    const __m512 value = Vec::sub(Vec::as_float(whole), Vec::as_float(less));
                    Vec::store(into, add_segment<MODE>(t, t.act_scale, s, s * R + r, n, value,
                                                       Vec::load(into)));
                }
            };
            pieces<0>(weights, acts, products, sum, add);
            weights += kPiecesPerLine * kPanels * kPieceBytes;
            acts += kLine * R;
        }
    }

    static void run(const TileArgs& t) {
        alignas(64) float total[R * kOutputs] = {};
        UNROLL for (int n = 0; n < kPanels; ++n) expect_writes<R>(t, n);
        multiply(t, total);
        UNROLL for (int n = 0; n < kPanels; ++n) {
            __m512 value[R];
            UNROLL for (int r = 0; r < R; ++r) {
                value[r] = Vec::load(total + r * kOutputs + n * kPanel);
            }
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
