// The kernels of a step on a CPU: paged attention, elementwise operations, and products with fp32 and eight-bit
// weights. library.py compiles this file and mirrors the structs below. network.py, int8.py and products.py call the C
// functions at the end.
//
// A token's result must have the same bits whether the token is decoded or prefilled, alone or in a batch. Therefore
// the order in which a token's sums are added depends only on its position, not on the tokens that are computed
// together with it: vectors have 16 numbers on every processor, and masked keys add zeros.
//
// T is the type of stored activations, value embeddings and cache entries: float or bf16. Arithmetic is fp32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int LANES = 16;
// Number of floats in a register of the processor for which this file is compiled. A compiler keeps longer vectors in
// memory, which makes products several times slower, so a vector of LANES numbers consists of parts that fit into
// registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;

typedef float part __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t ipart __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

// One vector contains the scores of LANES keys, so the block size of the cache is a multiple of LANES.
struct vec {
  part parts[PARTS];
  float operator[](int i) const { return parts[i / WIDTH][i % WIDTH]; }
};
struct ivec {
  ipart parts[PARTS];
};

// The vector whose part i is f(i).
template <typename V, typename F>
inline V each(F f) {
  V y;
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; i++) y.parts[i] = f(i);
  return y;
}

#define ELEMENTWISE(V, OTHER, OP, PART) \
  inline V operator OP(V a, OTHER b) { return each<V>([&](int i) { return a.parts[i] OP PART; }); }
ELEMENTWISE(vec, vec, +, b.parts[i])
ELEMENTWISE(vec, vec, -, b.parts[i])
ELEMENTWISE(vec, vec, *, b.parts[i])
ELEMENTWISE(vec, float, +, b)
ELEMENTWISE(vec, float, -, b)
ELEMENTWISE(vec, float, *, b)
ELEMENTWISE(vec, float, /, b)
ELEMENTWISE(ivec, ivec, &, b.parts[i])
ELEMENTWISE(ivec, int32_t, +, b)
ELEMENTWISE(ivec, int32_t, -, b)
ELEMENTWISE(ivec, int32_t, <<, b)
ELEMENTWISE(ivec, int32_t, >>, b)
ELEMENTWISE(ivec, int32_t, >=, b)
ELEMENTWISE(ivec, int32_t, <=, b)
#undef ELEMENTWISE
inline vec &operator+=(vec &a, vec b) { return a = a + b; }

inline vec all(float value) {
  return each<vec>([&](int) { return value - part{}; });
}
inline ivec less(vec a, vec b) {
  return each<ivec>([&](int i) { return a.parts[i] < b.parts[i]; });
}
inline vec larger(vec a, vec b) {
  return each<vec>([&](int i) { return a.parts[i] > b.parts[i] ? a.parts[i] : b.parts[i]; });
}
inline vec choose(ivec which, vec a, vec b) {
  return each<vec>([&](int i) { return which.parts[i] ? a.parts[i] : b.parts[i]; });
}
inline ivec truncated(vec a) {
  return each<ivec>([&](int i) { return __builtin_convertvector(a.parts[i], ipart); });
}
inline vec floats(ivec a) {
  return each<vec>([&](int i) { return __builtin_convertvector(a.parts[i], part); });
}

struct bf16 {
  uint16_t bits;
};

inline float load(const float *p) { return *p; }
inline float load(const bf16 *p) {
  uint32_t bits = uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(float *p, float value) { *p = value; }
inline void store(bf16 *p, float value) {  // rounds to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  p->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vec load16(const float *p) {
  return each<vec>([&](int i) { return *reinterpret_cast<const part *>(p + i * WIDTH); });
}
inline vec load16(const bf16 *p) {
  typedef uint16_t half __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
  typedef uint32_t wide __attribute__((vector_size(WIDTH * 4)));
  return each<vec>([&](int i) {
    wide bits = __builtin_convertvector(*reinterpret_cast<const half *>(p + i * WIDTH), wide) << 16;
    return reinterpret_cast<part &>(bits);
  });
}
inline ivec load16(const int32_t *p) {
  return each<ivec>([&](int i) { return *reinterpret_cast<const ipart *>(p + i * WIDTH); });
}
inline void store16(float *p, vec value) { std::memcpy(p, &value, sizeof value); }

inline float sum_of(vec v) {
  float total[LANES];
  std::memcpy(total, &v, sizeof total);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) total[i] += total[i + width];
  return total[0];
}
inline float largest_of(vec v) {
  float most = v[0];
  for (int i = 1; i < LANES; i++) most = std::max(most, v[i]);
  return most;
}

