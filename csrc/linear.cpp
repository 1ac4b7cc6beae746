#include "linear.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

namespace omega {
namespace {

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

template <class T>
const T* keep(Buffer<T>& buffer, const T* source, size_t count) {
    if (!source) return nullptr;
    buffer.reserve(count);
    std::memcpy(buffer.data(), source, count * sizeof(T));
    return buffer.data();
}

// To the 8 bits of a bfloat16, halves to even.
void round_scales(Buffer<float>& scales) {
    for (size_t i = 0; i < scales.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &scales[i], 4);
        bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
        std::memcpy(&scales[i], &bits, 4);
    }
}

// Four nibbles to the low halves of four bytes.
uint32_t spread(uint32_t v) {
    v = (v | v << 8) & 0x00ff00ffu;
    return (v | v << 4) & 0x0f0f0f0fu;
}

}  // namespace

Linear::Linear(const LinearSpec& spec, const Isa& isa)
    : isa_(&isa), outputs_(spec.outputs), steps_(spec.steps) {
    if (spec.inputs < 1 || spec.outputs < 1) refuse("a layer needs inputs and outputs");
    padded_outputs_ = round_up(outputs_, kPanel * isa.panels[1]);
    set_segments(spec);
    set_prologue(spec);
    repack(spec);
    set_scales(spec);
    set_lowrank(spec);
}

void Linear::set_segments(const LinearSpec& spec) {
    const int weight = spec.weight_group < spec.inputs ? spec.weight_group : 0;
    const int act = spec.act_group < spec.inputs ? spec.act_group : 0;
    mode_ = (act ? kActSegments : 0) | (weight ? kWeightSegments : 0);
    const int whole = round_up(spec.inputs, isa_->line);
    Prologue& p = prologue_;
    p.inputs = spec.inputs;
    p.segment = mode_ ? std::gcd(weight, act) : whole;
    if (p.segment % kSegment) {
        refuse("groups of " + std::to_string(p.segment) + " inputs: must be multiples of " +
               std::to_string(kSegment));
    }
    // Sums of a segment must stay below kMaxSegmentSum: cut long ones.
    const int largest = 8 << (spec.bits - 1);
    while (mode_ && p.segment > kMaxSegmentSum / largest - 1) {
        if (p.segment % (2 * kSegment)) refuse("groups too large for this kernel");
        p.segment /= 2;
    }
    // Scales of activations alone must leave the product exact; column scales of 1 round it first.
    if (mode_ == kActSegments && p.segment > kMaxExactSum / largest) mode_ |= kWeightSegments;
    const bool whole_runs = p.segment % kLine == 0 && p.segment <= kLine * kSegmentLines;
    while (spec.bits > isa_->max_bits || (isa_->plain && mode_ && !whole_runs)) isa_ = isa_->plain;
    p.start = mode_ ? kMagicBits : 0;
    p.padded = round_up(spec.inputs, p.segment);
    p.segments = p.padded / p.segment;
    p.group = act ? act : p.padded;
    p.groups = act ? (spec.inputs + act - 1) / act : 1;
}

void Linear::set_prologue(const LinearSpec& spec) {
    Prologue& p = prologue_;
    if (spec.bits != 4 && spec.bits != 8) refuse("activations have 4 or 8 bits");
    p.low = float(-(1 << (spec.bits - 1)));
    p.high = -p.low - 1.0f;
    p.rotation = spec.rotation;
    p.block = spec.block;
    p.base = spec.base;
    if (p.rotation == Rotation::hadamard || p.rotation == Rotation::dense) {
        if (p.block < 1 || (p.block & (p.block - 1)) || p.block > 1024) {
            refuse("rotation blocks must be powers of two up to 1024");
        }
    }
    if (p.rotation == Rotation::hadamard) p.norm = 1.0f / std::sqrt(float(p.block));
    if (p.rotation == Rotation::full) {
        const int power = p.base < 1 || p.base > 36 ? 0 : p.inputs / p.base;
        if (power < 1 || power * p.base != p.inputs || (power & (power - 1))) {
            refuse("no Hadamard transform of width " + std::to_string(p.inputs));
        }
        p.norm = 1.0f / std::sqrt(float(p.inputs));
    }
    if (spec.signed_scales && spec.table) refuse("scales of a table have no sign");
    p.signed_scales = spec.signed_scales;
    p.factor = spec.clip / p.high * p.norm;
    p.first_factor = 1.0f / -p.low * p.norm;
    p.multiplier = keep(multiplier_, spec.multiplier, spec.inputs);
    p.permutation = keep(permutation_, spec.permutation, spec.inputs);
    p.matrix = keep(matrix_, spec.matrix, spec.matrix_size);
    p.table = keep(table_, spec.table, size_t(spec.steps) * p.groups);
    if (mode_ & kActSegments) round_scales(table_);
}

