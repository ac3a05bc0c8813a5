// What kernels need of products.cpp: its functions, and the packing of columns.
#ifndef __AVX512F__
#error "these kernels need vectors of 64 bytes"
#endif
constexpr int W = 16, PANEL = 32, WIDE = 64;
struct pair { int bits; };
typedef void (*Finish)(const void* context, i64 m, i64 n, i64 count, const float* values);
typedef void (*Pack)(const void* context, i64 k, i64 count, i64 n, i64 columns, float* to);
#define PRODUCTS(E, suffix)                                                                                  \
  extern "C" __attribute__((visibility("hidden"))) void pack_columns_##suffix(const E*, i64, E*, i64, i64,   \
                                                                              i64, i64);                     \
  extern "C" __attribute__((visibility("hidden"))) void product_##suffix(                                    \
      const E*, const E*, i64, i64, i64, i64, i64, i64, i64, Finish, const void*);                           \
  extern "C" __attribute__((visibility("hidden"))) void few_rows_##suffix(                                   \
      const E*, i64, const E*, i64, i64, i64, i64, i64, i64, Finish, const void*);
PRODUCTS(float, f32)
PRODUCTS(pair, bf16)
extern "C" __attribute__((visibility("hidden"))) void wide_f32(const float*, i64, i64, i64, i64, i64, i64, i64, Pack,
                                                               Finish, const void*, const char*, i64, i64);

typedef void (*PackPairs)(const void* context, i64 k, i64 count, i64 n, i64 columns, pair* to);
extern "C" __attribute__((visibility("hidden"))) void wide_bf16(const pair*, i64, i64, i64, i64, i64, i64, i64,
                                                                PackPairs, Finish, const void*, const char*,
                                                                i64, i64);

// What a template hands to its epilogue: the kernel's buffers, and the row its rows count from.
struct epilogue_context {
  void* const* p;
  i64 row;
};

// Packs b[k][n], n from n0 on. Whole lines of b are read in their order, and ahead.
INLINE void pack_rows(const float* b, i64 ldb, i64 k0, i64 k_count, i64 n0, i64 columns, float* to) {
  typedef vec<float, W> V;
  const float* from = b + k0 * ldb + n0;
  if (columns == WIDE) {
    for (i64 k = 0; k < k_count; k++, from += ldb, to += PANEL) {
      V x[WIDE / W];
      _Pragma("GCC unroll 4") for (int j = 0; j < WIDE / W; j++) {
        __builtin_prefetch(from + 24 * ldb + j * W);
        __builtin_memcpy(&x[j], from + j * W, sizeof(V));
      }
      _Pragma("GCC unroll 4") for (int j = 0; j < WIDE / W; j++)
        __builtin_memcpy(to + j / 2 * PANEL * k_count + j % 2 * W, &x[j], sizeof(V));
    }
    return;
  }
  for (i64 n = 0; n < columns; n += PANEL, to += PANEL * k_count) {
    const i64 left = columns - n, width = left > W ? PANEL : W;
    for (i64 k = 0; k < k_count; k++) {
      const float* row = from + k * ldb + n;
      for (i64 l = 0; l < width; l++) to[k * width + l] = l < left ? row[l] : 0.f;
    }
  }
}

// The same where the columns are every `step`th pixel of every `step`th line of an image.
INLINE void pack_pixels(const float* b, i64 ldb, i64 width, i64 line, i64 step, i64 k0, i64 k_count, i64 n0,
                        i64 columns, float* to) {
  int place[WIDE];
  for (i64 n = 0; n < columns; n++) place[n] = int((n0 + n) / width * step * line + (n0 + n) % width * step);
  for (i64 n = 0; n < columns; n += PANEL, to += PANEL * k_count) {
    const i64 left = columns - n, wide = left > W ? PANEL : W;
    for (i64 k = 0; k < k_count; k++) {
      const float* from = b + (k0 + k) * ldb;
      for (i64 l = 0; l < wide; l++) to[k * wide + l] = l < left ? from[place[n + l]] : 0.f;
    }
  }
}

// Pairs of neighbouring lines of bfloat16: k counts pairs, `ldb` single elements.
INLINE void pack_pairs(const bfloat16* b, i64 ldb, i64 k0, i64 k_count, i64 n0, i64 columns, pair* to) {
  typedef vec<int, W> V;
  typedef unsigned short H __attribute__((vector_size(2 * W)));
  for (i64 k = 0; k < k_count; k++) {
    const unsigned short* even = (const unsigned short*)b + (k0 + k) * 2 * ldb + n0;
    const unsigned short* odd = even + ldb;
    for (i64 n = 0; n < columns; n += W) {
      const i64 panel = n / PANEL * PANEL, width = columns - panel > W ? PANEL : W;
      H x = H{}, y = H{};
      if (columns - n >= W) {
        __builtin_prefetch(even + n + 32 * ldb), __builtin_prefetch(odd + n + 32 * ldb);
        __builtin_memcpy(&x, even + n, sizeof x), __builtin_memcpy(&y, odd + n, sizeof y);
      } else {
        for (i64 l = 0; n + l < columns; l++) x[l] = even[n + l], y[l] = odd[n + l];
      }
      V both = __builtin_convertvector(x, V) | __builtin_convertvector(y, V) << 16;
      __builtin_memcpy(to + panel * k_count + k * width + (n - panel), &both, sizeof both);
    }
  }
}
