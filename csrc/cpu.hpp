// Which instruction sets this binary and this CPU have.
#pragma once

#include <string>
#include <vector>

#include "layout.hpp"

namespace omega {

// Usable here, fastest first; the portable one is always last.
std::vector<const Isa*> usable_isas();

// The one called `name`, "" for the fastest. Throws std::invalid_argument when it cannot run here.
const Isa& find_isa(const std::string& name);

}  // namespace omega
