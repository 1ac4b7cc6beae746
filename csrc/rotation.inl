// Compiler vectors and the rotations of one row: Walsh-Hadamard transforms and dense blocks.
// Included once per instruction set with LANES defined (floats in a vector), inside its
// anonymous namespace. Transforms leave their normalization to `Prologue::norm`.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef float LooseFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int8_t LooseBytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// Half as many, twice as wide.
typedef float HalfFloats __attribute__((vector_size(2 * LANES)));
typedef float LooseHalf __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(4 * LANES)));

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
// the others the difference. (A product with 1 or -1 is exact: fused or not, the same bits.)
template <int D>
inline Floats butterfly(Floats v) {
    Floats sign;
    for (int i = 0; i < LANES; ++i) sign[i] = i & D ? -1.0f : 1.0f;
    return Floats(Vec::fma(Vec::F(v), Vec::F(sign), Vec::F(swap_lanes<D>(v))));
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
inline void hadamard_registers(Floats (&v)[N]) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = butterflies(v[i]);
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
}

inline void hadamard64(float* p) {
    constexpr int N = 64 / LANES;
    Floats v[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = load(p + i * LANES);
    hadamard_registers(v);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) store(p + i * LANES, v[i]);
}

// Unnormalized, any power of two.
void hadamard(float* p, int n) {
    int h = 1;
    if (n % 64 == 0) {
        for (int i = 0; i < n; i += 64) hadamard64(p + i);
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

// ROWS rows times a block's matrix, in place. Sums in double, rounded once: their order does not
// show.
template <int ROWS>
void dense_block(float* p, size_t stride, const float* matrix, int block, int size) {
    constexpr int half = LANES / 2, N = 4;
    double in[ROWS][1024];
    for (int r = 0; r < ROWS; ++r) {
        for (int i = 0; i < size; ++i) in[r][i] = p[r * stride + i];
    }
    int o = 0;
    for (; o + N * half <= size; o += N * half) {
        Doubles sum[ROWS][N] = {};
        for (int i = 0; i < size; ++i) {
            const float* row = matrix + size_t(i) * block + o;
            for (int n = 0; n < N; ++n) {
                const Doubles m = Vec::load_wide(row + n * half);
                for (int r = 0; r < ROWS; ++r) {
                    sum[r][n] = Vec::fma_wide(m, Doubles{} + in[r][i], sum[r][n]);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int n = 0; n < N; ++n) {
                *reinterpret_cast<LooseHalf*>(p + r * stride + o + n * half) =
                    __builtin_convertvector(sum[r][n], HalfFloats);
            }
        }
    }
    for (; o < size; ++o) {
        for (int r = 0; r < ROWS; ++r) {
            double sum = 0.0;
            for (int i = 0; i < size; ++i) sum += in[r][i] * matrix[size_t(i) * block + o];
            p[r * stride + o] = float(sum);
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
