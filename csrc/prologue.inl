// From rows of floats to a tile of integers: multiply, permute, rotate, find scales, round.
// Written with compiler vectors; included once per instruction set with LANES defined (floats in
// a vector), inside its anonymous namespace. Rows stay in the first-level cache throughout.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef float LooseFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int8_t LooseBytes __attribute__((vector_size(LANES), aligned(1), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<LooseFloats*>(p) = v; }
inline Floats splat(float v) { return v - Floats{}; }

// Lane i of the result is lane i ^ D of v.
#if LANES == 16
template <int D>
inline Floats swap_lanes(Floats v) {
    return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D,
                                   8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
}
#elif LANES == 8
template <int D>
inline Floats swap_lanes(Floats v) {
    return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D);
}
#else
template <int D>
inline Floats swap_lanes(Floats v) {
    return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D);
}
#endif

// One butterfly at distance D inside a vector: lanes without bit D get the sum of the pair,
// the others the difference.
template <int D>
inline Floats butterfly(Floats v) {
    Floats sign;
    for (int i = 0; i < LANES; ++i) sign[i] = i & D ? -1.0f : 1.0f;
    return swap_lanes<D>(v) + v * sign;
}

inline Floats butterflies(Floats v) {
    v = butterfly<1>(v);
    v = butterfly<2>(v);
#if LANES >= 8
    v = butterfly<4>(v);
#endif
#if LANES >= 16
    v = butterfly<8>(v);
#endif
    return v;
}

// Unnormalized Walsh-Hadamard transform of N * LANES neighbouring floats, in registers.
template <int N>
inline void hadamard_registers(float* p) {
    Floats v[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = butterflies(load(p + i * LANES));
#pragma GCC unroll 4
    for (int h = 1; h < N; h *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
            if (i & h) continue;
            const Floats a = v[i], b = v[i + h];
            v[i] = a + b;
            v[i + h] = a - b;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) store(p + i * LANES, v[i]);
}

// Unnormalized, any power of two.
void hadamard(float* p, int n) {
    int h = 1;
    if (n % 64 == 0) {
        for (int i = 0; i < n; i += 64) hadamard_registers<64 / LANES>(p + i);
        h = 64;
    }
    for (; h < LANES && h < n; h *= 2) {
        for (int i = 0; i < n; i += 2 * h) {
            for (int j = i; j < i + h; ++j) {
                const float a = p[j], b = p[j + h];
                p[j] = a + b;
                p[j + h] = a - b;
            }
        }
    }
    for (; h * 4 <= n; h *= 4) {
        for (int i = 0; i < n; i += 4 * h) {
            for (int j = i; j < i + h; j += LANES) {
                const Floats a = load(p + j), b = load(p + j + h);
                const Floats c = load(p + j + 2 * h), d = load(p + j + 3 * h);
                const Floats ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
                store(p + j, ab + cd);
                store(p + j + h, a_b + c_d);
                store(p + j + 2 * h, ab - cd);
                store(p + j + 3 * h, a_b - c_d);
            }
        }
    }
    for (; h < n; h *= 2) {
        for (int i = 0; i < n; i += 2 * h) {
            for (int j = i; j < i + h; j += LANES) {
                const Floats a = load(p + j), b = load(p + j + h);
                store(p + j, a + b);
                store(p + j + h, a - b);
            }
        }
    }
}

// p as a matrix [base][n / base]: Hadamard along the rows, then the base matrix down the columns.
void hadamard_full(float* p, int n, int base, const float* matrix) {
    const int power = n / base;
    for (int i = 0; i < base; ++i) hadamard(p + i * power, power);
    if (base == 1) return;
    const int width = power < LANES ? 1 : LANES;
    for (int j = 0; j < power; j += width) {
        float in[36 * LANES] = {};
        for (int i = 0; i < base; ++i) {
            for (int l = 0; l < width; ++l) in[i * LANES + l] = p[i * power + j + l];
        }
        for (int o = 0; o < base; ++o) {
            Floats sum{};
            for (int i = 0; i < base; ++i) sum += load(in + i * LANES) * matrix[i * base + o];
            for (int l = 0; l < width; ++l) p[o * power + j + l] = sum[l];
        }
    }
}

// Blocks of `block`, then falling powers of two up to the width.
template <class Visit>
inline void for_blocks(int width, int block, Visit visit) {
    int start = 0, index = 0;
    for (; start + block <= width; start += block) visit(start, block, index++);
    for (int size = block / 2; size > 0; size /= 2) {
        if ((width - start) & size) {
            visit(start, size, index++);
            start += size;
        }
    }
}

void hadamard_blocks(float* p, int width, int block) {
    for_blocks(width, block, [&](int start, int size, int) {
        hadamard(p + start, size);
        if (size != block) {  // `norm` is that of whole blocks
            const float more = __builtin_sqrtf(float(block) / float(size));
            for (int i = 0; i < size; ++i) p[start + i] *= more;
        }
    });
}

// ROWS rows times a block's matrix, in place. size is a multiple of LANES.
template <int ROWS>
void dense_block(float* p, size_t stride, const float* matrix, int block, int size) {
    constexpr int N = 64 / LANES < 4 ? 64 / LANES : 4;
    float in[ROWS][1024];
    for (int r = 0; r < ROWS; ++r) {
        for (int i = 0; i < size; ++i) in[r][i] = p[r * stride + i];
    }
    int o = 0;
    for (; o + N * LANES <= size; o += N * LANES) {
        Floats sum[ROWS][N] = {};
        for (int i = 0; i < size; ++i) {
            const float* row = matrix + size_t(i) * block + o;
            for (int n = 0; n < N; ++n) {
                const Floats m = load(row + n * LANES);
                for (int r = 0; r < ROWS; ++r) sum[r][n] += m * in[r][i];
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int n = 0; n < N; ++n) store(p + r * stride + o + n * LANES, sum[r][n]);
        }
    }
    for (; o < size; ++o) {
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0.0f;
            for (int i = 0; i < size; ++i) sum += in[r][i] * matrix[size_t(i) * block + o];
            p[r * stride + o] = sum;
        }
    }
}

