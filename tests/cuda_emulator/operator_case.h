// Runs all launchers, forward and backward, on one map of random values.
// Buffers are exactly as large as they have to be, and outputs start as NaN;
// results must be finite. The conformance tests check whether they are correct.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "../../ops/structure_aware_ssm/cuda.h"

namespace smd2 {
namespace cuda {

class Case {
 public:
  Case(int64_t images, int64_t height, int64_t width, int64_t dim)
      : images_(images), height_(height), width_(width), dim_(dim) {}

  // Called with every buffer, if it is set.
  std::function<void(const void*, size_t)> on_allocation;

  // Returns the bytes of all results.
  template <typename T>
  std::vector<unsigned char> run() {
    using Acc = acc_t<T>;
    random_.seed(1);
    buffers_.clear();
    results_.clear();
    const int64_t tokens = images_ * height_ * width_, values = tokens * dim_;
    const int64_t channel_blocks = blocks_of(dim_, kLanes);
    const auto tiles =
        cut_for_device(sizeof(Acc) == 8, images_, height_, width_, dim_);

    ScanBackwardArgs<T> scan{};
    scan.u = input<T>(values);
    scan.delta = input<T>(values);
    scan.A = input<Acc>(dim_, -1);
    scan.B = input<Acc>(tokens);
    scan.bias = input<Acc>(dim_);
    scan.images = images_;
    scan.dim = dim_;
    scan.segments = sequence_segments(height_ * width_);
    backward_buffers(&scan);
    ScanForwardArgs<T> forward{};
    static_cast<ScanArgs<T>&>(forward) = scan;
    forward.h = result<Acc>(values);
    scan.grad_h = input<Acc>(values);
    scan_forward(forward, nullptr);
    scan_backward(scan, nullptr);

    const Acc* taps = input<Acc>(kTaps * dim_);
    const T* h = input<T>(values);
    fusion_forward(
        FusionForwardArgs<T>{{h, taps, tiles}, result<Acc>(values)}, nullptr);
    fusion_backward(
        FusionBackwardArgs<T>{
            {h, taps, tiles},
            input<Acc>(values),
            result<T>(values),
            result<Acc>(tiles.parts() * kTaps * dim_)},
        nullptr);

    scan.segments = image_segments(tiles);
    backward_buffers(&scan);
    const Acc* C = input<Acc>(tokens);
    const Acc* D = input<Acc>(dim_);
    ssm_forward(
        SsmForwardArgs<T>{scan, tiles, C, D, taps, result<T>(values)}, nullptr);
    scan.grad_y = input<T>(values);
    scan.D = D;
    scan.grad_D = result<Acc>(images_ * height_ * dim_);
    Acc* grad_h = result<Acc>(values);
    scan.grad_h = grad_h;
    ssm_backward(
        SsmBackwardArgs<T>{
            scan,
            tiles,
            C,
            taps,
            grad_h,
            result<Acc>(channel_blocks * tokens),
            result<Acc>(tiles.parts() * kTaps * dim_)},
        nullptr);
    return gather();
  }

 private:
  template <typename T>
  T* buffer(int64_t size) {
    buffers_.emplace_back(
        new unsigned char[size * sizeof(T)],
        std::default_delete<unsigned char[]>());
    if (on_allocation) {
      on_allocation(buffers_.back().get(), size * sizeof(T));
    }
    return reinterpret_cast<T*>(buffers_.back().get());
  }

  template <typename T>
  T* input(int64_t size, float scale = 1) {
    std::uniform_real_distribution<float> uniform(scale < 0 ? 0.f : -1.f, 1.f);
    T* values = buffer<T>(size);
    for (int64_t i = 0; i < size; i++) {
      values[i] = static_cast<T>(scale * uniform(random_));
    }
    return values;
  }

  template <typename T>
  T* scratch(int64_t size) {
    T* values = buffer<T>(size);
    for (int64_t i = 0; i < size; i++) {
      values[i] = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
    }
    return values;
  }

  template <typename T>
  T* result(int64_t size) {
    T* values = scratch<T>(size);
    results_.push_back([this, values, size] {
      for (int64_t i = 0; i < size; i++) {
        if (!std::isfinite(static_cast<double>(values[i]))) {
          throw std::runtime_error("a value was not written, or is not finite");
        }
      }
      const auto* bytes = reinterpret_cast<const unsigned char*>(values);
      gathered_.insert(gathered_.end(), bytes, bytes + size * sizeof(T));
    });
    return values;
  }

  template <typename T>
  void backward_buffers(ScanBackwardArgs<T>* a) {
    using Acc = acc_t<T>;
    const int64_t tokens = images_ * height_ * width_;
    const int64_t rows = images_ * a->segments.rows() * dim_;
    const int64_t workspace = workspace_size(a->segments, images_, dim_);
    a->workspace = scratch<Acc>(workspace);
    a->adjoint_workspace = scratch<Acc>(workspace);
    a->grad_u = result<T>(tokens * dim_);
    a->grad_delta = result<T>(tokens * dim_);
    a->grad_B = result<Acc>(blocks_of(dim_, kLanes) * tokens);
    a->grad_A = result<Acc>(rows);
    a->grad_bias = result<Acc>(rows);
  }

  std::vector<unsigned char> gather() {
    gathered_.clear();
    for (const auto& append : results_) {
      append();
    }
    return gathered_;
  }

  int64_t images_, height_, width_, dim_;
  std::mt19937 random_;
  std::vector<std::shared_ptr<unsigned char>> buffers_;
  std::vector<std::function<void()>> results_;
  std::vector<unsigned char> gathered_;
};

}  // namespace cuda
}  // namespace smd2
