// Matrix products, on top of preamble.h; compiled once for a machine and kept as an object
// file, one for each E: `float`, or `pair` (two neighbouring bfloat16, summed in float).
//
// One micro-kernel: rows of one operand are read as they lie in memory, an element at a time,
// broadcast; the columns of the other come packed, V vectors for each k. So a weight is never
// copied for longer than a call, and nothing is remembered about it.
// Sums run over at most KB elements before they are added to a total, as BLAS libraries do:
// the error stays that of blocked summation.
#ifndef __AVX512F__
#error "these kernels need vectors of 64 bytes"
#endif
constexpr int W = 16, MR = 12;
constexpr int NV = 2, PANEL = W * NV, BLOCK = 48, KB = 128, NEAR = KB + 16;
constexpr int FETCHED = 8;              // cache lines, every 16 k
constexpr int AWAITED = 4;              // those of results
#ifndef L1_WAYS
#define L1_WAYS 8
#endif
constexpr int PANELS = 8;               // of `product`, at once
constexpr int WIDE = 64, ROWS = 516;    // of `wide`, at most
constexpr int FEW = 4;
constexpr int TURNED_K = 96;
typedef vec<float, W> VF;
typedef vec<int, W> VI;
struct pair { int bits; };

#ifdef PRODUCTS_OF_PAIRS
typedef pair E;
#define NAME(x) x##_bf16
constexpr int LINES = 2;  // of memory for one k
#else
typedef float E;
#define NAME(x) x##_f32
constexpr int LINES = 1;
#endif
// `finish` gets the sums of one row: columns n to n + count; `where` (may be null) says where the result
// of one row and column will be.
struct Results {
  void (*finish)(const void* context, i64 m, i64 n, i64 count, const float* values);
  char* (*where)(const void* context, i64 m, i64 n);
};
// Packs `count` rows of k from column n on: to[panel][k][column], panels of `panel_width`.
typedef void (*Pack)(const void* context, i64 k, i64 count, i64 n, i64 columns, E* to);
// FEW columns that are left over are worth dot products, not a vector of their own.
INLINE i64 panel_width(i64 columns_left) { return columns_left > W + FEW ? PANEL : W; }

// Memory that will be packed or copied next, `left` pieces of it `step` apart, fetched a few cache
// lines at a time while other memory is worked on: all at once they would have to be waited for.
template <bool WRITTEN> struct Lines {
  const char* at = nullptr;
  i64 step = 0, left = 0, bytes = 0, done = 0;
  __attribute__((always_inline)) void some(int lines) {
    for (; lines > 0 && left > 0; lines--) {
      WRITTEN ? __builtin_prefetch(at + done, 1, 3) : __builtin_prefetch(at + done, 0, 2);
      done += 64;
      if (done >= bytes) done = 0, left--, at += step;
    }
  }
};
struct Fetches {
  Lines<false> columns, rows;
  Lines<true> results;
  __attribute__((always_inline)) void some() { columns.some(FETCHED), rows.some(FETCHED), results.some(AWAITED); }
  // Where `count` rows of results will be written, some piece of each: a store to memory that is
  // not near waits for it, and few of them can wait at a time.
  void await(const Results* r, const void* context, i64 m, i64 count, i64 n, i64 columns) {
    if (!r->where) return;
    const char* at = r->where(context, m, n);
    i64 bytes = r->where(context, m, n + columns - 1) + 1 - at;
    if (bytes <= 0 || bytes > columns * 8) bytes = columns * 4;  // not all in one place: the first will do
    results = {at, count > 1 ? r->where(context, m + 1, n) - at : 0, count, bytes};
  }
};

INLINE VF multiply_add(VF sum, float a, VF b) { return sum + (a - VF{}) * b; }
INLINE VF multiply_add(VF sum, VF a, VF b, float) { return sum + a * b; }
#ifdef __AVX512BF16__
INLINE VF multiply_add(VF sum, pair a, VF b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a.bits - VI{}));
  return sum;
}
INLINE VF multiply_add(VF sum, VF a, VF b, pair) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
  return sum;
}
#endif

