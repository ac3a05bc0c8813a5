// Functions of vectors, on top of preamble.h, with its rules.

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

#ifdef __AVX512F__
alignas(64) static const float sixteenths[2][16] = {  // of powers of two, and what rounding took from them
    {1.f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
     1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f},
    {0.f, 4.8334702e-08f, -1.307754e-08f, 5.3862223e-08f, 3.7976353e-08f, 4.4968381e-08f, -4.0189995e-08f,
     -1.0123349e-08f, 2.4203235e-08f, -4.5008989e-08f, 8.0709048e-09f, 9.8362172e-09f, -2.4755327e-08f,
     -9.2357704e-09f, -1.1239278e-08f, 9.8453281e-09f}};
// e^x = 2^whole * 2^(sixteenths) * e^r: the middle one is looked up in registers, so that three terms do
// for the last (|r| < 0.0217, fitted to 1.6e-9).
INLINE vec<float, 16> looked_up_exp(vec<float, 16> x) {
  typedef vec<float, 16> V;
  typedef vec<int, 16> I;
  V c = MIN512(V{} + 89.f, x);
  V t = c * 1.44269504088896341f + 786432.f;  // its last bits count sixteenths
  V n = t - 786432.f;
  V r = c - n * 0.6931472f;  // exact
  r = r + n * 1.9046542e-9f;
  const auto looked_up = [&](int k) __attribute__((always_inline)) {
    V table;
    __builtin_memcpy(&table, sixteenths[k], sizeof table);
    return __builtin_ia32_permvarsf512_mask(table, (I)t, V{}, (unsigned short)-1);
  };
  V power = looked_up(0);
  V p = r * 0.16667025f + 0.5000162f;
  p = p * r + 1.f;
  p = (power * r + looked_up(1)) * p + power;
  // Where nothing is left: rounding to zero costs the processor 150 cycles, a zero costs none.
  unsigned short left = __builtin_ia32_cmpps512_mask(x, V{} - 104.f, 5 /* not less */, (unsigned short)-1, 4);
  return __builtin_ia32_scalefps512_mask(p, n, V{}, left, 4);
}
#endif

// exp: 1 ULP; denormal results, overflow and NaN are exact in kind.
template <class V> INLINE V v_exp(V x) {
  if constexpr (sizeof(element<V>) == 8) {
    return m_exp(x);
#ifdef __AVX512F__
  } else if constexpr (LANES(V) == 16) {
    return looked_up_exp(x);
#endif
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
  else return all_below(v_abs(x), 8192.f) ? (x == 0.f ? x : sine<0>(x)) : m_sin(x);  // -0 stays
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

// Division of many numbers by one: a quotient from its reciprocal is corrected by what it leaves, which gives
// the bits of a division (Cornea, Harrison and Tang: the reciprocal is rounded correctly and normal), but for
// the last one of numbers below 1e-30, whose rest is not exact. Vectors with infinities or NaN are divided.
template <class V> struct divisor {
  V value, reciprocal;
  bool plain;
};
// ... by a value that is the same in all lanes.
template <int N, class U> INLINE divisor<vec<element<U>, N>> to_divide_by(U value) {
  element<U> y = value[0], least = sizeof y == 8 ? (element<U>)0x1p-1000 : (element<U>)0x1p-120f;
  return {spread<N>(value), spread<N>(1 / value), !(y > least && y < 1 / least)};
}
template <class V> INLINE bool none_is_nan(V x) {
#ifdef __AVX512F__
  if constexpr (is_same_<V, vec<float, 16>>::value)
    return __builtin_ia32_cmpps512_mask(x, x, 3 /* unordered */, (unsigned short)-1, 4) == 0;
  if constexpr (is_same_<V, vec<double, 8>>::value)
    return __builtin_ia32_cmppd512_mask(x, x, 3, (unsigned char)-1, 4) == 0;
#endif
#ifdef __AVX__
  if constexpr (is_same_<V, vec<float, 8>>::value) return __builtin_ia32_movmskps256((V)(x != x)) == 0;
  if constexpr (is_same_<V, vec<double, 4>>::value) return __builtin_ia32_movmskpd256((V)(x != x)) == 0;
#endif
  bool none = true;
  for (int l = 0; l < LANES(V); l++) none &= x[l] == x[l];
  return none;
}
template <class V> INLINE V v_over(V x, const divisor<V>& by) {
#ifdef __FMA__
  if (__builtin_expect(!by.plain, 1)) {
    V q = x * by.reciprocal;
    V rest = q * by.value - x;  // rounded once: contracted
    V r = q - rest * by.reciprocal;
    if (__builtin_expect(none_is_nan(r), 1)) return r;
  }
#endif
  return x / by.value;
}

// A place inside of a dimension.
template <class V> INLINE V v_bounded(V place, V count) { return v_min(v_max(place, V{}), count - 1); }

// Philox4x32-10, one element after the other.
INLINE void philox_words(u64 seed, u64 counter, u64 thread, unsigned* x) {
  x[0] = counter, x[1] = counter >> 32, x[2] = thread, x[3] = thread >> 32;
  unsigned low = seed, high = seed >> 32;
  for (int round = 0; round < 10; ++round, low += 0x9e3779b9u, high += 0xbb67ae85u) {
    u64 a = (u64)x[0] * 0xd2511f53u, b = (u64)x[2] * 0xcd9e8d57u;
    unsigned first = (unsigned)(b >> 32) ^ x[1] ^ low, third = (unsigned)(a >> 32) ^ x[3] ^ high;
    x[0] = first, x[1] = b, x[2] = third, x[3] = a;
  }
}
template <class V> INLINE vec<float, LANES(V)> v_philox_uniform(V seed, V counter, V thread, V lane) {
  vec<float, LANES(V)> r;
  for (int i = 0; i < LANES(V); ++i) {
    unsigned x[4];
    philox_words(seed[i], counter[i], thread[i], x);
    r[i] = (float)x[lane[i]] * 0x1p-32f + 0x1p-33f;
  }
  return r;
}
template <class V> INLINE vec<double, LANES(V)> v_philox_uniform_wide(V seed, V counter, V thread, V lane) {
  vec<double, LANES(V)> r;
  for (int i = 0; i < LANES(V); ++i) {
    unsigned x[4];
    philox_words(seed[i], counter[i], thread[i], x);
    r[i] = (double)(x[2 * lane[i]] ^ (u64)x[2 * lane[i] + 1] << 21) * 0x1p-53 + 0x1p-54;
  }
  return r;
}

// 32 random bits of a position and two seeds. Source: `triple32` of Chris Wellons' hash-prospector.
template <class V> INLINE V v_random_bits(V position, V first, V second) {
  typedef vec<unsigned, LANES(V)> U;
  U x = (U)position ^ (U)first;
  x = (x ^ x >> 17) * 0xed5ad4bbu;
  x = (x ^ x >> 11) + (U)second;
  x *= 0xac4c1b51u;
  x = (x ^ x >> 15) * 0x31848babu;
  return (V)(x ^ x >> 14);
}
