// How states are stored: any format, from its functions, which are printed as struct F with
//   MAXIMA, SHARED, GROUP, RANDOM           sizes of the arrays below; elements that share; see formats/format.py
//   decode(numbers, shared)                 returns the state
//   magnitudes(state, magnitudes)
//   share(maxima, shared)
//   encode(state, shared, noise, numbers)
// where numbers are a tuple; and from E, how each of its parts for elements is written, a struct with
//   Entry, zero                           type of an entry, and the one that stands for 0
//   Number                                V, or I of integers
//   PER                                   elements in an entry
//   load(entries, i)                      LANES numbers from element i on
//   store(number, entries)                a block; number(i) are LANES of its numbers, from i on
//   VECTORS, store(numbers, entries, i)   whether LANES numbers can be written alone, and if so how,
//   rounded(numbers)                      and what they are then

// Floating-point numbers of type T.
template <class T>
struct Numbers {
  using Entry = T;
  using Number = V;
  static constexpr bool VECTORS = true;
  static constexpr int PER = 1;
  static constexpr float zero = 0.f;
  inline V load(const T* entries, int i) const {
    return read(entries + i);
  }
  static inline void store(const V& numbers, T* entries, int i) {
    write(numbers, entries + i);
  }
  static inline V rounded(const V& numbers) {
    alignas(64) T entries[LANES];
    write(numbers, entries);
    return read(entries);
  }
};

// Integers of 8 bits; or of 4, two in an entry.
template <class T, int EACH = 1>
struct Integers {
  using Entry = T;
  using Number = I;
  static constexpr bool VECTORS = true;
  static constexpr int PER = EACH;
  static constexpr T zero = 0;
  inline I load(const T* entries, int i) const {
    return PER == 1 ? read_8(entries + i) : read_nibbles(entries + i / 2);
  }
  static inline void store(const I& numbers, T* entries, int i) {
    PER == 1 ? write_8(numbers, entries + i) : write_nibbles(numbers, entries + i / 2);
  }
  static inline I rounded(const I& numbers) {
    return numbers;
  }
};

