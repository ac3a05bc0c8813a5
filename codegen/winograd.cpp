// Convolutions with kernels of 3x3 that go on by one pixel, with 16 multiplications for 4 results instead of
// 36 (Winograd's F(2x2, 3x3)): the input is cut into overlapping tiles of 4x4, each is added up to 16 numbers, and
// one matrix product for each of the 16 takes the place of the sums over channels. On top of products.cpp.
//
// The terms are only added, subtracted and (weights) halved before they are multiplied, so results are as
// exact as plain sums of the same tiles. A number that is not finite would spread over its tile, though, and large ones
// could overflow: where a result is not finite, these results are computed anew as plain sums. So are all where a weight
// has taps that are zero among others that are not: what such a tap meets would not cancel to the last digit, so that a
// masked kernel would see what it must not, and sums of nothing negative could be less than zero.
#ifndef PRODUCTS_OF_PAIRS

constexpr int TILE = 4, STEP = 2, SPOTS = TILE * TILE;  // numbers of a tile
constexpr int CHUNK = 32;                               // channels of a sum before it is added to a total
constexpr int TAPS = 9;
constexpr int MAX_TILES = 64;                           // of a block
constexpr int MAX_PATCH = (STEP * MAX_TILES + 2) * TILE;   // pixels that a block of one line of tiles reads
constexpr int MAX_PIXELS = MAX_TILES * STEP * STEP;

// A convolution, and how its tiles make blocks: several whole images, or whole lines of tiles of one image, or
// a part of one line. A unit is a block with `part` of the filters (a multiple of PANEL).
struct Winograd {
  i64 images, channels, height, width, filters, height_out, width_out, pad_h, pad_w;
  i64 block_images, block_rows, block_columns, part;
  bool by_channels, weights_by_channels;  // pixels (taps) whose channels lie beside each other, or planes of them

  i64 image_size() const { return channels * height * width; }
  i64 pixel_step() const { return by_channels ? channels : 1; }
  i64 channel_step() const { return by_channels ? 1 : height * width; }
};
// The last W filters are a narrow panel.
INLINE i64 width_of_panel(i64 filters_left) { return filters_left > W ? PANEL : W; }
INLINE i64 upto(i64 n, i64 step) { return (n + step - 1) / step * step; }
INLINE i64 at_most(i64 a, i64 b) { return a < b ? a : b; }
// Lines that are a multiple of a page apart would fight for the same cache lines.
INLINE i64 line_of(i64 numbers) { return upto(numbers, W) + W; }
INLINE i64 spot_of(i64 lines, i64 line) { return lines * line + W; }

// Numbers of the weights of one of the 16 products.
INLINE i64 weights_of_spot(i64 filters, i64 channels) { return upto(filters, W) * channels + W; }

