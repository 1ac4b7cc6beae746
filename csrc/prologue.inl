// From rows of floats to a tile of integers: multiply, permute, rotate, find scales, round.
// Included after rotation.inl. Rows stay in the first-level cache throughout.

// x, multiplied and permuted, into p; zeros behind it.
void load_row(const Prologue& pro, const float* x, float* p) {
    const int n = pro.inputs;
    int j = 0;
    if (pro.permutation) {
        for (; j < n; ++j) {
            p[j] = x[pro.permutation[j]] * (pro.multiplier ? pro.multiplier[j] : 1.0f);
        }
    } else if (pro.multiplier) {
        for (; j + LANES <= n; j += LANES) store(p + j, load(x + j) * load(pro.multiplier + j));
        for (; j < n; ++j) p[j] = x[j] * pro.multiplier[j];
    } else {
        for (; j + LANES <= n; j += LANES) store(p + j, load(x + j));
        for (; j < n; ++j) p[j] = x[j];
    }
    for (; j < pro.padded; ++j) p[j] = 0.0f;
}

// load_row and blocks of 64 in one pass, the usual case.
void load_row_hadamard64(const Prologue& pro, const float* x, float* p) {
    constexpr int N = 64 / LANES;
    for (int j = 0; j < pro.inputs; j += 64) {
        Floats v[N];
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
            v[i] = load(x + j + i * LANES);
            if (pro.multiplier) v[i] *= load(pro.multiplier + j + i * LANES);
        }
        hadamard_registers(v);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) store(p + j + i * LANES, v[i]);
    }
    for (int j = pro.inputs; j < pro.padded; ++j) p[j] = 0.0f;
}

void rotate(const Prologue& pro, float* p, int rows) {
    switch (pro.rotation) {
        case Rotation::none: break;
        case Rotation::hadamard: hadamard_blocks(p, pro.inputs, pro.block); break;
        case Rotation::full: hadamard_full(p, pro.inputs, pro.base, pro.matrix); break;
        case Rotation::dense: dense_blocks(p, pro.padded, rows, pro); break;
    }
}

typedef uint32_t Uints __attribute__((vector_size(4 * LANES)));

template <class I>
inline I larger(I a, I b) { return a > b ? a : b; }
inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }

template <int D, class I>
inline I spread(I v) { return larger(v, I(swap_lanes<D>(Floats(v)))); }

// The largest of all lanes, in every lane.
template <class I>
inline I spread_largest(I v) {
    v = spread<1>(v);
    v = spread<2>(v);
#if LANES >= 8
    v = spread<4>(v);
#endif
#if LANES >= 16
    v = spread<8>(v);
#endif
    return v;
}

// Largest |p[i]|, in every lane. Compared as bits: infinity above numbers, NaN above all.
inline Floats absmax(const float* p, int n) {
    Ints a{}, b{};
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        a = larger(a, Ints(load(p + i)) & 0x7fffffff);
        b = larger(b, Ints(load(p + i + LANES)) & 0x7fffffff);
    }
    for (; i < n; i += LANES) a = larger(a, Ints(load(p + i)) & 0x7fffffff);
    return Floats(spread_largest(larger(a, b)));
}

inline int32_t sum_lanes(Ints v) {
    v = v + Ints(swap_lanes<1>(Floats(v)));
    v = v + Ints(swap_lanes<2>(Floats(v)));
#if LANES >= 8
    v = v + Ints(swap_lanes<4>(Floats(v)));
#endif
#if LANES >= 16
    v = v + Ints(swap_lanes<8>(Floats(v)));
#endif
    return v[0];
}

// Each lane to a byte that it fits in.
inline Bytes to_bytes(Ints v) {
#if LANES == 8  // GCC would take the lanes apart, one after another
    typedef int8_t All __attribute__((vector_size(4 * LANES)));
    return __builtin_shufflevector(All(v), All(v), 0, 4, 8, 12, 16, 20, 24, 28);
#else
    return __builtin_convertvector(v, Bytes);
#endif
}

// v times inverse, rounded to even and cut to the range, into bytes.
inline Ints round_vector(Ints low, Ints high, Floats v, Floats inverse, int8_t* q) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: the addition rounds
    Ints whole = Ints(v * inverse + magic) - Ints(magic);
    whole = larger(smaller(whole, high), low);
    *reinterpret_cast<LooseBytes*>(q) = to_bytes(whole);
    return whole;
}

