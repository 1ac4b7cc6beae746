// The functions of rows.hpp for one instruction set. Included after tile.inl.

// a * b + c rounded once, where there is an instruction for it: the library is compiled so that
// the compiler puts none of its own (products of layers have the same bits everywhere).
inline Floats fused(Floats a, Floats b, Floats c) {
#if LANES == 16
    return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif LANES == 8
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(_AARCH64_NEON_H_) || defined(__ARM_NEON_H)
    return Floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
    return a * b + c;
#endif
}

// a > b ? a : b and a < b ? a : b, NaN where b is none.
inline Floats larger_of(Floats a, Floats b) {
#if LANES == 16
    return Floats(_mm512_max_ps(__m512(a), __m512(b)));
#elif LANES == 8
    return Floats(_mm256_max_ps(__m256(a), __m256(b)));
#else
    return a > b ? a : b;
#endif
}
inline Floats smaller_of(Floats a, Floats b) {
#if LANES == 16
    return Floats(_mm512_min_ps(__m512(a), __m512(b)));
#elif LANES == 8
    return Floats(_mm256_min_ps(__m256(a), __m256(b)));
#else
    return a < b ? a : b;
#endif
}

// e^x to about two units of the last place; x is cut to where the result is a normal number.
inline Floats exponential(Floats x) {
    const Floats low = splat(-87.3f), high = splat(88.3f), magic = splat(12582912.0f);
    x = smaller_of(high, larger_of(low, x));
    const Floats shifted = fused(x, splat(1.44269504f), magic);
    const Floats n = shifted - magic;
    Floats r = fused(n, splat(-0.693359375f), x);
    r = fused(n, splat(2.12194440e-4f), r);
    Floats p = fused(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));  // Cephes, expf
    p = fused(p, r, splat(8.3334519073e-3f));
    p = fused(p, r, splat(4.1665795894e-2f));
    p = fused(p, r, splat(1.6666665459e-1f));
    p = fused(p, r, splat(5.0000001201e-1f));
    p = fused(p, r * r, r) + 1.0f;
    return Floats(Ints(p) + ((Ints(shifted) - Ints(magic)) << 23));
}

inline float total(Floats v) {
    v = v + swap_lanes<1>(v);
    v = v + swap_lanes<2>(v);
#if LANES >= 8
    v = v + swap_lanes<4>(v);
#endif
#if LANES >= 16
    v = v + swap_lanes<8>(v);
#endif
    return v[0];
}

// The first `left` lanes (fewer than LANES) of memory, zeros behind; and back.
inline Floats load_part(const float* p, int left) {
    Floats v{};
    __builtin_memcpy(&v, p, size_t(left) * sizeof(float));
    return v;
}
inline void store_part(float* p, Floats v, int left) {
    __builtin_memcpy(p, &v, size_t(left) * sizeof(float));
}

// visit(offset, left) for every vector of a row; left is LANES but for the last.
template <class Visit>
inline void for_vectors(int width, Visit visit) {
    int i = 0;
    for (; i + LANES <= width; i += LANES) visit(i, LANES);
    if (i < width) visit(i, width - i);
}
inline Floats load_some(const float* p, int left) {
    return left == LANES ? load(p) : load_part(p, left);
}
inline void store_some(float* p, Floats v, int left) {
    left == LANES ? store(p, v) : store_part(p, v, left);
}

void norm_row(const NormArgs& a, const float* x, const float* gain, const float* shift, float* y) {
    float mean = 0.0f;
    if (a.center) {
        Floats sums[2] = {};
        for_vectors(a.width, [&](int i, int left) {
            sums[i / LANES % 2] += load_some(x + i, left);
        });
        mean = total(sums[0] + sums[1]) / float(a.width);
    }
    Floats squares[2] = {};
    for_vectors(a.width, [&](int i, int left) {
        Floats v = load_some(x + i, left) - mean;
        if (left < LANES) {
            for (int l = left; l < LANES; ++l) v[l] = 0.0f;
        }
        squares[i / LANES % 2] = fused(v, v, squares[i / LANES % 2]);
    });
    const float spread = total(squares[0] + squares[1]) / float(a.width);
    const float inverse = 1.0f / __builtin_sqrtf(spread + a.eps);
    for_vectors(a.width, [&](int i, int left) {
        Floats v = (load_some(x + i, left) - mean) * inverse;
        if (gain) v = v * (load_some(gain + i, left) + a.plus);
        if (shift) v = v + load_some(shift + i, left);
        store_some(y + i, v, left);
    });
}

