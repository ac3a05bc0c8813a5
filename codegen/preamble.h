// What every generated kernel builds on: vectors of N lanes, loads and stores, functions.
//
// No header is included, so that a library compiles in tenths of a second. Rules:
// 1. bool is a vector of int, 0 or -1 in each lane.
// 2. NaN, infinities and signed zeros come out as in ATen's CPU kernels.
// 3. Error bounds against the exact result are stated in ULP and held by tests.
typedef long i64;
typedef unsigned long u64;
#define INLINE static inline __attribute__((always_inline, unused))

template <class T, int N> struct vector_ { typedef T type __attribute__((vector_size(sizeof(T) * N))); };
template <class T, int N> using vec = typename vector_<T, N>::type;
template <int K> struct count { static constexpr int value = K; };

template <class A, class B> struct is_same_ { static constexpr bool value = false; };
template <class A> struct is_same_<A, A> { static constexpr bool value = true; };

template <int SIZE> struct sized_ { typedef int type; };
template <> struct sized_<8> { typedef i64 type; };

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };
struct boolean { unsigned char bits; };

template <class V> struct shape_;
#define SHAPE(T, N)                                                   \
  template <> struct shape_<vec<T, N>> {                              \
    typedef T element;                                                \
    static constexpr int n = N;                                       \
  };
#define SHAPES(N)                                                                         \
  SHAPE(float, N) SHAPE(double, N) SHAPE(int, N) SHAPE(i64, N) SHAPE(short, N)            \
  SHAPE(signed char, N) SHAPE(unsigned short, N) SHAPE(unsigned char, N)
SHAPES(2) SHAPES(4) SHAPES(8) SHAPES(16)
#define LANES(V) (shape_<V>::n)
template <class V> using element = typename shape_<V>::element;
template <class V> using ints = vec<int, shape_<V>::n>;

template <class T, int N> INLINE vec<T, N> splat(T x) { return x - vec<T, N>{}; }

// A value that is the same in all lanes, in N lanes.
template <int N, class V> INLINE vec<element<V>, N> spread(V x) {
  return splat<element<V>, N>(x[0]);
}

// ---- conversions

template <class T, class V> INLINE vec<T, LANES(V)> v_to(V x) {
  return __builtin_convertvector(x, vec<T, LANES(V)>);
}
// A comparison's result (lanes as wide as the operands) as bool.
template <class M> INLINE ints<M> v_mask(M m) {
  if constexpr (sizeof(element<M>) == 8) return __builtin_convertvector(m, ints<M>);
  else return m;
}

template <class V> INLINE V v_where(ints<V> m, V a, V b) {
  if constexpr (sizeof(element<V>) == 8) {
    return __builtin_convertvector(m, vec<i64, LANES(V)>) ? a : b;
  } else {
    return m ? a : b;
  }
}
template <class T, class V> INLINE V v_wrap(V x) {
  constexpr int spare = 8 * (sizeof(element<V>) - sizeof(T));
  if constexpr ((T)-1 < (T)0) return x << spare >> spare;
  return x & (element<V>)(T)-1;
}

INLINE unsigned float_bits(float x) { return __builtin_bit_cast(unsigned, x); }

template <class V> INLINE V v_round_bfloat16(V x) {
  typedef vec<unsigned, LANES(V)> U;
  U u = (U)x;
  U r = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
  return x == x ? (V)r : (V)(u | 0x00400000u);
}