// Sums over k of rows[i][k] * panel[k][...], into or onto totals[i][...]; rows `ahead`
// elements on are fetched early.
template <int R, int V>
static __attribute__((noinline)) void micro(const E* __restrict__ rows, i64 stride, const E* __restrict__ panel,
                                            i64 k_count, float* __restrict__ totals, i64 totals_stride, i64 ahead,
                                            bool first, Fetches* fetch) {
  // Rows in threes: three registers of addresses and one of strides reach all of them.
  constexpr int G = (R + 2) / 3;
  const E* row[G];
  VF c[R][V];
  _Pragma("GCC unroll 16") for (int g = 0; g < G; g++) row[g] = rows + 3 * g * stride;
  _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
    _Pragma("GCC unroll 4") for (int j = 0; j < V; j++) c[i][j] = VF{};
  auto one = [&](i64 at) __attribute__((always_inline)) {
    VF x[V];
    _Pragma("GCC unroll 4") for (int j = 0; j < V; j++) __builtin_memcpy(&x[j], panel + at * V * W + W * j, sizeof(VF));
    _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
      _Pragma("GCC unroll 4") for (int j = 0; j < V; j++) c[i][j] = multiply_add(c[i][j], row[i / 3][i % 3 * stride + at], x[j]);
  };
  i64 k = 0;
  auto four = [&]() __attribute__((always_inline)) {
    one(0), one(1), one(2), one(3);
    _Pragma("GCC unroll 16") for (int g = 0; g < G; g++) row[g] += 4;
    panel += 4 * V * W;
  };
  for (; k + 16 <= k_count; k += 16) {
    if (ahead)
      _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) __builtin_prefetch(row[i / 3] + i % 3 * stride + ahead, 0, 2);
    // The next cache line of every row: processors foresee only some of so many.
    _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) __builtin_prefetch(row[i / 3] + i % 3 * stride + 16, 0, 3);
    fetch->some();
    for (int u = 0; u < 4; u++) four();
  }
  for (; k + 4 <= k_count; k += 4) four();
  for (i64 at = 0; k < k_count; k++, at++) one(at);
  _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
    _Pragma("GCC unroll 4") for (int j = 0; j < V; j++) {
      float* t = totals + i * totals_stride + W * j;
      if (!first) {
        VF before;
        __builtin_memcpy(&before, t, sizeof(VF));
        c[i][j] += before;
      }
      __builtin_memcpy(t, &c[i][j], sizeof(VF));
    }
}

#if defined PRODUCTS_OF_PAIRS && defined __AMX_BF16__ && defined __AMX_TILE__
// The matrix unit: tiles of 16 rows of 16 k are loaded as the rows lie, those of the packed columns as they were
// packed. It is asked for once in a process; where the system refuses, vectors do the work.
#define MATRIX_UNIT 1
extern "C" long syscall(long, ...) noexcept;
static bool has_matrix_unit() {
  static const bool granted = [] {
    constexpr long ARCH_PRCTL = 158, ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
  }();
  return granted;
}
// Eight tiles of 16 lines of 64 bytes while it lives; then what was configured before.
struct Tiles {
  alignas(64) unsigned char before[64], own[64] = {};
  const bool on = has_matrix_unit();
  Tiles() {
    if (!on) return;
    asm volatile("sttilecfg %0" : "=m"(before));
    own[0] = 1;
    for (int i = 0; i < 8; i++) own[16 + 2 * i] = 64, own[48 + i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(own));
  }
  ~Tiles() {
    if (on && before[0]) asm volatile("ldtilecfg %0" ::"m"(before));
    else if (on) asm volatile("tilerelease");
  }
};
#define LOAD_TILE(tile, from, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((i64)(bytes)) : "memory")
#define STORE_TILE(tile, to, bytes) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((i64)(bytes)) : "memory")
#define ZERO_TILE(tile) asm volatile("tilezero %tmm" #tile)
#define MULTIPLY_TILES(sum, row, column) asm volatile("tdpbf16ps %tmm" #column ", %tmm" #row ", %tmm" #sum)

