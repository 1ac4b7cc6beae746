// Attention whose products are of whole numbers of 16 bits, for quantized layers: twice as many
// fit into an instruction as of float32. Included after rows.inl on x86.
//
// Queries and keys have a scale each, so that |q| |k| < 2^31 bounds every sum (Cauchy-Schwarz): a
// score is exact but for the rounding of q and k, 1e-5 of |q| |k|. Weights of 32 keys at a time have
// the largest of them as their unit, values have a scale per dimension: 32 * 2^14 * 4095 < 2^31.
//
// A key that takes nearly all (an attention sink, whose values are near zero) would leave nothing
// of its 31 neighbours: its value is added in float32.

constexpr int kPanelWidth = 2 * LANES;  // keys, or dimensions of values
constexpr int kFold = 32;               // keys whose weights share a unit; whole panels
constexpr int kPairsOfFold = kFold / 2;
constexpr float kNorm = 46000.0f, kMostShort = 32766.0f, kShare = 16384.0f, kMostValue = 4095.0f;
constexpr int kShortTall = LANES == 16 ? 8 : 6;
typedef int16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline void add_pairs(Ints& sum, Ints a, Ints b) {
#if LANES == 16
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
    const __m256i two = _mm256_madd_epi16(__m256i(a), __m256i(b));
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(two));
#endif
}

inline Ints rounded(Floats v) {
#if LANES == 16
    return Ints(_mm512_cvtps_epi32(__m512(v)));
#else
    return Ints(_mm256_cvtps_epi32(__m256(v)));
#endif
}
inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }
inline Ints pairs_of(Ints first, Ints second) { return (first & 0xffff) | (second << 16); }
inline void store_shorts(int16_t* to, Floats v) {
    *reinterpret_cast<Shorts*>(to) = __builtin_convertvector(rounded(v), Shorts);
}

// `total` is what keys are called by in Packed.
inline float sum_of(Floats v) { return total(v); }
inline Floats magnitude(Floats v) { return Floats(Ints(v) & 0x7fffffff); }
// In every lane.
inline Floats largest(Floats v) {
    v = larger_of(swap_lanes<1>(v), v);
    v = larger_of(swap_lanes<2>(v), v);
    v = larger_of(swap_lanes<4>(v), v);
#if LANES == 16
    v = larger_of(swap_lanes<8>(v), v);
#endif
    return v;
}

// What to multiply rows by, of sums of squares and largest magnitudes. NaN where a value is none:
// the scores are then, too.
inline Floats units_of(Floats squares, Floats most) {
#if LANES == 16
    const Floats norm = Floats(_mm512_sqrt_ps(__m512(squares)));
#else
    const Floats norm = Floats(_mm256_sqrt_ps(__m256(squares)));
#endif
    const Floats by_norm = kNorm / norm, by_most = kMostShort / most;
    const Floats unit = by_most < by_norm ? by_most : by_norm;
    return squares == 0.0f ? splat(1.0f) : unit;
}

inline float unit_of(const float* x, int dim) {
    Floats squares{}, most{};
    for_vectors(dim, [&](int d, int left) {
        const Floats v = load_some(x + d, left);
        squares = fused(v, v, squares);
        most = larger_of(magnitude(v), most);
    });
    return units_of(splat(total(squares)), largest(most))[0];
}

struct Lone {
    int key;
    float weight;
};

// Scratch of one thread.
struct ShortSpace {
    Buffer<int32_t> keys, values;   // panels [pairs][kPanelWidth], a pair to an element
    Buffer<int16_t> queries, shares;
    Buffer<Lone> lone;              // [queries][folds], the first `lone_count` of each
    Buffer<int> lone_count;
    Buffer<float> key_scale, query_scale, value_scale, scores, units, sums, turned;
};
inline ShortSpace& short_space() {
    thread_local ShortSpace space;
    return space;
}

// Sizes, and the keys and values of one pair of batch entry and key head.
struct ShortPacked : Packed {
    int dim_pairs, width, folds, value_panels;

