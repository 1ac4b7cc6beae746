// Any CPU: four outputs to a compiler vector, no instruction named.
#include "layout.hpp"

namespace omega {
namespace {

struct Vec {
    typedef int32_t I __attribute__((vector_size(16)));
    typedef float F __attribute__((vector_size(16)));
    typedef float Loose __attribute__((vector_size(16), aligned(4), may_alias));
    static constexpr int lanes = 4, max_rows = 2, narrow = 1, wide = 1, wide_rows = 0;
    static constexpr bool independent = false;

    static inline I splat(int32_t v) { return I{v, v, v, v}; }
    static inline I splat4(const int8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
    // The four bytes of an output stay together; `dot` takes them apart.
    static inline void split(const uint8_t* p, I& even, I& odd) {
        typedef uint32_t U __attribute__((vector_size(16)));
        U both;
        __builtin_memcpy(&both, p, 16);
        even = I(both & 0x0f0f0f0fu);
        odd = I((both >> 4) & 0x0f0f0f0fu);
    }
    static inline void dot(I& sum, I w, I a) {
        for (int j = 0; j < 4; ++j) sum += ((w >> (8 * j)) & 15) * splat(a[j]);
    }
    static inline I add(I a, I b) { return a + b; }
    static inline F to_float(I v) { return __builtin_convertvector(v, F); }
    static inline F as_float(I v) { return F(v); }
    static inline F sub(F a, F b) { return a - b; }
    static inline F splatf(float v) { return F{v, v, v, v}; }
    static inline F load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
    static inline void store(float* p, F v) { *reinterpret_cast<Loose*>(p) = v; }
    static inline F mul(F a, F b) { return a * b; }
    static inline F addf(F a, F b) { return a + b; }
    static inline F fma(F a, F b, F c) { return a * b + c; }
    typedef double D __attribute__((vector_size(16)));
    static inline D load_wide(const float* p) { return D{p[0], p[1]}; }
    static inline D fma_wide(D a, D b, D c) { return a * b + c; }
};

#define LANES 4
#include "rotation.inl"
#include "prologue.inl"
#include "tile.inl"
#include "longs.inl"
#include "rows.inl"

}  // namespace

const Isa* isa_portable() {
    static const Isa isa = make_isa<LongTile>("portable", row_fns);
    return &isa;
}

}  // namespace omega
