// Shared by the two parts of the self-check of norms, gates, attention, small layers and blocks.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

#include "layout.hpp"
#include "pool.hpp"

namespace check {

using Floats = std::vector<float>;  // exactly as long as it must be: a sanitizer sees its end

// The same numbers on every architecture: no distribution of the standard library is.
class Draw {
public:
    explicit Draw(unsigned seed) : engine_(seed) {}
    int between(int low, int high) { return low + int(engine_() % unsigned(high - low + 1)); }
    bool coin() { return between(0, 1) == 1; }
    int of(std::initializer_list<int> choices) {
        return choices.begin()[between(0, int(choices.size()) - 1)];
    }
    Floats reals(size_t count, float size = 2.0f) {
        Floats values(count);
        for (float& v : values) v = size * (float(int32_t(engine_())) * 0x1p-31f);
        return values;
    }
    uint8_t byte() { return uint8_t(engine_() >> 24); }

private:
    std::mt19937 engine_;
};

inline const float* or_null(const Floats& v) { return v.empty() ? nullptr : v.data(); }

// Counts a failure and says which where `good` is false.
void expect(bool good, const char* isa, const char* what, double value);

// Blocks against the same calls one by one, bit for bit; `cases` of them on one instruction set.
void check_blocks(Draw& draw, const omega::Isa& isa, omega::Pool& pool, int cases);
// Several callers of one block and one pool.
void check_block_callers(Draw& draw, const omega::Isa& isa, omega::Pool& pool);

}  // namespace check
