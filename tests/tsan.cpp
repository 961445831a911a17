// The CPU engine under ThreadSanitizer: several std::threads call it at once, each call on threads of the engine's own
// pool, and every result must have the bits that one thread alone comes to. For tests/tsan.sh.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "common/tile_plan.h"
#include "common/token_groups.h"
#include "common/visible_frames.h"
#include "cpu/core/engine.h"

namespace {

using namespace vdcore;

constexpr int64_t B = 2, T = 6, S = 70, H = 2, D = 40;
constexpr int kCallers = 3, kRounds = 4, kThreads = 3;

// A contiguous tensor of random numbers, or of zeros.
struct Array {
  std::vector<char> bytes;
  TensorView view;

  Array(DType dtype, std::vector<int64_t> size, int seed = 0) {
    view.dtype = dtype;
    view.ndim = static_cast<int32_t>(size.size());
    int64_t count = 1;
    for (int axis = view.ndim - 1; axis >= 0; --axis) {
      view.size[axis] = size[axis];
      view.stride[axis] = count;
      count *= size[axis];
    }
    bytes.resize(count * size_of(dtype));
    view.data = bytes.data();
    std::mt19937 random(seed);
    for (int64_t i = 0; i < count && seed; ++i) {
      const float x = static_cast<float>(random() % 2001) / 1000.f - 1.f;
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      bits >>= dtype == DType::bf16 ? 16 : 0;
      std::memcpy(view.data + i * size_of(dtype), &bits, size_of(dtype));
    }
  }
  float* floats() { return reinterpret_cast<float*>(view.data); }
  std::vector<double> numbers() const {
    std::vector<double> found(bytes.size() / size_of(view.dtype));
    for (size_t i = 0; i < found.size(); ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, view.data + i * size_of(view.dtype), size_of(view.dtype));
      bits <<= view.dtype == DType::bf16 ? 16 : 0;
      float x;
      std::memcpy(&x, &bits, sizeof x);
      found[i] = x;
    }
    return found;
  }
};

// Spatial or causal attention and its gradients; the bits of all of them.
std::vector<char> frame_attention(DType dtype, const FrameMask& mask, int threads) {
  const std::vector<int64_t> tokens = {B, T, S, H, D};
  std::vector<Array> x;
  for (int i = 0; i < 4; ++i) x.emplace_back(dtype, tokens, i + 1);  // q, k, v, dout
  Array out(dtype, tokens), lse(DType::f32, {B, T, S, H}), dq(dtype, tokens), dk(dtype, tokens), dv(dtype, tokens);
  const TokenGroups groups = frame_groups(mask, B, T, T, S, 0, nullptr, {});
  cpu::FrameAttention a;
  a.segment[0].q = x[0].view, a.segment[0].k = x[1].view, a.segment[0].v = x[2].view, a.segment[0].dout = x[3].view;
  a.segment[0].out = out.view, a.segment[0].lse = lse.view;
  a.segment[0].dq = dq.view, a.segment[0].dk = dk.view, a.segment[0].dv = dv.view;
  a.groups = &groups;
  a.scale = 0.15f;
  a.threads = threads;
  cpu::kernels().frame_attention_forward(a);

  const cpu::BackwardPlan plan(groups, H, H, D, threads);
  std::vector<float> delta(B * H * T * S), workspace(plan.floats());
  std::vector<int64_t> progress(plan.tiles), done(plan.chains);
  a.plan = &plan;
  a.delta = delta.data();
  a.workspace = workspace.data();
  a.progress = progress.data();
  a.done = done.data();
  cpu::kernels().frame_attention_backward(a);

  std::vector<char> all;
  for (const Array* result : {&out, &lse, &dq, &dk, &dv})
    all.insert(all.end(), result->bytes.begin(), result->bytes.end());
  return all;
}

using Numbers = std::vector<double>;

// The sum of dout * out, and out, in plain loops.
double plain_attention(const Numbers& q, const Numbers& k, const Numbers& v, const Numbers& dout, bool causal,
                       Numbers& out) {
  const auto at = [](int64_t b, int64_t token, int64_t h) { return ((b * T * S + token) * H + h) * D; };
  double loss = 0;
  out.assign(q.size(), 0);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < T * S; ++i) {
        const int64_t frame = i / S, begin = causal ? 0 : frame * S, end = (frame + 1) * S;
        Numbers p(end - begin);
        double sum = 0;
        for (int64_t j = begin; j < end; ++j) {
          double score = 0;
          for (int64_t c = 0; c < D; ++c) score += q[at(b, i, h) + c] * k[at(b, j, h) + c];
          sum += p[j - begin] = std::exp(score * 0.15f);
        }
        for (int64_t c = 0; c < D; ++c) {
          double total = 0;
          for (int64_t j = begin; j < end; ++j) total += p[j - begin] * v[at(b, j, h) + c];
          out[at(b, i, h) + c] = total / sum;
          loss += total / sum * dout[at(b, i, h) + c];
        }
      }
  return loss;
}