    ShortPacked(const AttendArgs& args, int b, int h) : Packed(args, b, h) {
        dim_pairs = (a.dim + 1) / 2;
        folds = (total + kFold - 1) / kFold;
        width = folds * kFold;
        value_panels = (a.dim + kPanelWidth - 1) / kPanelWidth;
    }
    void pack_keys(ShortSpace& s) const {
        s.keys.reserve(size_t(width) * dim_pairs);
        s.key_scale.reserve(size_t(width));
        const int vectors = (a.dim + LANES - 1) / LANES * LANES;
        s.turned.reserve(size_t(vectors) * LANES);
        for (int first = 0; first < width; first += LANES) {
            Floats squares{}, most{};
            for_vectors(a.dim, [&](int d, int left) {
                Floats v[LANES];
                for (int l = 0; l < LANES; ++l) {
                    v[l] = first + l < total ? load_some(row(first + l, false) + d, left) : Floats{};
                }
                transpose(v);
                OMEGA_UNROLL for (int l = 0; l < LANES; ++l) {
                    squares = fused(v[l], v[l], squares);
                    most = larger_of(magnitude(v[l]), most);
                    store(s.turned.data() + size_t(d + l) * LANES, v[l]);
                }
            });
            const Floats unit = units_of(squares, most);
            store(s.key_scale.data() + first, 1.0f / unit);
            int32_t* panel = s.keys.data() + size_t(first / kPanelWidth) * dim_pairs * kPanelWidth +
                             first % kPanelWidth;
            const float* from = s.turned.data();
            for (int k = 0; k < dim_pairs; ++k, from += 2 * LANES, panel += kPanelWidth) {
                const Ints both = pairs_of(rounded(load(from) * unit),
                                           rounded(load(from + LANES) * unit));
                store(reinterpret_cast<float*>(panel), Floats(both));
            }
        }
    }
    // Row by row: a column of rows, a power of two apart, falls into a few sets of the caches.
    void pack_values(ShortSpace& s) const {
        const int all = value_panels * kPanelWidth;
        s.values.reserve(value_panels * value_stride());
        s.value_scale.reserve(size_t(all));
        s.turned.reserve(size_t(all));
        float *most = s.value_scale.data(), *unit = s.turned.data();
        Floats poison{};
        for (int d = 0; d < all; d += LANES) store(most + d, Floats{});
        for (int i = 0; i < total; ++i) {
            const float* v = row(i, true);
            for_vectors(a.dim, [&](int d, int left) {
                const Floats x = load_some(v + d, left);
                store(most + d, larger_of(magnitude(x), load(most + d)));
                poison = fused(x, Floats{}, poison);  // NaN or zero
            });
        }
        const float spoilt = sum_of(poison);
        for (int d = 0; d < all; d += LANES) {
            const Floats m = load(most + d);
            store(unit + d, m > 0.0f ? kMostValue / m : Floats{});
            store(most + d, m / kMostValue + spoilt);
        }
        for (int i = 0; i < width; i += 2) {
            const float* first = i < total ? row(i, true) : nullptr;
            const float* second = i + 1 < total ? row(i + 1, true) : nullptr;
            int32_t* to = s.values.data() + size_t(i / 2) * kPanelWidth;
            for (int d = 0; d < all; d += LANES) {
                const int left = a.dim - d < LANES ? a.dim - d : LANES;
                const auto part = [&](const float* v) {
                    return v && left > 0 ? rounded(load_some(v + d, left) * load(unit + d)) : Ints{};
                };
                store(reinterpret_cast<float*>(to + d / kPanelWidth * value_stride() +
                                               d % kPanelWidth),
                      Floats(pairs_of(part(first), part(second))));
            }
        }
    }
    // Elements from panel to panel of values: a line more than they need, for the same reason.
    size_t value_stride() const { return size_t(width / 2 + 1) * kPanelWidth; }
};

// sum [R][2 vectors] of `pairs` products of pairs; rows of x `stride` shorts apart.
template <int R>
inline __attribute__((always_inline)) void short_product(const int16_t* x, size_t stride, int pairs,
                                                         const int32_t* panel, Ints (&sum)[R][2]) {
    Ints own[R][2];
    OMEGA_UNROLL for (int r = 0; r < R; ++r) own[r][0] = own[r][1] = Ints{};
    for (int k = 0; k < pairs; ++k, panel += kPanelWidth, x += 2) {
        const Ints first = Ints(load(reinterpret_cast<const float*>(panel)));
        const Ints second = Ints(load(reinterpret_cast<const float*>(panel + LANES)));
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            int32_t both;
            __builtin_memcpy(&both, x + r * stride, sizeof both);
            const Ints v = Ints{} + both;
            add_pairs(own[r][0], first, v);
            add_pairs(own[r][1], second, v);
        }
    }
    OMEGA_UNROLL for (int r = 0; r < R; ++r) {
        sum[r][0] = own[r][0];
        sum[r][1] = own[r][1];
    }
}