// What `micro` does, for R = 16 or 32 rows and V = 1 or 2 vectors of columns; k_count a multiple of 16.
template <int R, int V>
static void multiply_tiles(const E* rows, i64 stride, const E* panel, i64 k_count, float* totals, i64 totals_stride,
                           i64 ahead, bool first, Fetches* fetch) {
  const i64 row_bytes = stride * sizeof(E), line = V * W * sizeof(E), out = totals_stride * sizeof(float);
  float* const lower = totals + 16 * totals_stride;
  if (first) {
    ZERO_TILE(0);
    if (V == 2) ZERO_TILE(1);
    if (R == 32) ZERO_TILE(2);
    if (R == 32 && V == 2) ZERO_TILE(3);
  } else {
    LOAD_TILE(0, totals, out);
    if (V == 2) LOAD_TILE(1, totals + W, out);
    if (R == 32) LOAD_TILE(2, lower, out);
    if (R == 32 && V == 2) LOAD_TILE(3, lower + W, out);
  }
  for (i64 k = 0; k < k_count; k += 16, rows += 16, panel += 16 * V * W) {
    if (ahead)
      _Pragma("GCC unroll 32") for (int i = 0; i < R; i++) __builtin_prefetch(rows + i * stride + ahead, 0, 2);
    fetch->some();
    LOAD_TILE(6, panel, line);
    LOAD_TILE(4, rows, row_bytes);
    MULTIPLY_TILES(0, 4, 6);
    if (V == 2) {
      LOAD_TILE(7, panel + W, line);
      MULTIPLY_TILES(1, 4, 7);
    }
    if (R == 32) {
      LOAD_TILE(5, rows + 16 * stride, row_bytes);
      MULTIPLY_TILES(2, 5, 6);
      if (V == 2) MULTIPLY_TILES(3, 5, 7);
    }
  }
  STORE_TILE(0, totals, out);
  if (V == 2) STORE_TILE(1, totals + W, out);
  if (R == 32) STORE_TILE(2, lower, out);
  if (R == 32 && V == 2) STORE_TILE(3, lower + W, out);
}
#else
struct Tiles {};
#endif

template <int V>
static void tiles(i64 count, const E* rows, i64 stride, const E* panel, i64 k_count, float* totals,
                  i64 totals_stride, i64 ahead, bool first, Fetches* fetch) {
  i64 i = 0;
#ifdef MATRIX_UNIT
  const i64 whole = k_count / 16 * 16, rest = k_count - whole;
  for (i64 r; has_matrix_unit() && whole && count - i >= 16; i += r) {
    r = count - i >= 32 ? 32 : 16;
    const E* from = rows + i * stride;
    float* to = totals + i * totals_stride;
    if (r == 32) multiply_tiles<32, V>(from, stride, panel, whole, to, totals_stride, ahead, first, fetch);
    else multiply_tiles<16, V>(from, stride, panel, whole, to, totals_stride, ahead, first, fetch);
    for (i64 j = 0; rest && j < r; j += 8)
      micro<8, V>(from + j * stride + whole, stride, panel + whole * V * W, rest, to + j * totals_stride, totals_stride,
                  0, false, fetch);
  }
#endif
  auto some = [&](auto r) __attribute__((always_inline)) {
    constexpr int R = decltype(r)::value;
    for (; i + R <= count; i += R)
      micro<R, V>(rows + i * stride, stride, panel, k_count, totals + i * totals_stride, totals_stride, ahead, first,
                  fetch);
  };
  some(::count<MR>{});
  some(::count<8>{});
  some(::count<4>{});
  some(::count<2>{});
  some(::count<1>{});
}

