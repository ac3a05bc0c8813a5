// What kernels need of products.cpp: its functions, and the packing of columns.
#ifndef __AVX512F__
#error "these kernels need vectors of 64 bytes"
#endif
constexpr int W = 16, PANEL = 32, BLOCK = 48, WIDE = 64, FEW = 4;
INLINE i64 panel_width(i64 columns_left) { return columns_left > W + FEW ? PANEL : W; }
struct pair { int bits; };
struct Results {
  void (*finish)(const void* context, i64 m, i64 n, i64 count, const float* values);
  char* (*where)(const void* context, i64 m, i64 n);
};
typedef void (*Pack)(const void* context, i64 k, i64 count, i64 n, i64 columns, float* to);
#define PRODUCTS(E, suffix)                                                                                  \
  extern "C" __attribute__((visibility("hidden"))) void pack_columns_##suffix(const E*, i64, E*, i64, i64,   \
                                                                              i64, i64);                     \
  extern "C" __attribute__((visibility("hidden"))) void product_##suffix(                                    \
      const E*, const E*, i64, i64, i64, i64, i64, i64, i64, const Results*, const void*);                           \
  extern "C" __attribute__((visibility("hidden"))) void few_rows_##suffix(                                   \
      const E*, i64, const E*, i64, i64, i64, i64, i64, i64, const Results*, const void*);
PRODUCTS(float, f32)
PRODUCTS(pair, bf16)
extern "C" __attribute__((visibility("hidden"))) void wide_f32(const float*, i64, i64, i64, i64, i64, i64, i64, Pack,
                                                               const Results*, const void*, const char*, i64, i64);

typedef void (*PackPairs)(const void* context, i64 k, i64 count, i64 n, i64 columns, pair* to);
extern "C" __attribute__((visibility("hidden"))) void wide_bf16(const pair*, i64, i64, i64, i64, i64, i64, i64,
                                                                PackPairs, const Results*, const void*, const char*,
                                                                i64, i64);

struct Winograd {  // as in winograd.cpp
  i64 images, channels, height, width, filters, height_out, width_out, pad_h, pad_w;
  i64 block_images, block_rows, block_columns, part;
  bool by_channels, weights_by_channels;
};
extern "C" __attribute__((visibility("hidden"))) void winograd_weights_f32(const float*, i64, i64, bool, float*,
                                                                           float*, i64, i64);
extern "C" __attribute__((visibility("hidden"))) void winograd_f32(const float*, const float*, const float*, const float*,
                                                                   float*, const Winograd*, i64, i64,
                                                                   const Results*, const void*);

// What a template hands to its epilogue: the kernel's buffers, and the row its rows count from.
struct epilogue_context {
  void* const* p;
  i64 row;
};

// Columns of several images: each piece goes to `finish` as pixels of its own image.
template <i64 FILTERS, i64 PIXELS, const Results& RESULTS>
static void finish_images(const void* context, i64 m, i64 n, i64 count, const float* values) {
  const epilogue_context& all = *(const epilogue_context*)context;
  while (count > 0) {
    const i64 image = n / PIXELS, pixel = n - image * PIXELS, left = PIXELS - pixel;
    const i64 length = count < left ? count : left;
    const epilogue_context one = {all.p, all.row + image * FILTERS};
    RESULTS.finish(&one, m, pixel, length, values);
    n += length, count -= length, values += length;
  }
}

template <i64 FILTERS, i64 PIXELS, const Results& RESULTS>
static char* where_images(const void* context, i64 m, i64 n) {
  const epilogue_context& all = *(const epilogue_context*)context;
  const i64 image = n / PIXELS;
  const epilogue_context one = {all.p, all.row + image * FILTERS};
  return RESULTS.where(&one, m, n - image * PIXELS);
}
template <i64 FILTERS, i64 PIXELS, const Results& RESULTS>
static const Results of_images = {finish_images<FILTERS, PIXELS, RESULTS>,
                                  RESULTS.where ? where_images<FILTERS, PIXELS, RESULTS> : nullptr};

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
  for (i64 n = 0, width; n < columns; n += width, to += width * k_count) {
    const i64 left = columns - n;
    width = panel_width(left);
    for (i64 k = 0; k < k_count; k++) {
      const float* row = from + k * ldb + n;
      for (i64 l = 0; l < width; l++) to[k * width + l] = l < left ? row[l] : 0.f;
    }
  }
}

// The same where b is what a convolution multiplies its weights with: line k, of (channel, tap in
// a column of the kernel, tap in a line), at column n, of (image, pixel), is the pixel that this tap
// meets there; outside the image it is zero. The values are read from the images as they lie.
typedef vec<int, W> Places;
INLINE unsigned lanes_where(Places condition) { return (unsigned short)__builtin_ia32_cvtd2mask512(condition); }
INLINE vec<float, W> load_where(const float* from, unsigned lanes, vec<float, W> others = vec<float, W>{}) {
  return __builtin_ia32_loadups512_mask(from, others, (unsigned short)lanes);
}

