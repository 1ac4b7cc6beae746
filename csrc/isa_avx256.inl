// What AVX2 with and without VNNI share: 8 outputs to a vector. Needs OMEGA_DOTS, the products, before it.

struct Vec {
    using I = __m256i;
    using F = __m256;
    static constexpr int lanes = 8, narrow = 1, wide = 2, wide_rows = 2;

    static inline I splat(int32_t v) { return _mm256_set1_epi32(v); }
    static inline I splat4(const int8_t* p) {
        int32_t v;
        __builtin_memcpy(&v, p, 4);
        return _mm256_set1_epi32(v);
    }
    // The first or the last 4 inputs of a piece's part.
    template <int HALF>
    static inline I half(const uint8_t* p) {
        const I both = _mm256_load_si256(reinterpret_cast<const I*>(p));
        return _mm256_and_si256(HALF ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
    }
    static inline void split(const uint8_t* p, I& even, I& odd) {
        even = half<0>(p);
        odd = half<1>(p);
    }
    OMEGA_DOTS
    static inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static inline F to_float(I v) { return _mm256_cvtepi32_ps(v); }
    static inline F as_float(I v) { return _mm256_castsi256_ps(v); }
    static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static inline F splatf(float v) { return _mm256_set1_ps(v); }
    static inline F load(const float* p) { return _mm256_loadu_ps(p); }
    static inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static inline F addf(F a, F b) { return _mm256_add_ps(a, b); }
    static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static inline __m256d load_wide(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
    static inline __m256d fma_wide(__m256d a, __m256d b, __m256d c) {
        return _mm256_fmadd_pd(a, b, c);
    }
};

#define LANES 8
#include "rotation.inl"
#include "prologue.inl"
#include "tile.inl"
#include "rows.inl"