#ifdef __F16C__
typedef float f32x8 __attribute__((vector_size(32)));
typedef short i16x8 __attribute__((vector_size(16)));
#endif
INLINE float half_to_float(unsigned short h) {
  unsigned sign = (unsigned)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return __builtin_bit_cast(float, sign | 0x7f800000u | (rest & 0x3ff) << 13);
  if (rest < 0x400) {
    float f = (float)rest * 5.9604644775390625e-8f;
    return __builtin_bit_cast(float, float_bits(f) | sign);
  }
  return __builtin_bit_cast(float, sign | ((rest << 13) + 0x38000000u));
}
INLINE unsigned short float_to_half(float x) {
  unsigned u = float_bits(x), sign = u >> 16 & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00 | (u >> 13 & 0x3ff);
  if (u >= 0x477ff000u) return sign | 0x7c00;
  if (u < 0x38800000u) {
    float f = __builtin_bit_cast(float, u) + 0.5f;
    return sign | (unsigned short)(float_bits(f) - 0x3f000000u);
  }
  return sign | (unsigned short)((u + 0xfffu + (u >> 13 & 1u) - 0x38000000u) >> 13);
}
template <int N> INLINE vec<float, N> halves_to_floats(vec<short, N> h) {
#ifdef __AVX512F__
  if constexpr (N == 16) {
    return __builtin_ia32_vcvtph2ps512_mask(h, vec<float, N>{}, (unsigned short)-1, 4);
  }
#endif
  vec<float, N> r;
#ifdef __F16C__
  if constexpr (N >= 8) {
    for (int k = 0; k < N / 8; k++) {
      i16x8 part;
      __builtin_memcpy(&part, (const char*)&h + 16 * k, 16);
      f32x8 wide = __builtin_ia32_vcvtph2ps256(part);
      __builtin_memcpy((char*)&r + 32 * k, &wide, 32);
    }
    return r;
  }
#endif
  for (int l = 0; l < N; l++) r[l] = half_to_float((unsigned short)h[l]);
  return r;
}
template <int N> INLINE vec<short, N> floats_to_halves(vec<float, N> x) {
#ifdef __AVX512F__
  if constexpr (N == 16) {
    return __builtin_ia32_vcvtps2ph512_mask(x, 0, vec<short, N>{}, (unsigned short)-1);
  }
#endif
  vec<short, N> r;
#ifdef __F16C__
  if constexpr (N >= 8) {
    for (int k = 0; k < N / 8; k++) {
      f32x8 part;
      __builtin_memcpy(&part, (const char*)&x + 32 * k, 32);
      i16x8 narrow = __builtin_ia32_vcvtps2ph256(part, 0);
      __builtin_memcpy((char*)&r + 16 * k, &narrow, 16);
    }
    return r;
  }
#endif
  for (int l = 0; l < N; l++) r[l] = (short)float_to_half(x[l]);
  return r;
}
template <class V> INLINE V v_round_float16(V x) {
  return halves_to_floats<LANES(V)>(floats_to_halves<LANES(V)>(x));
}

// ---- memory: K of N lanes; the others are zero when loaded and untouched when stored

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define NARROW_MASKS
#endif
template <int N, int K, class T> INLINE vec<T, N> load_raw(const T* p) {
  vec<T, N> r;
  if constexpr (K == N) {
    __builtin_memcpy(&r, p, sizeof r);
    return r;
#ifdef __AVX512F__
  } else if constexpr (N == 16 && sizeof(T) == 4) {
    typedef float F __attribute__((vector_size(64)));
    return (vec<T, N>)__builtin_ia32_loadups512_mask((const float*)p, (F){}, (unsigned short)((1u << K) - 1));
  } else if constexpr (N == 8 && sizeof(T) == 8) {
    typedef double D __attribute__((vector_size(64)));
    return (vec<T, N>)__builtin_ia32_loadupd512_mask((const double*)p, (D){}, (unsigned char)((1u << K) - 1));
#endif
#ifdef NARROW_MASKS
  } else if constexpr (N == 16 && sizeof(T) == 2) {
    return (vec<T, N>)__builtin_ia32_loaddquhi256_mask((const short*)p, vec<short, 16>{}, (unsigned short)((1u << K) - 1));
  } else if constexpr (N == 16 && sizeof(T) == 1) {
    return (vec<T, N>)__builtin_ia32_loaddquqi128_mask((const char*)p, vec<char, 16>{}, (unsigned short)((1u << K) - 1));
#endif
  } else {
    r = vec<T, N>{};
    for (int l = 0; l < K; l++) r[l] = p[l];
    return r;
  }
}
template <int N, int K, class T> INLINE void store_raw(T* p, vec<T, N> v) {
  if constexpr (K == N) {
    __builtin_memcpy(p, &v, sizeof v);
#ifdef __AVX512F__
  } else if constexpr (N == 16 && sizeof(T) == 4) {
    typedef float F __attribute__((vector_size(64)));
    __builtin_ia32_storeups512_mask((float*)p, (F)v, (unsigned short)((1u << K) - 1));
  } else if constexpr (N == 8 && sizeof(T) == 8) {
    typedef double D __attribute__((vector_size(64)));
    __builtin_ia32_storeupd512_mask((double*)p, (D)v, (unsigned char)((1u << K) - 1));
#endif
#ifdef NARROW_MASKS
  } else if constexpr (N == 16 && sizeof(T) == 2) {
    __builtin_ia32_storedquhi256_mask((short*)p, (vec<short, 16>)v, (unsigned short)((1u << K) - 1));
  } else if constexpr (N == 16 && sizeof(T) == 1) {
    __builtin_ia32_storedquqi128_mask((char*)p, (vec<char, 16>)v, (unsigned short)((1u << K) - 1));
#endif
  } else {
    for (int l = 0; l < K; l++) p[l] = v[l];
  }
}

