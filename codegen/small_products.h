// Products of small matrices, compiled for their sizes; on top of preamble.h.

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
