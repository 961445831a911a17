// Frame attention's tiles of queries, one after another, on threads.
#pragma once

#include "common/threads.h"
#include "cpu/frame_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {

// Calls a Walk for every tile of queries: Walk(arguments, products, group, head, queries).run(), with the names
// Walk::Arguments and Walk::Products.
template <typename Walk>
struct QueryTilesJob {
  using Products = typename Walk::Products;
  const typename Walk::Arguments& a;
  TokenTiles tiles;

  explicit QueryTilesJob(const typename Walk::Arguments& args)
      : a(args), tiles(args.groups->queries, args.segment[0].q.size[3], Products::kQueryTile) {}

  void run(int64_t i) const {
    const TokenTiles::Item item = tiles.at(i);
    const int64_t D = a.segment[0].q.size[4];
    Arena count(nullptr);
    Products(D, count);
    Arena arena(scratch(count.used()));
    Products products(D, arena);
    Walk(a, products, item.group, item.head, item.tokens).run();
  }
  void run_all() {
    parallel_for(
        tiles.items(), a.threads, [](void* p, int64_t item) { static_cast<const QueryTilesJob*>(p)->run(item); }, this);
  }
};

}  // namespace vdcore::cpu::VDCORE_ISA