void norm_rows(const NormArgs& a, size_t begin, size_t end) {
    for (size_t o = begin; o < end; ++o) {
        const size_t at = o / a.per_gain * a.width;
        for (int i = 0; i < a.inner; ++i) {
            norm_row(a, a.x + o * a.stride + size_t(i) * a.width, a.gain ? a.gain + at : nullptr,
                     a.shift ? a.shift + at : nullptr, a.y + (o * a.inner + i) * a.width);
        }
    }
}

void gate_rows(const GateArgs& a, size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
        const float* gate = a.gate + r * a.gate_stride;
        const float* up = a.up ? a.up + r * a.up_stride : nullptr;
        float* y = a.y + r * a.width;
        for_vectors(a.width, [&](int i, int left) {
            const Floats v = load_some(gate + i, left);
            // 0.5 (1 + tanh u) = 1 / (1 + e^-2u), u = sqrt(2 / pi) (v + 0.044715 v^3)
            const Floats u = a.kind ? v : v * fused(v * v, splat(0.0713548163f), splat(1.5957691216f));
            Floats out = a.kind == 2 ? (v < 0.0f ? Floats{} : v) : v / (exponential(-u) + 1.0f);
            if (up) out = out * load_some(up + i, left);
            store_some(y + i, out, left);
        });
    }
}

void rotate_rows(const RotateArgs& a, size_t begin, size_t end) {
    const int half = a.dim / 2;
    for (size_t t = begin; t < end; ++t) {
        const float* cos = a.cos + t % a.table * half;
        const float* sin = a.sin + t % a.table * half;
        for (int h = 0; h < a.heads; ++h) {
            const float* x = a.x + t * a.stride + size_t(h) * a.dim;
            float* y = a.y + t * a.y_stride + size_t(h) * a.dim;
            for_vectors(half, [&](int i, int left) {
                const Floats c = load_some(cos + i, left), s = load_some(sin + i, left);
                const Floats p = load_some(x + i, left), q = load_some(x + half + i, left);
                store_some(y + i, p * c - q * s, left);
                store_some(y + half + i, q * c + p * s, left);
            });
        }
    }
}

void residual_rows(const ResidualArgs& a, size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
        const float *x = a.x + r * a.width, *add = a.add + r * a.width;
        const float* gate = a.gate ? a.gate + r / a.per_gate * a.width : nullptr;
        float* y = a.y + r * a.width;
        for_vectors(a.width, [&](int i, int left) {
            Floats v = load_some(add + i, left);
            if (gate) v = v * load_some(gate + i, left);
            store_some(y + i, v + load_some(x + i, left), left);
        });
    }
}

constexpr int kWide = LANES == 16 ? 3 : 2;    // vectors of a panel of keys
constexpr int kTall = LANES == 16 ? 8 : LANES == 8 ? 6 : 4;  // queries that meet it at a time

// c [R][N * LANES] = a [R][depth] b [depth][N * LANES]
template <int R, int N>
inline __attribute__((always_inline)) void small_product(const float* a, size_t a_stride,
                                                         int depth, const float* b,
                                                         size_t b_stride, float* c,
                                                         size_t c_stride) {
    Floats sum[R][N];
    OMEGA_UNROLL for (int r = 0; r < R; ++r) {
        OMEGA_UNROLL for (int n = 0; n < N; ++n) sum[r][n] = Floats{};
    }
    for (int k = 0; k < depth; ++k, b += b_stride) {
        Floats row[N];
        OMEGA_UNROLL for (int n = 0; n < N; ++n) row[n] = load(b + n * LANES);
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            const Floats v = splat(a[r * a_stride + k]);
            OMEGA_UNROLL for (int n = 0; n < N; ++n) sum[r][n] = fused(v, row[n], sum[r][n]);
        }
    }
    OMEGA_UNROLL for (int r = 0; r < R; ++r) {
        OMEGA_UNROLL for (int n = 0; n < N; ++n) store(c + r * c_stride + n * LANES, sum[r][n]);
    }
}