// How values of a memory type T are computed with, and the way between.
template <class T> struct memory;
template <class T> struct same_memory {
  typedef T raw;
  typedef T value;
  template <int N> INLINE vec<T, N> up(vec<T, N> v) { return v; }
  template <int N> INLINE vec<T, N> down(vec<T, N> v) { return v; }
};
template <> struct memory<float> : same_memory<float> {};
template <> struct memory<double> : same_memory<double> {};
template <> struct memory<int> : same_memory<int> {};
template <> struct memory<i64> : same_memory<i64> {};
// GCC halves a vector of 16 to convert it: five instructions for one; of bytes it converts each by
// itself. `To` is int or unsigned, `From` as wide as the vector in memory.
template <int N, class To, class From> INLINE vec<To, N> widened(vec<From, N> v) {
#ifdef __AVX512F__
  typedef int I __attribute__((vector_size(64)));
  constexpr bool is_signed = (From)-1 < (From)0;
  if constexpr (N == 16 && sizeof(From) == 2) {
    typedef short S __attribute__((vector_size(32)));
    if constexpr (is_signed) {
      return (vec<To, N>)__builtin_ia32_pmovsxwd512_mask((S)v, (I){}, (unsigned short)-1);
    } else {
      return (vec<To, N>)__builtin_ia32_pmovzxwd512_mask((S)v, (I){}, (unsigned short)-1);
    }
  }
  if constexpr (N == 16 && sizeof(From) == 1) {
    typedef char C __attribute__((vector_size(16)));
    if constexpr (is_signed) {
      return (vec<To, N>)__builtin_ia32_pmovsxbd512_mask((C)v, (I){}, (unsigned short)-1);
    } else {
      return (vec<To, N>)__builtin_ia32_pmovzxbd512_mask((C)v, (I){}, (unsigned short)-1);
    }
  }
#endif
#ifdef __AVX512VL__
  if constexpr (N == 8 && sizeof(From) == 1) {
    typedef char C __attribute__((vector_size(16)));
    typedef i64 H __attribute__((vector_size(16)));
    typedef int I8 __attribute__((vector_size(32)));
    C bytes = (C)(H){__builtin_bit_cast(i64, v), 0};
    __asm__("" : "+v"(bytes));  // g++ 12 fails where this load and the widening become one
    if constexpr ((From)-1 < (From)0) {
      return (vec<To, N>)__builtin_ia32_pmovsxbd256_mask(bytes, (I8){}, (unsigned char)-1);
    } else {
      return (vec<To, N>)__builtin_ia32_pmovzxbd256_mask(bytes, (I8){}, (unsigned char)-1);
    }
  }
#endif
  return __builtin_convertvector(v, vec<To, N>);
}
// The lower bits of each.
template <int N, class To, class From> INLINE vec<To, N> narrowed(vec<From, N> v) {
#ifdef __AVX512F__
  typedef int I __attribute__((vector_size(64)));
  if constexpr (N == 16 && sizeof(To) == 2) {
    typedef short S __attribute__((vector_size(32)));
    return (vec<To, N>)__builtin_ia32_pmovdw512_mask((I)v, (S){}, (unsigned short)-1);
  }
  if constexpr (N == 16 && sizeof(To) == 1) {
    typedef char C __attribute__((vector_size(16)));
    return (vec<To, N>)__builtin_ia32_pmovdb512_mask((I)v, (C){}, (unsigned short)-1);
  }
#endif
#ifdef __AVX512VL__
  if constexpr (N == 8 && sizeof(To) == 1) {
    typedef char C __attribute__((vector_size(16)));
    typedef i64 H __attribute__((vector_size(16)));
    typedef int I8 __attribute__((vector_size(32)));
    const C bytes = (C)__builtin_ia32_pmovdb256_mask((I8)v, (C){}, (unsigned char)-1);
    return __builtin_bit_cast(vec<To, N>, ((H)bytes)[0]);
  }
#endif
  return __builtin_convertvector(v, vec<To, N>);
}
template <class T> struct small_memory {
  typedef T raw;
  typedef int value;
  template <int N> INLINE vec<int, N> up(vec<T, N> v) { return widened<N, int, T>(v); }
  template <int N> INLINE vec<T, N> down(vec<int, N> v) { return narrowed<N, T, int>(v); }
};
template <> struct memory<short> : small_memory<short> {};
template <> struct memory<signed char> : small_memory<signed char> {};
template <> struct memory<unsigned char> : small_memory<unsigned char> {};
template <> struct memory<boolean> {
  typedef unsigned char raw;
  typedef int value;
  template <int N> INLINE vec<int, N> up(vec<raw, N> v) { return widened<N, int, raw>(v) != 0; }
  template <int N> INLINE vec<raw, N> down(vec<int, N> v) { return narrowed<N, raw, int>(v & 1); }
};
template <> struct memory<bfloat16> {
  typedef unsigned short raw;
  typedef float value;
  template <int N> INLINE vec<float, N> up(vec<raw, N> v) {
    return (vec<float, N>)(widened<N, unsigned, raw>(v) << 16);
  }
  template <int N> INLINE vec<raw, N> down(vec<float, N> v) {
    return narrowed<N, unsigned short, unsigned>((vec<unsigned, N>)v_round_bfloat16(v) >> 16);
  }
};
// A bfloat16 for values that have been rounded to one already.
struct rounded_bfloat16 { unsigned short bits; };
template <> struct memory<rounded_bfloat16> : memory<bfloat16> {
  template <int N> INLINE vec<raw, N> down(vec<float, N> v) {
    return narrowed<N, unsigned short, unsigned>((vec<unsigned, N>)v >> 16);
  }
};
template <> struct memory<float16> {
  typedef short raw;
  typedef float value;
  template <int N> INLINE vec<float, N> up(vec<short, N> v) { return halves_to_floats<N>(v); }
  template <int N> INLINE vec<short, N> down(vec<float, N> v) { return floats_to_halves<N>(v); }
};

