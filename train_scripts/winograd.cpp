// Winograd's transforms of 3x3 convolutions, F(4x4, 3x3) of Lavin and Gray (arXiv:1509.09308), for winograd.py.
// A map is (B, H, W, C) float32. Planes are (36, tiles, C), `stride` floats apart: 6x6 numbers for each 4x4 of the map.
#include <cstdint>

typedef float Channels __attribute__((vector_size(32), aligned(4)));  // eight at a time

struct Input {  // the tile's 6x6 pixels, which begin one before it -> 6x6
  static constexpr int R = 6, S = 6, offset = -1;
  static constexpr float P[6][6] = {{4, 0, -5, 0, 1, 0}, {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                    {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
};
struct Output {  // 6x6 -> the tile's 4x4 pixels
  static constexpr int R = 4, S = 6, offset = 0;
  static constexpr float P[4][6] = {{1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
};
struct Gradient {  // the tile's 4x4 pixels -> 6x6, the transpose of Output
  static constexpr int R = 6, S = 4, offset = 0;
  static constexpr float P[6][4] = {{1, 0, 0, 0}, {1, 1, 1, 1}, {1, -1, 1, -1},
                                    {1, 2, 4, 8}, {1, -2, 4, -8}, {0, 0, 0, 1}};
};

// P @ tile @ P.T
template <class T> static inline void transform(const Channels (&in)[T::S][T::S], Channels (&out)[T::R][T::R]) {
  Channels half[T::R][T::S];
#pragma GCC unroll 6
  for (int r = 0; r < T::R; r++)
#pragma GCC unroll 6
    for (int s = 0; s < T::S; s++) {
      Channels sum = {};
#pragma GCC unroll 6
      for (int k = 0; k < T::S; k++) if (T::P[r][k] != 0) sum += T::P[r][k] * in[k][s];
      half[r][s] = sum;
    }
#pragma GCC unroll 6
  for (int r = 0; r < T::R; r++)
#pragma GCC unroll 6
    for (int s = 0; s < T::R; s++) {
      Channels sum = {};
#pragma GCC unroll 6
      for (int k = 0; k < T::S; k++) if (T::P[s][k] != 0) sum += T::P[s][k] * half[r][k];
      out[r][s] = sum;
    }
}

template <class T>
static void gather(const float* map, float* planes, int64_t B, int64_t H, int64_t W, int64_t C, int64_t stride) {
  int64_t th = (H + 3) / 4, tw = (W + 3) / 4;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < B * th; row++) {
    int64_t b = row / th, y0 = row % th * 4 + T::offset;
    for (int64_t tx = 0; tx < tw; tx++) {
      int64_t x0 = tx * 4 + T::offset;
      for (int64_t c = 0; c < C; c += 8) {
        Channels in[T::S][T::S], out[T::R][T::R];
        for (int i = 0; i < T::S; i++)
          for (int j = 0; j < T::S; j++) {
            int64_t y = y0 + i, x = x0 + j;
            if (y >= 0 && y < H && x >= 0 && x < W) in[i][j] = *(const Channels*)(map + ((b * H + y) * W + x) * C + c);
            else in[i][j] = Channels{};
          }
        transform<T>(in, out);
        float* to = planes + (row * tw + tx) * C + c;
        for (int i = 0; i < 6; i++)
          for (int j = 0; j < 6; j++) *(Channels*)(to + (i * 6 + j) * stride) = out[i][j];
      }
    }
  }
}

extern "C" {
void input(const float* map, float* planes, int64_t B, int64_t H, int64_t W, int64_t C, int64_t stride) {
  gather<Input>(map, planes, B, H, W, C, stride);
}
void gradient(const float* map, float* planes, int64_t B, int64_t H, int64_t W, int64_t C, int64_t stride) {
  gather<Gradient>(map, planes, B, H, W, C, stride);
}
void output(float* map, const float* planes, int64_t B, int64_t H, int64_t W, int64_t C, int64_t stride) {
  int64_t th = (H + 3) / 4, tw = (W + 3) / 4;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < B * th; row++) {
    int64_t b = row / th, y0 = row % th * 4;
    for (int64_t tx = 0; tx < tw; tx++)
      for (int64_t c = 0; c < C; c += 8) {
        Channels in[6][6], out[4][4];
        const float* from = planes + (row * tw + tx) * C + c;
        for (int i = 0; i < 6; i++)
          for (int j = 0; j < 6; j++) in[i][j] = *(const Channels*)(from + (i * 6 + j) * stride);
        transform<Output>(in, out);
        for (int i = 0; i < 4 && y0 + i < H; i++)
          for (int j = 0; j < 4 && tx * 4 + j < W; j++)
            *(Channels*)(map + ((b * H + y0 + i) * W + tx * 4 + j) * C + c) = out[i][j];
      }
  }
}
}
