// The run of one layer: tiles of input become integers, then tiles meet strips of weights.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "linear.hpp"

namespace omega {
namespace {

// Bytes of activations that stay in a core's second-level cache while weights stream past.
// CPUs with a matrix unit have larger ones, and it waits longer for weights to be unpacked.
constexpr size_t kBlockBytes = 384 * 1024, kMatrixBlockBytes = 1024 * 1024;
// Parts dealt to each thread: more balance better, fewer stream longer.
constexpr int kPartsPerThread = 8;
// Multiply-adds below which a second thread costs more than it saves (a few microseconds).
constexpr double kWorthSharing = 5e5;

// What a call needs besides its layer, kept by each calling thread so that it allocates once.
struct Workspace {
    Buffer<int8_t> acts, bytes, strip;
    Buffer<int32_t> offset;
    Buffer<float> act_scale, token_scale, lowrank, rows;
    Buffer<QuantTile> tiles;
};

Workspace& workspace() {
    thread_local Workspace space;
    return space;
}

// Results this large are fresh memory in every call: malloc gives it back to the system. A fault
// per 4 KiB then costs as much as a tenth of the product; per 2 MiB, nothing.
void ask_for_huge_pages([[maybe_unused]] float* y, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr size_t large = size_t(32) << 20, page = 4096;
    if (bytes < large) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(y) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(y) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: may fail
#endif
}

}  // namespace

class Product final : public Job {
public:
    Product(const Linear& layer, const float* x, int rows, float* y, int step, int threads,
            Workspace& space)
        : layer_(layer), isa_(suited(layer, rows)), matrix_(isa_.matrix.multiply), x_(x), y_(y),
          rows_(rows), step_(step), space_(space) {
        const Prologue& p = layer.prologue_;
        tiles_ = (rows + isa_.max_rows - 1) / isa_.max_rows;
        wide_ = matrix_ || rows <= isa_.wide_rows;
        strip_panels_ = isa_.panels[wide_];
        strips_ = layer.padded_outputs_ / (kPanel * strip_panels_);
        const size_t tile_bytes = size_t(matrix_ ? kMatrixRows : kRowStride) * p.padded;
        const size_t block = matrix_ ? kMatrixBlockBytes : kBlockBytes;
        const int fit = int(std::max<size_t>(1, block / tile_bytes));
        blocks_ = (tiles_ + fit - 1) / fit;
        if (threads > 1) {
            const int wanted = kPartsPerThread * threads;
            chunks_ = std::max(1, std::min((wanted + blocks_ - 1) / blocks_, strips_));
        }
        tile_deal_.open(tiles_, threads);
        parts_.open(blocks_ * chunks_, threads);
        reserve(threads);
    }

    void run(int participant) override {
        quantize(participant);
        wait_until([&] { return tiles_done_.load(std::memory_order_acquire) >= tiles_; });
        for (int i; (i = parts_.take(participant)) >= 0;) {
            multiply(i / chunks_, i % chunks_, participant);
        }
    }

    // Deals out the tiles of input.
    void quantize(int participant) {
        const Prologue& p = layer_.prologue_;
        const Scratch scratch{space_.rows.data() + size_t(participant) * row_floats(),
                              space_.bytes.data() + size_t(participant) * p.padded * kMaxRows};
        for (int i; (i = tile_deal_.take(participant)) >= 0;) {
            isa_.prologue(p, x_ + size_t(first_row(i)) * p.inputs, p.inputs, step_,
                                 tile(i), scratch);
            tiles_done_.fetch_add(1, std::memory_order_release);
        }
    }