static void tiles_of(bool wide, i64 count, const E* rows, i64 stride, const E* panel, i64 k_count, float* totals,
                     i64 totals_stride, i64 ahead, bool first, Fetches* fetch) {
  if (wide) tiles<NV>(count, rows, stride, panel, k_count, totals, totals_stride, ahead, first, fetch);
  else tiles<1>(count, rows, stride, panel, k_count, totals, totals_stride, ahead, first, fetch);
}

// Rows a multiple of half a page apart fight for the same cache lines: they are copied, unless
// there are as many of those as rows.
INLINE bool conflicts(i64 stride) { return L1_WAYS < MR && stride % 512 == 0; }
static void copy_near(const E* rows, i64 stride, i64 count, i64 k_count, E* near) {
  for (i64 i = 0; i < count; i++) {
    i64 j = 0;
    for (; j + 16 <= k_count; j += 16) __builtin_memcpy(near + i * NEAR + j, rows + i * stride + j, 64);
    for (; j < k_count; j++) near[i * NEAR + j] = rows[i * stride + j];
  }
}

// Groups `begin` to `end` of W columns of x[M][K]: packed[panel][k][column], missing ones zero.
extern "C" __attribute__((visibility("hidden")))
void NAME(pack_columns)(const E* x, i64 row_stride, E* packed, i64 M, i64 K, i64 begin, i64 end) {
  for (i64 unit = begin; unit < end; unit++) {
    const i64 m0 = unit * W, panel = unit / NV, left = M - panel * PANEL, width = left > W ? PANEL : W;
    E* to = packed + panel * PANEL * K + unit % NV * W;
    for (i64 k = 0; k < K; k += W) {
      VI r[W];
      for (int i = 0; i < W; i++) {
        r[i] = VI{};
        if (m0 + i >= M) continue;
        const int* from = (const int*)(x + (m0 + i) * row_stride + k);
        if (k + W <= K) __builtin_memcpy(&r[i], from, sizeof(VI));
        else for (int l = 0; l < W && k + l < K; l++) r[i][l] = from[l];
      }
      transpose<W>(r);
      for (int i = 0; i < W && k + i < K; i++) __builtin_memcpy(to + (k + i) * width, &r[i], sizeof(VI));
    }
  }
}

// Hands out a panel of totals[n][m], turned: rows m to M, at most `width`.
static void turn_out(const float* totals, i64 width, i64 m, i64 M, i64 n0, i64 columns, const Results* results,
                     const void* context) {
  alignas(64) float out[W * BLOCK];
  for (i64 part = 0; part < width && m + part < M; part += W) {
    for (i64 n = 0; n < columns; n += W) turn(totals + n * width + part, width, out + n, BLOCK);
    for (i64 i = 0; i < W && m + part + i < M; i++) results->finish(context, m + part + i, n0, columns, out + i * BLOCK);
  }
}