// The same of a run of floats. Returns the sum of the integers.
// FIXED scales may be far too small for p: cut before rounding, which works up to 2^22.
template <bool FIXED>
inline int32_t round_run(const Prologue& pro, const float* p, int n, Floats inverse, int8_t* q) {
    const Ints low = Ints{} + int32_t(pro.low), high = Ints{} + int32_t(pro.high);
    const Floats lowest = splat(pro.low), highest = splat(pro.high), one = splat(1.0f);
    Ints sum{};
    for (int i = 0; i < n; i += LANES) {
        Floats v = load(p + i);
        if (FIXED) {
            v *= inverse;
            v = v < lowest ? lowest : v;
            v = v > highest ? highest : v;
        }
        sum += round_vector(low, high, v, FIXED ? one : inverse, q + i);
    }
    return sum_lanes(sum);
}

// To the 8 bits of a bfloat16, halves to even; what is not a number stays so.
inline Floats round_scale(Floats v) {
    const Ints bits = Ints(v), odd = (bits >> 16) & 1;
    const Floats rounded = Floats((bits + 0x7fff + odd) & ~0xffff);
    return v == v ? rounded : v;
}

inline Floats at_least_tiny(Floats v) {
    constexpr float tiny = 1.17549435e-38f;
    return v < tiny ? splat(tiny) : v;
}

// From the largest numbers as bits, signed and unsigned.
inline Floats signed_scale(const Prologue& pro, Ints above, Uints lowest) {
    const Uints minus_zero = Uints{} + 0x80000000u;
    const Ints below = Ints(lowest ^ minus_zero);
    const Floats first = Floats(larger(above, below)) * pro.first_factor;
    const Floats second = Floats(smaller(above, below)) * pro.factor;
    const Floats size = at_least_tiny(second > first ? second : first);
    return Floats(Uints(size) ^ (below < above ? minus_zero : Uints{}));
}

// A scale with a sign from the values that it is for, in every lane: negative where the largest of
// them is positive; all zeros have a positive one. As bits the largest number is the largest value,
// and the largest unsigned one the lowest value: infinity above numbers, NaN above all.
inline Floats signed_scale(const Prologue& pro, const float* p, int n) {
    const Uints minus_zero = Uints{} + 0x80000000u;
    Ints high[2] = {};
    Uints low[2] = {minus_zero, minus_zero};
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        for (int k = 0; k < 2; ++k) {
            const Floats v = load(p + i + k * LANES);
            high[k] = larger(high[k], Ints(v));
            low[k] = larger(low[k], Uints(v));
        }
    }
    for (; i < n; i += LANES) {
        high[0] = larger(high[0], Ints(load(p + i)));
        low[0] = larger(low[0], Uints(load(p + i)));
    }
    return signed_scale(pro, spread_largest(larger(high[0], high[1])),
                        spread_largest(larger(low[0], low[1])));
}
inline Floats dynamic_scale(const Prologue& pro, const float* p, int n) {
    if (pro.signed_scales) return signed_scale(pro, p, n);
    return at_least_tiny(absmax(p, n) * pro.factor);
}

// One row of floats to integers, sums and scales.
void quantize_row(const Prologue& pro, const float* p, int step, int row, const QuantTile& to,
                  int8_t* q) {
    const int per_group = pro.group / pro.segment;
    for (int g = 0, s = 0; g < pro.groups; ++g) {
        const int start = g * pro.group;
        const int end = start + pro.group < pro.padded ? start + pro.group : pro.padded;
        Floats scale, inverse;
        if (pro.table) {
            const Floats peak = absmax(p + start, end - start);
            const float fixed = pro.table[size_t(step) * pro.groups + g];
            inverse = splat(pro.norm / fixed);
            scale = splat(peak[0] == peak[0] ? fixed : peak[0]);
        } else {
            scale = dynamic_scale(pro, p + start, end - start);
            if (to.act_scale) scale = round_scale(scale);
            inverse = pro.norm / scale;
        }
        for (int i = 0; i < per_group && s < pro.segments; ++i, ++s) {
            const int at = s * pro.segment;
            const int32_t sum =
                pro.table ? round_run<true>(pro, p + at, pro.segment, inverse, q + at)
                          : round_run<false>(pro, p + at, pro.segment, inverse, q + at);
            to.offset[s * to.stride() + row] = pro.start - 8 * sum;
            if (to.act_scale) to.act_scale[s * to.stride() + row] = scale[0];
        }
        to.token_scale[row] = to.act_scale ? 1.0f : scale[0];
    }
}

// Lane i: the largest of all lanes of v[i], for the first 2 * D of them.
template <int D, class I>
inline I largest_of_each(const I* v) {
    if constexpr (D == 0) {
        return v[0];
    } else {
        Ints second;
        for (int i = 0; i < LANES; ++i) second[i] = i & D ? -1 : 0;
        const I a = spread<D>(largest_of_each<D / 2>(v));
        const I b = spread<D>(largest_of_each<D / 2>(v + D));
        return second ? b : a;
    }
}

