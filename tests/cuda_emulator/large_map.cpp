// Where the kernels of the scan and the fusion read and write in a map of 2^33
// elements, which no test can allocate: the last lane of the last block is to
// find the last value. Prints what is wrong.
#include <simt_emulator.h>

#undef blockIdx
#undef threadIdx
struct Index {
  unsigned x, y, z;
};
static Index last_block{0, 0, 0};
static const Index last_lane{31, 0, 0};
#define blockIdx last_block
#define threadIdx last_lane

#include <cstdio>

#include "ops/structure_aware_ssm/ssm.cuh"

using namespace smd2;
using namespace smd2::cuda;

namespace {

constexpr int64_t kImages = 8, kSide = 2048, kDim = 256;
constexpr int64_t kTiles = 114, kTileWidth = 18, kBands = 32, kBandHeight = 64;
constexpr int64_t kLast = kImages * kSide * kSide * kDim - 1;
int wrong = 0;

void check(const char* what, int64_t actual, int64_t expected) {
  if (actual != expected) {
    std::printf(
        "%s: expected %lld, got %lld\n",
        what,
        static_cast<long long>(expected),
        static_cast<long long>(actual));
    wrong = 1;
  }
}

// Elements between two pointers, of which only one may be to real memory.
template <typename T>
int64_t distance(const T* from, const T* to) {
  return (reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from)) /
         static_cast<int64_t>(sizeof(T));
}

void check_tiles() {
  const int64_t parts = kImages * kBands * kTiles;
  last_block.x = static_cast<unsigned>(parts * kDim / kLanes - 1);
  const TilePlace place(
      Tiles{
          kImages,
          kSide,
          kSide,
          kDim,
          kTileWidth,
          kTiles,
          kBandHeight,
          kBands});
  check("end of the columns", place.x1, kSide);
  check("end of the rows", place.y1, kSide);
  const int64_t token = place.token(place.y1 - 1, place.x1 - 1);
  check("value of a tile", place.value(token), kLast);
  check(
      "partial sums of taps",
      place.value(static_cast<int64_t>(place.part) * kTaps),
      (parts - 1) * kTaps * kDim + kDim - 1);
}

void check_segments() {
  static float of_channels[kDim], memory[1];
  ScanArgs<float> a{};
  a.u = a.delta = a.B = a.workspace = memory;
  a.A = a.bias = of_channels;
  a.segments = Segments{kSide * kSide, kSide, kSide, kTiles, kTileWidth, 5};
  a.images = kImages;
  a.dim = kDim;
  last_block.x = static_cast<unsigned>(kImages * kSide * kDim / kLanes - 1);
  const RowPlace place(a.segments.rows, a.dim);
  const int64_t begin = a.segments.begin(place.row, kTiles - 1);
  const int64_t end = a.segments.end(place.row, kTiles - 1);
  const Channel<float> channel(a, place.image, begin, place.channel, true);
  const int64_t left = (end - begin - 1) * kDim;  // after the first token
  check("u", distance(a.u, channel.u) + left, kLast);
  check("delta", distance(a.delta, channel.steps.delta) + left, kLast);
  check("B", distance(a.B, channel.B) + end - begin - 1, kLast / kDim);
  const Carries<float> carries(a);
  const int64_t rows = kImages * kSide * kDim;
  const auto* maps = reinterpret_cast<const float*>(carries.rows);
  check("maps of rows", distance<float>(memory, maps), 2 * rows * kTiles);
  check(
      "states of rows",
      distance<float>(memory, carries.row_state),
      2 * rows * (kTiles + 1));
}

}  // namespace

int main() {
  check_tiles();
  check_segments();
  return wrong;
}
