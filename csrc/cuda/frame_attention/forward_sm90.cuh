// Spatial and video attention on Hopper: one block per tile of query tokens and head, which walks over the keys that
// the tile sees. Tensor memory accelerator, wgmma and warp specialisation as in FlashAttention-3 (Shah et al. 2024,
// arXiv:2407.08608); runs of visible frames instead of a mask.
//
// Roles. Two threads of warpgroup 0 load: the tile's queries once, then keys, and values, into rings of kStages tiles
// each, as soon as the consumers have released a stage. Each of the other warpgroups owns 64 query rows: scores S = Q
// K^T go to registers, probabilities P = 2^(S c - m c) stay there as the first operand of O += P V. The product for the
// next tile's scores is issued before the softmax of this one, and named barriers let the warpgroups take turns at the
// tensor cores, so that one's softmax runs under the other's products.
//
// Runs. A tile of queries never leaves a chunk of the mask, so all its rows see the same one or two runs of frames, and
// text. Where frames follow one another in memory, a run is one sequence of tokens. A tile that begins with a run and
// ends with it needs no mask but at its last, partial tile, whose other rows must not be read at all: what is not
// visible may be NaN, and 0 * NaN is NaN. So keys and values are seen through a tensor map of windows, channels x
// kKeys x tokens x heads x batch, in which window t holds the kKeys tokens from token t on: its second and third stride
// are the same. A box that starts kKeys - rows before window t holds, in its last rows, exactly the tokens [t, t +
// rows), and the accelerator fills those before with zeros, because there the window has not begun. Every tile, whole
// or not, is loaded so; any end will do, those of a prompt included. Where frames have gaps between them, tiles stay
// inside a frame, the map is channels x S x frames x heads x batch, and the rows before are zeros or tokens that the
// frame's tile before has had.
//
// Clusters. Two tiles of a chunk walk over the same keys under every mask. So two blocks on neighbouring
// multiprocessors take them side by side, each loads a half of every tile of keys and values, and the accelerator
// writes it to both: L2 is read half as often. A stage is free when the consumers of both blocks have released it.
//
// Plan. Work is 4 D FLOP per visible pair; an SM's tensor cores do 4,096 FLOP per cycle and its special units 16
// exponentials.
//   D = 128, 128 queries x 176 keys: 11.5 MFLOP, 2,816 cycles; 22.5 k exponentials, 1,408 cycles, and 2 x 650
//     instructions per scheduler. Keys and values are 90 KB, 32 B per cycle, or 16 in a cluster, from L2, where the
//     tiles of a head meet; from memory a head's keys come once. Shared memory: 32 KB of queries + 2 stages x 2 x 44 KB
//     = 208 KB, one block an SM. Registers of a consumer: S 88, P 44, O 64, which leaves 44 of 240.
//   D = 64, 192 queries x 128 keys: 6.3 MFLOP, 1,536 cycles, and as many for the exponentials: these are the bound.
//     Three warpgroups share what is loaded, 21 B per cycle; registers: S 64, P 32, O 32, which leaves 32 of 160.
//   D = 80, 96: as 128, with results of 96 channels: see plan_sm90.cuh. 65 to 80 channels multiply 5 steps of 16 for a
//     score, and then 96 for the result where 80 are needed: 9 % more of the tensor cores' time.
// Expected: 600 to 650 TFLOP/s at D = 128 and 440 to 500 at D = 64 on dense attention, the rates of FlashAttention-3,
// whose tiles these are, and 90 % of that per pair under a mask, where the last tile of a run is partly empty. None of
// it is measured yet.
#pragma once

#include "cuda/frame_attention/plan_sm90.cuh"

