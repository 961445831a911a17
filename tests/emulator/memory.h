// Who has touched which memory, to tell what must be ordered and is not.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "emulator/clocks.h"

namespace vdcore::cuda::emulator {

// A touch of memory, by whom, and what those who do it know.
struct Touch {
  enum Kind { reads, reads_constant, writes } kind;
  Event by;
  Knowing knowing;
  bool async = false;  // through the proxy of TMA and wgmma
};

// Remembers the last write of every byte, and the reads since; fails where a touch is in no order with them.
class Touched {
 public:
  void touch(const void* p, size_t bytes, const Touch& touch);
  void clear();

 private:
  struct Cell {
    Event writer, reader;
    uint32_t readers = 0;   // number of the list of more readers, 0: none
    bool constant = false;  // some load takes it as never written
  };
  static constexpr uintptr_t kPage = 4096, kPiece = 16, kCell = 1;
  using Parts = std::array<Cell, kPiece / kCell>;
  struct Piece {
    Cell whole;
    uint32_t parts = 0;  // number of its parts, once it was not touched as a whole
  };
  using Page = std::unique_ptr<Piece[]>;

  Piece& piece_at(uintptr_t address);
  void touch(Cell& cell, const Touch& touch);
  void read(Cell& cell, const Touch& touch);
  void check_writer(const Cell& cell, const Touch& touch) const;
  void check_reader(const Event& reader, const Touch& touch) const;

  std::unordered_map<uintptr_t, Page> pages_;
  uintptr_t last_number_ = 0;
  Piece* last_ = nullptr;
  std::vector<Parts> parts_{1};
  std::vector<std::vector<Event>> readers_{1};
  std::vector<uint32_t> free_readers_;
};

}  // namespace vdcore::cuda::emulator