// out[m][n] = sum over k of x[m][k] * w[n][k], x packed by pack_columns. Units are blocks of
// BLOCK rows of w by `m_block` rows of x (a multiple of PANEL, at most PANELS of them), which stay in
// the second-level cache for all of w; along k, a chunk of w stays near for all panels.
extern "C" __attribute__((visibility("hidden")))
void NAME(product)(const E* packed, const E* w, i64 ldw, i64 M, i64 N, i64 K, i64 m_block, i64 begin, i64 end,
                   const Results* results, const void* context) {
  alignas(64) float totals[PANELS * BLOCK * PANEL];
  alignas(64) E near[BLOCK * NEAR];
  const Tiles matrix_unit;
  const bool copies = conflicts(ldw);
  Fetches fetch;
  const i64 n_blocks = (N + BLOCK - 1) / BLOCK;
  for (i64 unit = begin; unit < end; unit++) {
    const i64 n0 = unit % n_blocks * BLOCK, rows = N - n0 < BLOCK ? N - n0 : BLOCK;
    const i64 m0 = unit / n_blocks * m_block, m1 = M - m0 < m_block ? M : m0 + m_block;
    const E* block = w + n0 * ldw;
    for (i64 k = 0; k < K; k += KB) {
      const i64 k_count = K - k < KB ? K - k : KB;
      i64 ahead = k + KB < K ? KB : n0 + 2 * BLOCK <= N ? BLOCK * ldw - k : 0;
      const E* from = block + k;
      i64 stride = ldw;
      if (copies) {
        copy_near(from, ldw, rows, k_count, near);
        if (ahead) fetch.rows = {(const char*)(from + ahead), ldw * (i64)sizeof(E), rows, KB * sizeof(E)};
        from = near, stride = NEAR, ahead = 0;
      }
      for (i64 m = m0; m < m1; m += PANEL) {
        const bool full = M - m > W, last = k + KB >= K;
        if (last) fetch.await(results, context, m, M - m < PANEL ? M - m : PANEL, n0, rows);
        tiles_of(full, rows, from, stride, packed + m * K + k * (full ? PANEL : W), k_count,
                 totals + (m - m0) * BLOCK, full ? PANEL : W, m == m0 ? ahead : 0, k == 0, &fetch);
        // At once: results are written while others are worked on.
        if (last) turn_out(totals + (m - m0) * BLOCK, full ? PANEL : W, m, M, n0, rows, results, context);
      }
    }
  }
}

// The first `count` elements there, at most a vector; the others are not read.
INLINE VI first_of(const E* from, i64 count) {
  return (VI)__builtin_ia32_loadups512_mask((const float*)from, VF{}, (unsigned short)((1u << count) - 1));
}

// The same for few rows of x: vectors along k, nothing packed. Units are groups of W rows of w.
// Rows of x from `some` on are the last of those again.
template <int R, int C>
INLINE void dots(const E* w, i64 ldw, const E* x, i64 ldx, i64 K, float* out, i64 some = C) {
  const E* row[C];
  _Pragma("GCC unroll 16") for (int j = 0; j < C; j++) row[j] = x + (j < some ? j : some - 1) * ldx;
  VF c[R * C];
  _Pragma("GCC unroll 16") for (int i = 0; i < R * C; i++) c[i] = VF{};
  i64 k = 0;
  auto one = [&](auto fetch) __attribute__((always_inline)) {
    VF b[C];
    _Pragma("GCC unroll 16") for (int j = 0; j < C; j++) b[j] = fetch(row[j] + k);
    _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) {
      VF a = fetch(w + i * ldw + k);
      _Pragma("GCC unroll 16") for (int j = 0; j < C; j++) c[i * C + j] = multiply_add(c[i * C + j], a, b[j], E{});
    }
  };
  for (; k + W <= K; k += W)
    one([&](const E* from) __attribute__((always_inline)) {
      VF v;
      __builtin_memcpy(&v, from, sizeof v);
      return v;
    });
  if (k < K)
    one([&](const E* from) __attribute__((always_inline)) { return (VF)first_of(from, K - k); });
  if constexpr (R * C == W) {
    VI r[W];
    _Pragma("GCC unroll 16") for (int i = 0; i < W; i++) r[i] = (VI)c[i];
    transpose<W>(r);
    _Pragma("GCC unroll 4") for (int d = W / 2; d; d /= 2)
      _Pragma("GCC unroll 16") for (int i = 0; i < d; i++) r[i] = (VI)((VF)r[i] + (VF)r[i + d]);
    __builtin_memcpy(out, &r[0], sizeof(VI));
  } else {
    for (int i = 0; i < R * C; i++) out[i] = across_sum(c[i]);
  }
}

template <int C>
static void dot_columns(const E* w, i64 ldw, const E* x, i64 ldx, i64 K, i64 rows, float* totals, i64 some = C) {
  constexpr int R = W / C;
  i64 i = 0;
  for (; i + R <= rows; i += R) {
    alignas(64) float part[W];
    dots<R, C>(w + i * ldw, ldw, x, ldx, K, part, some);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) totals[c * W + i + r] = part[r * C + c];
  }
  for (; i < rows; i++) {
    float part[C];
    dots<1, C>(w + i * ldw, ldw, x, ldx, K, part, some);
    for (int c = 0; c < C; c++) totals[c * W + i] = part[c];
  }
}