// Results against plain loops, and gradients against difference quotients of these, along one direction each.
bool right(DType dtype, bool causal) {
  const std::vector<int64_t> tokens = {B, T, S, H, D};
  std::vector<Numbers> x;  // q, k, v, dout
  for (int i = 0; i < 4; ++i) x.push_back(Array(dtype, tokens, i + 1).numbers());
  const FrameMask mask = causal ? FrameMask{{-1, 0, 1, 0}} : FrameMask{{0, 0, 1, 0}};
  const std::vector<char> found = frame_attention(dtype, mask, 1);
  const size_t size = x[0].size() * size_of(dtype), lse = B * T * S * H * sizeof(float);
  const auto numbers = [&](size_t from) {
    Array part(dtype, tokens);
    std::memcpy(part.view.data, found.data() + from, size);
    return part.numbers();
  };
  const double tolerance = dtype == DType::f32 ? 2e-5 : 3e-2;
  Numbers out;
  plain_attention(x[0], x[1], x[2], x[3], causal, out);
  const Numbers ours = numbers(0);
  for (size_t i = 0; i < out.size(); ++i)
    if (!(std::abs(ours[i] - out[i]) <= tolerance)) return false;
  for (int i = 0; i < 3; ++i) {
    const Numbers gradient = numbers(size + lse + i * size), at = x[i];
    constexpr double kStep = 1e-4;
    double along = 0, loss[2];
    for (const int side : {0, 1}) {
      for (size_t j = 0; j < at.size(); ++j) {
        const double direction = std::sin(static_cast<double>(j + i));
        x[i][j] = at[j] + (side ? kStep : -kStep) * direction;
        if (side) along += direction * gradient[j];
      }
      loss[side] = plain_attention(x[0], x[1], x[2], x[3], causal, out);
    }
    x[i] = at;
    const double quotient = (loss[1] - loss[0]) / (2 * kStep);
    if (!(std::abs(along - quotient) <= tolerance * (10 + std::abs(quotient)))) return false;
  }
  return true;
}

std::vector<char> temporal_attention(DType dtype, int threads) {
  const std::vector<int64_t> tokens = {B, T, S, H, D};
  Array q(dtype, tokens, 1), k(dtype, tokens, 2), v(dtype, tokens, 3), out(dtype, tokens);
  const VisibleTables t(FrameMask{}, T, T, 0, nullptr, B);
  cpu::TemporalAttention a;
  a.q = q.view, a.k = k.view, a.v = v.view, a.out = out.view;
  a.visible = {t.begin.data(),
               t.end.data(),
               t.low_begin.data(),
               t.low_end.data(),
               t.seen_begin.data(),
               t.seen_end.data(),
               t.also_begin.data(),
               t.also_end.data(),
               t.per_sample,
               t.dense,
               t.twice};
  a.scale = 0.15f;
  a.threads = threads;
  cpu::kernels().temporal_attention_forward(a);
  return out.bytes;
}

// A grid of 7 x 10 tokens a frame: windows with a sink and text, whose sizes no vector divides, or lists of ragged
// tiles.
OwnedPlan plan_of_grid(bool lists) {
  constexpr int64_t kRows = 7, kColumns = S / kRows, kText = 5, kTile[3] = {2, 3, 4};
  const GridSizes sizes = {B, T, T, kRows, kColumns, 0};
  if (lists) {  // a tile sees itself and the next one
    constexpr int64_t n = 3 * 3 * 3;
    std::vector<int32_t> indices(2 * n), counts(n, 2);
    for (int32_t i = 0; i < n; ++i) indices[2 * i] = i ? i - 1 : 0, indices[2 * i + 1] = i ? i : 1;
    return plan_of_lists(sizes, kTile, 1, 1, 2, indices.data(), counts.data());
  }
  WindowsOfHeads w = {H, {1, 1, 1}, true, 1, 0, {}, {{0, 2}, {2, 1}}, {{0, 3}}};
  for (int64_t frame = 0; frame < T; ++frame) w.frame_runs.push_back({{0, frame + 1}});
  return plan_of_windows(sizes, {w}, nullptr, kText, nullptr, true);
}

