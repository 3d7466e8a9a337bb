// One optimizer step for a bucket of parameters: a single parallel loop over all their blocks.
//
// Printed before this text: struct Rule with
//   STATES, HYPER, SCALARS
//   STEP_SIZE, UNIT                   which scalars these are
//   scalars(hyper, step, out)         what the elements of a parameter share
//   update(param, grad, state, s)     the update of LANES elements; param and state are replaced
//   direction(param, grad, state, s)  returns the direction; state is replaced
//   MEANS, FIRST_MEASURED             how many means there are, and where they and the number of elements are
//                                     among the scalars
//   measure(param, grad, state, s, numbers)   the numbers that means are taken of
//   impulse<K>(lost, root, s)         the directions to come that a part of a state has, see rules/rule.py
// where states are in the order of their formats; GRAD_LIMIT, the Modes of ops/operator.py,
// trust_ratio(max_unorm, param_norm, update_norm), random_bits(index, step), high_bits(index, step),
// round_bits(bits, random) and noise_of(random); and what stores the states, see stored.h.

// A parameter of the bucket; Python fills an int64 row of the same fields.
struct Parameter {
  void* data;
  const void* grad;  // null: no gradient, nothing of this parameter is touched
  int64_t numel;
  int64_t offset;  // of its first element in the arenas
  int64_t block;   // of its first scale
  // Null for a contiguous tensor, otherwise {dims, sizes..., strides...}.
  const int64_t* data_strides;
  const int64_t* grad_strides;
  // A part of a tensor that several processes hold: see formats/arena.py, Slot.
  int64_t row;
  int64_t row_blocks;
  int64_t row_stride;
  int64_t first;
};

// Whether all of a block's gradients are below the limit, and none is NaN.
template <class G>
inline bool all_usable(const G* grad, float scale) {
  if constexpr (SKIP_ZEROS) return false;  // each is looked at then
  // Most often none reaches 2, so that the first bit of no exponent is set, in any of the dtypes.
  if (!GRAD_SCALE || std::abs(scale) < (float)(GRAD_LIMIT / 2)) {
    constexpr int EACH = sizeof(int32_t) / sizeof(G);
    I bits(0);
    for (int i = 0; i < BLOCK; i += LANES * EACH) bits = bits | I::loadu((const int32_t*)(grad + i));
    if constexpr (EACH == 2) bits = bits | bits << I(16);
    if (as_numbers(bits & I(0x40000000)).zero_mask() == (1 << LANES) - 1) return true;
  }
  const V to_infinity = V((GRAD_SCALE ? scale : 1.f) * (float)(0x1p128 / GRAD_LIMIT));
  V bad(0.f);  // zero, or NaN from 0 * infinity
  for (int i = 0; i < BLOCK; i += LANES)
    bad = at::vec::fmadd(read(grad + i) * to_infinity, V(0.f), bad);
  return bad.zero_mask() == (1 << LANES) - 1;
}

// All bits of the lanes whose gradient is used.
inline V usable(const V& grad) {
  const V below = grad.abs() < V(GRAD_LIMIT);
  if constexpr (SKIP_ZEROS) return below & (grad != V(0.f));
  return below;
}

// Of a block, and then of a parameter: what its update must know beforehand.
template <int MAXIMA>
struct Measured {
  static constexpr int SUMS = Rule::MEANS ? 1 + Rule::MEANS : 0;
  double update = 0, param = 0;  // sums of squares
  double sums[SUMS + 1] = {};    // of elements, and of their numbers
  float maxima[MAXIMA + 1] = {};  // what the formats found

  // As the option `totals`: a row of numbers.
  static constexpr int COLUMNS = 2 + SUMS + MAXIMA;
  static Measured from(const double* row) {
    Measured found;
    found.update = row[0], found.param = row[1];
    for (int k = 0; k < SUMS; k++) found.sums[k] = row[2 + k];
    for (int k = 0; k < MAXIMA; k++) found.maxima[k] = (float)row[2 + SUMS + k];
    return found;
  }
  void write(double* row) const {
    row[0] = update, row[1] = param;
    for (int k = 0; k < SUMS; k++) row[2 + k] = sums[k];
    for (int k = 0; k < MAXIMA; k++) row[2 + SUMS + k] = maxima[k];
  }

  void add(const Measured& other) {
    update += other.update;
    param += other.param;
    for (int k = 0; k < SUMS; k++) sums[k] += other.sums[k];
    for (int k = 0; k < MAXIMA; k++) maxima[k] = std::max(maxima[k], other.maxima[k]);
  }
};

