// AVX-512 with VNNI: 16 outputs to a vector, four products of bytes per lane and instruction.
#include "layout.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.hpp"
OMEGA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")

namespace omega {
namespace {

#include "isa_avx512.inl"

#define LANES 16
#include "rotation.inl"
#include "prologue.inl"
#include "tile.inl"
#include "longs.inl"
#include "rows.inl"

}  // namespace

const Isa* isa_avx512vnni() {
    static const Isa isa = make_isa<LongTile>("avx512-vnni", row_fns);
    return &isa;
}

}  // namespace omega
OMEGA_TARGET_END
#else
namespace omega {
const Isa* isa_avx512vnni() { return nullptr; }
}  // namespace omega
#endif
