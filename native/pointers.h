// A list of pointers that lives on the C stack while it is short.
#pragma once

#include <cstddef>
#include <vector>

namespace accel {

// Not initialised. Owns nothing that its pointers point to.
template <typename T>
class Pointers {
 public:
  explicit Pointers(size_t count) {
    if (count > INLINE) many_.resize(count);
    data_ = count > INLINE ? many_.data() : few_;
  }
  Pointers(const Pointers&) = delete;
  Pointers& operator=(const Pointers&) = delete;
  T& operator[](size_t index) { return data_[index]; }
  const T& operator[](size_t index) const { return data_[index]; }
  T* data() { return data_; }

 private:
  static constexpr size_t INLINE = 48;
  T few_[INLINE];
  std::vector<T> many_;
  T* data_;
};

}  // namespace accel