namespace vdcore::cuda {

// A length below 0 counts as 0.
VDCORE_DEVICE int32_t valid_of(const int64_t* lengths, int32_t sample) {
  if (!lengths) return INT32_MAX;
  return static_cast<int32_t>(larger(smaller(load_global<int64_t>(lengths + sample), INT32_MAX), 0));
}

// Where a tile of keys lies in its tensor map: in the last rows of a box.
struct KeyBox {
  const FrameSource* source;
  int32_t c1, c2, rows;
  VDCORE_DEVICE KeyBox(const FrameParameters& p, const KeyTile& tile, int32_t window)
      : source(tile.of_text ? &p.text : &p.video), c1(tile.rows - window), c2(tile.start), rows(tile.rows) {
    if (source->k_frame) {
      c2 = tile.start / source->k_frame;
      c1 += tile.start - c2 * source->k_frame;
    }
  }
};

template <class Plan>
VDCORE_DEVICE Cluster cluster_of(const FrameParameters& p) {
  if (Plan::kCluster == 1) return {1, 0};
  return {static_cast<uint32_t>(p.cluster), cluster_rank()};
}

// Halves of a tile of keys or values to `shared`, in boxes of kColumn channels: those of the block's rank, for both
// blocks of a cluster, or both halves.
template <class Plan, int kColumns, int kColumn>
VDCORE_DEVICE void load_keys(char* shared, const TensorMap* map, uint64_t* barrier, const Cluster& cluster,
                             const KeyBox& box, int32_t head, int32_t sample) {
  constexpr int kRow = 2 * kColumn;
  VDCORE_NO_UNROLL
  for (uint32_t half = cluster.rank; half < Plan::kCluster; half += cluster.size) {
    const int32_t first = static_cast<int32_t>(half) * Plan::kBoxRows;
    VDCORE_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      char* const to = shared + (column * Plan::kKeys + first) * kRow;
      if (cluster.size > 1)
        load_box_for_both(to, map, barrier, kReadAgain, kColumn * column, box.c1 + first, box.c2, head, sample);
      else
        load_box(to, map, barrier, kReadAgain, kColumn * column, box.c1 + first, box.c2, head, sample);
    }
  }
}

// What one thread loads: queries and keys, or values.
template <class Plan, bool kValues>
VDCORE_DEVICE void produce(const FrameParameters& p, const FrameShared<Plan>& shared, const Cluster cluster) {
  auto pipeline = kValues ? shared.of_values : shared.of_keys;
  auto queries = shared.of_queries;
  int slot = 0;
  const int32_t count = p.tiles.count() / static_cast<int32_t>(cluster.size);
  for (uint32_t i = block_index() / cluster.size; i < static_cast<uint32_t>(p.items); i += p.blocks / cluster.size) {
    const auto item = static_cast<int32_t>(i);
    const int32_t pair = item / count, sample = pair / p.heads, head = pair % p.heads;
    // The longest tiles first, to avoid a tail: text and the last frames of a causal mask see the most.
    const int32_t first = (count - 1 - item % count) * static_cast<int32_t>(cluster.size);
    const int32_t valid = valid_of(p.lengths, sample), text_valid = valid_of(p.text_lengths, sample);
    // The first tile of a cluster is live where any is, and all see the same.
    const KeyWalk<Plan::kKeys> walk(p.tiles.at(first, valid, text_valid), p.video.k_frame);

    if constexpr (!kValues) {
      const QueryTile tile = p.tiles.at(first + static_cast<int32_t>(cluster.rank), valid, text_valid);
      const FrameSource& own = tile.of_text ? p.text : p.video;
      queries.claim();
      const int64_t row = sample * p.rows + (tile.of_text ? p.text_row : p.video_row) + tile.start;
      const FrameItem item{row * p.heads + head, tile.rows, tile.live, walk.count, sample, head, tile.start};
      store_shared(shared.items + slot, item);
      slot ^= 1;
      queries.expect(walk.count ? Plan::kQueryBytes : 0);
      queries.next();
      const int32_t frame = own.q_frame ? tile.start / own.q_frame : 0;
      if (walk.count)
        unroll<Plan::kColumns>([&](int column) {
          load_box(shared.queries + column * Plan::kRows * 128, &own.q, queries.full, kReadOnce, 64 * column,
                   tile.start - frame * own.q_frame, frame, head, sample);
        });
    }
    VDCORE_NO_UNROLL
    for (int32_t j = 0; j < walk.count; ++j) {
      const KeyBox box(p, walk.at(j), Plan::kKeys);
      uint64_t* const full = pipeline.full + pipeline.stage;
      pipeline.claim();
      if constexpr (kValues) {
        pipeline.expect(Plan::kValueBytes);
        load_keys<Plan, Plan::kValueColumns, Plan::kValueColumn>(shared.values + pipeline.stage * Plan::kValueBytes,
                                                                 &box.source->v, full, cluster, box, head / p.ratio,
                                                                 sample);
      } else {
        store_shared(shared.key_rows + pipeline.stage, box.rows);
        pipeline.expect(Plan::kKeyBytes);
        load_keys<Plan, Plan::kColumns, 64>(shared.keys + pipeline.stage * Plan::kKeyBytes, &box.source->k, full,
                                            cluster, box, head / p.ratio, sample);
      }
      pipeline.next();
    }
  }
}