// Calls visit(row, height) for tiles of about equal height, which is a constant: a last one of one
// or two rows would wait for its own sums.
template <int R, class Visit>
inline void of_height(int rows, Visit visit) {
    if constexpr (R > 1) {
        if (rows < R) return of_height<R - 1>(rows, visit);
    }
    visit(std::integral_constant<int, R>{});
}
template <class Visit>
inline void for_tiles(size_t row, size_t end, Visit visit) {
    const size_t count = end - row, tiles = (count + kTall - 1) / kTall;
    for (size_t i = 0, at = row; i < tiles; ++i) {
        const size_t next = row + count * (i + 1) / tiles;
        of_height<kTall>(int(next - at), [&](auto height) { visit(at, height); });
        at = next;
    }
}

// The same for any number of rows.
template <int N>
void tall_product(const float* a, size_t a_stride, int rows, int depth, const float* b,
                  size_t b_stride, float* c, size_t c_stride) {
    for_tiles(0, size_t(rows), [&](size_t r, auto height) {
        small_product<decltype(height)::value, N>(a + r * a_stride, a_stride, depth, b, b_stride,
                                                  c + r * c_stride, c_stride);
    });
}

// Scratch of one thread.
struct AttendSpace {
    Buffer<float> keys, values, queries, scores, out;
};
inline AttendSpace& attend_space() {
    thread_local AttendSpace space;
    return space;
}

template <int D>
inline void swap_blocks(Floats (&v)[LANES]) {
    // Lanes with bit D set of row i change places with those without of row i + D.
    Ints keep;
    for (int l = 0; l < LANES; ++l) keep[l] = l & D ? 0 : -1;
    OMEGA_UNROLL for (int i = 0; i < LANES; ++i) {
        if (i & D) continue;
        const Floats a = v[i], b = v[i + D];
        v[i] = keep ? a : swap_lanes<D>(b);
        v[i + D] = keep ? swap_lanes<D>(a) : b;
    }
}

inline void transpose(Floats (&v)[LANES]) {
    swap_blocks<1>(v);
    swap_blocks<2>(v);
#if LANES >= 8
    swap_blocks<4>(v);
#endif
#if LANES >= 16
    swap_blocks<8>(v);
#endif
}

// Keys [count][dim] as panels [keys / (kWide * LANES)][dim][kWide * LANES], zeros behind. Values as
// panels [dim / kValues][count][kValues], the last one as wide as what is left: rows of a whole head,
// a power of two apart, would all fall into a few sets of the caches.
constexpr int kValues = 2 * LANES;
struct Packed {
    const AttendArgs& a;
    int batch, head, total, panels, value_stride;

    Packed(const AttendArgs& args, int b, int h) : a(args), batch(b), head(h) {
        total = a.keys[0].count + (a.sources > 1 ? a.keys[1].count : 0);
        panels = (total + kWide * LANES - 1) / (kWide * LANES);
        value_stride = (a.dim + LANES - 1) / LANES * LANES;
    }
    // Keys that a query sees.
    int seen_by(int query) const {
        const int seen = (a.sources > 1 ? a.keys[0].count : 0) + query + 1;
        return a.causal && seen < total ? seen : total;
    }
    const float* row(int i, bool values) const {
        const bool second = i >= a.keys[0].count;
        const Keys& s = a.keys[second];
        if (second) i -= a.keys[0].count;
        const size_t b = size_t(batch / s.repeats);
        return values ? s.v + b * s.v_batch + head * s.v_head + i * s.v_row
                      : s.k + b * s.k_batch + head * s.k_head + i * s.k_row;
    }
    void pack_keys(Buffer<float>& to) const {
        constexpr int kPanelKeys = kWide * LANES;
        to.reserve(size_t(panels) * kPanelKeys * a.dim);
        for (int block = 0; block < panels * kWide; ++block) {
            float* panel = to.data() + size_t(block / kWide) * kPanelKeys * a.dim +
                           block % kWide * LANES;
            for_vectors(a.dim, [&](int d, int left) {
                Floats v[LANES];
                for (int l = 0; l < LANES; ++l) {
                    const int i = block * LANES + l;
                    v[l] = i < total ? load_some(row(i, false) + d, left) : Floats{};
                }
                transpose(v);
                for (int l = 0; l < left; ++l) store(panel + size_t(d + l) * kPanelKeys, v[l]);
            });
        }
    }
    void pack_values(Buffer<float>& to) const {
        to.reserve(size_t(total) * value_stride);
        for (int i = 0; i < total; ++i) {
            const float* v = row(i, true);
            for_vectors(a.dim, [&](int d, int left) {
                const int first = d / kValues * kValues, rest = value_stride - first;
                const int wide = rest < kValues ? rest : kValues;
                float* panel = to.data() + size_t(first) * total;
                store(panel + size_t(i) * wide + d - first, load_some(v + d, left));
            });
        }
    }
};