// K neighbours; K elements `step` apart; one element in every lane.
template <int N, int K, class T> INLINE vec<typename memory<T>::value, N> load(const T* p) {
  return memory<T>::template up<N>(load_raw<N, K>((const typename memory<T>::raw*)p));
}
#ifdef NARROW_MASKS
// K elements STEP apart, from STEP vectors of neighbours. Only lanes up to the last element are touched.
template <int K, int STEP, class E> INLINE vec<E, 16> every(const E* p) {
  constexpr int LAST = (K - 1) * STEP;
  vec<E, 16> result = load_raw<16, (LAST < 16 ? LAST + 1 : 16)>(p), place;
  for (int l = 0; l < 16; l++) place[l] = l * STEP & 15;
  result = __builtin_shuffle(result, place);
  const auto with = [&](auto part) __attribute__((always_inline)) {
    constexpr int FIRST = decltype(part)::value * 16;
    if constexpr (FIRST <= LAST) {
      vec<E, 16> next = load_raw<16, (LAST - FIRST < 16 ? LAST - FIRST + 1 : 16)>(p + FIRST);
      for (int l = 0; l < 16; l++) place[l] = l * STEP >= FIRST && l * STEP < FIRST + 16 ? 16 + (l * STEP & 15) : l;
      result = __builtin_shuffle(result, next, place);
    }
  };
  with(count<1>{});
  if constexpr (STEP > 2) with(count<2>{});
  if constexpr (STEP > 3) with(count<3>{});
  for (int l = K; l < 16; l++) result[l] = 0;
  return result;
}
template <int K, int STEP, class E> INLINE void set_every(E* p, vec<E, 16> v) {
  const auto part = [&](auto number) __attribute__((always_inline)) {
    constexpr int FIRST = decltype(number)::value * 16;
    unsigned short mask = 0;
    vec<E, 16> place;
    for (int l = 0; l < 16; l++) {
      place[l] = (FIRST + l) / STEP;
      if ((FIRST + l) % STEP == 0 && (FIRST + l) / STEP < K) mask |= 1 << l;
    }
    if constexpr (FIRST <= (K - 1) * STEP) {
      const vec<E, 16> spaced = __builtin_shuffle(v, place);
      if constexpr (sizeof(E) == 4) __builtin_ia32_storedqusi512_mask((int*)p + FIRST, spaced, mask);
      else __builtin_ia32_storedquhi256_mask((short*)p + FIRST, spaced, mask);
    }
  };
  part(count<0>{});
  part(count<1>{});
  if constexpr (STEP > 2) part(count<2>{});
  if constexpr (STEP > 3) part(count<3>{});
}
// K elements of which p is the last one in memory.
template <int K, class E> INLINE vec<E, 16> backwards(const E* p) {
  vec<E, 16> place;
  for (int l = 0; l < 16; l++) place[l] = l < K ? K - 1 - l : l;
  return __builtin_shuffle(load_raw<16, K>(p - (K - 1)), place);
}
template <int K, class E> INLINE bool from_vectors(const E* p, i64 step, vec<E, 16>& result) {
  if (__builtin_constant_p(step == -1) && step == -1) result = backwards<K>(p);
  else if (__builtin_constant_p(step == 2) && step == 2) result = every<K, 2>(p);
  else if (__builtin_constant_p(step == 3) && step == 3) result = every<K, 3>(p);
  else if (__builtin_constant_p(step == 4) && step == 4) result = every<K, 4>(p);
  else return false;
  return true;
}
template <int K, class E> INLINE bool to_vectors(E* p, i64 step, vec<E, 16> v) {
  if (__builtin_constant_p(step == 2) && step == 2) set_every<K, 2>(p, v);
  else if (__builtin_constant_p(step == 3) && step == 3) set_every<K, 3>(p, v);
  else if (__builtin_constant_p(step == 4) && step == 4) set_every<K, 4>(p, v);
  else return false;
  return true;
}
template <int SIZE> struct signed_ { typedef int type; };
template <> struct signed_<2> { typedef short type; };
#endif
template <int N, int K, class R> INLINE vec<R, N> load_raw_strided(const R* p, i64 step) {
#ifdef NARROW_MASKS
  if constexpr (N == 16 && (sizeof(R) == 4 || sizeof(R) == 2)) {
    typedef typename signed_<sizeof(R)>::type E;
    vec<E, 16> result;
    if (from_vectors<K>((const E*)p, step, result)) return (vec<R, N>)result;
  }
#endif
  vec<R, N> r = {};
  for (int l = 0; l < K; l++) r[l] = p[l * step];
  return r;
}
template <int N, int K, class R> INLINE void store_raw_strided(R* p, i64 step, vec<R, N> v) {
#ifdef NARROW_MASKS
  if constexpr (N == 16 && (sizeof(R) == 4 || sizeof(R) == 2)) {
    typedef typename signed_<sizeof(R)>::type E;
    if (to_vectors<K>((E*)p, step, (vec<E, 16>)v)) return;
  }
#endif
  for (int l = 0; l < K; l++) p[l * step] = v[l];
}
// Every lane from a place of its own.
template <int N, int K, class R, class V> INLINE vec<R, N> load_raw_gathered(const R* p, V place, i64 step) {
  vec<R, N> r = {};
  for (int l = 0; l < K; l++) r[l] = p[place[l] + l * step];
  return r;
}
template <int N, int K, class T> INLINE vec<typename memory<T>::value, N> load_strided(const T* p, i64 step) {
  return memory<T>::template up<N>(load_raw_strided<N, K>((const typename memory<T>::raw*)p, step));
}
template <int N, class T> INLINE vec<typename memory<T>::value, N> load_one(const T* p) {
  typedef typename memory<T>::raw raw;
  vec<raw, N> r = *(const raw*)p - vec<raw, N>{};
  return memory<T>::template up<N>(r);
}
template <int N, int K, class T> INLINE void store(T* p, vec<typename memory<T>::value, N> v) {
  store_raw<N, K>((typename memory<T>::raw*)p, memory<T>::template down<N>(v));
}
// The same for what is only moved: its bits.
template <int N, int K, class T> INLINE auto load_bits(const T* p) {
  return load_raw<N, K>((const typename memory<T>::raw*)p);
}
template <int N, int K, class T, class V>
INLINE vec<typename memory<T>::value, N> load_gathered(const T* p, V place, i64 step) {
  return memory<T>::template up<N>(load_raw_gathered<N, K>((const typename memory<T>::raw*)p, place, step));
}
template <int N, int K, class T, class V> INLINE auto load_bits_gathered(const T* p, V place, i64 step) {
  return load_raw_gathered<N, K>((const typename memory<T>::raw*)p, place, step);
}
template <int N, int K, class T> INLINE auto load_bits_strided(const T* p, i64 step) {
  return load_raw_strided<N, K>((const typename memory<T>::raw*)p, step);
}
template <int N, class T> INLINE auto load_bits_one(const T* p) {
  typedef typename memory<T>::raw raw;
  return *(const raw*)p - vec<raw, N>{};
}
template <int N, int K, class T, class V> INLINE void store_bits(T* p, V bits) {
  store_raw<N, K>((typename memory<T>::raw*)p, bits);
}
template <int N, int K, class T, class V> INLINE void store_bits_strided(T* p, i64 step, V bits) {
  store_raw_strided<N, K>((typename memory<T>::raw*)p, step, bits);
}
template <int N, class T, class V> INLINE void store_bits_one(T* p, V bits) {
  *(typename memory<T>::raw*)p = bits[0];
}
// For memory that is not read again soon: past the caches. `p` is a whole cache line.
template <int N, int K, class T> INLINE void stream(T* p, vec<typename memory<T>::value, N> v) {
  auto r = memory<T>::template down<N>(v);
#ifdef __AVX512F__
  if constexpr (K == N && sizeof r == 64) {
    typedef float F __attribute__((vector_size(64)));
    __builtin_ia32_movntps512((float*)p, (F)r);
    return;
  }
#endif
  store<N, K>(p, v);
}
INLINE void end_of_stream() {
#ifdef __AVX512F__
  __builtin_ia32_sfence();
#endif
}
template <int N, int K, class T> INLINE void store_strided(T* p, i64 step, vec<typename memory<T>::value, N> v) {
  store_raw_strided<N, K>((typename memory<T>::raw*)p, step, memory<T>::template down<N>(v));
}
template <int N, class T> INLINE void store_one(T* p, vec<typename memory<T>::value, N> v) {
  *(typename memory<T>::raw*)p = memory<T>::template down<N>(v)[0];
}

