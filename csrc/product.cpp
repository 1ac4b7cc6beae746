// The run of one layer: tiles of input become integers, then tiles meet strips of weights.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "linear.hpp"

namespace omega {
namespace {

// Bytes of activations that stay in a core's second-level cache while weights stream past.
constexpr size_t kBlockBytes = 384 * 1024;
// Between the scratch of two threads: prefetchers run on past the end of one, and the other would
// find its lines taken away (a fifth of a layer's time).
constexpr size_t kApart = 64 * 1024;
// Sums kept of strips that are met again.
constexpr size_t kSumBytes = size_t(4) << 20;
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
        : layer_(layer), isa_(suited(layer, rows)), by_strips_(isa_.strips.multiply), x_(x), y_(y),
          rows_(rows), step_(step), space_(space) {
        const Prologue& p = layer.prologue_;
        tiles_ = (rows + isa_.max_rows - 1) / isa_.max_rows;
        wide_ = by_strips_ ? isa_.strips.wide : rows <= isa_.wide_rows;
        strip_panels_ = isa_.panels[wide_];
        strips_ = layer.padded_outputs_ / (kPanel * strip_panels_);
        const int room = isa_.order == Order::vectors ? kRowStride : isa_.max_rows;
        lines_ = p.padded / kLine;
        chunk_lines_ = by_strips_ ? std::min(lines_, whole_lines(isa_.strips.chunk_lines)) : lines_;
        const size_t tile_bytes = size_t(room) * (by_strips_ ? chunk_lines_ * kLine : p.padded);
        const size_t block = by_strips_ ? isa_.strips.block_bytes : kBlockBytes;
        const int fit = std::max(1, int(block / tile_bytes));
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
                              space_.bytes.data() + size_t(participant) * row_bytes()};
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
        switch (isa_.order) {
            case Order::lines: return size_t(tile) * kMatrixRows;
            case Order::pairs: return first_row(tile);
            default: return rows_ == 1 ? tile : size_t(tile) * kRowStride;
        }
    }
    // Scales of a segment before a tile.
    size_t scale_row(int tile) const {
        return isa_.order == Order::lines ? acts_row(tile) : first_row(tile);
    }
    QuantTile tile(int i) const {
        const Prologue& p = layer_.prologue_;
        const size_t first = first_row(i), scales = scale_row(i) * p.segments;
        const int rows = first_row(i + 1) - int(first);
        const bool grouped = layer_.mode_ & kActSegments;
        return {rows, isa_.order, space_.acts.data() + acts_row(i) * p.padded,
                space_.offset.data() + scales,
                grouped ? space_.act_scale.data() + scales : nullptr,
                space_.token_scale.data() + first, space_.lowrank.data() + first * p.rank};
    }

private:
    size_t row_floats() const {
        const Prologue& p = layer_.prologue_;
        return size_t(p.padded) * (p.rotation == Rotation::dense ? kMaxRows : 1) +
               kApart / sizeof(float);
    }
    size_t row_bytes() const { return size_t(layer_.prologue_.padded) * kMaxRows + kApart; }

    void reserve(int threads) {
        const Prologue& p = layer_.prologue_;
        space_.acts.reserve(acts_row(tiles_) * p.padded);
        space_.offset.reserve(scale_row(tiles_) * p.segments);
        if (layer_.mode_ & kActSegments) space_.act_scale.reserve(scale_row(tiles_) * p.segments);
        space_.token_scale.reserve(rows_);
        space_.lowrank.reserve(size_t(rows_) * p.rank);
        space_.rows.reserve(row_floats() * threads);
        space_.bytes.reserve(row_bytes() * threads);
        if (!by_strips_) return;
        space_.strip.reserve(strip_bytes() * threads);
        space_.tiles.reserve(tiles_);
        for (int i = 0; i < tiles_; ++i) space_.tiles[i] = tile(i);
    }

