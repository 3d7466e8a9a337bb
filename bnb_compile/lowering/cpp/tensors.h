// Blocks of tensors as vectors of floats, whatever their dtype and strides.

using V = at::vec::Vectorized<float>;
constexpr int BLOCK = 256;
constexpr int LANES = V::size();

template <class T>
inline V read(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return V::loadu(from);
  } else {
    return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, LANES));
  }
}

template <class T>
inline void write(const V& value, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    value.store(to);
  } else {
    at::vec::convert<T>(value).store(to, LANES);
  }
}

// Calls visit(element, place in memory) for `count` elements in logical order from `first` on.
template <class Visit>
inline void walk(const int64_t* strides, int64_t first, int count, const Visit& visit) {
  const int dims = (int)strides[0];
  const int64_t *size = strides + 1, *stride = strides + 1 + dims;
  for (int i = 0; i < count; i++) {
    int64_t rest = first + i, place = 0;
    for (int d = dims - 1; d >= 0; d--) {
      place += rest % size[d] * stride[d];
      rest /= size[d];
    }
    visit(i, place);
  }
}

// What a block of a tensor is computed on: the tensor itself, or a copy where the block is cut off by
// the tensor's end or does not lie together in memory. Lanes past the end hold `zero`.
template <class T>
struct Staged {
  alignas(64) T copy[BLOCK];

  T* in(T* tensor, const int64_t* strides, int64_t first, int count, T zero = T(0)) {
    if (!strides && count == BLOCK) return tensor + first;
    for (int i = count; i < BLOCK; i++) copy[i] = zero;
    if (strides) {
      walk(strides, first, count, [&](int i, int64_t place) { copy[i] = tensor[place]; });
    } else {
      std::copy_n(tensor + first, count, copy);
    }
    return copy;
  }

  void out(T* tensor, const int64_t* strides, int64_t first, int count) {
    if (!strides && count == BLOCK) return;
    if (strides) {
      walk(strides, first, count, [&](int i, int64_t place) { tensor[place] = copy[i]; });
    } else {
      std::copy_n(copy, count, tensor + first);
    }
  }
};