// Adds to what lies there; lanes one after the other where they may meet in one place.
template <int N, class T> INLINE void add_one(T* p, vec<typename memory<T>::value, N> v) {
  store_one<N>(p, load_one<N>(p) + v);
}
template <int N, int K, class T> INLINE void add_to(T* p, vec<typename memory<T>::value, N> v) {
  store<N, K>(p, load<N, K>(p) + v);
}
template <int N, int K, class T, class V>
INLINE void add_scattered(T* p, V place, i64 step, vec<typename memory<T>::value, N> v) {
  for (int l = 0; l < K; l++) add_one<2>(p + place[l] + l * step, v[l] - vec<typename memory<T>::value, 2>{});
}

// N x N elements of 32 bits, transposed in registers.
template <int D, int N> INLINE void exchange(vec<int, N>& a, vec<int, N>& b) {
  vec<int, N> low, high;
  for (int l = 0; l < N; l++) {
    low[l] = l & D ? N + l - D : l;
    high[l] = l & D ? N + l : l + D;
  }
  vec<int, N> x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
  a = x, b = y;
}
template <int D, int N> INLINE void exchange_all(vec<int, N> (&r)[N]) {
  _Pragma("GCC unroll 16") for (int i = 0; i < N; i++)
    if (!(i & D)) exchange<D, N>(r[i], r[i + D]);
}
template <int N> INLINE void transpose(vec<int, N> (&r)[N]) {
  exchange_all<1, N>(r), exchange_all<2, N>(r);
  if constexpr (N >= 8) exchange_all<4, N>(r);
  if constexpr (N >= 16) exchange_all<8, N>(r);
}
#ifdef __AVX512F__
// 16 lines of 16 numbers, turned: four pieces of four lines meet in a register as they are loaded, so that
// shuffles, of which a processor does one or two at a time, are left only within pieces.
INLINE void turn(const float* from, i64 stride, float* to, i64 to_stride) {
  typedef vec<float, 16> V;
  typedef vec<float, 4> Q;
  typedef vec<double, 8> D;
  const auto piece = [&](const float* at) __attribute__((always_inline)) {
    Q q;
    __builtin_memcpy(&q, at, sizeof q);
    return q;
  };
  _Pragma("GCC unroll 4") for (int c = 0; c < 16; c += 4) {
    V r[4];
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
      const float* line = from + i * stride + c;
      r[i] = __builtin_ia32_ps512_ps(piece(line));
      r[i] = (V)__builtin_ia32_insertf32x4_mask(r[i], piece(line + 4 * stride), 1, r[i], (unsigned short)-1);
      r[i] = (V)__builtin_ia32_insertf32x4_mask(r[i], piece(line + 8 * stride), 2, r[i], (unsigned short)-1);
      r[i] = (V)__builtin_ia32_insertf32x4_mask(r[i], piece(line + 12 * stride), 3, r[i], (unsigned short)-1);
    }
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
    const D low = (D)LOW(r[0], r[1]), low2 = (D)LOW(r[2], r[3]), high = (D)HIGH(r[0], r[1]), high2 = (D)HIGH(r[2], r[3]);
#undef LOW
#undef HIGH
    const D columns[4] = {__builtin_shufflevector(low, low2, 0, 8, 2, 10, 4, 12, 6, 14),
                          __builtin_shufflevector(low, low2, 1, 9, 3, 11, 5, 13, 7, 15),
                          __builtin_shufflevector(high, high2, 0, 8, 2, 10, 4, 12, 6, 14),
                          __builtin_shufflevector(high, high2, 1, 9, 3, 11, 5, 13, 7, 15)};
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) __builtin_memcpy(to + (c + i) * to_stride, &columns[i], sizeof(D));
  }
}
#else
INLINE void turn(const float* from, i64 stride, float* to, i64 to_stride) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[j * to_stride + i] = from[i * stride + j];
}
#endif
// K lines of `width` (at most N) elements, `step` apart: to[column][line].
template <int N, int K, class T> INLINE void transpose_tile(const T* from, i64 step, i64 width, T* to) {
  if constexpr (sizeof(T) == 4 && N >= 4) {
#ifdef __AVX512F__
    if constexpr (N == 16) {
      if (K == N && width == N) return turn((const float*)from, step, (float*)to, N);
      vec<int, N> r[N];
      _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) {
        if (i < K) r[i] = __builtin_ia32_loaddqusi512_mask((const int*)(from + i * step), vec<int, N>{}, (1u << width) - 1);
        else r[i] = vec<int, N>{};
      }
      transpose<N>(r);
      _Pragma("GCC unroll 16") for (int i = 0; i < N; i++)
        if (i < width) __builtin_memcpy(to + i * N, &r[i], sizeof r[i]);
      return;
    }
#endif
    if (width == N) {
      vec<int, N> r[N];
      _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) {
        if (i < K) __builtin_memcpy(&r[i], from + i * step, sizeof r[i]);
        else r[i] = vec<int, N>{};
      }
      transpose<N>(r);
      _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) __builtin_memcpy(to + i * N, &r[i], sizeof r[i]);
      return;
    }
  }