// Scales of LANES blocks at once, as dynamic_scale: what each one's values are between is known.
struct Ranges {
    Ints high[LANES];   // of absolute values, or of values
    Uints low[LANES];   // of values

    inline void set(bool signed_scales, int i, const Floats* v, int n) {
        const Uints minus_zero = Uints{} + 0x80000000u;
        high[i] = Ints{};
        low[i] = minus_zero;
        for (int k = 0; k < n; ++k) {
            high[i] = larger(high[i], signed_scales ? Ints(v[k]) : Ints(v[k]) & 0x7fffffff);
            if (signed_scales) low[i] = larger(low[i], Uints(v[k]));
        }
    }
    inline Floats scales(const Prologue& pro) const {
        const Ints highest = largest_of_each<LANES / 2>(high);
        if (!pro.signed_scales) return at_least_tiny(Floats(highest) * pro.factor);
        return signed_scale(pro, highest, largest_of_each<LANES / 2>(low));
    }
};

// The usual row: blocks of 64, rotated, with a scale each. LANES of them at a time, so that their
// scales come out of one vector; one after another they would wait for each other.
void quantize_blocks64(const Prologue& pro, const float* x, int row, const QuantTile& to,
                       float* p, int8_t* q) {
    constexpr int N = 64 / LANES, ahead = 1024;
    const Ints low = Ints{} + int32_t(pro.low), high = Ints{} + int32_t(pro.high);
    Ranges ranges;
    float scale[LANES], inverse[LANES];
    for (int first = 0; first < pro.groups; first += LANES, x += 64 * LANES) {
        const int count = pro.groups - first < LANES ? pro.groups - first : LANES;
        const float* multiplier = pro.multiplier ? pro.multiplier + first * 64 : nullptr;
        for (int g = 0; g < LANES; ++g) {
            Floats v[N] = {};
            if (g < count) {
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) {
                    const int at = g * 64 + i * LANES;
                    v[i] = load(x + at);
                    if (multiplier) v[i] *= load(multiplier + at);
                }
                for (int i = 0; i < 64; i += 16) __builtin_prefetch(x + ahead + g * 64 + i, 0, 3);
                hadamard_registers(v);
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) store(p + g * 64 + i * LANES, v[i]);
            }
            ranges.set(pro.signed_scales, g, v, N);
        }
        const Floats found = round_scale(ranges.scales(pro));
        store(scale, found);
        store(inverse, pro.norm / found);
        for (int g = 0; g < count; ++g, q += 64) {
            const Floats factor = splat(inverse[g]);
            Ints sum{};
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) {
                sum += round_vector(low, high, load(p + g * 64 + i * LANES), factor, q + i * LANES);
            }
            const size_t at = size_t(first + g) * to.stride() + row;
            to.act_scale[at] = scale[g];
            if (to.order != Order::pairs) to.offset[at] = pro.start - 8 * sum_lanes(sum);
        }
    }
    to.token_scale[row] = 1.0f;
}

// To 12 bits (Veltkamp's splitting), so that products with the 11 bits of a stored 16-bit float
// are exact: it then does not matter whether they are added by a fused instruction.
inline float round_share(double sum) {
    const double raised = sum * double((int64_t(1) << 41) + 1);
    return float(raised - (raised - sum));
}

// The row times the low-rank part's input side: sums in double, whose order does not show.
template <int RANKS>
inline void project_ranks(const Prologue& pro, const float* p, int first, float* out) {
    const float* b = pro.lowrank_b + size_t(first) * pro.padded;
    Doubles sum[RANKS] = {};
    for (int k = 0; k < pro.padded; k += LANES / 2) {
        const Doubles x = Vec::load_wide(p + k);
#pragma GCC unroll 4
        for (int i = 0; i < RANKS; ++i) {
            sum[i] = Vec::fma_wide(x, Vec::load_wide(b + size_t(i) * pro.padded + k), sum[i]);
        }
    }
    for (int i = 0; i < RANKS; ++i) {
        double total = 0.0;
        for (int l = 0; l < LANES / 2; ++l) total += sum[i][l];
        out[first + i] = round_share(total);
    }
}

inline void project_row(const Prologue& pro, const float* p, float* out) {
    int i = 0;
    for (; i + 4 <= pro.rank; i += 4) project_ranks<4>(pro, p, i, out);
    for (; i < pro.rank; ++i) project_ranks<1>(pro, p, i, out);
}