// The formats of the rule's states, with the first maximum of each.
template <class... F>
struct Formats {
  std::tuple<F...> formats;
  using Buffers = std::tuple<typename F::Buffer...>;
  using Blocks = std::tuple<typename F::Block...>;
  static constexpr auto ALL = std::make_integer_sequence<int, sizeof...(F)>();

  static constexpr int MAXIMA = (F::FOUND + ... + 0);
  static constexpr int GROUP = std::min({BLOCK, F::GROUP...});  // the fewest elements that share something
  static constexpr int COMPENSATED = (F::COMPENSATED + ... + 0);

  static constexpr int first_maximum(int format) {
    constexpr int counts[] = {F::FOUND..., 0};
    int first = 0;
    for (int k = 0; k < format; k++) first += counts[k];
    return first;
  }
  static constexpr int over(int format) {
    constexpr int overs[] = {F::OVER..., 0};
    return overs[format];
  }
  // How many before a format are compensated.
  static constexpr int compensated_before(int format) {
    constexpr bool flags[] = {F::COMPENSATED..., false};
    int count = 0;
    for (int k = 0; k < format; k++) count += flags[k];
    return count;
  }
};

// Updates block b of a parameter; or, if MEASURE, only finds out about it.
template <bool MEASURE, class P, class G, class Storage, int... F>
Measured<Storage::MAXIMA> update_block(
    const Parameter& parameter, const Storage& storage, int64_t b, const float* scalars, float grad_scale,
    int64_t step, const Measured<Storage::MAXIMA>& whole, std::integer_sequence<int, F...>) {
  int64_t first = b * BLOCK, end = parameter.numel, index = parameter.first + first;
  if constexpr (ROWS) {
    const int64_t row = b / parameter.row_blocks, column = b % parameter.row_blocks * BLOCK;
    first = row * parameter.row + column, end = (row + 1) * parameter.row;
    index = parameter.first + row * parameter.row_stride + column;
  }
  const int64_t offset = parameter.offset + first, block = parameter.block + b;
  const int count = (int)std::min<int64_t>(BLOCK, end - first);
  Staged<P> staged_param;
  Staged<G> staged_grad;
  P* const data = (P*)parameter.data;
  P* const param = staged_param.in(data, parameter.data_strides, first, count);
  const G not_usable(std::numeric_limits<float>::quiet_NaN());  // past the end
  const G* const grad =
      staged_grad.in((G*)parameter.grad, parameter.grad_strides, first, count, not_usable);
  typename Storage::Buffers buffers;
  typename Storage::Blocks states{typename std::tuple_element_t<F, typename Storage::Blocks>(
      std::get<F>(storage.formats), std::get<F>(buffers), offset, block, count)...};

  V s[Rule::SCALARS];
  for (int k = 0; k < Rule::SCALARS; k++) s[k] = V(scalars[k]);
  const V scale(grad_scale);
  V update_squares(0.f), param_squares(0.f);
  V sums[Rule::MEANS + 1];
  for (V& all : sums) all = V(0.f);
  // Without what comes for states that are encoded, and not rounded yet.
  alignas(64) float moved[Storage::COMPENSATED ? BLOCK : LANES];
  const auto number = [&](int i) { return numbers_from((int32_t)(index + i)); };
  const I now((int32_t)step);
  const auto rounded = [&](int i, const V& fresh_param) {
    if constexpr (!STOCHASTIC_ROUND) return fresh_param;
    return as_numbers(round_bits(as_integers(fresh_param), random_bits(number(i), now)));
  };
  const auto update_at = [&](auto checked, int group, int i) {
    const V old_param = read(param + i);
    V old[Rule::STATES + 1], fresh[Rule::STATES + 1];
    ((old[F] = std::get<F>(states).decode(group, i, old)), ...);
    for (int k = 0; k < Rule::STATES; k++) fresh[k] = old[k];
    V fresh_param = old_param;
    const V grad_f32 = GRAD_SCALE ? read(grad + i) * scale : read(grad + i);
    V direction(0.f);
    if constexpr (MEASURE && MEANS) {
      V numbers[Rule::MEANS + 1], counted(1.f);
      Rule::measure(old_param, grad_f32, old, s, numbers);
      if constexpr (checked) counted = V::blendv(V(0.f), counted, usable(grad_f32));
      sums[0] = sums[0] + counted;
      for (int k = 0; k < Rule::MEANS; k++)
        sums[k + 1] = sums[k + 1] + (checked ? V::blendv(V(0.f), numbers[k], usable(grad_f32)) : numbers[k]);
    } else if constexpr (MEASURE && MAX_UNORM) {
      direction = Rule::direction(old_param, grad_f32, fresh, s);
    } else {
      Rule::update(fresh_param, grad_f32, fresh, s);
      if constexpr (!Storage::COMPENSATED) fresh_param = rounded(i, fresh_param);
    }
    if constexpr (checked && !(MEASURE && MEANS)) {
      const V used = usable(grad_f32);
      if constexpr (!Storage::COMPENSATED) fresh_param = V::blendv(old_param, fresh_param, used);
      direction = V::blendv(V(0.f), direction, used);
      for (int k = 0; k < Rule::STATES; k++) fresh[k] = V::blendv(old[k], fresh[k], used);
    }
    if constexpr (MEASURE && MEANS) {
      // These are all that is asked for.
    } else if constexpr (MEASURE) {
      update_squares = at::vec::fmadd(direction, direction, update_squares);
      param_squares = at::vec::fmadd(old_param, old_param, param_squares);
      ((Storage::over(F) < 0 ? std::get<F>(states).measure(group, fresh[F]) : void()), ...);
    } else {
      Storage::COMPENSATED ? fresh_param.store(moved + i) : write(fresh_param, param + i);
      (std::get<F>(states).keep(group, i, fresh[F]), ...);
    }
  };
  const auto update = [&](auto checked) {
    for (int group = 0; group < BLOCK; group += Storage::GROUP)
      for (int i = group; i < group + Storage::GROUP; i += LANES) update_at(checked, group, i);
  };
  if constexpr (SKIP_ZEROS && BLOCK_WISE && !MEASURE) {
    // Encoding a block anew may change it, so one without any gradient is left alone.
    V any(0.f);
    for (int i = 0; i < BLOCK; i += LANES)
      any = V::blendv(any, V(1.f), usable(GRAD_SCALE ? read(grad + i) * scale : read(grad + i)));
    if (largest(any) == 0.f) return {};
  }
  // Elements with an unusable gradient stay as they are; most blocks have none and need no check of each.
  const bool clean = all_usable(grad, grad_scale);
  if (clean) {
    update(std::false_type());
  } else {
    update(std::true_type());
  }
  Measured<Storage::MAXIMA> found;
  if constexpr (MEASURE) {
    found.update = MAX_UNORM ? sum(update_squares) : 0.f;
    found.param = sum(param_squares);
    for (int k = 0; k < found.SUMS; k++) found.sums[k] = sum(sums[k]);
    (std::get<F>(states).found(found.maxima + Storage::first_maximum(F)), ...);
  } else {
    const auto noise = [&](int i) { return noise_of(high_bits(number(i), now)); };
    const auto relate = [&](auto format, int i, const V& kept) {
      ((Storage::over(F) == format ? std::get<F>(states).relate(i, kept) : void()), ...);
    };
    const auto compensate = [&](auto format, int i, const V& lost, const V& root) {
      V fresh_param = V::loadu(moved + i);
      fresh_param = fresh_param - s[Rule::STEP_SIZE] * Rule::template impulse<format>(lost, root, s);
      if (Storage::compensated_before(format) + 1 < Storage::COMPENSATED) {
        fresh_param.store(moved + i);
        return;
      }
      fresh_param = rounded(i, fresh_param);
      if (!clean) {
        const V grad_f32 = GRAD_SCALE ? read(grad + i) * scale : read(grad + i);
        fresh_param = V::blendv(read(param + i), fresh_param, usable(grad_f32));
      }
      write(fresh_param, param + i);
    };
    // One reduction need not wait for what is made of another one.
    const auto share = [&](auto format) {
      if constexpr (Storage::over(format) < 0)
        std::get<format>(states).share(
            std::get<format>(storage.formats), block, whole.maxima + Storage::first_maximum(format));
    };
    (share(std::integral_constant<int, F>()), ...);
    const auto out = [&](auto format) {
      std::get<format>(states).out(
          std::get<format>(storage.formats), offset, block, count,
          whole.maxima + Storage::first_maximum(format), noise,
          [&](int i, const V& kept) { relate(format, i, kept); },
          [&](int i, const V& lost, const V& root) { compensate(format, i, lost, root); });
    };
    (out(std::integral_constant<int, F>()), ...);
    staged_param.out(data, parameter.data_strides, first, count);
  }
  return found;
}

