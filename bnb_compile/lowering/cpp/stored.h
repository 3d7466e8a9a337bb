// How states are stored: any format, from its functions, which are printed as struct F with
//   STATES, MAXIMA, SHARED                sizes of the arrays below
//   decode(numbers, shared, states)       V each
//   magnitudes(states, magnitudes)
//   share(maxima, shared)
//   encode(states, shared, numbers)
// and from E, how each of its parts for elements is written, a struct with
//   Entry, zero                           type of an entry, and the one that stands for 0
//   load(entries)                         LANES numbers
//   store(number, entries)                a block; number(i) are LANES of its numbers, from i on
//   VECTORS, store(numbers, entries)      whether LANES numbers can be written alone, and if so how

// Numbers of type T.
template <class T>
struct Numbers {
  using Entry = T;
  static constexpr bool VECTORS = true;
  static constexpr float zero = 0.f;
  inline V load(const T* from) const {
    return read(from);
  }
  static inline void store(const V& numbers, T* to) {
    write(numbers, to);
  }
  template <class Number>
  static inline void store(const Number& number, T* to) {
    for (int i = 0; i < BLOCK; i += LANES) write(number(i), to + i);
  }
};

// Codes of a table, a struct with VALUES[256], ZERO, the code of 0, and code(x), the code of numbers.
template <class Table>
struct Codes {
  using Entry = uint8_t;
  static constexpr bool VECTORS = false;
  static constexpr uint8_t zero = Table::ZERO;
  inline V load(const uint8_t* codes) const {
    float values[LANES];
    for (int k = 0; k < LANES; k++) values[k] = Table::VALUES[codes[k]];
    return V::loadu(values);
  }
  template <class Number>
  static inline void store(const Number& number, uint8_t* codes) {
    for (int i = 0; i < BLOCK; i += LANES) {
      float lane[LANES];
      Table::code(number(i)).store(lane);
      for (int k = 0; k < LANES; k++) codes[i + k] = (uint8_t)lane[k];
    }
  }
};

template <class F, class... E>
struct Stored {
  static constexpr int STATES = F::STATES, MAXIMA = F::MAXIMA;
  // Otherwise the states are kept until all is known of a block that is needed to encode it.
  static constexpr bool AT_ONCE = F::SHARED == 0 && (E::VECTORS && ...);
  static constexpr auto PARTS = std::make_integer_sequence<int, sizeof...(E)>();

  std::tuple<typename E::Entry*...> entries;
  std::array<float*, F::SHARED> shared;

  struct Buffer {
    std::tuple<Staged<typename E::Entry>...> staged;
    alignas(64) float fresh[AT_ONCE ? 1 : STATES][AT_ONCE ? LANES : BLOCK];

    Buffer() {}  // see Staged
  };

  // The buffer is elsewhere, so that the members can live in registers.
  struct Block {
    const std::tuple<E...> parts{};
    const std::tuple<typename E::Entry*...> entries;
    Buffer& buffer;
    V shared[F::SHARED + 1];
    V high[MAXIMA + 1];

    template <int... K>
    Block(
        const Stored& rows, Buffer& buffer, int64_t first, int64_t block, int count,
        std::integer_sequence<int, K...>)
        : entries(std::get<K>(buffer.staged)
                      .in(std::get<K>(rows.entries) + first, nullptr, 0, count,
                          typename E::Entry(E::zero))...),
          buffer(buffer) {
      for (int k = 0; k < F::SHARED; k++) shared[k] = V(rows.shared[k][block]);
      for (int k = 0; k < MAXIMA; k++) high[k] = V(0.f);
    }
    Block(const Stored& rows, Buffer& buffer, int64_t first, int64_t block, int count)
        : Block(rows, buffer, first, block, count, PARTS) {}

    inline void decode(int i, V* states) const {
      decode(i, states, PARTS);
    }
    inline void measure(const V* states) {
      V magnitudes[MAXIMA + 1];
      F::magnitudes(states, magnitudes);
      for (int k = 0; k < MAXIMA; k++) high[k] = at::vec::clamp_min(high[k], magnitudes[k]);
    }
    inline void found(float* maxima) const {
      for (int k = 0; k < MAXIMA; k++) maxima[k] = largest(high[k]);
    }
    inline void keep(int i, const V* states) {
      if constexpr (AT_ONCE) {
        encode(i, states, PARTS);
      } else {
        for (int k = 0; k < STATES; k++) states[k].store(buffer.fresh[k] + i);
        if constexpr (BLOCK_WISE) measure(states);
      }
    }
    void out(const Stored& rows, int64_t first, int64_t block, int count, const float* whole) {
      if constexpr (!AT_ONCE) {
        V maxima[MAXIMA + 1], fresh[F::SHARED + 1];
        for (int k = 0; k < MAXIMA; k++) maxima[k] = V(BLOCK_WISE ? largest(high[k]) : whole[k]);
        F::share(maxima, fresh);
        float lanes[LANES];
        for (int k = 0; k < F::SHARED; k++) {
          fresh[k].store(lanes);
          rows.shared[k][block] = lanes[0];
        }
        encode(fresh, PARTS);
      }
      out(rows, first, count, PARTS);
    }

   private:
    template <int... K>
    inline void decode(int i, V* states, std::integer_sequence<int, K...>) const {
      const V numbers[] = {std::get<K>(parts).load(std::get<K>(entries) + i)...};
      F::decode(numbers, shared, states);
    }
    template <int... K>
    inline void encode(int i, const V* states, std::integer_sequence<int, K...>) {
      V numbers[sizeof...(E)];
      F::encode(states, shared, numbers);
      (E::store(numbers[K], std::get<K>(entries) + i), ...);
    }
    template <int... K>
    inline void encode(const V* shared, std::integer_sequence<int, K...>) {
      const auto numbers = [&](int part) {
        return [&, part](int i) {
          V states[STATES], numbers[sizeof...(E)];
          for (int k = 0; k < STATES; k++) states[k] = V::loadu(buffer.fresh[k] + i);
          F::encode(states, shared, numbers);
          return numbers[part];
        };
      };
      (E::store(numbers(K), std::get<K>(entries)), ...);
    }
    template <int... K>
    void out(const Stored& rows, int64_t first, int count, std::integer_sequence<int, K...>) {
      (std::get<K>(buffer.staged).out(std::get<K>(rows.entries) + first, nullptr, 0, count), ...);
    }
  };
};