// Scores of one query to weights that are not yet divided by their sum, which is returned.
float softmax_row(float* s, int seen, int padded) {
    Floats most = splat(-3.0e38f);
    for (int i = seen; i < padded; ++i) s[i] = -3.0e38f;
    for (int i = 0; i < padded; i += LANES) {
        const Floats v = load(s + i);
        most = larger_of(v, most);
    }
    float peak = most[0];
    for (int l = 1; l < LANES; ++l) peak = most[l] > peak ? most[l] : peak;
    Floats sum{};
    for (int i = 0; i < padded; i += LANES) {
        const Floats v = exponential(load(s + i) - peak);
        store(s + i, v);
        sum += v;
    }
    for (int i = seen; i < padded; ++i) s[i] = 0.0f;
    return total(sum);
}

// Queries [first, last) of one pair of batch entry and key head; they count heads, then rows.
void attend_rows(const AttendArgs& a, const Packed& p, int first, int last, AttendSpace& space) {
    const int count = last - first, width = p.panels * kWide * LANES;
    const int group = a.heads / a.kv_heads;
    space.queries.reserve(size_t(count) * a.dim);
    space.scores.reserve(size_t(count) * width);
    space.out.reserve(size_t(count) * p.value_stride);
    for (int i = 0; i < count; ++i) {
        const int head = p.head * group + (first + i) / a.rows, row = (first + i) % a.rows;
        const float* q = a.q + p.batch * a.q_batch + head * a.q_head + row * a.q_row;
        float* into = space.queries.data() + size_t(i) * a.dim;
        for_vectors(a.dim, [&](int d, int left) {
            store_some(into + d, load_some(q + d, left) * a.scale, left);
        });
    }
    for (int panel = 0; panel < p.panels; ++panel) {
        tall_product<kWide>(space.queries.data(), a.dim, count, a.dim,
                            space.keys.data() + size_t(panel) * kWide * LANES * a.dim,
                            kWide * LANES, space.scores.data() + panel * kWide * LANES, width);
    }
    float sums[128];
    for (int i = 0; i < count; ++i) {
        const int seen = p.seen_by((first + i) % a.rows);
        sums[i] = softmax_row(space.scores.data() + size_t(i) * width, seen, width);
    }
    int d = 0;
    const float* panel = space.values.data();
    for (; d + kValues <= p.value_stride; d += kValues, panel += size_t(kValues) * p.total) {
        tall_product<2>(space.scores.data(), width, count, p.total, panel, kValues,
                        space.out.data() + d, p.value_stride);
    }
    if (d < p.value_stride) {
        tall_product<1>(space.scores.data(), width, count, p.total, panel, LANES,
                        space.out.data() + d, p.value_stride);
    }
    for (int i = 0; i < count; ++i) {
        const int head = p.head * group + (first + i) / a.rows, row = (first + i) % a.rows;
        float* to = a.out + ((size_t(p.batch) * a.rows + row) * a.heads + head) * a.dim;
        const float* from = space.out.data() + size_t(i) * p.value_stride;
        for_vectors(a.dim, [&](int j, int left) {
            store_some(to + j, load_some(from + j, left) / sums[i], left);
        });
    }
}

