// A few threads that help the calling one, for products that take microseconds.
//
// A region is one job that every participant runs; the caller always does, helpers join if they
// are awake in time, and the job deals out its parts by counters, so nobody waits for a helper
// that the system has not scheduled. Helpers spin for a while before they sleep. A second caller
// (or a forked child, whose helpers did not survive) simply works alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace omega {

// Told to the CPU inside a loop that waits for another thread.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

// Spin, politely after a while, until `done()`.
template <class Done>
inline void wait_until(Done done) {
    for (int i = 0; !done(); ++i) {
        if (i < 512) {
            relax();
        } else {
            std::this_thread::yield();
        }
    }
}

class Job {
public:
    virtual ~Job() = default;
    // participant: 0 the caller, then 1 .. helpers. Must return when all parts are dealt out.
    virtual void run(int participant) = 0;
};

// Deals out parts [0, count). Neighbouring parts go to the same participant, and in every job of as
// many parts to the same: it finds what it wrote last in its own cache. Whoever has no more takes
// what others have not begun.
class Deal {
public:
    // Before any participant takes one.
    void open(int count, int threads) {
        count_ = count;
        shares_ = std::min(threads, kMost);
    }

    // The next part for a participant, or -1.
    int take(int participant) {
        for (int k = 0; k < shares_; ++k) {
            const int share = (participant + k) % shares_;
            const int begin = int(int64_t(count_) * share / shares_);
            const int end = int(int64_t(count_) * (share + 1) / shares_);
            if (taken_[share].count.load(std::memory_order_relaxed) >= end - begin) continue;
            const int i = taken_[share].count.fetch_add(1, std::memory_order_relaxed);
            if (i < end - begin) return begin + i;
        }
        return -1;
    }

private:
    static constexpr int kMost = 16;
    struct alignas(64) Counter {
        std::atomic<int> count{0};
    };
    int count_ = 0, shares_ = 1;
    Counter taken_[kMost];
};

class Pool {
public:
    Pool() = default;
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Runs `job` on the caller and on up to threads - 1 helpers; returns when all have finished.
    void run(Job& job, int threads);

private:
    void start_helpers(int count);
    void helper(int index);
    bool wait_for_region(unsigned& seen);  // false: stop
    bool join(int index);

    std::mutex one_caller_;
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<unsigned> epoch_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<int> active_{-1};   // helpers inside the region; -1: closed
    std::atomic<int> invited_{0};   // helpers with an index up to this may join
    std::atomic<Job*> job_{nullptr};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> helpers_;
    long owner_ = 0;                // process that started the helpers
};

}  // namespace omega
