// Euclidean norms of many tensors: a parallel loop over chunks of all of them, then a sum for each tensor.

// One of the tensors; Python fills an int64 row of the same fields.
struct Operand {
  const void* data;
  int64_t numel;
  const int64_t* strides;  // as in walk()
};

constexpr int64_t CHUNK = 16;  // blocks; its sum is in float, sums of chunks are in double

template <class T>
double sum_of_squares(const Operand& x, int64_t chunk) {
  V sum(0.f);
  Staged<T> staged;
  const int64_t end = std::min((chunk + 1) * CHUNK * BLOCK, x.numel);
  for (int64_t first = chunk * CHUNK * BLOCK; first < end; first += BLOCK) {
    const int count = (int)std::min<int64_t>(BLOCK, end - first);
    const T* const block = staged.in((T*)x.data, x.strides, first, count);
    for (int i = 0; i < BLOCK; i += LANES) {
      const V value = read(block + i);
      sum = at::vec::fmadd(value, value, sum);
    }
  }
  float lanes[LANES];
  sum.store(lanes);
  double total = 0;
  for (int k = 0; k < LANES; k++) total += lanes[k];
  return total;
}

template <class T>
void norms(const Operand* xs, int64_t count, float* out) {
  const auto chunks = [&](int64_t k) { return (xs[k].numel + CHUNK * BLOCK - 1) / (CHUNK * BLOCK); };
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += chunks(k);
  std::vector<double> sums(total);
  share_out(count, 8, chunks, [&](int64_t k, int64_t from, int64_t to, int64_t passed) {
    for (int64_t c = from; c < to; c++) sums[passed + c] = sum_of_squares<T>(xs[k], c);
  });
  int64_t next = 0;
  for (int64_t k = 0; k < count; k++) {
    double sum = 0;
    for (int64_t c = 0; c < chunks(k); c++) sum += sums[next++];
    out[k] = (float)std::sqrt(sum);
  }
}
