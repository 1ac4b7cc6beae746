// AVX-512 with VNNI: 16 outputs to a vector. What it shares with the matrix units (isa_amx.cpp).

struct Vec {
    using I = __m512i;
    using F = __m512;
    static constexpr int lanes = 16, max_rows = 8, narrow = 2, wide = 4, wide_rows = 2;
    static constexpr bool independent = true;

    static inline I splat(int32_t v) { return _mm512_set1_epi32(v); }
    static inline I splat4(const int8_t* p) {
        int32_t v;
        __builtin_memcpy(&v, p, 4);
        return _mm512_set1_epi32(v);
    }
    static inline void split(const uint8_t* p, I& even, I& odd) {
        const I mask = _mm512_set1_epi8(15);
        const I both = _mm512_load_si512(p);
        even = _mm512_and_si512(both, mask);
        odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
    // Not the intrinsic: with it GCC keeps copies of the sums and spills some in the inner loop.
    static inline void dot(I& sum, I w, I a) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(a));
    }
    static inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static inline F to_float(I v) { return __builtin_convertvector((__v16si)v, F); }
    static inline F as_float(I v) { return _mm512_castsi512_ps(v); }
    static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static inline F splatf(float v) { return _mm512_set1_ps(v); }
    static inline F load(const float* p) { return _mm512_loadu_ps(p); }
    static inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static inline F addf(F a, F b) { return _mm512_add_ps(a, b); }
    static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static inline __m512d load_wide(const float* p) {
        return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));
    }
    static inline __m512d fma_wide(__m512d a, __m512d b, __m512d c) {
        return _mm512_fmadd_pd(a, b, c);
    }
};