INLINE VF load(const float* from) {
  VF v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
INLINE void store(float* to, VF v) { __builtin_memcpy(to, &v, sizeof v); }

// Up to W lines of up to W numbers, turned; what is missing is zero and not read.
INLINE void turn_some(const float* from, i64 step, i64 lines, i64 numbers, float* to) {
  if (lines >= W && numbers >= W) return turn(from, step, to, W);
  VI r[W];
  for (int i = 0; i < W; i++) r[i] = i < lines ? first_of(from + i * step, at_most(W, numbers)) : VI{};
  transpose<W>(r);
  __builtin_memcpy(to, r, sizeof r);
}

// Units are groups of W channels of PANEL filters: to[spot][panel][channel][filter]; `masked`[unit] is 1 where some taps
// of a filter and channel are zero and others are not, else 0.
extern "C" __attribute__((visibility("hidden")))
void winograd_weights_f32(const float* w, i64 filters, i64 channels, bool by_channels, float* to, float* masked, i64 begin,
                          i64 end) {
  alignas(64) float turned[W * TAPS * W];
  const i64 groups = (channels + W - 1) / W, spot = weights_of_spot(filters, channels), row = channels * TAPS;
  for (i64 unit = begin; unit < end; unit++) {
    const i64 panel = unit / groups, c0 = unit % groups * W, c_count = at_most(W, channels - c0);
    const i64 width = width_of_panel(filters - panel * PANEL);
    VI some = VI{};
    for (i64 half = 0; half < width; half += W) {
      const i64 f0 = panel * PANEL + half, f_count = filters - f0;
      // A vector of filters for each channel and tap, in the order in which those lie.
      const i64 lines = by_channels ? TAPS : 1, length = by_channels ? c_count : c_count * TAPS;
      const i64 tap_step = by_channels ? W : 1, channel_step = by_channels ? 1 : TAPS;
      for (i64 l = 0; l < lines; l++)
        for (i64 k = 0; k < length; k += W) {
          const float* from = w + f0 * row + (by_channels ? l * channels + c0 : c0 * TAPS) + k;
          turn_some(from, row, f_count, length - k, turned + (l * W + k) * W);
        }
      for (i64 c = 0; c < c_count; c++) {
        VF g[3][3], t[TILE][3];
        VI any = VI{}, all = VI{} - 1;
        for (int i = 0; i < TAPS; i++) {
          g[i / 3][i % 3] = load(turned + (c * channel_step + i * tap_step) * W);
          const VI zero = g[i / 3][i % 3] == VF{};
          any |= zero, all &= zero;
        }
        some |= any & ~all;
        _Pragma("GCC unroll 3") for (int j = 0; j < 3; j++) {
          const VF ends = g[0][j] + g[2][j];
          t[0][j] = g[0][j], t[1][j] = (ends + g[1][j]) * 0.5f, t[2][j] = (ends - g[1][j]) * 0.5f, t[3][j] = g[2][j];
        }
        float* out = to + panel * PANEL * channels + (c0 + c) * width + half;
        _Pragma("GCC unroll 4") for (int i = 0; i < TILE; i++, out += TILE * spot) {
          const VF ends = t[i][0] + t[i][2];
          store(out, t[i][0]), store(out + spot, (ends + t[i][1]) * 0.5f);
          store(out + 2 * spot, (ends - t[i][1]) * 0.5f), store(out + 3 * spot, t[i][2]);
        }
      }
    }
    masked[unit] = 0.f;
    for (int l = 0; l < W; l++)
      if (some[l]) masked[unit] = 1.f;
  }
}

// The part of an image that a block covers, in tiles and pixels of its input.
struct Area {
  i64 row, rows, column, columns;  // of tiles
  i64 patch_width() const { return STEP * columns + 2; }
  i64 patch_height() const { return STEP * rows + 2; }
};

// W channels (from `count` on: zeros) of the pixels of an area, to[row][column][channel]; pixels that are outside of the
// image are not written.
static void take_patch(const Winograd& g, const float* image, i64 count, const Area& a, float* to) {
  const i64 top = a.row * STEP - g.pad_h, left = a.column * STEP - g.pad_w;
  const i64 h0 = top < 0 ? 0 : top, h1 = at_most(g.height, top + a.patch_height());
  const i64 w0 = left < 0 ? 0 : left, w1 = at_most(g.width, left + a.patch_width());
  if (w0 >= w1) return;
  // Whole lines lie behind each other.
  const bool whole = w0 == 0 && w1 == g.width;
  alignas(64) float some[W * W];
  for (i64 h = h0; h < h1; h += whole ? h1 - h0 : 1) {
    const i64 length = whole ? (h1 - h0) * g.width : w1 - w0;
    i64 y = h - top, x = w0 - left;
    float* line = to + y * a.patch_width() * W;
    for (i64 n = 0; n < length; n += W) {
      const float* from = image + (h * g.width + w0 + n) * g.pixel_step();
      const i64 pixels = at_most(W, length - n);
      if (!g.by_channels) turn_some(from, g.channel_step(), count, pixels, some);
      for (i64 i = 0; i < pixels; i++) {
        if (!g.by_channels) store(line + x * W, load(some + i * W));
        else store(line + x * W, (VF)first_of(from + i * g.channels, at_most(W, count)));
        if (++x == w1 - left) x = w0 - left, line += a.patch_width() * W;
      }
    }
  }
}

// The 16 numbers of each tile: to[spot][tile][channel].
static void take_tiles(const Area& a, const float* patch, float* to, i64 line, i64 spot) {
  const i64 width = a.patch_width() * W;
  for (i64 r = 0; r < a.rows; r++)
    for (i64 c = 0; c < a.columns; c++, to += line) {
      const float* from = patch + r * STEP * width + c * STEP * W;
      VF t[TILE][TILE];
      _Pragma("GCC unroll 4") for (int j = 0; j < TILE; j++) {
        const VF d0 = load(from + j * W), d1 = load(from + width + j * W), d2 = load(from + 2 * width + j * W),
                 d3 = load(from + 3 * width + j * W);
        t[0][j] = d0 - d2, t[1][j] = d1 + d2, t[2][j] = d2 - d1, t[3][j] = d1 - d3;
      }
      float* out = to;
      _Pragma("GCC unroll 4") for (int i = 0; i < TILE; i++, out += TILE * spot) {
        store(out, t[i][0] - t[i][2]), store(out + spot, t[i][1] + t[i][2]);
        store(out + 2 * spot, t[i][2] - t[i][1]), store(out + 3 * spot, t[i][1] - t[i][3]);
      }
    }
}

// W filters' results of the tiles of an area, to[row][column][filter], lines of `to_line`; results outside of the image
// are left out.
// Whether all are finite.
static bool give_tiles(const Winograd& g, const Area& a, const float* from, i64 line, i64 spot, float* to, i64 width,
                       i64 to_line) {
  VF doubt = VF{};
  const i64 height = g.height_out - a.row * STEP, limit = g.width_out - a.column * STEP;
  for (i64 r = 0; r < a.rows; r++)
    for (i64 c = 0; c < a.columns; c++, from += line) {
      VF t[STEP][TILE];
      _Pragma("GCC unroll 4") for (int j = 0; j < TILE; j++) {
        const VF m0 = load(from + j * spot), m1 = load(from + (TILE + j) * spot), m2 = load(from + (2 * TILE + j) * spot),
                 m3 = load(from + (3 * TILE + j) * spot);
        t[0][j] = m0 + m1 + m2, t[1][j] = m1 - m2 - m3;
      }
      _Pragma("GCC unroll 2") for (int i = 0; i < STEP; i++) {
        if (STEP * r + i >= height) break;
        const VF y0 = t[i][0] + t[i][1] + t[i][2], y1 = t[i][1] - t[i][2] - t[i][3];
        float* out = to + ((STEP * r + i) * width + STEP * c) * to_line;
        store(out, y0);
        doubt += y0 * 0.f;
        if (STEP * c + 1 < limit) store(out + to_line, y1), doubt += y1 * 0.f;
      }
    }
  for (int l = 0; l < W; l++)
    if (doubt[l] != 0.f) return false;
  return true;
}

// Where the results of an area are: pixel `n` of its `height` lines of `width`, counted over all images from `first` on.
struct Places_of_results {
  i64 first, height, width, width_out;
  bool whole() const { return width == width_out; }  // lines lie behind each other
  i64 of(i64 n) const { return first + n / width * width_out + n % width; }
  // Hands out `count` results from n on.
  void give(const Results* results, const void* context, i64 m, i64 n, i64 count, const float* values) const {
    if (whole()) return results->finish(context, m, first + n, count, values);
    while (count > 0) {
      const i64 y = n / width, x = n - y * width, length = at_most(width - x, count);
      results->finish(context, m, first + y * width_out + x, length, values);
      n += length, values += length, count -= length;
    }
  }
};

// Up to WIDE pixels of an area as columns of a matrix, whose lines are what the taps meet there in every channel.
class Columns {
 public:
  Columns(const Winograd& g, const Area& a, i64 width, i64 n0, i64 count) : g_(g), vectors_(int(upto(count, W) / W)) {
    for (i64 l = 0; l < vectors_ * W; l++) {
      const i64 n = n0 + l, h = a.row * STEP + n / width - g.pad_h, v = a.column * STEP + n % width - g.pad_w;
      const int place = int((h * g.width + v) * g.pixel_step()), lane = int(l % W);
      Vector& at = vector_[l / W];
      at.place[lane] = place;
      if (lane == 0) at.second = 0, at.pieces = 1, at.in_first = 0xffff;
      if (l < count && place != (at.pieces == 1 ? at.place[0] : at.second) + lane)
        at.pieces++, at.second = place - lane, at.in_first &= (unsigned short)((1 << lane) - 1);
      for (int tap = 0; tap < TAPS; tap++) {
        const i64 y = h + tap / 3, z = v + tap % 3;
        const bool is = l < count && y >= 0 && y < g.height && z >= 0 && z < g.width;
        at.inside[tap] = (unsigned short)(is << lane | (lane ? at.inside[tap] : 0));
      }
    }
  }

  // Lines k0 to k0 + count, in the order of the weights, as panels; the last one is narrow where that will do.
  void pack(const float* image, i64 k0, i64 count, float* to) const {
    for (i64 k = 0, length; k < count; k += length) {
      const i64 at = k0 + k, channel = g_.weights_by_channels ? at % g_.channels : at / TAPS;
      const int tap = int(g_.weights_by_channels ? at / g_.channels : at % TAPS);
      const float* from = image + channel * g_.channel_step() + (tap / 3 * g_.width + tap % 3) * g_.pixel_step();
      const bool together = g_.by_channels && g_.weights_by_channels;
      length = together ? at_most(at_most(W, count - k), g_.channels - channel) : 1;
      for (int j = 0; j < vectors_; j++) {
        const i64 width = panel_of(j);
        float* line = to + j / NV * PANEL * count + k * width + j % NV * W;
        if (together) take_channels(vector_[j], from, vector_[j].inside[tap], length, line, width);
        else store(line, vector_[j].take(from, vector_[j].inside[tap]));
      }
    }
  }
  i64 panel_of(int vector) const { return vector / NV * NV + 1 < vectors_ ? PANEL : W; }
  int vectors() const { return vectors_; }

 private:
  // Pixels lie together in one or two pieces of lines, of which the other counts from `second`, or anywhere.
  struct Vector {
    VI place;
    int second, pieces;
    unsigned short in_first, inside[TAPS];
    VF take(const float* from, unsigned short lanes) const {
      if (pieces > 2) return __builtin_ia32_gathersiv16sf(VF{}, from, place, lanes, 4);
      const VF first = __builtin_ia32_loadups512_mask(from + place[0], VF{}, lanes & in_first);
      return __builtin_ia32_loadups512_mask(from + second, first, lanes & ~in_first);
    }
  };
  static void take_channels(const Vector& at, const float* from, unsigned lanes, i64 channels, float* to, i64 step) {
    VI r[W];
    for (int l = 0; l < W; l++) r[l] = lanes >> l & 1 ? first_of(from + at.place[l], channels) : VI{};
    transpose<W>(r);
    for (i64 c = 0; c < channels; c++) store(to + c * step, (VF)r[c]);
  }

  const Winograd& g_;
  int vectors_;
  Vector vector_[WIDE / W];
};

// Results of an area as plain sums, filters f0 to f1. Padding counts as zeros.
static __attribute__((noinline)) void give_plainly(const Winograd& g, const Area& a, const float* image, const float* w,
                                                   i64 f0, i64 f1, const Places_of_results& places,
                                                   const Results* results, const void* context) {
  constexpr int ROWS_AT_ONCE = 256;
  alignas(64) float chunk[WIDE * KB], totals[ROWS_AT_ONCE * WIDE];
  const i64 K = g.channels * TAPS, pixels = places.height * places.width;
  Fetches fetch;
  for (i64 n0 = 0; n0 < pixels; n0 += WIDE) {
    const i64 count = at_most(WIDE, pixels - n0);
    const Columns columns(g, a, places.width, n0, count);
    for (i64 f = f0; f < f1; f += ROWS_AT_ONCE) {
      const i64 rows = at_most(ROWS_AT_ONCE, f1 - f);
      for (i64 k0 = 0; k0 < K; k0 += KB) {
        const i64 k_count = at_most(KB, K - k0);
        columns.pack(image, k0, k_count, chunk);
        for (int j = 0; j < columns.vectors(); j += NV)
          tiles_of(columns.panel_of(j) > W, rows, w + f * K + k0, K, chunk + j * W * k_count, k_count, totals + j * W,
                   WIDE, 0, k0 == 0, &fetch);
      }
      if (!g.by_channels) {
        for (i64 m = 0; m < rows; m++) places.give(results, context, f + m, n0, count, totals + m * WIDE);
        continue;
      }
      for (i64 n = 0; n < count; n++) {
        float of_pixel[ROWS_AT_ONCE];
        for (i64 m = 0; m < rows; m++) of_pixel[m] = totals[m * WIDE + n];
        results->finish(context, places.of(n0 + n), f, rows, of_pixel);
      }
    }
  }
}

// Sums of `count` tiles for one of the 16 spots: out[tile][filter].
static void multiply_spot(const float* numbers, i64 line, i64 count, const float* weights, i64 filters, i64 K, float* out,
                          i64 out_line) {
  Fetches fetch;
  for (i64 k = 0; k < K; k += CHUNK) {
    const i64 k_count = at_most(CHUNK, K - k);
    for (i64 f = 0; f < filters; f += PANEL) {
      const i64 width = width_of_panel(filters - f);
      const float* from = weights + f * K + k * width;
      const i64 next = f + PANEL < filters ? K * PANEL : k + CHUNK < K ? CHUNK * PANEL - f * K : 0;
      if (next) fetch.columns = {(const char*)(from + next), 64, k_count * PANEL / W, 64};
      tiles_of(width > W, count, numbers + k, line, from, k_count, out + f, out_line, 0, k == 0, &fetch);
    }
  }
}

extern "C" __attribute__((visibility("hidden")))
void winograd_f32(const float* x, const float* w, const float* weights, const float* masked, float* room,
                  const Winograd* sizes, i64 begin, i64 end, const Results* results, const void* context) {
  const Winograd g = *sizes;
  alignas(64) float patch[MAX_PATCH * W];
  alignas(64) float pixels[(MAX_PIXELS + W) * W], turned[W * MAX_PIXELS];
  const i64 tile_rows = (g.height_out + 1) / STEP, tile_columns = (g.width_out + 1) / STEP;
  const i64 down = (tile_rows + g.block_rows - 1) / g.block_rows, across = (tile_columns + g.block_columns - 1) / g.block_columns;
  const i64 parts = (g.filters + g.part - 1) / g.part;
  const i64 line = line_of(g.channels), spot = spot_of(MAX_TILES, line);
  const i64 out_line = line_of(g.part), out_spot = spot_of(MAX_TILES, out_line);
  const i64 weights_spot = weights_of_spot(g.filters, g.channels);
  float* const taken = room;
  float* const sums = room + SPOTS * spot;
  float* const lines = sums + SPOTS * out_spot;  // of results, where these lie by channels
  const i64 part_line = upto(g.part, W);
  bool there = false;  // the numbers of this unit's tiles
  for (i64 unit = begin; unit < end; unit++) {
    if (unit % parts == 0) there = false;
    const i64 block = unit / parts, f0 = unit % parts * g.part, f1 = at_most(g.filters, f0 + g.part);
    const i64 image0 = block / (down * across) * g.block_images, images = at_most(g.block_images, g.images - image0);
    Area a;
    a.row = block / across % down * g.block_rows, a.rows = at_most(g.block_rows, tile_rows - a.row);
    a.column = block % across * g.block_columns, a.columns = at_most(g.block_columns, tile_columns - a.column);
    const i64 count = a.rows * a.columns;  // tiles of one image
    const i64 groups = (g.channels + W - 1) / W;
    bool plainly = false;
    for (i64 i = f0 / PANEL * groups; i < (f1 + PANEL - 1) / PANEL * groups; i++) plainly |= masked[i] != 0.f;
    if (!there && !plainly) {
      there = true;
      __builtin_memset(patch, 0, sizeof(float) * a.patch_height() * a.patch_width() * W);
      for (i64 i = 0; i < images; i++)
        for (i64 c = 0; c < g.channels; c += W) {
          take_patch(g, x + (image0 + i) * g.image_size() + c * g.channel_step(), g.channels - c, a, patch);
          take_tiles(a, patch, taken + i * count * line + c, line, spot);
        }
    }
    for (int i = 0; i < SPOTS && !plainly; i++)
      multiply_spot(taken + i * spot, line, images * count, weights + i * weights_spot + f0 * g.channels, f1 - f0, g.channels,
                    sums + i * out_spot, out_line);
    Places_of_results places = {0, at_most(STEP * a.rows, g.height_out - STEP * a.row),
                                at_most(STEP * a.columns, g.width_out - STEP * a.column), g.width_out};
    const i64 pixels_count = places.height * places.width;
    for (i64 i = 0; i < images; i++) {
      places.first = ((image0 + i) * g.height_out + STEP * a.row) * g.width_out + STEP * a.column;
      const float* image = x + (image0 + i) * g.image_size();
      const float* from = sums + i * count * out_line;
      if (plainly) {
        give_plainly(g, a, image, w, f0, f1, places, results, context);
        continue;
      }
      if (g.by_channels) {
        bool finite = true;
        for (i64 f = f0; f < f1 && finite; f += W)
          finite = give_tiles(g, a, from + f - f0, out_line, out_spot, lines + f - f0, places.width, part_line);
        if (!finite) give_plainly(g, a, image, w, f0, f1, places, results, context);
        for (i64 n = 0; n < pixels_count && finite; n++)
          results->finish(context, places.of(n), f0, f1 - f0, lines + n * part_line);
        continue;
      }
      for (i64 f = f0; f < f1; f += W) {
        if (!give_tiles(g, a, from + f - f0, out_line, out_spot, pixels, places.width, W)) {
          give_plainly(g, a, image, w, f, f1, places, results, context);
          break;
        }
        for (i64 n = 0; n < pixels_count; n += W) turn(pixels + n * W, W, turned + n, MAX_PIXELS);
        for (i64 m = 0; m < at_most(W, f1 - f); m++)
          places.give(results, context, f + m, 0, pixels_count, turned + m * MAX_PIXELS);
      }
    }
  }
}
#endif