    int tiles() const { return tiles_; }
    // Rows are dealt evenly: heights differ by one at most.
    int first_row(int tile) const {
        return int(int64_t(rows_) * tile / tiles_);
    }
    // Rows of bytes before a tile: a lone row of vectors needs one, other tiles all their room.
    size_t acts_row(int tile) const {
        if (matrix_) return size_t(tile) * kMatrixRows;
        return rows_ == 1 ? tile : size_t(tile) * kRowStride;
    }
    // Scales of a segment before a tile.
    size_t scale_row(int tile) const { return matrix_ ? acts_row(tile) : first_row(tile); }
    QuantTile tile(int i) const {
        const Prologue& p = layer_.prologue_;
        const size_t first = first_row(i), scales = scale_row(i) * p.segments;
        const int rows = first_row(i + 1) - int(first);
        const bool grouped = layer_.mode_ & kActSegments;
        return {rows, matrix_, space_.acts.data() + acts_row(i) * p.padded,
                space_.offset.data() + scales,
                grouped ? space_.act_scale.data() + scales : nullptr,
                space_.token_scale.data() + first, space_.lowrank.data() + first * p.rank};
    }

private:
    size_t row_floats() const {
        const Prologue& p = layer_.prologue_;
        return size_t(p.padded) * (p.rotation == Rotation::dense ? kMaxRows : 1);
    }

    void reserve(int threads) {
        const Prologue& p = layer_.prologue_;
        space_.acts.reserve(acts_row(tiles_) * p.padded);
        space_.offset.reserve(scale_row(tiles_) * p.segments);
        if (layer_.mode_ & kActSegments) space_.act_scale.reserve(scale_row(tiles_) * p.segments);
        space_.token_scale.reserve(rows_);
        space_.lowrank.reserve(size_t(rows_) * p.rank);
        space_.rows.reserve(row_floats() * threads);
        space_.bytes.reserve(size_t(p.padded) * kMaxRows * threads);
        if (!matrix_) return;
        space_.strip.reserve(strip_bytes() * threads);
        space_.tiles.reserve(tiles_);
        for (int i = 0; i < tiles_; ++i) space_.tiles[i] = tile(i);
    }

    // Of one thread's StripScratch: weights, sums on their way, sums.
    size_t weight_bytes() const { return size_t(kRunLines) * kLine * strip_panels_ * kPanel; }
    static constexpr size_t ring_bytes = kRing * kMatrixRows * kPanel * sizeof(int32_t);
    size_t strip_bytes() const {
        const size_t sums = size_t(tiles_) * strip_panels_ * kMatrixRows * kPanel;
        return weight_bytes() + ring_bytes + sums * sizeof(float);
    }
    StripScratch strip_scratch(int participant) const {
        int8_t* weights = space_.strip.data() + participant * strip_bytes();
        int8_t* ring = weights + weight_bytes();
        return {weights, reinterpret_cast<int32_t*>(ring),
                reinterpret_cast<float*>(ring + ring_bytes)};
    }

    // One block of tiles times one chunk of strips.
    void multiply(int block, int chunk, int participant) const {
        const int first = int(int64_t(tiles_) * block / blocks_);
        const int last = int(int64_t(tiles_) * (block + 1) / blocks_);
        const int begin = int(int64_t(strips_) * chunk / chunks_);
        const int end = int(int64_t(strips_) * (chunk + 1) / chunks_);
        TileArgs t = common();
        const int height = (rows_ + tiles_ - 1) / tiles_;
        if (matrix_) isa_.matrix.configure(height);
        for (int strip = begin; strip < end; ++strip) {
            const int column = strip * strip_panels_ * kPanel;
            if (column >= layer_.outputs_) break;
            const int rank = point_at(column, t);
            if (matrix_) {
                const QuantTile* tiles = space_.tiles.data() + first;
                t.lowrank = tiles->lowrank + rank;
                t.y = y_ + size_t(first_row(first)) * layer_.outputs_ + column;
                isa_.matrix.multiply(layer_.mode_, height, t, tiles, last - first,
                                     strip_scratch(participant));
                continue;
            }
            for (int i = first; i < last; ++i) {
                const QuantTile q = tile(i);
                t.acts = q.acts;
                t.offset = q.offset;
                t.act_scale = q.act_scale;
                t.token_scale = q.token_scale;
                t.lowrank = q.lowrank + rank;
                t.y = y_ + size_t(first_row(i)) * layer_.outputs_ + column;
                isa_.tile[layer_.mode_][wide_][q.rows](t);
            }
        }
        if (matrix_) isa_.matrix.release();
    }