// Largest score and sum of a thread's two rows, and the step of the online softmax.
template <class Plan>
struct FrameSoftmax {
  float top[2] = {-infinity(), -infinity()}, sum[2] = {0, 0};

  // Scores become probabilities in place; `shrink`: what the result so far is to be multiplied by.
  VDCORE_DEVICE void step(float (&s)[Plan::kKeys / 2], int32_t rows, int lane, float exponent, float (&shrink)[2]) {
    if (rows < Plan::kKeys) {
      VDCORE_UNROLL
      for (int i = 0; i < Plan::kKeys / 2; ++i)
        if (8 * (i / 4) + 2 * (lane % 4) + i % 2 < Plan::kKeys - rows) s[i] = -infinity();
    }
    VDCORE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float most = top[r];
      VDCORE_UNROLL
      for (int i = 2 * r; i < Plan::kKeys / 2; i += 4) most = maximum(most, maximum(s[i], s[i + 1]));
      most = row_maximum(most);
      shrink[r] = exp2_approx((top[r] - most) * exponent);
      top[r] = most;
      const float shift = most * exponent;
      float total = 0;
      VDCORE_UNROLL
      for (int i = 2 * r; i < Plan::kKeys / 2; i += 4) {
        s[i] = exp2_approx(fmaf(s[i], exponent, -shift));
        s[i + 1] = exp2_approx(fmaf(s[i + 1], exponent, -shift));
        total += s[i] + s[i + 1];
      }
      sum[r] = fmaf(sum[r], shrink[r], total);
    }
  }
};

template <class Plan, typename E>
struct FrameConsumer {
  static constexpr int kKeys = Plan::kKeys, D = Plan::D, kResult = Plan::kResult;
  const FrameParameters& p;
  const FrameShared<Plan>& shared;
  const Cluster cluster;
  Pipeline<1> queries;
  Pipeline<Plan::kStages> keys, values;
  int group, lane, row;  // warpgroup; lane of its warp; first of the two rows, row and row + 8
  int slot = 0;
  float o[kResult / 2];
  uint32_t probabilities[kKeys / 16][4];

  VDCORE_DEVICE FrameConsumer(const FrameParameters& parameters, const FrameShared<Plan>& memory, const Cluster& blocks,
                              int thread)
      : p(parameters),
        shared(memory),
        cluster(blocks),
        queries(memory.of_queries),
        keys(memory.of_keys),
        values(memory.of_values),
        group(warp_uniform(thread / 128)),
        lane(thread % 32) {
    row = 16 * (thread / 32) + lane / 4;
  }

  // Named barrier 1 + group lets a warpgroup issue its products; they pass it round.
  VDCORE_DEVICE void await_turn() const {
    if (Plan::kPingPong) named_barrier_wait(1 + group, 256);
  }
  VDCORE_DEVICE void pass_turn() const {
    if (Plan::kPingPong) named_barrier_arrive(1 + (group + 1) % Plan::kConsumers, 256);
  }