// Codes of a table, a struct with VALUES[256], ZERO, the code of 0, and code(x), the code of numbers.
template <class Table>
struct Codes {
  using Entry = uint8_t;
  using Number = V;
  static constexpr bool VECTORS = false;
  static constexpr int PER = 1;
  static constexpr uint8_t zero = Table::ZERO;
  inline V load(const uint8_t* codes, int i) const {
    float values[LANES];
    for (int k = 0; k < LANES; k++) values[k] = Table::VALUES[codes[i + k]];
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

// A state in format F. OVER: which format's state it is divided by the root of, -1 for none. KEPT: whether another
// one is over it. COMPENSATED: whether it must be known what is lost of it.
template <class F, int OVER_, bool KEPT, bool COMPENSATED_, class Shared, class... E>
struct Stored {
  static constexpr int MAXIMA = F::MAXIMA, GROUP = F::GROUP, GROUPS = BLOCK / GROUP, OVER = OVER_;
  static constexpr int FOUND = OVER < 0 ? MAXIMA : 0;  // what can be known of a whole parameter
  static constexpr bool VECTORS = (E::VECTORS && ...), COMPENSATED = COMPENSATED_, RANDOM = F::RANDOM;
  // Otherwise the states are kept until all is known of a block that is needed to encode it.
  static constexpr bool AT_ONCE = F::SHARED == 0 && VECTORS && OVER < 0 && !KEPT && !RANDOM;
  static_assert(VECTORS || !(KEPT || COMPENSATED), "what is kept of codes of a table is not known at once");
  static constexpr auto PARTS = std::make_integer_sequence<int, sizeof...(E)>();
  static constexpr auto SHARES = std::make_integer_sequence<int, F::SHARED>();
  using AllNumbers = std::tuple<typename E::Number...>;

  std::tuple<typename E::Entry*...> entries;
  Shared shared;  // a tuple of pointers

  struct Buffer {
    std::tuple<Staged<typename E::Entry>...> staged;
    alignas(64) float fresh[AT_ONCE ? LANES : BLOCK];  // or its ratio
    alignas(64) float root[COMPENSATED ? BLOCK : LANES];

    Buffer() {}  // see Staged
  };

  // The buffer is elsewhere, so that the members can live in registers.
  struct Block {
    const std::tuple<E...> parts{};
    const std::tuple<typename E::Entry*...> entries;
    Buffer& buffer;
    V shared[GROUPS][F::SHARED + 1];
    V high[GROUPS][MAXIMA + 1];

    template <int... K>
    Block(
        const Stored& rows, Buffer& buffer, int64_t first, int64_t block, int count,
        std::integer_sequence<int, K...>)
        : entries(begin<E>(std::get<K>(rows.entries), std::get<K>(buffer.staged), first, block, count)...),
          buffer(buffer) {
      for (int g = 0; g < GROUPS; g++) {
        load_shared(rows, g, block * GROUPS + g, SHARES);
        for (int k = 0; k < MAXIMA; k++) high[g][k] = V(0.f);
      }
    }
    Block(const Stored& rows, Buffer& buffer, int64_t first, int64_t block, int count)
        : Block(rows, buffer, first, block, count, PARTS) {}

    // The state of LANES elements, which are in a group; `states` are those of all formats before this.
    inline V decode(int group, int i, const V* states) const {
      const V stored = F::decode(load(i, PARTS), shared[group / GROUP]);
      if constexpr (OVER >= 0) return stored * Roots(states[OVER]).root;
      return stored;
    }
    inline void measure(int group, const V& state) {
      V magnitudes[MAXIMA + 1];
      F::magnitudes(state, magnitudes);
      V* const largest = high[group / GROUP];
      for (int k = 0; k < MAXIMA; k++) largest[k] = at::vec::clamp_min(largest[k], magnitudes[k]);
    }
    inline void found(float* maxima) const {
      for (int k = 0; k < FOUND; k++) {
        V all = high[0][k];
        for (int g = 1; g < GROUPS; g++) all = at::vec::clamp_min(all, high[g][k]);
        maxima[k] = largest(all);
      }
    }
    inline void keep(int group, int i, const V& state) {
      if constexpr (AT_ONCE) {
        AllNumbers numbers;
        F::encode(state, shared[0], V(NEAREST), numbers);
        store(numbers, i, PARTS);
      } else {
        state.store(buffer.fresh + i);
        if constexpr (BLOCK_WISE && OVER < 0) measure(group, state);
      }
    }
    // Of a ratio: what it is over has been encoded, and is `over` now.
    inline void relate(int i, const V& over) {
      const Roots roots(over);
      const V ratio = V::loadu(buffer.fresh + i) * roots.per_root;
      ratio.store(buffer.fresh + i);
      if constexpr (COMPENSATED) roots.root.store(buffer.root + i);
      measure(i, ratio);
    }
    // Finds what elements share, when all of the block are known.
    inline void share(const Stored& rows, int64_t block, const float* whole) {
      for (int g = 0; g < GROUPS; g++) {
        V maxima[MAXIMA + 1];
        for (int k = 0; k < MAXIMA; k++) maxima[k] = V(BLOCK_WISE ? largest(high[g][k]) : whole[k]);
        F::share(maxima, shared[g]);
        store_shared(rows, g, block * GROUPS + g, SHARES);
      }
    }
    // Encodes a block. noise(i) are LANES random numbers; kept(i, state) is called with what has been kept, and
    // lost(i, state, root) with what has not.
    template <class Noise, class Kept, class Lost>
    void out(
        const Stored& rows, int64_t first, int64_t block, int count, const float* whole, const Noise& noise,
        const Kept& kept, const Lost& lost) {
      if constexpr (!AT_ONCE) {
        if constexpr (OVER >= 0) share(rows, block, whole);
        if constexpr (VECTORS) {
          for (int g = 0; g < BLOCK; g += GROUP) {
            const V* const now = shared[g / GROUP];
            for (int i = g; i < g + GROUP; i += LANES) {
              const V fresh = V::loadu(buffer.fresh + i);
              AllNumbers numbers;
              F::encode(fresh, now, RANDOM ? noise(i) : V(NEAREST), numbers);
              store(numbers, i, PARTS);
              if constexpr (KEPT || COMPENSATED) numbers = rounded(numbers, PARTS);
              if constexpr (KEPT) kept(i, F::decode(numbers, now));
              if constexpr (COMPENSATED) {
                const V root = V::loadu(buffer.root + i);
                lost(i, (fresh - F::decode(numbers, now)) * root, root);
              }
            }
          }
        } else {
          store_blocks(noise, PARTS);
        }
      }
      stage_out(rows, first, count, PARTS);
    }

   private:
    // Where a block's entries are; packed ones have whole blocks to themselves.
    template <class Part>
    static inline typename Part::Entry* begin(
        typename Part::Entry* row, Staged<typename Part::Entry>& staged, int64_t first, int64_t block,
        int count) {
      if constexpr (Part::PER > 1) return row + block * (BLOCK / Part::PER);
      return staged.in(row + first, nullptr, 0, count, typename Part::Entry(Part::zero));
    }
    template <int... K>
    inline AllNumbers load(int i, std::integer_sequence<int, K...>) const {
      return AllNumbers(std::get<K>(parts).load(std::get<K>(entries), i)...);
    }
    template <int... K>
    inline void store(const AllNumbers& numbers, int i, std::integer_sequence<int, K...>) {
      (E::store(std::get<K>(numbers), std::get<K>(entries), i), ...);
    }
    template <int... K>
    static inline AllNumbers rounded(const AllNumbers& numbers, std::integer_sequence<int, K...>) {
      return AllNumbers(E::rounded(std::get<K>(numbers))...);
    }
    template <class Noise, int... K>
    inline void store_blocks(const Noise& noise, std::integer_sequence<int, K...>) {
      const auto number = [&](auto part) {
        return [&](int i) {
          AllNumbers numbers;
          F::encode(V::loadu(buffer.fresh + i), shared[i / GROUP], RANDOM ? noise(i) : V(NEAREST), numbers);
          return std::get<decltype(part)::value>(numbers);
        };
      };
      (store_block<E>(number(std::integral_constant<int, K>()), std::get<K>(entries)), ...);
    }
    template <class Part, class Number>
    static inline void store_block(const Number& number, typename Part::Entry* entries) {
      if constexpr (Part::VECTORS) {
        for (int i = 0; i < BLOCK; i += LANES) Part::store(number(i), entries, i);
      } else {
        Part::store(number, entries);
      }
    }
    template <int... K>
    inline void load_shared(const Stored& rows, int g, int64_t group, std::integer_sequence<int, K...>) {
      ((shared[g][K] = V((float)std::get<K>(rows.shared)[group])), ...);
    }
    template <int... K>
    inline void store_shared(const Stored& rows, int g, int64_t group, std::integer_sequence<int, K...>) {
      float lanes[LANES];
      ((shared[g][K].store(lanes), std::get<K>(rows.shared)[group] = lanes[0],
        shared[g][K] = V((float)std::get<K>(rows.shared)[group])),
       ...);
    }
    template <int... K>
    void stage_out(const Stored& rows, int64_t first, int count, std::integer_sequence<int, K...>) {
      (stage_out<E>(std::get<K>(rows.entries), std::get<K>(buffer.staged), first, count), ...);
    }
    template <class Part>
    static inline void stage_out(
        typename Part::Entry* row, Staged<typename Part::Entry>& staged, int64_t first, int count) {
      if constexpr (Part::PER == 1) staged.out(row + first, nullptr, 0, count);
    }
  };
};
