#include "cpu.hpp"

#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace omega {
namespace {

#if defined(__x86_64__)
// The operating system saves the registers named by these bits of XCR0.
bool os_saves(unsigned bits) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & bits) == bits;
}

// Linux saves the tiles of a matrix unit only for processes that have asked for it.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return os_saves(0x60000) && syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}

// Eight tiles of 16 rows of 64 bytes.
bool tiles_as_expected() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(0x1d, 1, &a, &b, &c, &d) && b >> 16 == 8 && (b & 0xffff) == 64 &&
           (c & 0xffff) == 16;
}

// Its adds have execution units beside those of the products, which AVX-512 shares elsewhere.
bool has_units_to_add() {
    unsigned a = 0, name[3] = {};
    return __get_cpuid(0, &a, &name[0], &name[2], &name[1]) &&
           std::memcmp(name, "AuthenticAMD", sizeof name) == 0;
}

struct Features {
    bool avx2 = false, avxvnni = false, avx512vnni = false, amx = false, pairs_first = false;
};

Features features() {
    Features found;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const bool fma_f16c = (c & (1u << 12)) && (c & (1u << 29));
    if (!fma_f16c || !os_saves(0x6)) return found;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    found.avx2 = (b & (1u << 5)) && (b & (1u << 8));  // with bmi2
    const unsigned f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
    found.avx512vnni = found.avx2 && (b & f_dq_bw_vl) == f_dq_bw_vl && (c & (1u << 11)) &&
                       os_saves(0xe6);
    found.amx = found.avx512vnni && (d & (1u << 24)) && (d & (1u << 25)) && tiles_as_expected() &&
                may_use_tiles();
    found.pairs_first = has_units_to_add();
#if defined(OMEGA_EMULATE_TILES)
    found.amx = found.avx512vnni;
#endif
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        found.avxvnni = found.avx2 && (a & (1u << 4));
    }
    return found;
}
#endif

void add(std::vector<const Isa*>& list, const Isa* isa) {
    if (isa) list.push_back(isa);
}

}  // namespace

std::vector<const Isa*> usable_isas() {
    std::vector<const Isa*> list;
#if defined(__x86_64__)
    static const Features has = features();  // asked once: every layer comes here
    if (has.amx) add(list, isa_amx());
    if (has.avx512vnni) {
        const Isa *pairs = isa_pairs(), *vnni = isa_avx512vnni();
        add(list, has.pairs_first ? pairs : vnni);
        add(list, has.pairs_first ? vnni : pairs);
    }
    if (has.avxvnni) add(list, isa_avxvnni());
    if (has.avx2) add(list, isa_avx2());
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long dotprod = 1ul << 20;  // HWCAP_ASIMDDP
    if (getauxval(AT_HWCAP) & dotprod) add(list, isa_neon());
#elif defined(__aarch64__) && defined(__APPLE__)
    add(list, isa_neon());  // every Apple CPU of this architecture has it
#endif
    add(list, isa_portable());
    return list;
}

const Isa& find_isa(const std::string& name) {
    std::string names;
    for (const Isa* isa : usable_isas()) {
        if (name.empty() && isa->automatic) return *isa->automatic;
        if (name.empty() || name == isa->name) return *isa;
        names += std::string(names.empty() ? "" : ", ") + isa->name;
    }
    throw std::invalid_argument("no instruction set " + name + " here; one of " + names);
}

}  // namespace omega
