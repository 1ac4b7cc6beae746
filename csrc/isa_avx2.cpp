// AVX2: byte products, which leave sums of two in 16 bits, are summed there as long as they fit
// (shorts.inl). Many rows meet weights that were unpacked once.
#include "layout.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.hpp"
OMEGA_TARGET_BEGIN("avx2,fma,f16c,bmi2")

namespace omega {
namespace {

// The addition is no intrinsic: GCC would add products of several inputs first, and spill them
// meanwhile.
#define OMEGA_DOTS                                                                            \
    static constexpr int max_rows = 6;                                                        \
    static inline I product(I w, I a) { return _mm256_maddubs_epi16(w, a); }                  \
    static inline void dot(I& shorts, I w, I a) {                                             \
        const I two = product(w, a);                                                          \
        __asm__("vpaddw %1, %0, %0" : "+x"(shorts) : "x"(two));                               \
    }                                                                                         \
    static inline void dot_two(I& first, I& second, I w, I v, const int8_t* acts) {           \
        I a, b;                                                                               \
        __asm__("vpbroadcastd %6, %2\n\t"                                                     \
                "vpmaddubsw %2, %4, %3\n\t"                                                   \
                "vpmaddubsw %2, %5, %2\n\t"                                                   \
                "vpaddw %3, %0, %0\n\t"                                                       \
                "vpaddw %2, %1, %1"                                                           \
                : "+x"(first), "+x"(second), "=&x"(a), "=&x"(b)                               \
                : "x"(w), "x"(v), "m"(*reinterpret_cast<const int32_t*>(acts)));              \
    }                                                                                         \
    static inline I widen(I shorts) { return _mm256_madd_epi16(shorts, _mm256_set1_epi16(1)); }
#include "isa_avx256.inl"
#include "shorts.inl"

}  // namespace

const Isa* isa_avx2() {
    static const Isa tiles = make_isa<PackedTile>("avx2", row_fns);
    static const Isa strips = strips_of(tiles);
    return &strips;
}

}  // namespace omega
OMEGA_TARGET_END
#else
namespace omega {
const Isa* isa_avx2() { return nullptr; }
}  // namespace omega
#endif
