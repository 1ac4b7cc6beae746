// From a finished sum to y: scales, low-rank part, bias, in this order. Needs `Vec`.

// Vector n of row r.
inline void write(const TileArgs& t, int r, int n, Vec::F value) {
    const int column = n * Vec::lanes, left = t.columns - column;
    value = Vec::mul(value, Vec::splatf(t.token_scale[r]));
    value = Vec::mul(value, Vec::load(t.row_scale + column));
    for (int i = 0; i < t.rank; ++i) {
        const Vec::F share = Vec::splatf(t.lowrank[r * t.lowrank_stride + i]);
        const Vec::F out = Vec::load(t.lowrank_a + i * t.outputs + column);
        value = Vec::addf(value, Vec::mul(share, out));
    }
    value = Vec::addf(value, Vec::load(t.bias + column));
    float* to = t.y + r * t.y_stride + column;
    if (left >= Vec::lanes) {
        Vec::store(to, value);
    } else if (left > 0) {
        float part[Vec::lanes];
        Vec::store(part, value);
        for (int i = 0; i < left; ++i) to[i] = part[i];
    }
}