template <int R>
__attribute__((noinline)) void short_scores(const ShortSpace& s, const ShortPacked& p, int first, int panel, float* to) {
    Ints sum[R][2];
    const size_t stride = size_t(p.dim_pairs) * 2;
    short_product<R>(s.queries.data() + first * stride, stride, p.dim_pairs,
                     s.keys.data() + size_t(panel) * p.dim_pairs * kPanelWidth, sum);
    const float* scale = s.key_scale.data() + panel * kPanelWidth;
    OMEGA_UNROLL for (int r = 0; r < R; ++r) {
        const float mine = s.query_scale[size_t(first + r)];
        float* row = to + size_t(first + r) * p.width + panel * kPanelWidth;
        OMEGA_UNROLL for (int n = 0; n < 2; ++n) {
            store(row + n * LANES, to_floats(sum[r][n]) * load(scale + n * LANES) * mine);
        }
    }
}

// Values mixed by the weights of R queries, for one panel of dimensions.
template <int R>
__attribute__((noinline)) void short_mix(const ShortSpace& s, const ShortPacked& p, int first, int panel, float* const* to) {
    Floats mixed[R][2] = {};
    const int32_t* values = s.values.data() + size_t(panel) * p.value_stride();
    for (int fold = 0; fold < p.folds; ++fold, values += kPairsOfFold * kPanelWidth) {
        Ints sum[R][2];
        short_product<R>(s.shares.data() + size_t(first) * p.width + fold * kFold, p.width,
                         kPairsOfFold, values, sum);
        OMEGA_UNROLL for (int r = 0; r < R; ++r) {
            const Floats unit = splat(s.units[size_t(first + r) * p.folds + fold]);
            OMEGA_UNROLL for (int n = 0; n < 2; ++n) {
                mixed[r][n] = fused(to_floats(sum[r][n]), unit, mixed[r][n]);
            }
        }
    }
    OMEGA_UNROLL for (int n = 0; n < 2; ++n) {
        const int d = panel * kPanelWidth + n * LANES;
        const int left = p.a.dim - d < LANES ? p.a.dim - d : LANES;
        if (left <= 0) continue;
        const Floats scale = load(s.value_scale.data() + d);
        for (int r = 0; r < R; ++r) {
            const size_t query = size_t(first + r);
            Floats v = mixed[r][n] * scale;
            const Lone* lone = s.lone.data() + query * p.folds;
            for (int i = 0; i < s.lone_count[query]; ++i) {
                const float* value = p.row(lone[i].key, true) + d;
                v = fused(load_some(value, left), splat(lone[i].weight), v);
            }
            store_some(to[query] + d, v / s.sums[query], left);
        }
    }
}

// e^(s - most) of one fold; their sum.
inline Floats fold_weights(const float* s, Floats most, Floats (&weights)[kFold / LANES]) {
    Floats sum{};
    OMEGA_UNROLL for (int i = 0; i < kFold / LANES; ++i) {
        weights[i] = exponential(load(s + i * LANES) - most);
        sum += weights[i];
    }
    return sum;
}
inline Floats fold_most(const float* s) {
    Floats most = load(s);
    for (int i = LANES; i < kFold; i += LANES) most = larger_of(load(s + i), most);
    return largest(most);
}

// Scores of one query to weights as whole numbers: of each fold in its own unit. The sum of all.
float short_softmax(float* scores, int seen, const ShortPacked& p, ShortSpace& space, size_t query) {
    int16_t* shares = space.shares.data() + query * p.width;
    float* units = space.units.data() + query * p.folds;
    Lone* lone = space.lone.data() + query * p.folds;
    int& lonely = space.lone_count[query];
    lonely = 0;
    for (int i = seen; i < p.width; ++i) scores[i] = -3.0e38f;
    float top = -3.0e38f;
    for (int f = 0; f < p.folds; ++f) {
        units[f] = fold_most(scores + f * kFold)[0];
        top = units[f] > top ? units[f] : top;
    }
    Floats sum{};
    float alone = 0.0f;
    for (int f = 0; f < p.folds; ++f) {
        float* s = scores + f * kFold;
        Floats most = splat(units[f]), weights[kFold / LANES];
        Floats inside = fold_weights(s, most, weights);
        Floats weight = units[f] < -1.0e38f ? Floats{} : exponential(most - top);
        // The others are a 128th of the largest on the average, or less, and it is near the top.
        if (weight[0] > 0x1p-6f && total(inside) < 1.0f + 31.0f / 128.0f) {
            int key = 0;
            while (key < kFold - 1 && !(s[key] == units[f])) ++key;
            lone[lonely++] = {f * kFold + key, weight[0]};
            alone += weight[0];
            s[key] = -3.0e38f;
            most = fold_most(s);
            inside = fold_weights(s, most, weights);
            weight = most[0] < -1.0e38f ? Floats{} : exponential(most - top);
        }
        OMEGA_UNROLL for (int i = 0; i < kFold / LANES; ++i) {
            store_shorts(shares + f * kFold + i * LANES, weights[i] * kShare);
        }
        sum = fused(inside, weight, sum);
        units[f] = weight[0] / kShare;
    }
    return total(sum) + alone;
}