  VDCORE_DEVICE void issue_scores(float (&s)[kKeys / 2]) const {
    const uint32_t q = shared_address(shared.queries) + group * 64 * 128;
    const uint32_t k = shared_address(shared.keys) + keys.stage * Plan::kKeyBytes;
    wgmma_fence();
    VDCORE_UNROLL
    for (int step = 0; step < D / 16; ++step) {
      const uint32_t column = step / 4, offset = step % 4 * 32;
      const uint64_t a = rows_descriptor(q + column * Plan::kRows * 128 + offset);
      const uint64_t b = rows_descriptor(k + column * kKeys * 128 + offset);
      if (step == 0)
        Wgmma<E, kKeys>::template rows_times_rows<false>(s, a, b);
      else
        Wgmma<E, kKeys>::template rows_times_rows<true>(s, a, b);
    }
    wgmma_commit();
  }

  VDCORE_DEVICE void issue_result() {
    const uint32_t v = shared_address(shared.values) + values.stage * Plan::kValueBytes;
    constexpr int kRow = 2 * Plan::kValueColumn;
    fence_operands(o);
    fence_operands(probabilities);
    wgmma_fence();
    VDCORE_UNROLL
    for (int step = 0; step < kKeys / 16; ++step)
      Wgmma<E, kResult>::registers_times_columns(
          o, probabilities[step], columns_descriptor<Plan::kValueColumn>(v + step * 16 * kRow, kKeys * kRow));
    wgmma_commit();
  }

  // Waits for the scores; with kAll for the result, too.
  template <bool kAll>
  VDCORE_DEVICE void await_scores(float (&s)[kKeys / 2]) {
    wgmma_wait<kAll ? 0 : 1>();
    fence_operands(s);
  }
  VDCORE_DEVICE void await_result() {
    wgmma_wait<0>();
    fence_operands(o);
    fence_operands(probabilities);
  }

  // The result of a product is laid out as the first operand of the next.
  VDCORE_DEVICE void keep_probabilities(const float (&s)[kKeys / 2]) {
    VDCORE_UNROLL
    for (int i = 0; i < kKeys / 4; ++i) probabilities[i / 4][i % 4] = pack<E>(s[2 * i], s[2 * i + 1]);
  }

  VDCORE_DEVICE void shrink_result(const float (&shrink)[2]) {
    VDCORE_UNROLL
    for (int i = 0; i < kResult / 2; ++i) o[i] *= shrink[i / 2 % 2];
  }

  VDCORE_DEVICE void run() {
    queries.await();
    FrameSoftmax<Plan> softmax;
    VDCORE_UNROLL
    for (int i = 0; i < kResult / 2; ++i) o[i] = 0;
    const auto key_tiles = load_shared<int32_t>(&shared.items[slot].key_tiles);
    if (key_tiles) {
      float shrink[2];
      {
        float s[kKeys / 2];
        keys.await();
        const auto rows = load_shared<int32_t>(shared.key_rows + keys.stage);
        issue_scores(s);
        await_scores<true>(s);
        keys.release(cluster, lane);
        softmax.step(s, rows, lane, p.exponent, shrink);
        keep_probabilities(s);
      }
      for (int32_t j = 1; j < key_tiles; ++j) {
        float s[kKeys / 2];
        keys.await();
        const auto rows = load_shared<int32_t>(shared.key_rows + keys.stage);
        await_turn();
        issue_scores(s);
        values.await();
        issue_result();
        pass_turn();
        await_scores<false>(s);
        keys.release(cluster, lane);
        softmax.step(s, rows, lane, p.exponent, shrink);
        after_computing(softmax.sum[0] + softmax.sum[1], shared.key_rows);
        await_result();
        values.release(cluster, lane);
        shrink_result(shrink);
        keep_probabilities(s);
      }
    }
    queries.release({1, cluster.rank}, lane);
    if (key_tiles) {
      values.await();
      issue_result();
      await_result();
      values.release(cluster, lane);
    }
    store(load_shared<FrameItem>(shared.items + slot), softmax);
    slot ^= 1;
  }