#ifdef NARROW_MASKS
  if constexpr (sizeof(T) == 2 && N == 16) {
    vec<int, N> r[N];
    _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) {
      r[i] = vec<int, N>{};
      if (i < K)
        r[i] = widened<N, int, unsigned short>((vec<unsigned short, N>)__builtin_ia32_loaddquhi256_mask(
            (const short*)from + i * step, vec<short, 16>{}, (unsigned short)((1u << width) - 1)));
    }
    transpose<N>(r);
    _Pragma("GCC unroll 16") for (int i = 0; i < N; i++)
      if (i < width) store_raw<N, N>((unsigned short*)to + i * N, narrowed<N, unsigned short, unsigned>((vec<unsigned, N>)r[i]));
    return;
  }
#endif
  for (int l = 0; l < K; l++)
    for (i64 i = 0; i < width; i++) to[i * N + l] = from[l * step + i];
}

// first, first + step, ... in the lanes
template <class T, int N> INLINE vec<T, N> iota(i64 first, i64 step) {
  vec<T, N> r;
  for (int l = 0; l < N; l++) r[l] = (T)(l * step);
  return r + (T)first;
}
// Lanes from K on get `filler`.
template <int K, class V> INLINE V keep_first(V v, element<V> filler) {
  if constexpr (K < LANES(V)) {
    ints<V> lane;
    for (int l = 0; l < LANES(V); l++) lane[l] = l < K ? -1 : 0;
    return v_where<V>(lane, v, splat<element<V>, LANES(V)>(filler));
  }
  return v;
}