    TileArgs common() const {
        const Prologue& p = layer_.prologue_;
        TileArgs t{};
        t.strip_bytes = layer_.strip_bytes_;
        t.outputs = layer_.padded_outputs_;
        t.segments = p.segments;
        t.pieces = p.segment / kPiece;
        t.lowrank_stride = p.rank;
        t.y_stride = layer_.outputs_;
        return t;
    }

    // Returns the first rank that reaches this strip.
    int point_at(int column, TileArgs& t) const {
        int first = layer_.prologue_.rank, end = 0;
        const int narrow = kPanel * isa_.panels[0];
        for (int c = column; layer_.prologue_.rank && c < column + kPanel * strip_panels_; c += narrow) {
            first = std::min(first, int(layer_.ranks_[2 * (c / narrow)]));
            end = std::max(end, int(layer_.ranks_[2 * (c / narrow) + 1]));
        }
        t.rank = std::max(0, end - first);
        first = t.rank ? first : 0;
        t.weight = layer_.weight_.data() +
                   column / (kPanel * isa_.panels[0]) * layer_.strip_bytes_;
        t.weight_scale = layer_.weight_scale_.data() + (layer_.weight_scale_.size() ? column : 0);
        t.row_scale = layer_.row_scale_.data() + column;
        t.bias = layer_.bias_.data() + column;
        t.lowrank_a = layer_.lowrank_a_.data() +
                      (t.rank ? size_t(first) * layer_.padded_outputs_ + column : 0);
        t.columns = layer_.outputs_ - column;
        return first;
    }

    static const Isa& suited(const Linear& layer, int rows) {
        const Isa& isa = *layer.isa_;
        const double work = double(rows) * layer.prologue_.padded * layer.outputs_;
        return isa.plain && (rows < isa.least_rows || work < isa.least_work) ? *isa.plain : isa;
    }

    const Linear& layer_;
    const Isa& isa_;
    const bool matrix_;
    const float* x_;
    float* y_;
    int rows_, step_;
    Workspace& space_;
    bool wide_ = false;
    int tiles_ = 0, strips_ = 0, strip_panels_ = 0, blocks_ = 1, chunks_ = 1;
    Deal tile_deal_, parts_;
    alignas(64) std::atomic<int> tiles_done_{0};
};

void Linear::run(const float* x, int rows, float* y, int step, Pool& pool, int threads) const {
    if (rows <= 0) return;
    if (double(rows) * prologue_.padded * outputs_ < kWorthSharing) threads = 1;
    ask_for_huge_pages(y, size_t(rows) * outputs_ * sizeof(float));
    Product product(*this, x, rows, y, step, std::max(1, threads), workspace());
    pool.run(product, threads);
}

void Linear::quantize(const float* x, int rows, int step, int8_t* q, float* scale) const {
    if (rows <= 0) return;
    Product product(*this, x, rows, nullptr, step, 1, workspace());
    product.quantize(0);
    const Prologue& p = prologue_;
    for (int i = 0; i < product.tiles(); ++i) {
        const QuantTile t = product.tile(i);
        const int stride = t.rows == 1 ? 1 : kRowStride;
        for (int r = 0; r < t.rows; ++r) {
            const size_t row = size_t(product.first_row(i)) + r;
            for (int k = 0; k < p.inputs; ++k) {
                const size_t at = t.lines ? (size_t(k / kLine) * kMatrixRows + r) * kLine + k % kLine
                                          : (size_t(k / 4) * stride + r) * 4 + k % 4;
                q[row * p.inputs + k] = t.acts[at];
            }
            for (int g = 0; g < p.groups; ++g) {
                const size_t s = size_t(g) * (p.group / p.segment);
                scale[row * p.groups + g] = t.act_scale ? t.act_scale[s * t.stride() + r]
                                                        : t.token_scale[r];
            }
        }
    }
}

}  // namespace omega
