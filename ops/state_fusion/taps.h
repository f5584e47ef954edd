// The 25 distinct taps of three 3x3 kernels with dilations 1, 3 and 5, as in
// taps.py. Torch-free.
#pragma once

namespace smd2 {

constexpr int kRadius = 5;  // reach of the most dilated kernel, in tokens
constexpr int kTaps = 25;

struct Offset {
  int dy, dx;
};

// Offset of a tap. The order: the 3x3 kernel of dilation 1 row by row, then
// those of dilations 3 and 5 without their centres.
#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr Offset
    tap_offset(int tap) {
  const int dilation = tap < 9 ? 1 : (tap < 17 ? 3 : 5);
  const int ring = tap < 17 ? tap - 9 : tap - 17;
  const int i = tap < 9 ? tap : (ring < 4 ? ring : ring + 1);
  return {dilation * (i / 3 - 1), dilation * (i % 3 - 1)};
}

}  // namespace smd2
