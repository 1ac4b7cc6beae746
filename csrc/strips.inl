// What paths share that unpack a run of a strip's weights once for many tiles of rows (Strips in
// layout.hpp). Included after isa_avx512.inl, inside an anonymous namespace.

#define UNROLL _Pragma("GCC unroll 16")

constexpr int kPiecesPerLine = kLine / kPiece;

// A run of lines of one strip, unpacked, and the tiles of rows that meet it.
struct Run {
    const TileArgs& strip;
    const QuantTile* tiles;
    int count;
    int first_line, lines;
    bool first, last;        // of the strip's runs
    const StripScratch& scratch;
};

// What is left to know of a tile of rows. `y` moves on with the tiles.
inline TileArgs point_at(const Run& run, int tile, float* y) {
    const QuantTile& q = run.tiles[tile];
    TileArgs t = run.strip;
    t.act_scale = q.act_scale;
    t.token_scale = q.token_scale;
    t.lowrank = q.lowrank + (t.lowrank - run.tiles[0].lowrank);
    t.y = y;
    return t;
}

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

// These lines of a strip in runs of up to `most`, about as long as each other, whole segments each.
template <class Meet>
inline void for_runs(int mode, const TileArgs& t, const QuantTile* tiles, int count, Lines lines,
                     int most, const StripScratch& scratch, Meet meet) {
    const int all = t.segments * t.pieces / kPiecesPerLine;
    const int per = mode ? t.pieces / kPiecesPerLine : 1;
    const int segments = (lines.end - lines.begin) / per, longest = most / per;
    const int runs = (segments + longest - 1) / longest;
    for (int i = 0; i < runs; ++i) {
        const int first = lines.begin + segments * i / runs * per;
        const int end = lines.begin + segments * (i + 1) / runs * per;
        meet(Run{t, tiles, count, first, end - first, first == 0, end == all, scratch});
    }
}
