// formats/elements.py: one state as numbers of type T, each for itself.
template <class T>
struct Elements {
  static constexpr int STATES = 1;
  T* values;

  using Buffer = Staged<T>;

  struct Block {
    T* const values;

    Block(const Elements& rows, Buffer& buffer, int64_t first, int64_t, int count)
        : values(buffer.in(rows.values + first, nullptr, 0, count)) {}
    inline void decode(int i, V* state) const {
      state[0] = read(values + i);
    }
    inline void measure(const V*) {}
    inline void found(float* whole) const {
      whole[0] = 0.f;
    }
    inline void keep(int i, const V* state) {
      write(state[0], values + i);
    }
    void out(
        const Elements& rows, Buffer& buffer, int64_t first, int64_t, int count, const float*) {
      buffer.out(rows.values + first, nullptr, 0, count);
    }
  };
};