template <int TAPS_H, int TAPS_W, int STEP_H, int STEP_W, int PAD_H, int PAD_W, int APART_H, int APART_W>
static __attribute__((noinline)) void pack_patches(const float* x, i64 image_size, i64 height, i64 line,
                                                   i64 height_out, i64 width_out, i64 k0, i64 k_count, i64 n0,
                                                   i64 columns, float* to) {
  typedef vec<float, W> V;
  constexpr int TAPS = TAPS_H * TAPS_W, SOON = TAPS < 8 ? 8 / TAPS : 1;  // channels ahead
  // Lanes lie together, in two pieces (lines or images), two apart, or anywhere.
  enum { GATHERED, NEIGHBOURS, TWO_PIECES, EVERY_OTHER } how[WIDE / W];
  Places place[WIDE / W];
  unsigned in_first[WIDE / W];
  i64 second[WIDE / W];
  unsigned lanes[TAPS][WIDE / W];
  i64 panel[WIDE / W], width[WIDE / W];
  const int vectors = int((columns + W - 1) / W);
  for (int j = 0; j < vectors; j++) {
    panel[j] = j % 2 && width[j - 1] == PANEL ? panel[j - 1] : j * W;
    width[j] = panel_width(columns - panel[j]);
  }
  i64 image = n0 / (height_out * width_out), rest = n0 - image * height_out * width_out;
  i64 row = rest / width_out, column = rest - row * width_out;
  for (int j = 0; j < vectors; j++) {
    Places top, left, inside;
    bool every_other = true;
    int pieces = 1;
    second[j] = 0, in_first[j] = 0xffff;
    for (int l = 0; l < W; l++) {
      inside[l] = j * W + l < columns ? -1 : 0;
      top[l] = int(row * STEP_H - PAD_H), left[l] = int(column * STEP_W - PAD_W);
      place[j][l] = int(image * image_size + top[l] * line + left[l]);
      if (inside[l] && place[j][l] != (pieces == 1 ? place[j][0] : second[j]) + l)
        pieces++, second[j] = place[j][l] - l, in_first[j] &= (1u << l) - 1;
      if (inside[l] && place[j][l] != place[j][0] + 2 * l) every_other = false;
      if (++column == width_out) {
        column = 0;
        if (++row == height_out) row = 0, image++;
      }
    }
    how[j] = pieces == 1 ? NEIGHBOURS : every_other ? EVERY_OTHER : pieces == 2 ? TWO_PIECES : GATHERED;
    for (int r = 0; r < TAPS_H; r++)
      for (int s = 0; s < TAPS_W; s++) {
        const Places h = top + r * APART_H, w = left + s * APART_W;
        lanes[r * TAPS_W + s][j] = lanes_where(inside & (h >= 0) & (h < (int)height) & (w >= 0) & (w < (int)line));
      }
  }
  i64 channel = k0 / TAPS;
  int tap = int(k0 - channel * TAPS);
  const i64 plane = height * line;
  const Places even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  for (i64 k = 0; k < k_count; k++) {
    const i64 from = channel * plane + tap / TAPS_W * APART_H * line + tap % TAPS_W * APART_W;
    for (int j = 0; j < vectors; j++) {
      const unsigned here = lanes[tap][j];
      const float* first = x + from + place[j][0];
      if (tap == 0) {
        __builtin_prefetch(first + SOON * plane);
        if (how[j] != NEIGHBOURS) __builtin_prefetch(first + SOON * plane + W);
      }
      V v;
      if (how[j] == NEIGHBOURS) {
        v = load_where(first, here);
      } else if (how[j] == TWO_PIECES) {
        v = load_where(x + from + second[j], here & ~in_first[j], load_where(first, here & in_first[j]));
      } else if (how[j] == EVERY_OTHER) {
        const unsigned spread = __builtin_ia32_pdep_si(here, 0x55555555u);
        v = __builtin_shuffle(load_where(first, spread), load_where(first + W, spread >> W), even);
      } else {
        v = __builtin_ia32_gathersiv16sf(V{}, x + from, place[j], (unsigned short)here, 4);
      }
      __builtin_memcpy(to + panel[j] * k_count + k * width[j] + (j * W - panel[j]), &v, sizeof v);
    }
    if (++tap == TAPS) tap = 0, channel++;
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
      const i64 before = n / PANEL * PANEL, panel = panel_width(columns - before) == PANEL ? before : n;
      const i64 width = panel_width(columns - panel);
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