void dense_blocks(float* p, size_t stride, int rows, const Prologue& pro) {
    const size_t entry = size_t(pro.block) * pro.block;
    for_blocks(pro.inputs, pro.block, [&](int start, int size, int index) {
        const float* matrix = pro.matrix + index * entry;
        int r = 0;
        for (; r + 4 <= rows; r += 4) {
            dense_block<4>(p + r * stride + start, stride, matrix, pro.block, size);
        }
        for (; r < rows; ++r) {
            dense_block<1>(p + r * stride + start, stride, matrix, pro.block, size);
        }
    });
}

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

void rotate(const Prologue& pro, float* p, int rows) {
    switch (pro.rotation) {
        case Rotation::none: break;
        case Rotation::hadamard: hadamard_blocks(p, pro.inputs, pro.block); break;
        case Rotation::full: hadamard_full(p, pro.inputs, pro.base, pro.matrix); break;
        case Rotation::dense: dense_blocks(p, pro.padded, rows, pro); break;
    }
}

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

template <int D>
inline Ints spread(Ints v) { return larger(v, Ints(swap_lanes<D>(Floats(v)))); }

// Largest |p[i]|, in every lane. Compared as bits: infinity above numbers, NaN above all.
inline Floats absmax(const float* p, int n) {
    Ints a{}, b{};
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        a = larger(a, Ints(load(p + i)) & 0x7fffffff);
        b = larger(b, Ints(load(p + i + LANES)) & 0x7fffffff);
    }
    for (; i < n; i += LANES) a = larger(a, Ints(load(p + i)) & 0x7fffffff);
    a = larger(a, b);
    a = spread<1>(a);
    a = spread<2>(a);
#if LANES >= 8
    a = spread<4>(a);
#endif
#if LANES >= 16
    a = spread<8>(a);
#endif
    return Floats(a);
}

// p times inverse, rounded to even and cut to the range, into bytes. Returns their sum.
inline int32_t round_run(const Prologue& pro, const float* p, int n, Floats inverse, int8_t* q) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: the addition rounds
    Ints sum{};
    for (int i = 0; i < n; i += LANES) {
        Floats v = load(p + i) * inverse;
        v = v < pro.low ? splat(pro.low) : v;
        v = v > pro.high ? splat(pro.high) : v;
        const Floats rounded = v + magic;
        const Ints whole = Ints(rounded) - Ints(magic);
        sum += whole;
        *reinterpret_cast<LooseBytes*>(q + i) = __builtin_convertvector(whole, Bytes);
    }
    int32_t total = 0;
    for (int i = 0; i < LANES; ++i) total += sum[i];
    return total;
}

// One row of floats to integers, sums and scales.
void quantize_row(const Prologue& pro, const float* p, int step, int row, const QuantTile& to,
                  int8_t* q) {
    constexpr float tiny = 1.17549435e-38f;
    const int per_group = pro.group / pro.segment;
    for (int g = 0, s = 0; g < pro.groups; ++g) {
        const int start = g * pro.group;
        const int end = start + pro.group < pro.padded ? start + pro.group : pro.padded;
        const Floats peak = absmax(p + start, end - start);
        Floats scale, inverse;
        if (pro.table) {
            const float fixed = pro.table[size_t(step) * pro.groups + g];
            inverse = splat(pro.norm / fixed);
            scale = splat(peak[0] == peak[0] ? fixed : peak[0]);
        } else {
            const Floats raw = peak * pro.factor;
            const Floats safe = raw < tiny ? splat(tiny) : raw;
            inverse = 1.0f / safe;
            scale = safe * pro.norm;
        }
        for (int i = 0; i < per_group && s < pro.segments; ++i, ++s) {
            const int at = s * pro.segment;
            const int32_t sum = round_run(pro, p + at, pro.segment, inverse, q + at);
            to.offset[s * to.rows + row] = -8 * sum;
            if (to.act_scale) to.act_scale[s * to.rows + row] = scale[0];
        }
        to.token_scale[row] = to.act_scale ? 1.0f : scale[0];
    }
}

// A row's bytes into its place in the tile, four by four.
inline void interleave(const int8_t* q, int padded, int row, const QuantTile& to) {
    int8_t* out = to.acts + 4 * row;
    for (int k = 0; k < padded; k += 4, out += 4 * to.rows) __builtin_memcpy(out, q + k, 4);
}

void prologue_tile(const Prologue& pro, const float* x, size_t x_stride, int step,
                   const QuantTile& to, const Scratch& scratch) {
    const int batch = pro.rotation == Rotation::dense ? to.rows : 1;
    for (int first = 0; first < to.rows; first += batch) {
        for (int r = 0; r < batch; ++r) {
            load_row(pro, x + (first + r) * x_stride, scratch.rows + size_t(r) * pro.padded);
        }
        rotate(pro, scratch.rows, batch);
        for (int r = 0; r < batch; ++r) {
            quantize_row(pro, scratch.rows + size_t(r) * pro.padded, step, first + r, to,
                         scratch.bytes);
            interleave(scratch.bytes, pro.padded, first + r, to);
        }
    }
}
