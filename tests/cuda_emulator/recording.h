// What the launch code in Python has launched, from a file: buffers with their
// contents before their first launch, and launches (tests/ops/emulator.py
// writes it). A program without Python can then run the same under sanitizers.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace smd2 {
namespace emulator {

class Recording {
 public:
  explicit Recording(const std::string& path)
      : file_(path, std::ios::binary), contents_(number()) {
    for (std::string& content : contents_) {
      content = text();
    }
    launches_.resize(static_cast<size_t>(number()));
    for (Launch& launch : launches_) {
      launch.name = text();
      launch.blocks = number();
      launch.warps = static_cast<int>(number());
      launch.shared_bytes = static_cast<size_t>(number());
      launch.members.resize(static_cast<size_t>(number()));
      for (Member& member : launch.members) {
        member.buffer = number();
        member.value = number();
      }
    }
    if (!file_) {
      throw std::runtime_error("recording: " + path + " is incomplete");
    }
  }

  // Memory of exactly the size of each buffer, so that sanitizers know its end.
  struct Memory {
    std::vector<std::unique_ptr<unsigned char[]>> buffers;
    std::vector<size_t> sizes;
  };
  Memory allocate() const {
    Memory memory;
    for (const std::string& content : contents_) {
      memory.buffers.emplace_back(new unsigned char[content.size()]);
      memory.sizes.push_back(content.size());
      std::memcpy(memory.buffers.back().get(), content.data(), content.size());
    }
    return memory;
  }

  void run(const Memory& memory) const {
    for (const Launch& launch : launches_) {
      std::vector<int64_t> argument;
      for (const Member& member : launch.members) {
        argument.push_back(member.value);
        if (member.buffer >= 0) {
          argument.back() +=
              reinterpret_cast<int64_t>(memory.buffers.at(member.buffer).get());
        }
      }
      emulator::launch(
          launch.name,
          launch.blocks,
          launch.warps,
          launch.shared_bytes,
          argument.data(),
          argument.size() * sizeof(int64_t));
    }
  }

 private:
  // A number, or if `buffer` is not negative, an offset into that buffer.
  struct Member {
    int64_t buffer, value;
  };
  struct Launch {
    std::string name;
    int64_t blocks;
    int warps;
    size_t shared_bytes;
    std::vector<Member> members;
  };

  int64_t number() {
    int64_t value = 0;
    file_.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }
  std::string text() {
    std::string value(static_cast<size_t>(number()), '\0');
    file_.read(value.data(), static_cast<std::streamsize>(value.size()));
    return value;
  }

  std::ifstream file_;
  std::vector<std::string> contents_;
  std::vector<Launch> launches_;
};

}  // namespace emulator
}  // namespace smd2
