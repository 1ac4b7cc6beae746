#include "pool.hpp"

#include <unistd.h>

#include <chrono>

namespace omega {
namespace {

// How long a helper stays awake for the next job. To wake one takes its caller tens of microseconds
// where a sleeping core is a halted virtual machine's: longer than most layers of a small policy. So
// it is about the longest gap between the jobs of one action chunk, Python's part included.
constexpr auto kSpin = std::chrono::microseconds(400);
// After this long it lets others have the core, if there are any.
constexpr auto kPolite = std::chrono::microseconds(20);

}  // namespace

Pool::~Pool() {
    if (owner_ != long(getpid())) {
        for (auto& helper : helpers_) helper.detach();  // they exist in the parent only
        return;
    }
    stop_.store(true);
    {
        std::lock_guard<std::mutex> lock(sleep_);
        epoch_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& helper : helpers_) helper.join();
}

void Pool::start_helpers(int count) {
    if (helpers_.empty()) owner_ = long(getpid());
    while (int(helpers_.size()) < count) {
        const int index = int(helpers_.size()) + 1;
        helpers_.emplace_back([this, index] { helper(index); });
    }
}

bool Pool::wait_for_region(unsigned& seen) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 1; epoch_.load(std::memory_order_acquire) == seen; ++i) {
        relax();
        if (i % 64) continue;
        const auto waited = std::chrono::steady_clock::now() - begin;
        if (waited > kPolite) std::this_thread::yield();
        if (waited > kSpin) {
            std::unique_lock<std::mutex> lock(sleep_);
            sleeping_.fetch_add(1);
            wake_.wait(lock, [&] { return epoch_.load() != seen; });
            sleeping_.fetch_sub(1);
        }
    }
    seen = epoch_.load(std::memory_order_acquire);
    return !stop_.load();
}

bool Pool::join(int index) {
    int inside = active_.load();
    while (inside >= 0 && index <= invited_.load()) {
        if (!active_.compare_exchange_weak(inside, inside + 1)) continue;
        // Between the two looks another, smaller region may have begun.
        if (index <= invited_.load()) return true;
        active_.fetch_sub(1);
        return false;
    }
    return false;
}

void Pool::helper(int index) {
    unsigned seen = 0;
    while (wait_for_region(seen)) {
        if (!join(index)) continue;
        job_.load()->run(index);
        active_.fetch_sub(1);
    }
}

void Pool::run(Job& job, int threads) {
    std::unique_lock<std::mutex> caller(one_caller_, std::try_to_lock);
    const bool forked = !helpers_.empty() && owner_ != long(getpid());
    if (threads <= 1 || !caller.owns_lock() || forked) {
        job.run(0);
        return;
    }
    start_helpers(threads - 1);
    job_.store(&job);
    invited_.store(threads - 1);
    active_.store(0);
    epoch_.fetch_add(1);
    if (sleeping_.load() > 0) {
        { std::lock_guard<std::mutex> lock(sleep_); }
        wake_.notify_all();
    }
    job.run(0);
    wait_until([&] {
        int none = 0;
        return active_.compare_exchange_strong(none, -1);
    });
}

}  // namespace omega