  VDCORE_DEVICE void store(const FrameItem& item, const FrameSoftmax<Plan>& softmax) const {
    VDCORE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(softmax.sum[r]);
      const int mine = row + 8 * r;
      const bool live = mine < item.live, inside = mine < item.rows;
      const float factor = live ? reciprocal(sum) : 0;
      const int64_t at = item.first + static_cast<int64_t>(mine) * p.heads;
      VDCORE_UNROLL
      for (int c = 0; c < kResult / 8; c += 4) {
        uint32_t word[4];
        VDCORE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int d = 4 * (c + i) + 2 * r;
          word[i] = live ? pack<E>(o[d] * factor, o[d + 1] * factor) : 0;
        }
        transpose_quad(word, lane);
        const int channel = 8 * (c + lane % 4);
        if (!inside || channel >= p.channels) continue;
        const int64_t offset = 2 * (at * p.channels + channel);
        if (p.ungated) store_global<Vec4>(p.ungated + offset, {{word[0], word[1], word[2], word[3]}});
        if (p.gate.data) mix(word, p.out + offset, item, mine, channel);
        store_global<Vec4>(p.out + offset, {{word[0], word[1], word[2], word[3]}});
      }
      if (p.lse && inside && lane % 4 == 0)
        store_global(p.lse + at,
                     live ? fmaf(softmax.top[r], p.exponent, log2_approx(sum)) * 0.6931471805599453f : -infinity());
    }
  }

  // word: eight channels of the result; becomes its mix with what `other` holds.
  VDCORE_DEVICE void mix(uint32_t (&word)[4], const char* other, const FrameItem& item, int mine, int channel) const {
    const int32_t token = item.start + mine, frame = token / p.tiles.tokens;
    const int64_t first = p.gate.index(item.sample, frame, token - frame * p.tiles.tokens, item.head);
    const Vec4 others = load_written<Vec4>(other);
    VDCORE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Float2 ours = unpack<E>(word[i]), theirs = unpack<E>(others.x[i]);
      const int64_t at = first + (channel + 2 * i) * p.gate.d;
      const float lo = gate_at<E>(p.gate, at), hi = gate_at<E>(p.gate, at + p.gate.d);
      word[i] = pack<E>(fmaf(lo, ours.lo - theirs.lo, theirs.lo), fmaf(hi, ours.hi - theirs.hi, theirs.hi));
    }
  }

  // Word i of lane j of four becomes word j of lane i: a lane's words are then 16 bytes of one row.
  static VDCORE_DEVICE void transpose_quad(uint32_t (&word)[4], int lane) {
    VDCORE_UNROLL
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool high = lane & bit;
      VDCORE_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const uint32_t got = shuffle_xor(high ? word[i] : word[i + bit], bit);
        (high ? word[i] : word[i + bit]) = got;
      }
    }
  }
};

template <class Plan, typename E>
VDCORE_KERNEL(Plan::kThreads, 1)
frame_attention_sm90_fwd_kernel(const VDCORE_GRID_CONSTANT FrameParameters p) {
  const FrameShared<Plan> shared(shared_memory());
  const Cluster cluster = cluster_of<Plan>(p);
  const int thread = static_cast<int>(thread_index());
  if (thread == 0) {
    p.video.prefetch();
    if (p.tiles.text) p.text.prefetch();
    constexpr uint32_t kWarps = 4 * Plan::kConsumers;
    shared.of_queries.init(kWarps);
    shared.of_keys.init(kWarps * cluster.size);
    shared.of_values.init(kWarps * cluster.size);
    mbarrier_init_fence();
  }
  // The other block's barriers are there, and before it ends, nobody reaches for them any more.
  if (cluster.size > 1)
    sync_cluster();
  else
    sync_block();
  if (thread < 128) {
    give_registers<Plan::kProducerRegisters>();
    if (thread == 0) produce<Plan, false>(p, shared, cluster);
    if (thread == 32) produce<Plan, true>(p, shared, cluster);
  } else {
    take_registers<Plan::kConsumerRegisters>();
    FrameConsumer<Plan, E> consumer(p, shared, cluster, thread - 128);
    if (consumer.group == Plan::kConsumers - 1) consumer.pass_turn();  // the first one's first turn
    for (uint32_t i = block_index() / cluster.size; i < static_cast<uint32_t>(p.items); i += p.blocks / cluster.size)
      consumer.run();
  }
  if (cluster.size > 1) sync_cluster();
}

}  // namespace vdcore::cuda
