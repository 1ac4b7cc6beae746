// AVX2 with the VNNI instructions in their 256-bit form (Alder Lake, Zen 5 and later).
#include "layout.hpp"

#if defined(__x86_64__) && defined(OMEGA_HAVE_AVXVNNI)
#include <immintrin.h>

#include "target.hpp"
OMEGA_TARGET_BEGIN("avx2,fma,f16c,bmi2,avxvnni")

namespace omega {
namespace {

#define OMEGA_DOTS                                                                            \
    static constexpr int max_rows = 4;                                                        \
    static constexpr bool independent = true;                                                 \
    static inline void dot(I& sum, I w, I a) { sum = _mm256_dpbusd_avx_epi32(sum, w, a); }
#include "isa_avx256.inl"
#include "longs.inl"

}  // namespace

const Isa* isa_avxvnni() {
    static const Isa isa = make_isa<LongTile>("avx-vnni", row_fns);
    return &isa;
}

}  // namespace omega
OMEGA_TARGET_END
#else
namespace omega {
const Isa* isa_avxvnni() { return nullptr; }
}  // namespace omega
#endif
