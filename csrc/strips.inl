// What paths share that unpack a run of a strip's weights once for many tiles of rows (Strips in
// layout.hpp). Included inside an anonymous namespace.

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
