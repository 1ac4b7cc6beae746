// A list of calls of kernels, for the bindings: modules/capture.py.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <vector>

// Calls of kernels in the order in which they were made, to be made again. They
// keep the addresses that they were given; their layers stay alive with the tape.
class Tape {
public:
    // From here to `end`, what this thread runs is kept.
    void begin() {
        if (current()) throw std::logic_error("a tape is being recorded already");
        current() = this;
    }
    void end() { current() = nullptr; }
    size_t size() const { return calls_.size(); }

    void run(size_t first, size_t last) const {
        if (last > calls_.size()) throw std::out_of_range("the tape has fewer calls");
        nanobind::gil_scoped_release release;
        for (size_t i = first; i < last; ++i) calls_[i]();
    }

    // Runs the call, and keeps it if a tape is being recorded.
    template <class Call>
    static void perform(Call call) {
        if (Tape* tape = current()) tape->calls_.emplace_back(call);
        nanobind::gil_scoped_release release;
        call();
    }
    template <class Call, class Owner>
    static void perform(Call call, const Owner& owner) {
        if (Tape* tape = current()) tape->owners_.push_back(nanobind::find(owner));
        perform(call);
    }

private:
    static Tape*& current() {
        thread_local Tape* tape = nullptr;
        return tape;
    }
    std::vector<std::function<void()>> calls_;
    std::vector<nanobind::object> owners_;
};