typedef int32_t Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define EVERY_FOUR_4(f) f(0)
#define EVERY_FOUR_8(f) f(0), f(4)
#define EVERY_FOUR_16(f) f(0), f(4), f(8), f(12)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define EVERY_FOUR JOIN(EVERY_FOUR_, LANES)
#define SINGLES_LOW(i) i, LANES + i, i + 1, LANES + i + 1
#define SINGLES_HIGH(i) i + 2, LANES + i + 2, i + 3, LANES + i + 3
#define PAIRS_LOW(i) i, i + 1, LANES + i, LANES + i + 1
#define PAIRS_HIGH(i) i + 2, i + 3, LANES + i + 2, LANES + i + 3
// Within every four elements: the lower or upper halves of a and b, by singles or by pairs.
#define MIX(a, b, which) __builtin_shufflevector(a, b, EVERY_FOUR(which))

// Each four elements of v to a place of its own, `stride` bytes apart.
template <int PART = 0>
inline void store_fours(Ints v, int8_t* out, size_t stride) {
    constexpr int i = 4 * PART;
    *reinterpret_cast<Four*>(out) = __builtin_shufflevector(v, v, i, i + 1, i + 2, i + 3);
    if constexpr (i + 4 < LANES) store_fours<PART + 1>(v, out + stride, stride);
}

// Four rows, LANES * 4 bytes of each, to [LANES][kRowStride][4].
inline void interleave_four(const int8_t* q, size_t stride, int8_t* out) {
    Ints r[4];
    for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const LooseInts*>(q + i * stride);
    const Ints a = MIX(r[0], r[1], SINGLES_LOW), b = MIX(r[0], r[1], SINGLES_HIGH);
    const Ints c = MIX(r[2], r[3], SINGLES_LOW), d = MIX(r[2], r[3], SINGLES_HIGH);
    constexpr size_t step = kRowStride * 4;
    store_fours(MIX(a, c, PAIRS_LOW), out, 4 * step);
    store_fours(MIX(a, c, PAIRS_HIGH), out + step, 4 * step);
    store_fours(MIX(b, d, PAIRS_LOW), out + 2 * step, 4 * step);
    store_fours(MIX(b, d, PAIRS_HIGH), out + 3 * step, 4 * step);
}

// The rows' bytes, [rows][padded], to the tile's order. Rows that do not exist hold anything.
void interleave(const int8_t* q, int padded, const QuantTile& to) {
    if (to.rows == 1) {
        __builtin_memcpy(to.acts, q, padded);
        return;
    }
    for (int first = 0; first < to.rows; first += 4) {
        int k = 0;
        for (; k + LANES * 4 <= padded; k += LANES * 4) {
            interleave_four(q + size_t(first) * padded + k, padded,
                            to.acts + k * kRowStride + first * 4);
        }
        for (; k < padded; k += 4) {
            for (int r = first; r < first + 4; ++r) {
                __builtin_memcpy(to.acts + k * kRowStride + r * 4, q + size_t(r) * padded + k, 4);
            }
        }
    }
}

// For another order than Order::vectors the bytes are left in the scratch.
void prologue_tile(const Prologue& pro, const float* x, size_t x_stride, int step,
                   const QuantTile& to, const Scratch& scratch) {
    const bool usual = pro.rotation == Rotation::hadamard && pro.block == 64 &&
                       !pro.permutation && pro.inputs % 64 == 0;
    if (usual && to.act_scale && pro.group == 64 && pro.segment == 64 && !pro.table && !pro.rank) {
        for (int r = 0; r < to.rows; ++r) {
            quantize_blocks64(pro, x + r * x_stride, r, to, scratch.rows,
                              scratch.bytes + size_t(r) * pro.padded);
        }
        if (to.order == Order::vectors) interleave(scratch.bytes, pro.padded, to);
        return;
    }
    const int batch = pro.rotation == Rotation::dense ? to.rows : 1;
    for (int first = 0; first < to.rows; first += batch) {
        for (int r = 0; r < batch; ++r) {
            const float* from = x + (first + r) * x_stride;
            float* p = scratch.rows + size_t(r) * pro.padded;
            usual ? load_row_hadamard64(pro, from, p) : load_row(pro, from, p);
        }
        if (!usual) rotate(pro, scratch.rows, batch);
        for (int r = 0; r < batch; ++r) {
            project_row(pro, scratch.rows + size_t(r) * pro.padded,
                        to.lowrank + (first + r) * pro.rank);
            quantize_row(pro, scratch.rows + size_t(r) * pro.padded, step, first + r, to,
                         scratch.bytes + size_t(first + r) * pro.padded);
        }
    }
    if (to.order == Order::vectors) interleave(scratch.bytes, pro.padded, to);
}