// The same where K is small, so that sums across lanes would cost more than the products: W rows of w
// are turned in registers. R rows of x: totals[m][n].
template <int R>
static __attribute__((noinline)) void turned(const E* w, i64 ldw, const E* x, i64 ldx, i64 K, i64 rows, float* totals) {
  constexpr int CHAINS = R <= 4 ? 2 : 1;  // as many as there are registers: short sums err less
  VF c[CHAINS][R];
  _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS * R; i++) c[i / R][i % R] = VF{};
  auto block = [&](i64 k, i64 steps) __attribute__((always_inline)) {
    VI r[W];
    _Pragma("GCC unroll 16") for (int i = 0; i < W; i++) r[i] = first_of(w + i * ldw + k, i < rows ? steps : 0);
    transpose<W>(r);
    _Pragma("GCC unroll 16") for (int i = 0; i < W; i++)
      if (i < steps)
        _Pragma("GCC unroll 16") for (int j = 0; j < R; j++)
          c[i % CHAINS][j] = multiply_add(c[i % CHAINS][j], x[j * ldx + k + i], (VF)r[i]);
  };
  i64 k = 0;
  for (; k + W <= K; k += W) block(k, W);
  if (k < K) block(k, K - k);
  _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) {
    const VF total = CHAINS == 2 ? c[0][i] + c[CHAINS - 1][i] : c[0][i];
    __builtin_memcpy(totals + i * W, &total, sizeof total);
  }
}

extern "C" __attribute__((visibility("hidden")))
void NAME(few_rows)(const E* x, i64 ldx, const E* w, i64 ldw, i64 M, i64 N, i64 K, i64 begin, i64 end,
                    const Results* results, const void* context) {
  for (i64 unit = begin; unit < end; unit++) {
    const i64 n0 = unit * W, rows = N - n0 < W ? N - n0 : W;
    const E* from = w + n0 * ldw;
    alignas(64) float totals[8 * W];
    for (i64 m = 0, columns; m < M; m += columns) {
      columns = M - m >= 4 ? 4 : M - m;
      const E* at = x + m * ldx;
      if (K <= TURNED_K && M - m >= 8) turned<8>(from, ldw, at, ldx, K, rows, totals), columns = 8;
      else if (K <= TURNED_K && columns == 4) turned<4>(from, ldw, at, ldx, K, rows, totals);
      else if (columns >= 3) dot_columns<4>(from, ldw, at, ldx, K, rows, totals, columns);
      else if (columns == 2) dot_columns<2>(from, ldw, at, ldx, K, rows, totals);
      else dot_columns<1>(from, ldw, at, ldx, K, rows, totals);
      for (i64 c = 0; c < columns; c++) results->finish(context, m + c, n0, rows, totals + c * W);
    }
  }
}

// The last columns of a chunk, one after the other.
static void take_columns(const E* panel, i64 k_count, i64 count, E (*columns)[KB]) {
  for (i64 c = 0; c < FEW; c++)
    for (i64 k = 0; k < k_count; k++) columns[c][k] = c < count ? panel[k * W + c] : E{};
}

// totals[i][c] (+)= the dot product of row i and column c.
static void dot_rows(i64 count, const E* rows, i64 stride, const E (*columns)[KB], i64 column_count, i64 k_count,
                     float* totals, bool first) {
  for (i64 i = 0; i < count; i += W) {
    const i64 some = count - i < W ? count - i : W;
    alignas(64) float part[FEW * W];
    const E* from = rows + i * stride;
    if (column_count == 1) dot_columns<1>(from, stride, columns[0], KB, k_count, some, part);
    else if (column_count == 2) dot_columns<2>(from, stride, columns[0], KB, k_count, some, part);
    else dot_columns<4>(from, stride, columns[0], KB, k_count, some, part);
    for (i64 r = 0; r < some; r++)
      for (i64 c = 0; c < column_count; c++) {
        float& total = totals[(i + r) * WIDE + c];
        total = first ? part[c * W + r] : total + part[c * W + r];
      }
  }
}