// ---- functions

template <class V> INLINE V v_abs(V x) {
  if constexpr (is_same_<element<V>, float>::value) return (V)((vec<int, LANES(V)>)x & 0x7fffffff);
  else if constexpr (is_same_<element<V>, double>::value) return (V)((vec<i64, LANES(V)>)x & 0x7fffffffffffffffL);
  else return x < 0 ? -x : x;
}
#ifdef __AVX512F__
// Of equals and with a NaN the second operand.
#define MAX512(a, b) __builtin_ia32_maxps512_mask(a, b, a, (unsigned short)-1, 4)
#define MIN512(a, b) __builtin_ia32_minps512_mask(a, b, a, (unsigned short)-1, 4)
#endif
// x between two bounds; NaN stays.
template <class V> INLINE V v_bound(V x, float low, float high) {
#ifdef __AVX512F__
  if constexpr (LANES(V) == 16) return MIN512(V{} + high, MAX512(V{} + low, x));
#endif
  V c = x < low ? V{} + low : x;
  return c > high ? V{} + high : c;
}
// A NaN in either operand wins.
template <class V> INLINE V v_max(V a, V b) {
#ifdef __AVX512F__
  if constexpr (is_same_<V, vec<float, 16>>::value) return a == a ? MAX512(a, b) : a;
#endif
  if constexpr (is_same_<element<V>, float>::value || is_same_<element<V>, double>::value)
    return ((a > b) | (a != a)) ? a : b;
  else return a > b ? a : b;
}
template <class V> INLINE V v_min(V a, V b) {
#ifdef __AVX512F__
  if constexpr (is_same_<V, vec<float, 16>>::value) return a == a ? MIN512(a, b) : a;
#endif
  if constexpr (is_same_<element<V>, float>::value || is_same_<element<V>, double>::value)
    return ((a < b) | (a != a)) ? a : b;
  else return a < b ? a : b;
}
#define LANEWISE(name, call)                                  \
  template <class V> INLINE V name(V x) {                     \
    V r;                                                      \
    for (int l = 0; l < LANES(V); l++) {                      \
      if constexpr (sizeof(element<V>) == 8) r[l] = call(x[l]); \
      else r[l] = call##f(x[l]);                              \
    }                                                         \
    return r;                                                 \
  }
#define LANEWISE2(name, call)                                 \
  template <class V> INLINE V name(V x, V y) {                \
    V r;                                                      \
    for (int l = 0; l < LANES(V); l++) {                      \
      if constexpr (sizeof(element<V>) == 8) r[l] = call(x[l], y[l]); \
      else r[l] = call##f(x[l], y[l]);                        \
    }                                                         \
    return r;                                                 \
  }
LANEWISE(v_sqrt, __builtin_sqrt)
LANEWISE(v_floor, __builtin_floor)
LANEWISE(v_ceil, __builtin_ceil)
LANEWISE(v_trunc, __builtin_trunc)
LANEWISE(v_round, __builtin_rint)
LANEWISE2(m_nextafter, __builtin_nextafter)
LANEWISE2(m_copysign, __builtin_copysign)

// ---- reductions over lanes