// e^x for x <= 0, accurate to 2 ulp; 0 for x < -87. The method is that of expf in the library Cephes: 2^n times a
// polynomial of the remainder.
inline vec exponential(vec x) {
  const vec least = all(-87.0f);
  const ivec dead = less(x, least);
  x = larger(x, least);
  ivec n = truncated(x * 1.44269504f - 0.5f);  // rounds to nearest, because x <= 0
  vec whole = floats(n);
  vec r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  vec y = p * r * r + r + 1.0f;
  const ivec exponent = (n + 127) << 23;
  vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return choose(dead, vec{}, y * power);
}

// Sum of squares of n numbers.
template <typename T>
inline float square_sum(const T *x, int n) {
  vec sums = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    vec v = load16(x + i);
    sums += v * v;
  }
  float total = sum_of(sums);
  for (; i < n; i++) total += load(x + i) * load(x + i);
  return total;
}

// A loop over fewer numbers than this uses one thread, because waking several threads takes longer than the loop.
constexpr int64_t PARALLEL_FROM = 1 << 14;

}  // namespace

extern "C" {

// The model's sizes.
struct Shape {
  int32_t dim, heads, kv_heads, head_dim, block_size, bf16_storage;
  float epsilon, score_scale, value_gate_scale;
};

// The batch of one step. A chunk's tokens begin at index first_token in the batch and at position start in its sequence.
struct Batch {
  int32_t tokens, chunks, threads;
  const int64_t *ids, *positions;         // (tokens,)
  const int32_t *first_token, *start;     // (chunks + 1,), (chunks,)
  const float *turns;                     // (context, head_dim) alternating cosines and negative sines
  float *scale;                           // (tokens,) 1 / sqrt(sum of squares of x + dim * epsilon)
  float *queries;                         // (tokens, heads, head_dim)
};

// The cache of one layer, and the places of the batch's tokens in it.
struct Layer {
  void *keys;                             // (blocks, kv_heads, head_dim, block_size)
  void *values;                           // (blocks, kv_heads, block_size, head_dim)
  const int64_t *slots;                   // (tokens,) block * block_size + offset
  const int32_t *tables;                  // block tables of all chunks, concatenated
  const int64_t *first_entry;             // (chunks,) index at which each chunk's table begins
  const void *value_table;                // (vocabulary, columns) value embeddings, or null
  int64_t value_columns;                  // columns of value_table
  int64_t qkv_columns;                    // columns of the product with the qkv weights
  int64_t window;                         // number of earlier tokens that a token sees
};
}

