// The product of one tile of activations with one strip of panels, for any vector type, but for the
// integer sums of a segment: `By::segment` of longs.inl or shorts.inl.
// Included once per instruction set, after its `Vec` and inside its anonymous namespace.
//
// Vec offers: I (int32 lanes), F (float lanes), lanes; splat(int32), splat4(4 bytes), dot(sum, w, a),
// add, to_float, as_float (same bits), sub, mul, addf, fma, and loads and stores of floats.

#define OMEGA_UNROLL _Pragma("GCC unroll 64")
// The compiler may assume nothing of v from here on.
#if defined(__x86_64__)
#define OMEGA_ANEW(v) __asm__ volatile("" : "+x"(v))
#elif defined(__aarch64__)
#define OMEGA_ANEW(v) __asm__ volatile("" : "+w"(v))
#else
#define OMEGA_ANEW(v) __asm__ volatile("" : "+m"(v))
#endif

template <int R, int P, int MODE>
struct Tile {
    static constexpr int per_panel = kPanel / Vec::lanes;
    static constexpr int N = P * per_panel;  // vectors across the strip
    static constexpr int kStep = kPieceBytes * Vec::narrow;  // from piece to piece of a strip
    static constexpr int kAhead = 8192;                      // bytes
    static constexpr int S = R == 1 ? 1 : kRowStride;
    using I = typename Vec::I;
    using F = typename Vec::F;

    // Where vector n of a piece lies, from the strip's piece on.
    static inline size_t place(size_t strip_bytes, int n) {
        const int panel = n / per_panel, part = n % per_panel;
        return (panel / Vec::narrow) * strip_bytes + (panel % Vec::narrow) * kPieceBytes +
               part * (Vec::lanes * 4);
    }

    // Weights come from memory once and in order: ask for them early enough.
    static inline void prefetch(const uint8_t* weight, size_t strip_bytes) {
        OMEGA_UNROLL for (int panel = 0; panel < P; ++panel) {
            __builtin_prefetch(weight + place(strip_bytes, panel * per_panel) + kAhead, 0, 2);
        }
    }

    // total += sum * row scale * column scale of this segment, rounded after each operation. With
    // row scales alone the product is exact (Linear::set_segments), so it may be fused.
    static inline __attribute__((always_inline)) void accumulate(
        const TileArgs& t, int s, const I (&sum)[R][N], float* total) {
        F column[N];
        if (MODE & kWeightSegments) {
            OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                column[n] = Vec::load(t.weight_scale + s * t.outputs + n * Vec::lanes);
            }
        }
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            const F row = MODE & kActSegments ? Vec::splatf(t.act_scale[s * R + r]) : F();
            OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                float* into = total + (r * N + n) * Vec::lanes;
                const F value = Vec::sub(Vec::as_float(sum[r][n]), Vec::splatf(kMagic));
                if (MODE == 1) {
                    Vec::store(into, Vec::fma(value, row, Vec::load(into)));
                    continue;
                }
                const F scaled = MODE == 3 ? Vec::mul(value, row) : value;
                Vec::store(into, Vec::addf(Vec::load(into), Vec::mul(scaled, column[n])));
            }
        }
    }

    static inline void write(const TileArgs& t, int r, int n, F value) {
        const int column = n * Vec::lanes, left = t.columns - column;
        value = Vec::mul(value, Vec::splatf(t.token_scale[r]));
        value = Vec::mul(value, Vec::load(t.row_scale + column));
        for (int i = 0; i < t.rank; ++i) {
            const F share = Vec::splatf(t.lowrank[r * t.lowrank_stride + i]);
            value = Vec::addf(value, Vec::mul(share, Vec::load(t.lowrank_a + i * t.outputs + column)));
        }
        value = Vec::addf(value, Vec::load(t.bias + column));
        float* to = t.y + r * t.y_stride + column;
        if (left >= Vec::lanes) {
            Vec::store(to, value);
        } else if (left > 0) {
            float part[Vec::lanes];
            Vec::store(part, value);
            for (int i = 0; i < left; ++i) to[i] = part[i];
        }
    }

    // Floats, or whole numbers where no scale changed.
    static inline void write_totals(const TileArgs& t, const float* total) {
        for (int r = 0; r < R; ++r) {
            for (int n = 0; n < N; ++n, total += Vec::lanes) {
                const F value = Vec::load(total);
                write(t, r, n, MODE ? value : Vec::to_float(I(value)));
            }
        }
    }

    // Lines of y are written at the end; stores that wait for memory would hold up others.
    static inline void expect_writes(const TileArgs& t) {
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            for (int i = 0; i < P * kPanel && i < t.columns; i += 16) {
                __builtin_prefetch(t.y + r * t.y_stride + i, 1, 3);
            }
        }
    }

    template <class By>
    static inline __attribute__((always_inline)) void run_by(const TileArgs& t) {
        expect_writes(t);
        I sum[R][N];
        if (MODE == 0) {
            By::segment(t, t.weight, t.acts, t.offset, t.segments * t.pieces, sum);
            OMEGA_UNROLL for (int r = 0; r < R; ++r) {
                OMEGA_UNROLL for (int n = 0; n < N; ++n) {
                    write(t, r, n, Vec::to_float(sum[r][n]));
                }
            }
            return;
        }
        alignas(64) float total[R * N * Vec::lanes];
        for (int i = 0; i < R * N * Vec::lanes; ++i) total[i] = 0.0f;
        for (int s = 0; s < t.segments; ++s) {
            By::segment(t, t.weight + size_t(s) * t.pieces * kStep,
                        t.acts + size_t(s) * t.pieces * kPiece * S, t.offset + s * R, t.pieces,
                        sum);
            accumulate(t, s, sum, total);
        }
        write_totals(t, total);
    }
};

