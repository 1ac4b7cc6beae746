// Memory that starts on a cache line, for what is laid out once and read in whole vectors.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

namespace omega {

template <class T>
class Buffer {
    static_assert(std::is_trivial<T>::value, "plain numbers only");

public:
    Buffer() = default;
    explicit Buffer(size_t count) { reserve(count); }
    ~Buffer() { std::free(data_); }
    Buffer(Buffer&& other) noexcept : data_(other.data_), count_(other.count_) {
        other.data_ = nullptr;
        other.count_ = 0;
    }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
        return *this;
    }

    // Room for `count` elements; what was there is lost when it grows.
    void reserve(size_t count) {
        if (count <= count_) return;
        std::free(data_);
        data_ = nullptr;
        count_ = 0;
        const size_t bytes = (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
        data_ = static_cast<T*>(std::aligned_alloc(kAlign, bytes));
        if (!data_) throw std::bad_alloc();
        count_ = count;
    }
    void fill(T value) {
        for (size_t i = 0; i < count_; ++i) data_[i] = value;
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return count_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

private:
    static constexpr size_t kAlign = 64;
    T* data_ = nullptr;
    size_t count_ = 0;
};

}  // namespace omega