#if LANES >= 8
#include "attend_shorts.inl"
#endif

void attend_range(const AttendArgs& a, size_t begin, size_t end) {
#if LANES >= 8
    if (shorts_pay(a)) return attend_short_range(a, begin, end);
#endif
    AttendSpace& space = attend_space();
    const int blocks = attend_blocks(a), block = attend_block(a);
    const int queries = a.heads / a.kv_heads * a.rows;
    for (size_t unit = begin; unit < end; ++unit) {
        const int pair = int(unit / blocks), i = int(unit % blocks);
        const Packed packed(a, pair / a.kv_heads, pair % a.kv_heads);
        if (unit == begin || i == 0) {
            packed.pack_keys(space.keys);
            packed.pack_values(space.values);
        }
        const int last = (i + 1) * block < queries ? (i + 1) * block : queries;
        attend_rows(a, packed, i * block, last, space);
    }
}

// R rows from `row` on times a panel of N vectors, which starts at output `first`.
template <int R, int N>
inline __attribute__((always_inline)) void dense_tile(const DenseArgs& a, size_t row, int first,
                                                      const float* w, const float* ahead) {
    Floats sum[R][N];
    OMEGA_UNROLL for (int n = 0; n < N; ++n) {
        const Floats bias = load(a.bias + first + n * LANES);
        OMEGA_UNROLL for (int r = 0; r < R; ++r) sum[r][n] = bias;
    }
    const float* x = a.x + row * a.inputs;
    for (int k = 0; k < a.inputs; ++k, w += N * LANES) {
        __builtin_prefetch(ahead + k * 16, 0, 2);
        Floats weight[N];
        OMEGA_UNROLL for (int n = 0; n < N; ++n) weight[n] = load(w + n * LANES);
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            const Floats v = splat(x[size_t(r) * a.inputs + k]);
            OMEGA_UNROLL for (int n = 0; n < N; ++n) sum[r][n] = fused(v, weight[n], sum[r][n]);
        }
    }
    OMEGA_UNROLL for (int n = 0; n < N; ++n) {
        const int column = first + n * LANES, left = a.outputs - column;
        float* y = a.y + row * a.outputs + column;
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            store_some(y + size_t(r) * a.outputs, sum[r][n], left < LANES ? left : LANES);
        }
    }
}

// Every tile of rows asks for a share of the weights that come next, `ahead`: those of a small
// policy do not fit the second-level cache together, and its few rows leave no time to wait.
template <int N>
void dense_panel(const DenseArgs& a, size_t row, size_t end, int first, const float* w,
                 const float* ahead) {
    const size_t step = size_t(a.inputs) * 16;
    int more = N - 1;
    const auto next = [&] {
        const float* now = ahead;
        if (more-- > 0) ahead += step;
        return now;
    };
    for_tiles(row, end, [&](size_t at, auto height) {
        dense_tile<decltype(height)::value, N>(a, at, first, w, next());
    });
}

void dense_range(const DenseArgs& a, size_t begin, size_t end) {
    constexpr int kColumns = kWide * LANES;
    const size_t panels = size_t((a.outputs + kColumns - 1) / kColumns);
    for (size_t unit = begin; unit < end; ++unit) {
        const size_t row = unit / panels * kDenseRows;
        const size_t last = row + kDenseRows < a.rows ? row + kDenseRows : a.rows;
        const int first = int(unit % panels) * kColumns, left = a.outputs - first;
        const float* w = a.weight + size_t(first) * a.inputs;
        const float* ahead = left > 2 * kColumns ? w + size_t(kColumns) * a.inputs : w;
        if (left > (kWide - 1) * LANES) {
            dense_panel<kWide>(a, row, last, first, w, ahead);
        } else if (left > LANES) {
            dense_panel<2>(a, row, last, first, w, ahead);
        } else {
            dense_panel<1>(a, row, last, first, w, ahead);
        }
    }
}

const RowFns row_fns = {LANES,          kWide * LANES, &norm_rows,    &gate_rows,
                        &rotate_rows,   &residual_rows, &attend_range, &dense_range};