// Products that wait for nothing, in registers: what this instruction set could do at most.
inline long peak_products(int rounds) {
    constexpr int sums = Vec::lanes == 16 ? 16 : 12;  // what the registers have room for
    using I = typename Vec::I;
    I sum[sums], w = Vec::splat(rounds), a = Vec::splat(rounds >> 1);
    OMEGA_UNROLL for (int i = 0; i < sums; ++i) sum[i] = Vec::splat(i);
    for (int round = 0; round < rounds; ++round) {
        OMEGA_UNROLL for (int i = 0; i < sums; ++i) {
            OMEGA_ANEW(a);  // or one product would do for all sums
            Vec::dot(sum[i], w, a);
        }
    }
    I total = sum[0];
    OMEGA_UNROLL for (int i = 1; i < sums; ++i) total = Vec::add(total, sum[i]);
    OMEGA_ANEW(total);  // so that it is made
    return long(rounds) * sums * Vec::lanes * 4;
}

// Fills the table with every height that this instruction set has.
template <template <int, int, int> class T, int MODE, int R>
void fill_tiles(Isa& isa) {
    if constexpr (R > 0) {
        isa.tile[MODE][0][R] = &T<R, Vec::narrow, MODE>::run;
        if constexpr (R <= Vec::wide_rows) {
            isa.tile[MODE][1][R] = &T<R, Vec::wide, MODE>::run;
        }
        fill_tiles<T, MODE, R - 1>(isa);
    }
}

template <template <int, int, int> class T>
inline Isa make_isa(const char* name, const RowFns& rows) {
    Isa isa{};
    isa.name = name;
    isa.max_bits = 8;
    isa.line = kSegment;
    isa.max_rows = Vec::max_rows;
    isa.wide_rows = Vec::wide_rows;
    isa.panels[0] = Vec::narrow;
    isa.panels[1] = Vec::wide;
    fill_tiles<T, 0, Vec::max_rows>(isa);
    fill_tiles<T, 1, Vec::max_rows>(isa);
    fill_tiles<T, 2, Vec::max_rows>(isa);
    fill_tiles<T, 3, Vec::max_rows>(isa);
    isa.prologue = &prologue_tile;
    isa.peak = &peak_products;
    isa.rows = &rows;
    return isa;
}