std::vector<char> tile_attention(DType dtype, bool lists, int threads) {
  const OwnedPlan owned = plan_of_grid(lists);
  cpu::TileAttention a;
  a.plan = &owned.plan;
  a.scale = 0.15f;
  a.threads = threads;
  std::vector<Array> x;
  x.reserve(18);
  for (int part = 0; part < (owned.plan.text ? 2 : 1); ++part) {
    const std::vector<int64_t> tokens = {B, part ? 1 : T, part ? owned.plan.text : S, H, D};
    cpu::FrameSegment& s = a.segment[part];
    for (TensorView* view : {&s.q, &s.k, &s.v, &s.dout}) *view = x.emplace_back(dtype, tokens, x.size() + 1).view;
    for (TensorView* view : {&s.out, &s.dq, &s.dk, &s.dv}) *view = x.emplace_back(dtype, tokens).view;
    s.lse = x.emplace_back(DType::f32, std::vector<int64_t>{B, tokens[1], tokens[2], H}).view;
  }
  std::vector<float> delta(B * H * (T * S + owned.plan.text));
  a.delta = delta.data();
  cpu::kernels().tile_attention_forward(a);
  cpu::kernels().tile_attention_backward(a);

  std::vector<char> all;
  for (const Array& each : x) all.insert(all.end(), each.bytes.begin(), each.bytes.end());
  return all;
}

std::vector<char> patchify(DType dtype, int threads) {
  constexpr int64_t kSide = 8, kChannels = 4, E = 96, K = kChannels * 4;
  Array video(dtype, {B, kChannels, T, 2 * kSide, 2 * kSide}, 1), weight(DType::f32, {K, E}, 2);
  Array tokens(dtype, {B, T, kSide * kSide, E}), packed(DType::f32, {(E + 64) * (K + 64)});
  Array dweight(DType::f32, {4, K, E});
  cpu::PatchProduct a;
  a.patches = {video.view, {1, 2, 2}, {T, kSide, kSide}, false};
  a.tokens = tokens.view;
  a.weight = {weight.floats(), E, 1};
  a.packed = packed.floats();
  a.threads = threads;
  cpu::kernels().tokens_from_patches(a);
  cpu::PatchWeightGradient g;
  g.patches = a.patches;
  g.tokens = a.tokens;
  g.parts = 4;
  g.dweight = dweight.floats();
  g.threads = threads;
  cpu::kernels().patch_weight_gradient(g);
  std::vector<char> all = tokens.bytes;
  all.insert(all.end(), dweight.bytes.begin(), dweight.bytes.end());
  return all;
}

std::vector<std::vector<char>> everything(int threads) {
  std::vector<std::vector<char>> found;
  const FrameMask same_frame{{0, 0, 1, 0}}, causal{{-1, 0, 1, 0}};
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (const FrameMask& mask : {same_frame, causal}) found.push_back(frame_attention(dtype, mask, threads));
    for (const bool lists : {false, true}) found.push_back(tile_attention(dtype, lists, threads));
    found.push_back(temporal_attention(dtype, threads));
    found.push_back(patchify(dtype, threads));
  }
  return found;
}

}  // namespace

int main(int count, char**) {
  for (DType dtype : {DType::f32, DType::bf16})
    for (const bool causal : {false, true})
      if (count > 1 && !right(dtype, causal)) return std::fprintf(stderr, "%s: wrong\n", cpu::kernels().isa), 1;
  const int rounds = count > 1 ? 1 : kRounds;  // under an emulator every one takes long
  const std::vector<std::vector<char>> alone = everything(1);
  bool same[kCallers] = {};
  std::vector<std::thread> callers;
  for (bool& mine : same)
    callers.emplace_back([&] {
      mine = true;
      for (int round = 0; round < rounds; ++round) mine = everything(kThreads) == alone && mine;
    });
  for (std::thread& caller : callers) caller.join();
  for (const bool mine : same)
    if (!mine) return std::fprintf(stderr, "%s: other bits with %d threads\n", cpu::kernels().isa, kThreads), 1;
  std::printf("%s: %d callers with %d threads each, %d rounds of %d calls without a report\n", cpu::kernels().isa,
              kCallers, kThreads, rounds, static_cast<int>(alone.size()));
  return 0;
}
