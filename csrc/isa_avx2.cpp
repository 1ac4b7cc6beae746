// AVX2: byte products in pairs to 16 bits (at most 2 * 2 * 15 * 128, no saturation), then to 32.
#include "layout.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.hpp"
OMEGA_TARGET_BEGIN("avx2,fma,f16c,bmi2")

namespace omega {
namespace {

#define OMEGA_DOTS                                                                            \
    static constexpr bool independent = false;                                                \
    static inline void dot(I& sum, I w, I a) {                                                \
        sum = _mm256_add_epi32(sum,                                                           \
                               _mm256_madd_epi16(_mm256_maddubs_epi16(w, a),                  \
                                                 _mm256_set1_epi16(1)));                      \
    }                                                                                         \
    static inline void dot2(I& sum, I even, I odd, I a, I b) {                                \
        const I pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, a),                       \
                                         _mm256_maddubs_epi16(odd, b));                       \
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));          \
    }
#include "isa_avx256.inl"

}  // namespace

const Isa* isa_avx2() {
    static const Isa isa = make_isa("avx2", row_fns);
    return &isa;
}

}  // namespace omega
OMEGA_TARGET_END
#else
namespace omega {
const Isa* isa_avx2() { return nullptr; }
}  // namespace omega
#endif