namespace {

// Rotates and normalizes the queries and keys in the product qkv, and writes keys and values to the cache.
template <typename T>
void prepare(const Shape &s, const Batch &b, const Layer &l, const T *qkv) {
  const int D = s.head_dim, pairs = D / 2, turned = s.heads + s.kv_heads;
  const int64_t kv_size = int64_t(s.block_size) * D;
#pragma omp parallel for num_threads(b.threads) schedule(static) if (int64_t(b.tokens) * l.qkv_columns >= PARALLEL_FROM)
  for (int t = 0; t < b.tokens; t++) {
    const T *row = qkv + int64_t(t) * l.qkv_columns;
    const float *turn = b.turns + b.positions[t] * D;
    const int64_t block = l.slots[t] / s.block_size, offset = l.slots[t] % s.block_size;
    for (int h = 0; h < turned; h++) {
      float y[256];
      const T *x = row + h * D;
      for (int i = 0; i < pairs; i++) {
        const float a = load(x + 2 * i), c = load(x + 2 * i + 1), cosine = turn[2 * i], sine = turn[2 * i + 1];
        y[2 * i] = a * cosine - c * sine;
        y[2 * i + 1] = a * sine + c * cosine;
      }
      const float norm = 1.0f / std::sqrt(square_sum(y, D) + D * s.epsilon);
      if (h < s.heads) {
        float *q = b.queries + (int64_t(t) * s.heads + h) * D;
        for (int i = 0; i < D; i++) q[i] = y[i] * (norm * s.score_scale);
      } else {
        T *k = static_cast<T *>(l.keys) + (block * s.kv_heads + h - s.heads) * kv_size + offset;
        for (int i = 0; i < D; i++) store(k + int64_t(i) * s.block_size, y[i] * norm);
      }
    }
    const float scale = b.scale[t];
    const T *v = row + turned * D, *gates = v + s.kv_heads * D;
    for (int h = 0; h < s.kv_heads; h++) {
      T *out = static_cast<T *>(l.values) + (block * s.kv_heads + h) * kv_size + offset * D;
      if (l.value_table) {
        const T *added = static_cast<const T *>(l.value_table) + b.ids[t] * l.value_columns + h * D;
        const float share = s.value_gate_scale / (1.0f + std::exp(-load(gates + h) * scale));
        for (int i = 0; i < D; i++) store(out + i, load(v + h * D + i) * scale + share * load(added + i));
      } else {
        for (int i = 0; i < D; i++) store(out + i, load(v + h * D + i) * scale);
      }
    }
  }
}

// Attention of ROWS query rows of one kv head over the keys [first, last) of one sequence. `first` is a multiple of LANES.
// Row r sees the keys from least[r] to most[r]. The scores of all keys are stored first, so a softmax needs no
// rescaling.
template <typename T, int D, int ROWS>
void attend_rows(const Shape &s, const T *keys, const T *values, const int32_t *table, int64_t first, int64_t last,
                 const float *const *q, const int64_t *least, const int64_t *most, T *const *out, float *scores,
                 int64_t stride) {
  constexpr int WIDE = D / LANES;
  const int64_t block_stride = int64_t(s.kv_heads) * s.block_size * D;
  vec top[ROWS];
  for (int r = 0; r < ROWS; r++) top[r] = all(-std::numeric_limits<float>::infinity());
  const int32_t numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const ivec lane = load16(numbers);
  for (int64_t at = first; at < last; at += LANES) {
    const T *k = keys + table[at / s.block_size] * block_stride + at % s.block_size;
    vec even[ROWS] = {}, odd[ROWS] = {};
    for (int d = 0; d < D; d += 2) {
      const vec k0 = load16(k + int64_t(d) * s.block_size), k1 = load16(k + int64_t(d + 1) * s.block_size);
      for (int r = 0; r < ROWS; r++) {
        even[r] += k0 * q[r][d];
        odd[r] += k1 * q[r][d + 1];
      }
    }
    for (int r = 0; r < ROWS; r++) {
      vec score = even[r] + odd[r];
      const ivec from = lane - int32_t(least[r] - at), to = lane - int32_t(most[r] - at);
      score = choose((from >= 0) & (to <= 0), score, all(-std::numeric_limits<float>::infinity()));
      top[r] = larger(top[r], score);
      store16(scores + r * stride + (at - first), score);
    }
  }
  float total[ROWS];
  for (int r = 0; r < ROWS; r++) {
    const float highest = largest_of(top[r]);
    vec sums = {};
    for (int64_t at = 0; at < last - first; at += LANES) {
      const vec share = exponential(load16(scores + r * stride + at) - highest);
      sums += share;
      store16(scores + r * stride + at, share);
    }
    total[r] = sum_of(sums);
  }
  vec mixed[ROWS][WIDE] = {};
  for (int64_t at = first; at < last; at += LANES) {
    const T *v = values + table[at / s.block_size] * block_stride + at % s.block_size * D;
    // The values behind the last key may be any numbers, even NaN, so they are not read.
    const int count = int(std::min<int64_t>(LANES, last - at));
    for (int j = 0; j < count; j++) {
      vec value[WIDE];
      for (int w = 0; w < WIDE; w++) value[w] = load16(v + j * D + w * LANES);
      for (int r = 0; r < ROWS; r++) {
        const float share = scores[r * stride + (at - first) + j];
        for (int w = 0; w < WIDE; w++) mixed[r][w] += value[w] * share;
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int w = 0; w < WIDE; w++) {
      const vec y = mixed[r][w] / total[r];
      for (int i = 0; i < LANES; i++) store(out[r] + w * LANES + i, y[i]);
    }
}

// Maximum number of query rows that are computed together, so that keys and values are loaded once for all these rows.
constexpr int MOST_ROWS = 4;

template <typename T, int D>
void attend(const Shape &s, const Batch &b, const Layer &l, T *out) {
  const int shared = s.heads / s.kv_heads;
  std::vector<int64_t> tiles(b.chunks + 1, 0);
  int64_t longest = 0;
  for (int c = 0; c < b.chunks; c++) {
    const int length = b.first_token[c + 1] - b.first_token[c];
    tiles[c + 1] = tiles[c] + (int64_t(length) * shared + MOST_ROWS - 1) / MOST_ROWS;
    longest = std::max<int64_t>(longest, b.start[c] + length);
  }
  const int64_t stride = (longest + 2 * LANES - 1) / LANES * LANES, work = tiles[b.chunks] * s.kv_heads;
#pragma omp parallel num_threads(b.threads) if (work * longest * D >= PARALLEL_FROM)
  {
    std::vector<float> scores(stride * MOST_ROWS);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < work; item++) {
      // The heads of one tile are processed one after another, because their keys and values are adjacent in memory.
      const int64_t tile = item / s.kv_heads, h = item % s.kv_heads;
      const int c = int(std::upper_bound(tiles.begin(), tiles.end(), tile) - tiles.begin()) - 1;
      const int64_t begin = (tile - tiles[c]) * MOST_ROWS;
      const int64_t end = std::min<int64_t>(begin + MOST_ROWS, int64_t(b.first_token[c + 1] - b.first_token[c]) * shared);
      const float *q[MOST_ROWS];
      T *y[MOST_ROWS];
      int64_t least[MOST_ROWS], most[MOST_ROWS];
      const int rows = int(end - begin);
      for (int r = 0; r < rows; r++) {
        const int64_t token = (begin + r) / shared, head = h * shared + (begin + r) % shared;
        most[r] = b.start[c] + token;
        least[r] = std::max<int64_t>(most[r] - l.window, 0);
        const int64_t place = (int64_t(b.first_token[c] + token) * s.heads + head) * D;
        q[r] = b.queries + place;
        y[r] = out + place;
      }
      const T *keys = static_cast<const T *>(l.keys) + h * s.block_size * D;
      const T *values = static_cast<const T *>(l.values) + h * s.block_size * D;
      const int32_t *table = l.tables + l.first_entry[c];
      const int64_t first = least[0] / LANES * LANES, last = most[rows - 1] + 1;
#define ATTEND(ROWS) \
  attend_rows<T, D, ROWS>(s, keys, values, table, first, last, q, least, most, y, scores.data(), stride)
      switch (rows) {
        case 1: ATTEND(1); break;
        case 2: ATTEND(2); break;
        case 3: ATTEND(3); break;
        default: ATTEND(4); break;
      }
#undef ATTEND
    }
  }
}

template <typename T>
bool attend_any(const Shape &s, const Batch &b, const Layer &l, T *out) {
  switch (s.head_dim) {
    case 16: attend<T, 16>(s, b, l, out); return true;
    case 32: attend<T, 32>(s, b, l, out); return true;
    case 64: attend<T, 64>(s, b, l, out); return true;
    case 128: attend<T, 128>(s, b, l, out); return true;
    default: return false;
  }
}

template <typename T>
void square(const Batch &b, T *x, int64_t n) {
#pragma omp parallel for num_threads(b.threads) schedule(static) if (n >= 4 * PARALLEL_FROM)
  for (int64_t i = 0; i < n; i++) store(x + i, load(x + i) * load(x + i));
}

// Finishes a transformer block and begins the next one. First x becomes x + y * dim / square_sum(x), where y is the
// result of an MLP whose input was not normalized. Then x becomes the next block's input, residual * x + skip * x0, and
// b.scale receives the scale of its norm. If y is null, the first change of x is left out. If x0 is null, the second
// change is left out. `kept`, unless null, receives x after the first change.
template <typename T>
void finish(const Shape &s, const Batch &b, T *x, const T *y, T *kept, const T *x0, float residual, float skip) {
  const int n = s.dim;
#pragma omp parallel for num_threads(b.threads) schedule(static) if (int64_t(b.tokens) * n >= PARALLEL_FROM)
  for (int t = 0; t < b.tokens; t++) {
    const int64_t at = int64_t(t) * n;
    T *row = x + at;
    if (y) {
      const float factor = n / (square_sum(row, n) + n * s.epsilon);
      for (int i = 0; i < n; i++) store(row + i, load(row + i) + load(y + at + i) * factor);
    }
    if (kept) std::memcpy(kept + at, row, n * sizeof(T));
    if (x0) {
      for (int i = 0; i < n; i++) store(row + i, load(row + i) * residual + load(x0 + at + i) * skip);
      b.scale[t] = 1.0f / std::sqrt(square_sum(row, n) + n * s.epsilon);
    }
  }
}

// A product with eight-bit weights computes TILE outputs of at most PRODUCT_ROWS rows together, so that a weight is
// converted to float only once for these rows.
constexpr int TILE = 2 * LANES;
constexpr int PRODUCT_ROWS = 8;

// Products of ROWS rows of x with a tile of weights. Each lane of a vector contains the weights of four successive
// inputs of one output. For every number of rows, sums are added in the order of the inputs.
template <int ROWS>
inline void multiply_tile(const float *x, const int8_t *weight, int64_t inputs, vec (*sums)[2]) {
  vec total[ROWS][2] = {};
  const int32_t *fours = reinterpret_cast<const int32_t *>(weight);
  for (int64_t k = 0; k < inputs; k += 4, fours += TILE)
    for (int i = 0; i < 2; i++) {
      const ivec four = load16(fours + i * LANES);
      const vec w0 = floats(four << 24 >> 24), w1 = floats(four << 16 >> 24);
      const vec w2 = floats(four << 8 >> 24), w3 = floats(four >> 24);
      for (int r = 0; r < ROWS; r++) {
        const float *from = x + r * inputs + k;
        total[r][i] += w0 * from[0];
        total[r][i] += w1 * from[1];
        total[r][i] += w2 * from[2];
        total[r][i] += w3 * from[3];
      }
    }
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < 2; i++) sums[r][i] = total[r][i];
}

// y = x times the transposed weight, each output times its scale. Then ReLU is applied if `relu` is set, and `other` is
// added unless it is null.
template <typename T>
void multiply_int8(const float *x, const int8_t *weight, const float *scale, const T *other, T *y, int64_t rows,
                   int64_t inputs, int64_t outputs, bool relu, int threads) {
  const int64_t tiles = (outputs + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * inputs * outputs >= 4 * PARALLEL_FROM)
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int8_t *w = weight + tile * TILE * inputs;
    const int64_t first = tile * TILE;
    const int count = int(std::min<int64_t>(TILE, outputs - first));
    for (int64_t row = 0; row < rows; row += PRODUCT_ROWS) {
      vec sums[PRODUCT_ROWS][2];
      const int together = int(std::min<int64_t>(PRODUCT_ROWS, rows - row));
      const float *from = x + row * inputs;
      switch (together) {
        case 1: multiply_tile<1>(from, w, inputs, sums); break;
        case 2: multiply_tile<2>(from, w, inputs, sums); break;
        case 3: multiply_tile<3>(from, w, inputs, sums); break;
        case 4: multiply_tile<4>(from, w, inputs, sums); break;
        case 5: multiply_tile<5>(from, w, inputs, sums); break;
        case 6: multiply_tile<6>(from, w, inputs, sums); break;
        case 7: multiply_tile<7>(from, w, inputs, sums); break;
        default: multiply_tile<8>(from, w, inputs, sums); break;
      }
      for (int r = 0; r < together; r++) {
        const int64_t at = (row + r) * outputs + first;
        for (int i = 0; i < count; i++) {
          float value = sums[r][i / LANES][i % LANES] * scale[first + i];
          if (relu) value = std::max(value, 0.0f);
          if (other) value += load(other + at + i);
          store(y + at + i, value);
        }
      }
    }
  }
}

