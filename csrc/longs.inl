// Tiles whose products are summed in 32 bits at once: for instructions that do so. Included after
// tile.inl.
//
// Vec offers besides: split(64-byte piece part, even, odd), and whether sums of their own for odd
// inputs are of use (`independent`).

template <int R, int P, int MODE>
struct LongTile : Tile<R, P, MODE> {
    using Base = Tile<R, P, MODE>;
    using I = typename Base::I;
    static constexpr int N = Base::N;
    // Few sums would wait for each other: give odd inputs sums of their own.
    static constexpr bool split_sums = Vec::independent && R * N < 8;

    // Integer sums of one segment.
    static inline __attribute__((always_inline)) void segment(
        const TileArgs& t, const uint8_t* weight, const int8_t* acts, const int32_t* offset,
        int pieces, I (&sum)[R][N]) {
        I more[R][N];
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            const I start = Vec::splat(offset[r]);
            OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                sum[r][n] = start;
                if (split_sums) more[r][n] = Vec::splat(0);
            }
        }
        for (int p = 0; p < pieces; ++p) {
            I even[N], odd[N];
            OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                Vec::split(weight + Base::place(t.strip_bytes, n), even[n], odd[n]);
            }
            Base::prefetch(weight, t.strip_bytes);
            OMEGA_UNROLL for (int r = 0; r < R; ++r) {
                const I a = Vec::splat4(acts + 4 * r), b = Vec::splat4(acts + 4 * (Base::S + r));
                OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                    Vec::dot(sum[r][n], even[n], a);
                    Vec::dot(split_sums ? more[r][n] : sum[r][n], odd[n], b);
                }
            }
            weight += Base::kStep;
            acts += kPiece * Base::S;
        }
        if (split_sums) {
            OMEGA_UNROLL for (int r = 0; r < R; ++r) {
                OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                    sum[r][n] = Vec::add(sum[r][n], more[r][n]);
                }
            }
        }
    }

    static void run(const TileArgs& t) { Base::template run_by<LongTile>(t); }
};