inline bool is_active(const Parameter& p, float grad_scale) {
  return p.grad && std::isfinite(grad_scale);
}

inline int64_t count_blocks(const Parameter& p) {
  return ROWS ? p.numel / p.row * p.row_blocks : (p.numel + BLOCK - 1) / BLOCK;
}

// What the next step must know of whole parameters.
template <class P, class G, class Storage>
std::vector<Measured<Storage::MAXIMA>> measure_bucket(
    const Parameter* parameters, int64_t count, const Storage& storage, const int64_t* step,
    const double* hyper, const float* grad_scale) {
  using Found = Measured<Storage::MAXIMA>;
  const auto scale = [&](int64_t k) { return GRAD_SCALE ? grad_scale[k] : 1.f; };
  const auto blocks = [&](int64_t k) {
    return is_active(parameters[k], scale(k)) ? count_blocks(parameters[k]) : 0;
  };
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += blocks(k);
  std::vector<Found> found(total), whole(count);
  share_out(count, 64, blocks, [&](int64_t k, int64_t from, int64_t to, int64_t passed) {
    float scalars[Rule::SCALARS] = {};  // the means are not known yet
    Rule::scalars(hyper + k * Rule::HYPER, (double)(step[k] + 1), scalars);
    for (int64_t b = from; b < to; b++)
      found[passed + b] = update_block<true, P, G>(
          parameters[k], storage, b, scalars, scale(k), step[k] + 1, whole[k], Storage::ALL);
  });
  const Found* next = found.data();
  for (int64_t k = 0; k < count; k++)
    for (int64_t b = 0; b < blocks(k); b++) whole[k].add(*next++);
  return whole;
}

