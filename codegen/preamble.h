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
#define SHAPES(N) SHAPE(float, N) SHAPE(double, N) SHAPE(int, N) SHAPE(i64, N)
SHAPES(2) SHAPES(4) SHAPES(8) SHAPES(16)
#define LANES(V) (shape_<V>::n)
template <class V> using element = typename shape_<V>::element;
template <class V> using ints = vec<int, shape_<V>::n>;

template <class T, int N> INLINE vec<T, N> splat(T x) { return x - vec<T, N>{}; }

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
  return __builtin_convertvector(__builtin_convertvector(x, vec<T, LANES(V)>), V);
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
template <class T> struct small_memory {
  typedef T raw;
  typedef int value;
  template <int N> INLINE vec<int, N> up(vec<T, N> v) { return __builtin_convertvector(v, vec<int, N>); }
  template <int N> INLINE vec<T, N> down(vec<int, N> v) { return __builtin_convertvector(v, vec<T, N>); }
};
template <> struct memory<short> : small_memory<short> {};
template <> struct memory<signed char> : small_memory<signed char> {};
template <> struct memory<unsigned char> : small_memory<unsigned char> {};
template <> struct memory<boolean> {
  typedef unsigned char raw;
  typedef int value;
  template <int N> INLINE vec<int, N> up(vec<raw, N> v) { return __builtin_convertvector(v, vec<int, N>) != 0; }
  template <int N> INLINE vec<raw, N> down(vec<int, N> v) { return __builtin_convertvector(v & 1, vec<raw, N>); }
};
// GCC halves a vector of 16 to convert it: five instructions for one.
template <int N> INLINE vec<unsigned, N> widened(vec<unsigned short, N> v) {
#ifdef __AVX512F__
  if constexpr (N == 16) {
    typedef short S __attribute__((vector_size(32)));
    typedef int I __attribute__((vector_size(64)));
    return (vec<unsigned, N>)__builtin_ia32_pmovzxwd512_mask((S)v, (I){}, (unsigned short)-1);
  }
#endif
  return __builtin_convertvector(v, vec<unsigned, N>);
}
template <int N> INLINE vec<unsigned short, N> narrowed(vec<unsigned, N> v) {
#ifdef __AVX512F__
  if constexpr (N == 16) {
    typedef short S __attribute__((vector_size(32)));
    typedef int I __attribute__((vector_size(64)));
    return (vec<unsigned short, N>)__builtin_ia32_pmovdw512_mask((I)v, (S){}, (unsigned short)-1);
  }
#endif
  return __builtin_convertvector(v, vec<unsigned short, N>);
}
template <> struct memory<bfloat16> {
  typedef unsigned short raw;
  typedef float value;
  template <int N> INLINE vec<float, N> up(vec<raw, N> v) {
    return (vec<float, N>)(widened<N>(v) << 16);
  }
  template <int N> INLINE vec<raw, N> down(vec<float, N> v) {
    return narrowed<N>((vec<unsigned, N>)v_round_bfloat16(v) >> 16);
  }
};
// A bfloat16 for values that have been rounded to one already.
struct rounded_bfloat16 { unsigned short bits; };
template <> struct memory<rounded_bfloat16> : memory<bfloat16> {
  template <int N> INLINE vec<raw, N> down(vec<float, N> v) {
    return narrowed<N>((vec<unsigned, N>)v >> 16);
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
template <int N, int K, class T> INLINE vec<typename memory<T>::value, N> load_strided(const T* p, i64 step) {
  vec<typename memory<T>::raw, N> r = {};
  for (int l = 0; l < K; l++) r[l] = ((const typename memory<T>::raw*)p)[l * step];
  return memory<T>::template up<N>(r);
}
template <int N, class T> INLINE vec<typename memory<T>::value, N> load_one(const T* p) {
  typedef typename memory<T>::raw raw;
  vec<raw, N> r = *(const raw*)p - vec<raw, N>{};
  return memory<T>::template up<N>(r);
}
template <int N, int K, class T> INLINE void store(T* p, vec<typename memory<T>::value, N> v) {
  store_raw<N, K>((typename memory<T>::raw*)p, memory<T>::template down<N>(v));
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
  vec<typename memory<T>::raw, N> r = memory<T>::template down<N>(v);
  for (int l = 0; l < K; l++) ((typename memory<T>::raw*)p)[l * step] = r[l];
}
template <int N, class T> INLINE void store_one(T* p, vec<typename memory<T>::value, N> v) {
  *(typename memory<T>::raw*)p = memory<T>::template down<N>(v)[0];
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
// K lines of `width` (at most N) elements, `step` apart: to[column][line].
template <int N, int K, class T> INLINE void transpose_tile(const T* from, i64 step, i64 width, T* to) {
  if constexpr (sizeof(T) == 4 && N >= 4) {
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

// The other functions of C's library. Eager takes SLEEF's for whole vectors, which torch's own
// library holds: these give eager's bits. Other widths, and machines without, go lane by lane.
template <class T> constexpr int sleef_lanes(int lanes) {
#ifdef ACCEL_SLEEF
  constexpr int each = 8 / sizeof(T);
#ifdef __AVX512F__
  if (lanes >= 8 * each) return 8 * each;
#endif
#ifdef __AVX2__
  return 4 * each;
#endif
#endif
  return 0;
}
typedef vec<float, 16> floats16;
typedef vec<float, 8> floats8;
typedef vec<double, 8> doubles8;
typedef vec<double, 4> doubles4;
#ifdef ACCEL_SLEEF
#ifdef __AVX512F__
#define SLEEF_512(X, name, f, d) X(name, floats16, f16##f) X(name, doubles8, d8##d)
#else
#define SLEEF_512(X, name, f, d)
#endif
#ifdef __AVX2__
#define SLEEF_256(X, name, f, d) X(name, floats8, f8##f) X(name, doubles4, d4##d)
#else
#define SLEEF_256(X, name, f, d)
#endif
#else
#define SLEEF_512(X, name, f, d)
#define SLEEF_256(X, name, f, d)
#endif
#define SLEEF_ONE(name, V, suffix)          \
  extern "C" V Sleef_##name##suffix(V);     \
  INLINE V s_##name(V x) { return Sleef_##name##suffix(x); }
#define SLEEF_TWO(name, V, suffix)          \
  extern "C" V Sleef_##name##suffix(V, V);  \
  INLINE V s_##name(V x, V y) { return Sleef_##name##suffix(x, y); }
// A vector in parts of the width that there is, or as part of one.
template <class V, class W> union parts_ {
  W part[sizeof(V) < sizeof(W) ? 1 : sizeof(V) / sizeof(W)];
  V whole;
};
// `f`, `d`: the variants that ATen calls for float and double, by their error bounds.
#define FUNCTION1(name, f, d)                                                      \
  LANEWISE(l_##name, __builtin_##name)                                             \
  template <class V> INLINE V s_##name(V x) { return l_##name(x); }                \
  SLEEF_512(SLEEF_ONE, name, f, d) SLEEF_256(SLEEF_ONE, name, f, d)                \
  template <class V> INLINE V m_##name(V x) {                                      \
    constexpr int W = sleef_lanes<element<V>>(LANES(V));                           \
    if constexpr (W == 0) return l_##name(x);                                      \
    else if constexpr (W == LANES(V)) return s_##name(x);                          \
    else {                                                                         \
      parts_<V, vec<element<V>, W>> r = {};                                        \
      r.whole = x;                                                                 \
      for (auto& part : r.part) part = s_##name(part);                             \
      return r.whole;                                                              \
    }                                                                              \
  }
#define FUNCTION2(name, f, d)                                                      \
  LANEWISE2(l_##name, __builtin_##name)                                            \
  template <class V> INLINE V s_##name(V x, V y) { return l_##name(x, y); }        \
  SLEEF_512(SLEEF_TWO, name, f, d) SLEEF_256(SLEEF_TWO, name, f, d)                \
  template <class V> INLINE V m_##name(V x, V y) {                                 \
    constexpr int W = sleef_lanes<element<V>>(LANES(V));                           \
    if constexpr (W == 0) return l_##name(x, y);                                   \
    else if constexpr (W == LANES(V)) return s_##name(x, y);                       \
    else {                                                                         \
      parts_<V, vec<element<V>, W>> r = {}, o = {};                                \
      r.whole = x;                                                                 \
      o.whole = y;                                                                 \
      int i = 0;                                                                   \
      for (auto& part : r.part) part = s_##name(part, o.part[i++]);                \
      return r.whole;                                                              \
    }                                                                              \
  }
FUNCTION1(exp, _u10, _u10)
FUNCTION1(exp2, _u10, _u10)
FUNCTION1(expm1, _u10, _u10)
FUNCTION1(log, _u10, _u10)
FUNCTION1(log2, _u10, _u10)
FUNCTION1(log10, _u10, _u10)
FUNCTION1(log1p, _u10, _u10)
FUNCTION1(tan, _u10, _u10)
FUNCTION1(tanh, _u10, _u10)
FUNCTION1(asin, _u10, _u10)
FUNCTION1(acos, _u10, _u10)
FUNCTION1(atan, _u10, _u10)
FUNCTION1(sinh, _u10, _u10)
FUNCTION1(cosh, _u10, _u10)
FUNCTION1(asinh, _u10, _u10)
FUNCTION1(acosh, _u10, _u10)
FUNCTION1(atanh, _u10, _u10)
FUNCTION1(erf, _u10, _u10)
FUNCTION1(erfc, _u15, _u15)
FUNCTION1(sin, _u10, _u10)
FUNCTION1(cos, _u10, _u10)
FUNCTION2(pow, _u10, _u10)
FUNCTION2(atan2, _u10, _u10)
FUNCTION2(fmod, , )
FUNCTION2(hypot, _u05, _u05)

// e * 2^n, down to denormal results; `magic` is n + 12582912.
template <class V> INLINE V two_to(V magic, V n, V e) {
#ifdef __AVX512F__
  if constexpr (LANES(V) == 16) return __builtin_ia32_scalefps512_mask(e, n, V{}, (unsigned short)-1, 4);
#endif
  typedef vec<int, LANES(V)> I;
  I whole = (I)magic - 0x4B400000;
  I half = whole >> 1;
  V s1 = (V)((half + 127) << 23), s2 = (V)((whole - half + 127) << 23);
  return e * s1 * s2;
}

// exp: 1 ULP; denormal results, overflow and NaN are exact in kind.
template <class V> INLINE V v_exp(V x) {
  if constexpr (sizeof(element<V>) == 8) {
    return m_exp(x);
  } else {
    V c = v_bound(x, -104.f, 89.f);
    V t = c * 1.44269504088896341f + 12582912.f;
    V n = t - 12582912.f;
    V r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    // Where nothing is left: rounding to zero costs the processor 150 cycles, a zero costs none.
    p = x < -104.f ? V{} : p;
    return two_to<V>(t, n, p);
  }
}

// log: 1.5 ULP.
template <class V> INLINE V v_log(V x) {
  if constexpr (sizeof(element<V>) == 8) {
    return m_log(x);
  } else {
    typedef vec<int, LANES(V)> I;
    I tiny = x < 1.17549435e-38f;
    V y = tiny ? x * 8388608.f : x;
    I u = (I)y - 0x3f3504f3;  // sqrt(1/2)
    I e = u >> 23;
    V m = (V)((u & 0x007fffff) + 0x3f3504f3);
    V n = __builtin_convertvector(e, V) - (V)((I)(V{} + 23.f) & tiny);
    V f = m - 1.f, z = f * f;
    V p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    V r = f * z * p;
    r = r + n * -2.12194440e-4f;
    r = r - 0.5f * z;
    r = f + r;
    r = r + n * 0.693359375f;
    r = x < 0.f ? V{} + __builtin_nanf("") : r;
    r = x == 0.f ? V{} - __builtin_inff() : r;
    r = (x == __builtin_inff()) | (x != x) ? x : r;
    return r;
  }
}

// tanh: 2 ULP.
template <class V> INLINE V v_tanh(V x) {
  if constexpr (sizeof(element<V>) == 8) {
    return m_tanh(x);
  } else {
    typedef vec<int, LANES(V)> I;
    V a = v_abs(x), z = x * x;
    V p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    V small = p * z * a + a;
    V big = 1.f - 2.f / (v_exp(a + a) + 1.f);
    V y = a < 0.625f ? small : big;
    return (V)((I)y | ((I)x & (int)0x80000000));
  }
}

// sigmoid: 2.5 ULP.
template <class V> INLINE V v_sigmoid(V x) { return 1 / (1 + v_exp(-x)); }

// erf: 2 ULP.
template <class V> INLINE V v_erf(V x) {
  if constexpr (sizeof(element<V>) == 8) {
    return m_erf(x);
  } else {
    typedef vec<int, LANES(V)> I;
    V t = v_abs(x), s = x * x;
    V r = t * -1.72853470e-5f + 3.83197126e-4f;
    V u = t * -3.88396438e-3f + 2.42546219e-2f;
    r = r * s + u;
    r = r * t - 1.06777877e-1f;
    r = r * t - 6.34846687e-1f;
    r = r * t - 1.28717512e-1f;
    r = r * t - t;
    V big = 1.f - v_exp(r);
    big = (V)((I)big | ((I)x & (int)0x80000000));
    big = t > 4.f ? (V)((I)(V{} + 1.f) | ((I)x & (int)0x80000000)) : big;
    V p = s * -5.96761703e-4f + 4.99119423e-3f;
    p = p * s - 2.67681349e-2f;
    p = p * s + 1.12819925e-1f;
    p = p * s - 3.76125336e-1f;
    p = p * s + 1.28379166e-1f;
    V small = p * x + x;
    return x != x ? x : t > 0.927734375f ? big : small;
  }
}

#ifdef __AVX512F__
// erf(a / sqrt 2) for a >= 0, around j / 5.5: five coefficients each, which two registers look up at once
// (fitted by least squares at Chebyshev's points; absolute error 6.3e-8). The last is 1 from 5.545 on.
alignas(64) static const float gelu_table[5][32] = {
    {0.f, 0.144274592f, 0.283870429f, 0.414559066f, 0.532941103f, 0.636697888f, 0.724687099f, 0.796885192f,
     0.854204893f, 0.898236513f, 0.930963635f, 0.954499722f, 0.970877051f, 0.981903434f, 0.989086449f,
     0.993613958f, 0.996375203f, 0.998004556f, 0.998934865f, 0.999448776f, 0.999723494f, 0.999865532f,
     0.99993664f, 0.999971092f, 0.999987185f, 0.999994516f, 0.999997735f, 0.999999106f, 0.999999642f,
     0.999999881f, 0.99999994f, 1.f},
    {0.797884524f, 0.784804404f, 0.746837676f, 0.687597334f, 0.612470686f, 0.527812421f, 0.440065265f,
     0.354974955f, 0.277026594f, 0.209164694f, 0.152791202f, 0.107982017f, 0.073832497f, 0.0488412492f,
     0.0312585607f, 0.0193550438f, 0.0115947742f, 0.00672006328f, 0.00376814255f, 0.00204420369f, 0.0010729112f,
     0.000544811424f, 0.000267652562f, 0.000127215273f, 5.84991758e-05f, 2.60257257e-05f, 1.12020753e-05f,
     4.6648388e-06f, 1.87939133e-06f, 7.32554895e-07f, 2.76252024e-07f, 0.f},
    {4.72878219e-06f, -0.0713457763f, -0.13578853f, -0.187526345f, -0.222716391f, -0.239914507f, -0.24003537f,
     -0.225892961f, -0.201473758f, -0.171134651f, -0.138901055f, -0.107982025f, -0.080544591f, -0.0577215441f,
     -0.0397836976f, -0.0263933167f, -0.0168651938f, -0.0103856092f, -0.00616609538f, -0.00353092933f,
     -0.00195077003f, -0.0010401092f, -0.000535314321f, -0.000266001094f, -0.00012763773f, -5.91511198e-05f,
     -2.64785504e-05f, -1.14505228e-05f, -4.7841304e-06f, -1.93138612e-06f, -7.53461677e-07f, 0.f},
    {-0.133208036f, -0.126287639f, -0.107870877f, -0.0804267153f, -0.0480808876f, -0.0153251411f, 0.0138384039f,
     0.0365459472f, 0.0513888374f, 0.0583792813f, 0.0586395487f, 0.0539444648f, 0.0462539308f, 0.0373401828f,
     0.0285624582f, 0.0207908526f, 0.014445439f, 0.00960168615f, 0.00611597532f, 0.00373822334f, 0.002194867f,
     0.00123899488f, 0.000672911352f, 0.000351828377f, 0.000177176451f, 8.59742941e-05f, 4.02140795e-05f,
     1.81373052e-05f, 7.88993111e-06f, 3.31120054e-06f, 1.34092159e-06f, 0.f},
    {0.00375678088f, 0.0176039282f, 0.0323869213f, 0.0421540886f, 0.0457858965f, 0.0433943793f, 0.0361663885f,
     0.025969699f, 0.014858515f, 0.00462369295f, -0.00350542576f, -0.00896505639f, -0.0117878504f,
     -0.0124235265f, -0.0115243634f, -0.00975746475f, -0.00767876068f, -0.0056758686f, -0.00396690471f,
     -0.0026333814f, -0.00166579697f, -0.00100651395f, -0.000581978064f, -0.000322486187f, -0.0001714502f,
     -8.7538574e-05f, -4.29573629e-05f, -2.02740011e-05f, -9.20766161e-06f, -4.02602063e-06f, -1.69551151e-06f,
     0.f}};
INLINE vec<float, 16> looked_up_gelu(vec<float, 16> x) {
  typedef vec<float, 16> V;
  typedef vec<int, 16> I;
  V a = v_abs(x), place = a * 5.5f + 12582912.f;
  place = place < 12582943.f ? place : V{} + 12582943.f;
  V u = a - (place - 12582912.f) * 0.181818187f;
  const auto coefficient = [&](int k) __attribute__((always_inline)) {
    V low, high;
    __builtin_memcpy(&low, gelu_table[k], sizeof low);
    __builtin_memcpy(&high, gelu_table[k] + 16, sizeof high);
    return __builtin_ia32_vpermt2varps512_mask((I)place, low, high, (unsigned short)-1);
  };
  V e = coefficient(4) * u + coefficient(3);
  e = e * u + coefficient(2);
  e = e * u + coefficient(1);
  e = e * u + coefficient(0);
  // An infinite u makes e NaN; a sum that vanishes has the sign of x.
  V y = (a * e + x) * 0.5f;
  return (V)((I)y | ((I)x & (int)0x80000000));
}
#endif

// gelu: absolute error 1.3e-7 of 1 + |gelu|, infinities give NaN as in oneDNN, which eager uses.
// x/2 * erfc is subtracted from max(x, 0); erfc(t) = 2^(t * polynomial), accurate where it counts.
template <class V> INLINE V v_gelu(V x) {
  if constexpr (sizeof(element<V>) == 8) {
    return x * 0.5 * (1 + m_erf(x * 0.70710678118654752440));
#ifdef __AVX512F__
  } else if constexpr (LANES(V) == 16) {
    return looked_up_gelu(x);
#endif
  } else {
    typedef vec<int, LANES(V)> I;
    V a = v_abs(x), t = a * 0.707106781186547524f;
    V p = t * -3.744797868e-05f + 3.786133407e-04f;
    p = p * t - 1.264612474e-03f;
    p = p * t - 1.159999995e-03f;
    p = p * t + 2.861275083e-02f;
    p = p * t - 1.486603203e-01f;
    p = p * t - 9.183734674e-01f;
    p = p * t - 1.627912296e+00f;
    p = p * t;
    p = p > -200.f ? p : V{} - 200.f;
    V r = p + 12582912.f;
    V f = p - (r - 12582912.f);
    V e = f * 1.326474611e-03f + 9.671520402e-03f;
    e = e * f + 5.550733770e-02f;
    e = e * f + 2.402224197e-01f;
    e = e * f + 6.931469775e-01f;
    e = e * f + 1.f;
    e = p > -152.f ? e : V{};  // nothing is left: see v_exp
    V top = x >= 0.f ? x : -V{};
    return ((top + top) - a * two_to<V>(r, r - 12582912.f, e)) * 0.5f;  // overflows where oneDNN does
  }
}

// sin, cos: 2 ULP below 8192 in magnitude; above, the library's.
template <int PHASE, class V> INLINE V sine(V x) {
  typedef vec<int, LANES(V)> I;
  V t = x * 0.636619772367581343f + 12582912.f;
  V n = t - 12582912.f;
  I q = (I)t - 0x4B400000 + PHASE;
  V r = x - n * 1.5703125f;
  r = r - n * 4.837512969970703125e-4f;
  r = r - n * 7.549789948768648e-8f;
  V z = r * r;
  V s = z * -1.9515295891e-4f + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * r + r;
  V c = z * 2.443315711809948e-5f - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * (z * z) - 0.5f * z + 1.f;
  V y = (q & 1) != 0 ? c : s;
  return (V)((I)y ^ ((q & 2) << 30));
}
template <class V> INLINE bool all_below(V x, element<V> limit) {
  bool all = true;
  for (int l = 0; l < LANES(V); l++) all &= x[l] < limit;
  return all;
}
template <class V> INLINE V v_sin(V x) {
  if constexpr (sizeof(element<V>) == 8) return m_sin(x);
  else return all_below(v_abs(x), 8192.f) ? sine<0>(x) : m_sin(x);
}
template <class V> INLINE V v_cos(V x) {
  if constexpr (sizeof(element<V>) == 8) return m_cos(x);
  else return all_below(v_abs(x), 8192.f) ? sine<1>(x) : m_cos(x);
}

// asinh, acosh: the library squares its argument; a large one is its logarithm and that of 2.
template <class V> INLINE V large_area(V x, V y) {
  typedef element<V> T;
  const T limit = sizeof(T) == 8 ? (T)1e150 : (T)1e18f;
  const V a = v_abs(x);
  if (all_below(a, limit)) return y;
  V logarithm;
  if constexpr (sizeof(T) == 8) logarithm = m_log(a);
  else logarithm = v_log(a);
  return a >= limit ? logarithm + (T)0.693147180559945309417 : y;
}
template <class V> INLINE V v_asinh(V x) { return m_copysign(large_area(x, m_asinh(x)), x); }
template <class V> INLINE V v_acosh(V x) { return x < 0 ? m_acosh(x) : large_area(x, m_acosh(x)); }

template <class V> INLINE V v_truncate_divide(V a, V b) {
  if constexpr (is_same_<element<V>, int>::value || is_same_<element<V>, i64>::value) return a / b;
  else return v_trunc(a / b);
}
// Python's floor division; floats as c10::div_floor_floating.
template <class V> INLINE V v_floor_divide(V a, V b) {
  if constexpr (is_same_<element<V>, int>::value || is_same_<element<V>, i64>::value) {
    V q = a / b;
    return ((a % b != 0) & ((a < 0) != (b < 0))) ? q - 1 : q;
  } else {
    V m = m_fmod(a, b), exact = a / b;
    // Where the quotient is infinite the library has no remainder.
    V inf = V{} + (element<V>)__builtin_inf();
    V q = (((v_abs(exact) == inf) & (v_abs(a) != inf)) ? a : a - m) / b;
    q = ((m != 0) & ((b < 0) != (m < 0))) ? q - 1 : q;
    V f = v_floor(q);
    f = (q - f > (element<V>)0.5) ? f + 1 : f;
    V zero = m_copysign(V{}, exact);
    V r = q != 0 ? f : zero;
    return b == 0 ? exact : r;
  }
}
template <class V> INLINE V v_remainder(V a, V b) {
  if constexpr (is_same_<element<V>, int>::value || is_same_<element<V>, i64>::value) {
    V m = a % b;
    return ((m != 0) & ((b < 0) != (m < 0))) ? m + b : m;
  } else {
    V m = m_fmod(a, b);
    return ((m != 0) & ((b < 0) != (m < 0))) ? m + b : m;
  }
}

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

// ---- threads: torch's own OpenMP, found in the process; without it one thread does all

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
extern "C" int omp_get_thread_num() __attribute__((weak));
extern "C" int omp_get_num_threads() __attribute__((weak));

struct shared_work {
  void (*part)(void* const*, i64, i64);
  void* const* p;
  i64 units;
};
static void run_part(void* data) {
  const shared_work& w = *(const shared_work*)data;
  i64 me = omp_get_thread_num(), all = omp_get_num_threads();
  w.part(w.p, w.units * me / all, w.units * (me + 1) / all);
}
INLINE void share(void (*part)(void* const*, i64, i64), void* const* p, i64 units, long threads) {
  if (threads > units) threads = units;
  if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
    shared_work w = {part, p, units};
    GOMP_parallel(run_part, &w, (unsigned)threads, 0);
  } else {
    part(p, 0, units);
  }
}

// ---- small matrix products

// Every sum is CHAINS sums, each of every so-manyth term.
template <int MR, int N, int K, int NV, int W, int CHAINS>
INLINE void gemm_rows(const float* a, i64 lda, const float* b, i64 ldb, const float* bias, i64 bias_m,
                      i64 bias_n, float* out, int n0, int width) {
  typedef vec<float, W> V;
  V sums[CHAINS][MR][NV], (&c)[MR][NV] = sums[0];
  for (int s = 0; s < CHAINS; s++)
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NV; j++) sums[s][i][j] = V{};
  const auto add = [&](int k, int s) __attribute__((always_inline)) {
    V row[NV];
    for (int j = 0; j < NV; j++) __builtin_memcpy(&row[j], b + k * ldb + n0 + W * j, sizeof(V));
    for (int i = 0; i < MR; i++) {
      V x = a[i * lda + k] - V{};
      for (int j = 0; j < NV; j++) sums[s][i][j] += x * row[j];
    }
  };
  int k = 0;
  for (; k + CHAINS <= K; k += CHAINS)
    _Pragma("GCC unroll 4") for (int s = 0; s < CHAINS; s++) add(k + s, s);
  for (; k < K; k++) add(k, 0);
  for (int step = 1; step < CHAINS; step *= 2)
    for (int s = 0; s + step < CHAINS; s += 2 * step)
      for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) sums[s][i][j] += sums[s + step][i][j];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) {
      int left = width - W * j;
      if (bias) {
        V add = V{};
        if (left >= W && bias_n == 1) __builtin_memcpy(&add, bias + i * bias_m + n0 + W * j, sizeof(V));
        else for (int l = 0; l < W && l < left; l++) add[l] = bias[i * bias_m + (n0 + W * j + l) * bias_n];
        c[i][j] += add;
      }
      float* o = out + i * N + n0 + W * j;
      if (left >= W) __builtin_memcpy(o, &c[i][j], sizeof(V));
      else for (int l = 0; l < left; l++) o[l] = c[i][j][l];
    }
}

#ifdef __AVX512F__
#define GEMM_LANES 16
#else
#define GEMM_LANES 8
#endif

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

// out[M,N] = a[M,K] * b (+ bias); b is [K,N], or with T its transpose [N,K].
template <int M, int N, int K, bool T>
static __attribute__((noinline)) void small_gemm(const float* __restrict__ a, i64 lda, const float* __restrict__ b, i64 ldb,
                       const float* __restrict__ bias, i64 bias_m, i64 bias_n, float* __restrict__ out) {
  constexpr int W = GEMM_LANES, NP = (N + W - 1) / W * W, NV = NP >= 2 * W ? 2 : 1;
  // BLAS libraries take few rows or columns along the sum, whose rounding errors are smaller then.
  constexpr int CHAINS = K >= 32 && (M <= 4 || N <= 4) ? 4 : 1;
  // Rows at once: as many as there are registers for, in parts of about the same size.
  constexpr int MOST = CHAINS > 1 ? (W == 16 ? 6 : 2) / NV : W == 16 ? 12 : NV == 2 ? 6 : 8, PARTS = (M + MOST - 1) / MOST, MR = (M + PARTS - 1) / PARTS;
  alignas(64) float packed[T || N % W ? K * NP : 1];
  const float* rows = b;
  i64 step = ldb;
  if constexpr (T && N % 16 == 0 && K % 16 == 0) {
    for (int n = 0; n < N; n += 16)
      for (int k = 0; k < K; k += 16) turn(b + n * ldb + k, ldb, packed + k * NP + n, NP);
    rows = packed;
    step = NP;
  } else if constexpr (T || N % W) {
    for (int k = 0; k < K; k++)
      for (int n = 0; n < NP; n++)
        packed[k * NP + n] = n < N ? (T ? b[n * ldb + k] : b[k * ldb + n]) : 0.f;
    rows = packed;
    step = NP;
  }
  const auto columns = [&](int n, auto vectors) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::value;
    const auto some = [&](int i, auto r) __attribute__((always_inline)) {
      gemm_rows<decltype(r)::value, N, K, V, W, CHAINS>(a + i * lda, lda, rows, step, bias ? bias + i * bias_m : bias, bias_m, bias_n, out + i * N, n, N - n);
    };
    for (int i = 0; i + MR <= M; i += MR) some(i, count<MR>{});
    if constexpr (M % MR != 0) some(M - M % MR, count<M % MR>{});
  };
  int n = 0;
  for (; n + NV * W <= NP; n += NV * W) columns(n, count<NV>{});
  if constexpr (NP % (NV * W) != 0) columns(n, count<1>{});
}

