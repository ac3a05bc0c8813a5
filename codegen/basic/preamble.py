"""The C++ text in front of every kernel file: scalar types and our own math.

Functions are branch-free, so that the compiler vectorises loops over them. Bounds are
measured against float64 in tests/unit/codegen/test_math.py.
"""

from __future__ import annotations

PREAMBLE = r"""
typedef long i64; typedef int i32; typedef short i16; typedef signed char i8; typedef unsigned char u8;
#define INL static inline __attribute__((always_inline))
template <class A, class B> INL A bits(B b) { return __builtin_bit_cast(A, b); }
// 1 ULP; denormal results; exp(inf) = inf, exp(nan) = nan.
INL float a_exp(float x) {
  float c = x < -104.f ? -104.f : x; c = c > 89.f ? 89.f : c;
  float t = c * 1.44269504088896341f + 12582912.f;
  float n = t - 12582912.f;
  float r = __builtin_fmaf(n, -0.693145751953125f, c);
  r = __builtin_fmaf(n, -1.428606765330187e-06f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r) + 1.f;
  i32 e = bits<i32>(t) - 0x4B400000;
  i32 h = e >> 1;
  return p * bits<float>((h + 127) << 23) * bits<float>((e - h + 127) << 23);
}
INL float a_erf(float x) {
  float c = x < -4.f ? -4.f : x; c = c > 4.f ? 4.f : c;
  float z = c * c;
  float p = -2.72614225801306e-10f;
  p = __builtin_fmaf(p, z, 2.77068142495902e-08f);
  p = __builtin_fmaf(p, z, -2.10102402082508e-06f);
  p = __builtin_fmaf(p, z, -5.69250639462346e-05f);
  p = __builtin_fmaf(p, z, -7.34990630326855e-04f);
  p = __builtin_fmaf(p, z, -2.95459980854025e-03f);
  p = __builtin_fmaf(p, z, -1.60960333262415e-02f);
  float q = -1.45660718464996e-05f;
  q = __builtin_fmaf(q, z, -2.13374055278905e-04f);
  q = __builtin_fmaf(q, z, -1.68282697438203e-03f);
  q = __builtin_fmaf(q, z, -7.37332916720468e-03f);
  q = __builtin_fmaf(q, z, -1.42647390514189e-02f);
  return __builtin_fabsf(x) >= 4.f ? __builtin_copysignf(1.f, x) : c * p / q;
}
INL float a_tanh(float x) {
  float a = __builtin_fabsf(x), z = x * x;
  float p = -5.70498872745e-3f;
  p = __builtin_fmaf(p, z, 2.06390887954e-2f);
  p = __builtin_fmaf(p, z, -5.37397155531e-2f);
  p = __builtin_fmaf(p, z, 1.33314422036e-1f);
  p = __builtin_fmaf(p, z, -3.33332819422e-1f);
  p = __builtin_fmaf(p * z, x, x);
  float big = 1.f - 2.f / (a_exp(2.f * a) + 1.f);
  big = x < 0.f ? -big : big;
  return a < 0.625f ? p : big;
}
INL float a_sigmoid(float x) { return 1.f / (1.f + a_exp(-x)); }
INL float a_gelu(float x) { return x * 0.5f * (1.f + a_erf(x * 0.70710678118654752440f)); }
INL float a_gelu_tanh(float x) {
  return 0.5f * x * (1.f + a_tanh(0.79788456080286535588f * (x + 0.044715f * x * x * x)));
}
INL float a_silu(float x) { return x / (1.f + a_exp(-x)); }
INL float a_max(float a, float b) { return a > b || a != a ? a : b; }
INL float a_min(float a, float b) { return a < b || a != a ? a : b; }
INL double a_max(double a, double b) { return a > b || a != a ? a : b; }
INL double a_min(double a, double b) { return a < b || a != a ? a : b; }
INL i64 a_max(i64 a, i64 b) { return a > b ? a : b; }
INL i64 a_min(i64 a, i64 b) { return a < b ? a : b; }
"""