    // Of one thread's StripScratch.
    size_t weight_bytes() const {
        return size_t(isa_.strips.run_lines) * kLine * strip_panels_ * kPanel;
    }
    static constexpr size_t word_bytes = kStripWords * sizeof(int32_t);
    // Sums of a block and a strip; of as many strips as are met again for the next chunk of lines.
    size_t strip_sums() const {
        const int tiles = (tiles_ + blocks_ - 1) / blocks_;
        return size_t(tiles) * isa_.max_rows * strip_panels_ * kPanel;
    }
    int strips_at_once() const {
        if (chunk_lines_ == lines_) return 1;
        const int part = (strips_ + chunks_ - 1) / chunks_;
        return std::max(1, std::min(part, int(kSumBytes / (strip_sums() * sizeof(float)))));
    }
    size_t strip_bytes() const {
        return weight_bytes() + word_bytes + strips_at_once() * strip_sums() * sizeof(float) + kApart;
    }
    StripScratch strip_scratch(int participant) const {
        int8_t* weights = space_.strip.data() + participant * strip_bytes();
        int8_t* words = weights + weight_bytes();
        return {weights, reinterpret_cast<int32_t*>(words),
                reinterpret_cast<float*>(words + word_bytes)};
    }

    // One block of tiles times one chunk of strips.
    void multiply(int block, int chunk, int participant) const {
        const int first = int(int64_t(tiles_) * block / blocks_);
        const int last = int(int64_t(tiles_) * (block + 1) / blocks_);
        const int begin = int(int64_t(strips_) * chunk / chunks_);
        const int end = int(int64_t(strips_) * (chunk + 1) / chunks_);
        if (by_strips_) return multiply_strips(first, last, begin, end, participant);
        TileArgs t = common();
        for (int strip = begin; strip < end; ++strip) {
            const int column = strip * strip_panels_ * kPanel;
            if (column >= layer_.outputs_) break;
            const int rank = point_at(column, t);
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
    }

    // The same where a strip meets the whole block at once, a chunk of inputs at a time.
    void multiply_strips(int first, int last, int begin, int end, int participant) const {
        TileArgs t = common();
        const int height = (rows_ + tiles_ - 1) / tiles_, at_once = strips_at_once();
        const QuantTile* tiles = space_.tiles.data() + first;
        isa_.strips.configure(height);
        for (int from = begin; from < end; from += at_once) {
            for (int line = 0; line < lines_; line += chunk_lines_) {
                const Lines lines{line, std::min(line + chunk_lines_, lines_)};
                StripScratch scratch = strip_scratch(participant);
                for (int strip = from; strip < std::min(from + at_once, end); ++strip) {
                    const int column = strip * strip_panels_ * kPanel;
                    if (column >= layer_.outputs_) break;
                    t.lowrank = tiles->lowrank + point_at(column, t);
                    t.y = y_ + size_t(first_row(first)) * layer_.outputs_ + column;
                    isa_.strips.multiply(layer_.mode_, height, t, tiles, last - first, lines,
                                         scratch);
                    scratch.sums += strip_sums();
                }
            }
        }
        isa_.strips.release();
    }

    // At most `lines`, whole segments.
    int whole_lines(int lines) const {
        const Prologue& p = layer_.prologue_;
        const int per = layer_.mode_ ? p.segment / kLine : 1;
        return lines / per * per;
    }

    TileArgs common() const {
        const Prologue& p = layer_.prologue_;
        TileArgs t{};
        t.strip_bytes = layer_.strip_bytes_;
        t.outputs = layer_.padded_outputs_;
        t.segments = p.segments;
        t.pieces = p.segment / kPiece;
        t.short_pieces = int(32767.0f / (kPiece / 2 * 15 * -p.low));
        t.lowrank_stride = p.rank;
        t.y_stride = layer_.outputs_;
        return t;
    }

    // Returns the first rank that reaches this strip.
    int point_at(int column, TileArgs& t) const {
        int first = layer_.prologue_.rank, end = 0;
        const int narrow = kPanel * isa_.panels[0];
        const int columns = layer_.prologue_.rank ? kPanel * strip_panels_ : 0;
        for (int c = column; c < column + columns; c += narrow) {
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
        const Isa* isa = layer.isa_;
        const double work = double(rows) * layer.prologue_.padded * layer.outputs_;
        while (isa->plain && (rows < isa->least_rows || work < isa->least_work)) isa = isa->plain;
        return *isa;
    }

    const Linear& layer_;
    const Isa& isa_;
    const bool by_strips_;
    const float* x_;
    float* y_;
    int rows_, step_;
    Workspace& space_;
    bool wide_ = false;
    int lines_ = 0, chunk_lines_ = 0;  // of inputs, and those that a strip goes through at once
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
        for (int r = 0; r < t.rows; ++r) {
            const size_t row = size_t(product.first_row(i)) + r;
            for (int k = 0; k < p.inputs; ++k) {
                q[row * p.inputs + k] = t.acts[t.place(r, k)];
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