void Linear::repack(const LinearSpec& spec) {
    const int row_bytes = (spec.inputs + 1) / 2, pieces = prologue_.padded / kPiece;
    const int panels = isa_->panels[0], step = panels * kPieceBytes;
    strip_bytes_ = size_t(pieces) * step;
    weight_.reserve(padded_outputs_ / (kPanel * panels) * strip_bytes_);
    for (int n = 0; n < padded_outputs_; ++n) {
        const int panel = n / kPanel;
        uint8_t* to = weight_.data() + (panel / panels) * strip_bytes_ +
                      (panel % panels) * kPieceBytes + (n % kPanel) * 4;
        const uint8_t* row = spec.qweight + size_t(n) * row_bytes;
        for (int p = 0; p < pieces; ++p, to += step) {
            uint32_t eight = 0x88888888u;  // zeros, stored as 8
            const int left = n < outputs_ ? row_bytes - 4 * p : 0;
            if (left > 0) std::memcpy(&eight, row + 4 * p, left < 4 ? left : 4);
            const uint32_t packed = spread(eight & 0xffffu) | spread(eight >> 16) << 4;
            std::memcpy(to, &packed, 4);
        }
    }
}

void Linear::set_scales(const LinearSpec& spec) {
    const bool grouped = spec.weight_group && spec.weight_group < spec.inputs;
    bias_.reserve(padded_outputs_);
    bias_.fill(0.0f);
    if (spec.bias) std::memcpy(bias_.data(), spec.bias, outputs_ * sizeof(float));
    row_scale_.reserve(padded_outputs_);
    row_scale_.fill(grouped ? 1.0f : 0.0f);
    if (!grouped) {
        std::memcpy(row_scale_.data(), spec.weight_scale, outputs_ * sizeof(float));
        if (mode_ & kWeightSegments) {
            weight_scale_.reserve(size_t(prologue_.segments) * padded_outputs_);
            weight_scale_.fill(1.0f);
        }
        return;
    }
    const int groups = (spec.inputs + spec.weight_group - 1) / spec.weight_group;
    weight_scale_.reserve(size_t(prologue_.segments) * padded_outputs_);
    weight_scale_.fill(0.0f);
    for (int s = 0; s < prologue_.segments; ++s) {
        // A segment that is padding only has no group of its own, and no sum.
        const int g = std::min(s * prologue_.segment / spec.weight_group, groups - 1);
        for (int n = 0; n < outputs_; ++n) {
            weight_scale_[size_t(s) * padded_outputs_ + n] =
                spec.weight_scale[size_t(n) * groups + g];
        }
    }
}

void Linear::set_lowrank(const LinearSpec& spec) {
    Prologue& p = prologue_;
    p.rank = spec.rank;
    lowrank_a_.reserve(size_t(p.rank) * padded_outputs_);
    lowrank_a_.fill(0.0f);
    lowrank_b_.reserve(size_t(p.rank) * p.padded);
    lowrank_b_.fill(0.0f);
    for (int i = 0; i < p.rank; ++i) {
        for (int n = 0; n < outputs_; ++n) {
            lowrank_a_[size_t(i) * padded_outputs_ + n] = spec.lowrank_a[size_t(n) * p.rank + i];
        }
        for (int k = 0; k < p.inputs; ++k) {
            lowrank_b_[size_t(i) * p.padded + k] =
                p.norm * spec.lowrank_b[size_t(k) * p.rank + i];
        }
    }
    p.lowrank_b = lowrank_b_.data();
    if (p.rank) find_ranks();
}

// Layers that were joined have ranks of their own: zeros in the others' strips.
void Linear::find_ranks() {
    const int width = kPanel * isa_->panels[0], rank = prologue_.rank;
    const int strips = padded_outputs_ / width;
    ranks_.reserve(size_t(strips) * 2);
    for (int strip = 0; strip < strips; ++strip) {
        int first = rank, end = 0;
        for (int i = 0; i < rank; ++i) {
            const float* a = lowrank_a_.data() + size_t(i) * padded_outputs_ + strip * width;
            if (std::all_of(a, a + width, [](float v) { return v == 0.0f; })) continue;
            first = std::min(first, i);
            end = i + 1;
        }
        ranks_[2 * strip] = first;
        ranks_[2 * strip + 1] = end;
    }
}

size_t Linear::bytes() const {
    return weight_.size() + (permutation_.size() + ranks_.size()) * 4 +
           4 * (row_scale_.size() + weight_scale_.size() + bias_.size() + multiplier_.size() +
                matrix_.size() + table_.size() + lowrank_a_.size() + lowrank_b_.size());
}

}  // namespace omega
