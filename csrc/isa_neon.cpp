// AArch64 with the dot-product extension (Cortex-A76 and A78, Neoverse N1 and later).
#include "layout.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "target.hpp"
#if defined(__clang__)
OMEGA_TARGET_BEGIN("dotprod")
#else
OMEGA_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif

namespace omega {
namespace {

struct Vec {
    using I = int32x4_t;
    using F = float32x4_t;
    static constexpr int lanes = 4, max_rows = 4, narrow = 1, wide = 2, wide_rows = 2;
    static constexpr bool independent = true;

    static inline I splat(int32_t v) { return vdupq_n_s32(v); }
    static inline I splat4(const int8_t* p) {
        int32_t v;
        __builtin_memcpy(&v, p, 4);
        return vdupq_n_s32(v);
    }
    static inline void split(const uint8_t* p, I& even, I& odd) {
        const uint8x16_t both = vld1q_u8(p);
        even = vreinterpretq_s32_u8(vandq_u8(both, vdupq_n_u8(15)));
        odd = vreinterpretq_s32_u8(vshrq_n_u8(both, 4));
    }
    // 0..15 is the same signed and unsigned.
    static inline void dot(I& sum, I w, I a) {
        sum = vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a));
    }
    static inline I add(I a, I b) { return vaddq_s32(a, b); }
    static inline F to_float(I v) { return vcvtq_f32_s32(v); }
    static inline F as_float(I v) { return vreinterpretq_f32_s32(v); }
    static inline F sub(F a, F b) { return vsubq_f32(a, b); }
    static inline F splatf(float v) { return vdupq_n_f32(v); }
    static inline F load(const float* p) { return vld1q_f32(p); }
    static inline void store(float* p, F v) { vst1q_f32(p, v); }
    static inline F mul(F a, F b) { return vmulq_f32(a, b); }
    static inline F addf(F a, F b) { return vaddq_f32(a, b); }
    static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static inline float64x2_t load_wide(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
    static inline float64x2_t fma_wide(float64x2_t a, float64x2_t b, float64x2_t c) {
        return vfmaq_f64(c, a, b);
    }
};

#define LANES 4
#include "rotation.inl"
#include "prologue.inl"
#include "tile.inl"
#include "longs.inl"
#include "rows.inl"

}  // namespace

const Isa* isa_neon() {
    static const Isa isa = make_isa<LongTile>("neon-dotprod", row_fns);
    return &isa;
}

}  // namespace omega
OMEGA_TARGET_END
#else
namespace omega {
const Isa* isa_neon() { return nullptr; }
}  // namespace omega
#endif
