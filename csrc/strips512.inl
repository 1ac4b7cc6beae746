// What such paths share on AVX-512. Included after isa_avx512.inl, inside an anonymous namespace.

#include "strips.inl"

// As Tile::write, with all that a row does not need anew outside of the loop.
template <int R>
inline void write_rows(const TileArgs& t, int rows, int panel, const __m512 (&y)[R]) {
    const int column = panel * kPanel, left = t.columns - column;
    if (left <= 0) return;
    const __mmask16 mask = left < kPanel ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
    const __m512 scale = Vec::load(t.row_scale + column), bias = Vec::load(t.bias + column);
    const float* a = t.lowrank_a + column;
    float* to = t.y + column;
    UNROLL for (int r = 0; r < R; ++r, to += t.y_stride) {
        if (r == rows) return;
        __m512 value = Vec::mul(Vec::mul(y[r], Vec::splatf(t.token_scale[r])), scale);
        for (int i = 0; i < t.rank; ++i) {
            const __m512 share = Vec::splatf(t.lowrank[r * t.lowrank_stride + i]);
            value = Vec::addf(value, Vec::mul(share, Vec::load(a + i * t.outputs)));
        }
        _mm512_mask_storeu_ps(to, mask, Vec::addf(value, bias));
    }
}

// Stores that wait for memory would hold up others.
template <int R>
inline void expect_writes(const TileArgs& t, int panel) {
    const float* to = t.y + panel * kPanel;
    if (panel * kPanel >= t.columns) return;
    UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(to + r * t.y_stride, 1, 3);
}
