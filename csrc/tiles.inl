// The instructions of a matrix unit: eight tiles of 16 rows of 64 bytes. Included by isa_amx.cpp.
//
// With OMEGA_EMULATE_TILES plain loops take their place, so that what is built on them can be
// checked on other CPUs (`cmake -DOMEGA_EMULATE_TILES=ON`); never in the module.

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "what the instruction reads");

#if defined(OMEGA_EMULATE_TILES)

struct EmulatedTile {
    int rows;
    int8_t bytes[16][kLine];
};
thread_local EmulatedTile tiles[8];

inline void tile_configure(const TileConfig& config) {
    for (int i = 0; i < 8; ++i) tiles[i] = {config.rows[i], {}};
}
void tile_release() { tile_configure({}); }
template <int T>
inline void tile_zero() { __builtin_memset(tiles[T].bytes, 0, sizeof tiles[T].bytes); }
template <int T>
inline void tile_load(const void* from) {
    tile_zero<T>();
    __builtin_memcpy(tiles[T].bytes, from, size_t(tiles[T].rows) * kLine);
}
template <int T>
inline void tile_store(void* to) {
    __builtin_memcpy(to, tiles[T].bytes, size_t(tiles[T].rows) * kLine);
}
template <int SUM, int A, int B>
inline void tile_dot() {
    for (int m = 0; m < tiles[SUM].rows; ++m) {
        for (int n = 0; n < 16; ++n) {
            int32_t sum;
            __builtin_memcpy(&sum, tiles[SUM].bytes[m] + 4 * n, 4);
            for (int k = 0; k < kLine; ++k) {
                sum += int32_t(tiles[A].bytes[m][k]) * tiles[B].bytes[k / 4][4 * n + k % 4];
            }
            __builtin_memcpy(tiles[SUM].bytes[m] + 4 * n, &sum, 4);
        }
    }
}

#else

inline void tile_configure(const TileConfig& config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
void tile_release() { __asm__ volatile("tilerelease"); }

// Not the intrinsics: they take literal numbers only, no template's.
template <int T>
inline void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T>
inline void tile_load(const void* from) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0"
                     : : "i"(T), "r"(from), "r"(size_t(kLine)) : "memory");
}
template <int T>
inline void tile_store(void* to) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)"
                     : : "i"(T), "r"(to), "r"(size_t(kLine)) : "memory");
}
// tile SUM += tile A (rows of signed bytes) times tile B (weights).
template <int SUM, int A, int B>
inline void tile_dot() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}

#endif