// Halves are folded onto each other; what is left in lane 0 is the result.
template <int D, class V> INLINE V fold_half(V v) {
  typedef vec<typename sized_<sizeof(element<V>)>::type, LANES(V)> M;
  M lanes;
  for (int l = 0; l < LANES(V); l++) lanes[l] = (l + D) % LANES(V);
  return __builtin_shuffle(v, lanes);
}
#define ACROSS(name, combine)                                  \
  template <class V> INLINE V name##_pair(V a, V b) { return combine; } \
  template <class V> INLINE element<V> name(V v) {             \
    if constexpr (LANES(V) >= 16) v = name##_pair(v, fold_half<8>(v)); \
    if constexpr (LANES(V) >= 8) v = name##_pair(v, fold_half<4>(v));  \
    if constexpr (LANES(V) >= 4) v = name##_pair(v, fold_half<2>(v));  \
    return name##_pair(v, fold_half<1>(v))[0];                 \
  }
ACROSS(across_sum, a + b)
ACROSS(across_prod, a * b)
ACROSS(across_max, v_max(a, b))
ACROSS(across_min, v_min(a, b))
ACROSS(across_any, a | b)
ACROSS(across_all, a & b)

// ---- scans along lanes: each lane is combined with those before it and with `total`, which becomes
// the last of the K that count

struct scan_sum {
  template <class A> static constexpr A nothing = 0;
  template <class A> INLINE A of(A a, A b) { return a + b; }
};
struct scan_prod {
  template <class A> static constexpr A nothing = 1;
  template <class A> INLINE A of(A a, A b) { return a * b; }
};
// D lanes further on, behind lanes of nothing.
template <int D, class S, class V> INLINE V moved_on(V v) {
  typedef vec<typename sized_<sizeof(element<V>)>::type, LANES(V)> M;
  M lanes;
  for (int l = 0; l < LANES(V); l++) lanes[l] = l < D ? LANES(V) : l - D;
  return __builtin_shuffle(v, splat<element<V>, LANES(V)>(S::template nothing<element<V>>), lanes);
}
#ifdef __AVX512F__
#define REGISTER_BYTES 64
#else
#define REGISTER_BYTES 32
#endif
template <int K, class S, class V> INLINE V scan_in_steps(V v, V& total) {
  if constexpr (sizeof(V) > REGISTER_BYTES) {
    constexpr int HALF = LANES(V) / 2;
    vec<element<V>, HALF> part[2], so_far;
    __builtin_memcpy(part, &v, sizeof v);
    __builtin_memcpy(&so_far, &total, sizeof so_far);
    part[0] = scan_in_steps<(K < HALF ? K : HALF), S>(part[0], so_far);
    if constexpr (K > HALF) part[1] = scan_in_steps<K - HALF, S>(part[1], so_far);
    __builtin_memcpy(&v, part, sizeof v);
    total = splat<element<V>, LANES(V)>(so_far[0]);
    return v;
  }
  v = S::of(v, moved_on<1, S>(v));
  if constexpr (LANES(V) > 2) v = S::of(v, moved_on<2, S>(v));
  if constexpr (LANES(V) > 4) v = S::of(v, moved_on<4, S>(v));
  if constexpr (LANES(V) > 8) v = S::of(v, moved_on<8, S>(v));
  const V result = S::of(total, v);
  total = S::of(total, splat<element<V>, LANES(V)>(v[K - 1]));  // only this waits for the vector before
  return result;
}
template <int K, class S, class V> INLINE V scan_in_order(V v, V& total) {
  element<V> last = total[0];
  for (int l = 0; l < K; l++) v[l] = last = S::of(last, v[l]);
  total = splat<element<V>, LANES(V)>(last);
  return v;
}

// ---- threads: torch's own OpenMP, found in the process; without it one thread does all

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
extern "C" int omp_get_thread_num() __attribute__((weak));
extern "C" int omp_get_num_threads() __attribute__((weak));

struct shared_work {
  void (*part)(void* const*, i64, i64);
  void (*part_of)(void* const*, i64, i64, i64);  // the same, told which of the threads it is
  void* const* p;
  i64 units;
};
static void run_part(void* data) {
  const shared_work& w = *(const shared_work*)data;
  const i64 me = omp_get_thread_num(), all = omp_get_num_threads();
  const i64 begin = w.units * me / all, end = w.units * (me + 1) / all;
  if (w.part) w.part(w.p, begin, end);
  else w.part_of(w.p, me, begin, end);
}
INLINE bool in_threads(const shared_work& w, long threads) {
  if (threads > w.units) threads = w.units;
  if (threads <= 1 || !GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads) return false;
  GOMP_parallel(run_part, (void*)&w, (unsigned)threads, 0);
  return true;
}
INLINE void share(void (*part)(void* const*, i64, i64), void* const* p, i64 units, long threads) {
  if (!in_threads({part, nullptr, p, units}, threads)) part(p, 0, units);
}
INLINE void share(void (*part)(void* const*, i64, i64, i64), void* const* p, i64 units, long threads) {
  if (!in_threads({nullptr, part, p, units}, threads)) part(p, 0, 0, units);
}