// A product with fp32 weights computes FLOAT_TILE outputs of at most FLOAT_ROWS rows together. The sums of a row fill
// two registers, so all sums and a few weights fit into 16 registers.
constexpr int FLOAT_TILE = 2 * WIDTH;
constexpr int FLOAT_ROWS = 6;
// Number of rows whose inputs stay in the processor's cache while all weights are read.
constexpr int64_t ROWS_IN_CACHE = 48;

// Products of ROWS rows of x with a tile of fp32 weights. For every number of rows, sums are added in the order of the
// inputs, by fused multiply-adds.
template <int ROWS>
inline void multiply_float_tile(const float *x, const float *weight, int64_t inputs, float (*sums)[FLOAT_TILE]) {
  part total[ROWS][2] = {};
  for (int64_t k = 0; k < inputs; k++, weight += FLOAT_TILE) {
    const part w0 = *reinterpret_cast<const part *>(weight), w1 = *reinterpret_cast<const part *>(weight + WIDTH);
    for (int r = 0; r < ROWS; r++) {
      total[r][0] += w0 * x[r * inputs + k];
      total[r][1] += w1 * x[r * inputs + k];
    }
  }
  std::memcpy(sums, total, sizeof total);
}

// y = x times the transposed weight. Then ReLU is applied if `relu` is set, and `other` is added unless it is null.
void multiply_floats(const float *x, const float *weight, const float *other, float *y, int64_t rows, int64_t inputs,
                     int64_t outputs, bool relu, int threads) {
  const int64_t tiles = (outputs + FLOAT_TILE - 1) / FLOAT_TILE, blocks = (rows + ROWS_IN_CACHE - 1) / ROWS_IN_CACHE;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (rows * inputs * outputs >= 4 * PARALLEL_FROM)
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t tile = 0; tile < tiles; tile++) {
      const float *w = weight + tile * FLOAT_TILE * inputs;
      const int64_t first = tile * FLOAT_TILE, end = std::min(rows, (block + 1) * ROWS_IN_CACHE);
      const int count = int(std::min<int64_t>(FLOAT_TILE, outputs - first));
      for (int64_t row = block * ROWS_IN_CACHE; row < end; row += FLOAT_ROWS) {
        float sums[FLOAT_ROWS][FLOAT_TILE];
        const int together = int(std::min<int64_t>(FLOAT_ROWS, end - row));
        const float *from = x + row * inputs;
        switch (together) {
          case 1: multiply_float_tile<1>(from, w, inputs, sums); break;
          case 2: multiply_float_tile<2>(from, w, inputs, sums); break;
          case 3: multiply_float_tile<3>(from, w, inputs, sums); break;
          case 4: multiply_float_tile<4>(from, w, inputs, sums); break;
          case 5: multiply_float_tile<5>(from, w, inputs, sums); break;
          default: multiply_float_tile<6>(from, w, inputs, sums); break;
        }
        for (int r = 0; r < together; r++) {
          const int64_t at = (row + r) * outputs + first;
          for (int i = 0; i < count; i++) {
            float value = sums[r][i];
            if (relu) value = std::max(value, 0.0f);
            if (other) value += other[at + i];
            y[at + i] = value;
          }
        }
      }
    }
}

}  // namespace