template <class P, class G, class Storage>
void update_parameters(
    const Parameter* parameters, int64_t count, const Storage& storage, int64_t* step,
    const double* hyper, const float* grad_scale, const float* max_unorm, float* unorm,
    const double* totals) {
  const auto scale = [&](int64_t k) { return GRAD_SCALE ? grad_scale[k] : 1.f; };
  const auto active = [&](int64_t k) { return is_active(parameters[k], scale(k)); };
  const auto blocks = [&](int64_t k) { return active(k) ? count_blocks(parameters[k]) : 0; };

  using Found = Measured<Storage::MAXIMA>;
  std::vector<Found> whole(NEEDS_TOTALS ? count : 1);
  if constexpr (TOTALS) {
    for (int64_t k = 0; k < count; k++) whole[k] = Found::from(totals + k * Found::COLUMNS);
  } else if constexpr (NEEDS_TOTALS) {
    whole = measure_bucket<P, G>(parameters, count, storage, step, hyper, grad_scale);
  }
  for (int64_t k = 0; k < count; k++) step[k] += active(k);
  if constexpr (MAX_UNORM) {
    for (int64_t k = 0; k < count; k++) {
      if (!active(k)) continue;
      float scalars[Rule::SCALARS];
      Rule::scalars(hyper + k * Rule::HYPER, (double)step[k], scalars);
      unorm[k] = (float)(whole[k].update * scalars[Rule::UNIT] * scalars[Rule::UNIT]);
    }
  }

  // A thread is worth waking for some 10 microseconds of work.
  share_out(count, 64, blocks, [&](int64_t k, int64_t from, int64_t to, int64_t) {
    float scalars[Rule::SCALARS];
    Rule::scalars(hyper + k * Rule::HYPER, (double)step[k], scalars);
    const Found& all = whole[NEEDS_TOTALS ? k : 0];
    if constexpr (MAX_UNORM) {
      const double unit = scalars[Rule::UNIT];
      scalars[Rule::STEP_SIZE] *=
          trust_ratio(max_unorm[k], std::sqrt(all.param), unit * std::sqrt(all.update));
    }
    if constexpr (MEANS) {
      const double elements = std::max(all.sums[0], 1.0);
      for (int m = 0; m < Rule::MEANS; m++)
        scalars[Rule::FIRST_MEASURED + m] = (float)(all.sums[1 + m] / elements);
      scalars[Rule::FIRST_MEASURED + Rule::MEANS] = (float)elements;
    }
    for (int64_t b = from; b < to; b++)
      update_block<false, P, G>(
          parameters[k], storage, b, scalars, scale(k), step[k], all, Storage::ALL);
  });
}

template <class P, class G, class Storage>
void update_bucket(
    const Parameter* parameters, int64_t count, const Storage& storage, int64_t* step,
    const double* hyper, const float* grad_scale, const float* max_unorm, float* unorm,
    const double* totals) {
  // What must be read twice is read the second time while it is in the cache.
  constexpr int64_t ELEMENTS = NEEDS_TOTALS && !TOTALS ? 1 << 20 : std::numeric_limits<int64_t>::max();
  for (int64_t k = 0; k < count;) {
    int64_t end = k, elements = 0;
    do elements += parameters[end++].numel;
    while (end < count && elements + parameters[end].numel <= ELEMENTS);
    const auto from = [&](auto* row) { return row ? row + k : row; };
    update_parameters<P, G>(
        parameters + k, end - k, storage, step + k, hyper + k * Rule::HYPER, from(grad_scale),
        from(max_unorm), from(unorm), totals);
    k = end;
  }
}