#ifdef __AVX512F__
// The same by columns, out.T = w @ rows.T: w is [N,K]; the rows lie as [K,M], or with IN as [M,K]; the
// results as [N,M], or with OUT as [M,N]. Reads w as it lies, in units of 32 rows; nothing else is large.
template <int M, int N, int K, bool IN, bool OUT>
static void columns_gemm(const float* w, i64 ldw, const float* rows, i64 ldr, const float* bias, i64 bias_n, i64 bias_m,
                         float* out, i64 begin, i64 end) {
  constexpr int UNIT = N < 32 ? N : 32;
  alignas(64) float columns[IN ? K * M : 1], results[OUT ? UNIT * M : 1];
  if constexpr (IN) {
    for (int m = 0; m < M; m += 16)
      for (int k = 0; k < K; k += 16) turn(rows + m * ldr + k, ldr, columns + k * M + m, M);
    rows = columns, ldr = M;
  }
  const auto some = [&](i64 n, auto lines) __attribute__((always_inline)) {
    constexpr int L = decltype(lines)::value;
    small_gemm<L, M, K, false>(w + n * ldw, ldw, rows, ldr, bias ? bias + n * bias_n : bias, bias_n, bias_m,
                               OUT ? results : out + n * M);
    if constexpr (OUT)
      for (int l = 0; l < L; l += 16)
        for (int m = 0; m < M; m += 16) turn(results + l * M + m, M, out + m * N + n + l, N);
  };
  const i64 whole = end < N / UNIT ? end : N / UNIT;
  for (i64 unit = begin; unit < whole; unit++) some(unit * UNIT, count<UNIT>{});
  if constexpr (N % UNIT != 0)
    if (end > N / UNIT) some(N - N % UNIT, count<N % UNIT>{});
}
#endif