// Queries [first, last) of one pair of batch entry and key head.
void attend_short_rows(const AttendArgs& a, const ShortPacked& p, int first, int last,
                       ShortSpace& s) {
    const int count = last - first, group = a.heads / a.kv_heads, pairs = p.dim_pairs * 2;
    const int vectors = (a.dim + LANES - 1) / LANES * LANES;
    s.queries.reserve(size_t(count) * pairs + size_t(vectors));  // whole vectors are written
    s.query_scale.reserve(size_t(count));
    s.scores.reserve(size_t(count) * p.width);
    s.shares.reserve(size_t(count) * p.width);
    s.units.reserve(size_t(count) * p.folds);
    s.sums.reserve(size_t(count));
    s.lone.reserve(size_t(count) * p.folds);
    s.lone_count.reserve(size_t(count));
    float* to[128];
    for (int i = 0; i < count; ++i) {
        const int head = p.head * group + (first + i) / a.rows, row = (first + i) % a.rows;
        const float* q = a.q + p.batch * a.q_batch + head * a.q_head + row * a.q_row;
        const float unit = unit_of(q, a.dim);
        s.query_scale[size_t(i)] = a.scale / unit;
        for_vectors(a.dim, [&](int d, int left) {
            store_shorts(s.queries.data() + size_t(i) * pairs + d, load_some(q + d, left) * unit);
        });
        to[i] = a.out + ((size_t(p.batch) * a.rows + row) * a.heads + head) * a.dim;
    }
    const auto tiles = [&](auto tall, auto four, auto single) {
        int i = 0;
        for (; i + kShortTall <= count; i += kShortTall) tall(i);
        for (; i + 4 <= count; i += 4) four(i);
        for (; i < count; ++i) single(i);
    };
    for (int panel = 0; panel < p.width / kPanelWidth; ++panel) {
        float* scores = s.scores.data();
        tiles([&](int i) { short_scores<kShortTall>(s, p, i, panel, scores); },
              [&](int i) { short_scores<4>(s, p, i, panel, scores); },
              [&](int i) { short_scores<1>(s, p, i, panel, scores); });
    }
    for (int i = 0; i < count; ++i) {
        const int seen = p.seen_by((first + i) % a.rows);
        s.sums[size_t(i)] = short_softmax(s.scores.data() + size_t(i) * p.width, seen, p, s,
                                          size_t(i));
    }
    for (int panel = 0; panel < p.value_panels; ++panel) {
        tiles([&](int i) { short_mix<kShortTall>(s, p, i, panel, to); },
              [&](int i) { short_mix<4>(s, p, i, panel, to); },
              [&](int i) { short_mix<1>(s, p, i, panel, to); });
    }
}

// Where the products are many enough to be worth packing in another way.
inline bool shorts_pay(const AttendArgs& a) {
    const int keys = a.keys[0].count + (a.sources > 1 ? a.keys[1].count : 0);
    return !a.exact && keys >= 256 && a.heads / a.kv_heads * a.rows >= 32;
}

void attend_short_range(const AttendArgs& a, size_t begin, size_t end) {
    ShortSpace& space = short_space();
    const int blocks = attend_blocks(a), block = attend_block(a);
    const int queries = a.heads / a.kv_heads * a.rows;
    for (size_t unit = begin; unit < end; ++unit) {
        const int pair = int(unit / blocks), i = int(unit % blocks);
        const ShortPacked packed(a, pair / a.kv_heads, pair % a.kv_heads);
        if (unit == begin || i == 0) {
            packed.pack_keys(space);
            packed.pack_values(space);
        }
        const int last = (i + 1) * block < queries ? (i + 1) * block : queries;
        attend_short_rows(a, packed, i * block, last, space);
    }
}