#define TYPED(call_float, call_bf16) \
  if (s->bf16_storage)               \
    call_bf16;                       \
  else                               \
    call_float

extern "C" {

void nanochat_prepare(const Shape *s, const Batch *b, const Layer *l, const void *qkv) {
  TYPED(prepare(*s, *b, *l, static_cast<const float *>(qkv)), prepare(*s, *b, *l, static_cast<const bf16 *>(qkv)));
}

int nanochat_attend(const Shape *s, const Batch *b, const Layer *l, void *out) {
  bool known;
  TYPED(known = attend_any(*s, *b, *l, static_cast<float *>(out)),
        known = attend_any(*s, *b, *l, static_cast<bf16 *>(out)));
  return known ? 0 : 1;
}

void nanochat_square(const Shape *s, const Batch *b, void *x, int64_t n) {
  TYPED(square(*b, static_cast<float *>(x), n), square(*b, static_cast<bf16 *>(x), n));
}

void nanochat_finish(const Shape *s, const Batch *b, void *x, const void *y, void *kept, const void *x0, float residual,
                     float skip) {
  TYPED(finish(*s, *b, static_cast<float *>(x), static_cast<const float *>(y), static_cast<float *>(kept),
               static_cast<const float *>(x0), residual, skip),
        finish(*s, *b, static_cast<bf16 *>(x), static_cast<const bf16 *>(y), static_cast<bf16 *>(kept),
               static_cast<const bf16 *>(x0), residual, skip));
}

// x is always fp32. Weights are tiles of 32 outputs, (tiles, inputs / 4, 32, 4); zeros fill the last tile. `other` is null
// or has the shape of y.
void nanochat_multiply_int8(const float *x, const int8_t *weight, const float *scale, const void *other, void *y,
                            int64_t rows, int64_t inputs, int64_t outputs, int bf16_storage, int relu, int threads) {
  if (bf16_storage)
    multiply_int8(x, weight, scale, static_cast<const bf16 *>(other), static_cast<bf16 *>(y), rows, inputs, outputs, relu,
                  threads);
  else
    multiply_int8(x, weight, scale, static_cast<const float *>(other), static_cast<float *>(y), rows, inputs, outputs, relu,
                  threads);
}

// Number of outputs in a tile of nanochat_multiply's weights.
int nanochat_float_tile() { return FLOAT_TILE; }

// Weights are tiles of outputs, (tiles, inputs, FLOAT_TILE); zeros fill the last tile. `other` is null or has the shape of y.
void nanochat_multiply(const float *x, const float *weight, const float *other, float *y, int64_t rows, int64_t inputs,
                       int64_t outputs, int relu, int threads) {
  multiply_floats(x, weight, other, y, rows, inputs, outputs, relu, threads);
}
}
