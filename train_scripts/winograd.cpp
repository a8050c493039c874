// Winograd's transforms of 3x3 convolutions, F(4x4, 3x3) of Lavin and Gray (arXiv:1509.09308), for winograd.py.
// A map is (B, H, W, C) float32, C a multiple of 8. Planes are (36, tiles, C), `stride` floats apart: 6x6 numbers for each 4x4
// of the map. The polynomials are evaluated at 0, p, -p, q, -q and infinity; winograd.py says which p (P) and q (Q).
#include <cstdint>
#include <vector>

typedef float Eight __attribute__((vector_size(32)));  // channels at a time
typedef float Sixteen __attribute__((vector_size(64)));

constexpr float p = P, q = Q, p2 = p * p, q2 = q * q;

// Each transform of a tile is one of its columns and rows, from S numbers `x` to R numbers `y`.
struct Input {  // the tile's 6x6 pixels, which begin one before it -> 6x6
  static constexpr int S = 6, R = 6, offset = -1;
  template <class T> static inline void line(const T (&x)[6], T (&y)[6]) {
    T even = x[4] - q2 * x[2], odd = p * (x[3] - q2 * x[1]);
    y[1] = even + odd, y[2] = even - odd;
    even = x[4] - p2 * x[2], odd = q * (x[3] - p2 * x[1]);
    y[3] = even + odd, y[4] = even - odd;
    y[0] = x[4] - (p2 + q2) * x[2] + p2 * q2 * x[0];
    y[5] = x[5] - (p2 + q2) * x[3] + p2 * q2 * x[1];
  }
};
struct Output {  // 6x6 -> the tile's 4x4 pixels
  static constexpr int S = 6, R = 4, offset = 0;
  template <class T> static inline void line(const T (&x)[6], T (&y)[4]) {
    T even_p = x[1] + x[2], odd_p = p * (x[1] - x[2]), even_q = x[3] + x[4], odd_q = q * (x[3] - x[4]);
    y[0] = x[0] + even_p + even_q;
    y[1] = odd_p + odd_q;
    y[2] = p2 * even_p + q2 * even_q;
    y[3] = p2 * odd_p + q2 * odd_q + x[5];
  }
};
struct Gradient {  // the tile's 4x4 pixels -> 6x6, the transpose of Output
  static constexpr int S = 4, R = 6, offset = 0;
  template <class T> static inline void line(const T (&x)[4], T (&y)[6]) {
    T even = x[0] + p2 * x[2], odd = p * (x[1] + p2 * x[3]);
    y[1] = even + odd, y[2] = even - odd;
    even = x[0] + q2 * x[2], odd = q * (x[1] + q2 * x[3]);
    y[3] = even + odd, y[4] = even - odd;
    y[0] = x[0], y[5] = x[3];
  }
};

template <class T, class Channels>
static inline void transform(const float* const (&from)[T::S][T::S], float* const (&to)[T::R][T::R], int64_t c) {
  typedef Channels Numbers __attribute__((aligned(4)));  // in memory
  Channels half[T::R][T::S];
#pragma GCC unroll 6
  for (int s = 0; s < T::S; s++) {
    Channels x[T::S], y[T::R];
#pragma GCC unroll 6
    for (int i = 0; i < T::S; i++) x[i] = *(const Numbers*)(from[i][s] + c);
    T::line(x, y);
#pragma GCC unroll 6
    for (int r = 0; r < T::R; r++) half[r][s] = y[r];
  }
#pragma GCC unroll 6
  for (int r = 0; r < T::R; r++) {
    Channels y[T::R];
    T::line(half[r], y);
#pragma GCC unroll 6
    for (int i = 0; i < T::R; i++) *(Numbers*)(to[r][i] + c) = y[i];
  }
}

// All tiles of a map, to their planes or back. Pixels outside of it are zero, and what is written to them is dropped.
template <class T>
static void tiles(float* map, float* planes, int64_t B, int64_t H, int64_t W, int64_t C, int64_t stride) {
  constexpr bool to_planes = T::R == 6;
  constexpr int side = to_planes ? T::S : T::R;
  int64_t th = (H + 3) / 4, tw = (W + 3) / 4;
#pragma omp parallel
  {
    std::vector<float> outside(C);
    float *pixels[side][side], *numbers[6][6];
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < B * th * tw; tile++) {
      int64_t b = tile / (th * tw), y0 = tile / tw % th * 4 + T::offset, x0 = tile % tw * 4 + T::offset;
      for (int i = 0; i < side; i++)
        for (int j = 0; j < side; j++) {
          int64_t y = y0 + i, x = x0 + j;
          bool inside = y >= 0 && y < H && x >= 0 && x < W;
          pixels[i][j] = inside ? map + ((b * H + y) * W + x) * C : outside.data();
        }
      for (int i = 0; i < 36; i++) numbers[i / 6][i % 6] = planes + i * stride + tile * C;
      auto all_channels = [&](auto& from, auto& to) {
        int64_t c = 0;
        for (; c + 16 <= C; c += 16) transform<T, Sixteen>(from, to, c);
        if (c < C) transform<T, Eight>(from, to, c);
      };
      if constexpr (to_planes) all_channels(pixels, numbers);
      else all_channels(numbers, pixels);
    }
  }
}

extern "C" {
void input(float* map, float* planes, int64_t B, int64_t H, int64_t W, int64_t C, int64_t stride) {
  tiles<Input>(map, planes, B, H, W, C, stride);
}
void gradient(float* map, float* planes, int64_t B, int64_t H, int64_t W, int64_t C, int64_t stride) {
  tiles<Gradient>(map, planes, B, H, W, C, stride);
}
void output(float* map, float* planes, int64_t B, int64_t H, int64_t W, int64_t C, int64_t stride) {
  tiles<Output>(map, planes, B, H, W, C, stride);
}
}