// out[m][n] = sum over k of a[m][k] * b[k][n], columns packed on the way. Units are blocks of
// `block` rows (a multiple of MR, at most ROWS) by WIDE columns, the rows first. With `b`, lines
// of `b_bytes` with elements of `b_item`, the next chunk is fetched while one is worked on.
extern "C" __attribute__((visibility("hidden")))
void NAME(wide)(const E* a, i64 lda, i64 M, i64 N, i64 K, i64 block, i64 begin, i64 end, Pack pack,
                const Results* results, const void* context, const char* b, i64 b_bytes, i64 b_item) {
  alignas(64) E chunk[WIDE * KB];
  alignas(64) E last[FEW][KB];
  alignas(64) E near[MR * 4 * NEAR];
  const Tiles matrix_unit;
  alignas(64) float totals[ROWS * WIDE];
  const bool copies = conflicts(lda);
  const i64 blocks = (M + block - 1) / block;
  for (i64 unit = begin; unit < end; unit++) {
    const i64 n0 = unit / blocks * WIDE, m0 = unit % blocks * block;
    const i64 rows = M - m0 < block ? M - m0 : block, columns = N - n0 < WIDE ? N - n0 : WIDE;
    const i64 few = columns % W <= FEW ? columns % W : 0, whole = columns - few;
    for (i64 k = 0; k < K; k += KB) {
      const i64 k_count = K - k < KB ? K - k : KB;
      pack(context, k, k_count, n0, columns, chunk);
      if (few) take_columns(chunk + whole * k_count, k_count, few, last);
      Fetches fetch;
      if (b) {
        const bool more = k + KB < K;
        const i64 next_n = more ? n0 : (unit + 1) / blocks * WIDE, next_k = more ? k + KB : 0;
        if (more || (unit + 1 < end && next_n < N)) {
          const char* at = b + next_k * LINES * b_bytes + next_n * b_item;
          fetch.columns = {at, b_bytes, (K - next_k < KB ? K - next_k : KB) * LINES, columns * b_item};
        }
      }
      for (i64 i = 0; i < rows; i += MR * 4) {
        const i64 count = rows - i < MR * 4 ? rows - i : MR * 4;
        const E* from = a + (m0 + i) * lda + k;
        // What comes after these rows: the next ones, the first ones' next chunk, the next block's.
        i64 stride = lda, ahead = MR * 4 * lda;
        if (i + MR * 4 >= rows) ahead = k + KB < K ? KB - i * lda : m0 + rows < M ? (rows - i) * lda - k : 0;
        if (copies) {
          copy_near(from, lda, count, k_count, near);
          if (ahead) fetch.rows = {(const char*)(from + ahead), lda * (i64)sizeof(E), count, KB * sizeof(E)};
          from = near, stride = NEAR, ahead = 0;
        }
        if (k + KB >= K) fetch.await(results, context, m0 + i, count, n0, columns);
        for (i64 n = 0, width; n < whole; n += width) {
          width = panel_width(columns - n);
          tiles_of(width > W, count, from, stride, chunk + n * k_count, k_count, totals + i * WIDE + n, WIDE,
                   n ? 0 : ahead, k == 0, &fetch);
        }
        if (few) dot_rows(count, from, stride, last, few, k_count, totals + i * WIDE + whole, k == 0);
        // At once: they are near, and writing results waits for memory while others are worked on.
        if (k + KB >= K)
          for (i64 m = i; m < i + count; m++) results->finish(context, m0 + m, n0, columns, totals + m * WIDE);
      }
    }
  }
}
