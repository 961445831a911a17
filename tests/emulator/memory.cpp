#include "emulator/memory.h"

#include <string>

#include "emulator/emulator.h"

namespace vdcore::cuda::emulator {
namespace {

// The block of an event; what works on its own does so in shared memory, which no other cluster knows.
int64_t block_of(const Event& e) {
  const Position& at = position();
  const uint32_t cluster = at.cluster;
  return clocks().is_thread(e.agent) ? int64_t{e.cluster} * cluster + e.agent / at.threads : -1;
}

bool in_one_block(const Event& a, const Event& b) {
  const int64_t block_a = block_of(a), block_b = block_of(b);
  return block_a < 0 || block_b < 0 || block_a == block_b;
}

std::string name_of(const Event& e) {
  if (!clocks().is_thread(e.agent)) return clocks().unit_name(e.agent);
  return "thread " + std::to_string(e.agent % position().threads);
}

}  // namespace

void Touched::clear() {
  pages_.clear();
  last_ = nullptr;
  parts_.resize(1);
  readers_.resize(1);
  free_readers_.clear();
}

Touched::Piece& Touched::piece_at(uintptr_t address) {
  const uintptr_t number = address / kPage;
  if (!last_ || last_number_ != number) {
    Page& page = pages_[number];
    if (!page) page.reset(new Piece[kPage / kPiece]);
    last_ = page.get(), last_number_ = number;
  }
  return last_[address % kPage / kPiece];
}

void Touched::touch(const void* p, size_t bytes, const Touch& touch) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (uintptr_t at = begin; at < end; at = at / kPiece * kPiece + kPiece) {
    Piece& piece = piece_at(at);
    const uintptr_t first = at / kPiece * kPiece, until = std::min(end, first + kPiece);
    if (!piece.parts) {
      if (at == first && until == first + kPiece) {
        this->touch(piece.whole, touch);
        continue;
      }
      piece.parts = static_cast<uint32_t>(parts_.size());
      parts_.emplace_back();
      for (Cell& cell : parts_.back()) {
        cell = piece.whole;
        if (cell.readers) {
          readers_.push_back(readers_[piece.whole.readers]);
          cell.readers = static_cast<uint32_t>(readers_.size()) - 1;
        }
      }
    }
    const uint32_t parts = piece.parts;
    for (uintptr_t cell = (at - first) / kCell; cell < (until - first + kCell - 1) / kCell; ++cell)
      this->touch(parts_[parts][cell], touch);
  }
}

void Touched::touch(Cell& cell, const Touch& touch) {
  if (touch.kind != Touch::writes) return read(cell, touch);
  if (cell.constant) fail("a load by ld.global.nc of what the kernel writes");
  check_writer(cell, touch);
  check_reader(cell.reader, touch);
  if (cell.readers) {
    for (const Event& reader : readers_[cell.readers]) check_reader(reader, touch);
    readers_[cell.readers].clear();
    free_readers_.push_back(cell.readers);
    cell.readers = 0;
  }
  cell.writer = touch.by;
  cell.reader = {};
}

void Touched::read(Cell& cell, const Touch& touch) {
  if (touch.kind == Touch::reads_constant) {
    if (cell.writer.time) fail("a load by ld.global.nc of what the kernel writes");
    cell.constant = true;
    return;
  }
  check_writer(cell, touch);
  // Who knows of a read stands for it: what is ordered with the later one is with the earlier one.
  if (!cell.reader.time || touch.knowing.of(cell.reader)) {
    cell.reader = touch.by;
    return;
  }
  if (!cell.readers) {
    if (free_readers_.empty()) free_readers_.push_back(static_cast<uint32_t>(readers_.size())), readers_.emplace_back();
    cell.readers = free_readers_.back();
    free_readers_.pop_back();
  }
  for (Event& reader : readers_[cell.readers])
    if (touch.knowing.of(reader)) {
      reader = touch.by;
      return;
    }
  readers_[cell.readers].push_back(touch.by);
}

void Touched::check_writer(const Cell& cell, const Touch& touch) const {
  const Event& writer = cell.writer;
  if (!writer.time) return;
  if (!touch.knowing.of(writer)) {
    const bool one_block = in_one_block(writer, touch.by);
    if (touch.kind == Touch::writes)
      fail(!one_block ? "two blocks write one address"
                      : "two threads write one address, and nothing orders them: " + name_of(writer) + " and " +
                            name_of(touch.by));
    fail(!one_block ? "a load of what another block writes"
                    : "a read and a write of one address, and nothing orders them: " + name_of(touch.by) + " reads, " +
                          name_of(writer) + " has written");
  }
  if (!touch.async || !clocks().is_thread(writer.agent)) return;
  const uint32_t fence = clocks().fence_since(writer);
  if (!fence || !touch.knowing.of({writer.cluster, writer.agent, fence}))
    fail("shared memory that " + name_of(writer) + " wrote is " + (touch.kind == Touch::writes ? "written" : "read") +
         " by " + name_of(touch.by) + " without its fence.proxy.async");
}

void Touched::check_reader(const Event& reader, const Touch& touch) const {
  if (!reader.time || touch.knowing.of(reader)) return;
  fail(!in_one_block(reader, touch.by) ? "a load of what another block writes"
                                       : "a read and a write of one address, and nothing orders them: " +
                                             name_of(touch.by) + " writes, " + name_of(reader) + " has read");
}

}  // namespace vdcore::cuda::emulator
