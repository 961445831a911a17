#include "common/token_groups.h"

#include <algorithm>

namespace vdcore {
namespace {

bool same_runs(const TokenGroup& a, const TokenGroup& b) {
  if (a.count != b.count) return false;
  for (int i = 0; i < a.count; ++i)
    if (a.runs[i].text != b.runs[i].text || a.runs[i].begin != b.runs[i].begin || a.runs[i].end != b.runs[i].end)
      return false;
  return true;
}

// Joins a group to the one before where they continue one another: longer groups make fuller tiles.
void append(std::vector<TokenGroup>& groups, const TokenGroup& next) {
  if (!next.tokens.size()) return;
  if (!groups.empty()) {
    TokenGroup& last = groups.back();
    if (last.sample == next.sample && last.tokens.text == next.tokens.text && last.tokens.end == next.tokens.begin &&
        same_runs(last, next)) {
      last.tokens.end = next.tokens.end;
      return;
    }
  }
  groups.push_back(next);
}

TokenRun video_run(Run frames, int64_t tokens) { return {false, frames.begin * tokens, frames.end * tokens}; }

bool overlap(Run a, Run b) { return intersect(a, b).size() > 0; }

bool begins_before_end(Run a, Run b) { return a.size() && b.size() && a.begin < b.end; }

Run hull(Run a, Run b) {
  if (!a.size()) return b;
  if (!b.size()) return a;
  return {smaller(a.begin, b.begin), larger(a.end, b.end)};
}

// Keys come in order, so a new group can only join components at the end: those whose queries begin before its own end.
// Where the queries that see a key are in two runs, they may have others in between, which then join as well.
void find_components(TokenGroups& groups) {
  std::vector<TokenComponent>& found = groups.components;
  for (size_t i = 0; i < groups.keys.size(); ++i) {
    const TokenGroup& keys = groups.keys[i];
    const int64_t seen = keys.count ? keys.tokens.size() : 0;
    TokenComponent next{keys.sample, {}, {}, static_cast<int64_t>(i), static_cast<int64_t>(i) + 1, seen > 0, seen, 0};
    for (int r = 0; r < keys.count; ++r) {
      Run& queries = keys.runs[r].text ? next.text : next.video;
      queries = hull(queries, {keys.runs[r].begin, keys.runs[r].end});
    }
    while (!found.empty() && found.back().sample == next.sample &&
           (begins_before_end(next.video, found.back().video) || overlap(found.back().text, next.text) ||
            found.back().queries() == 0)) {
      next.video = hull(next.video, found.back().video);
      next.text = hull(next.text, found.back().text);
      next.first_group = found.back().first_group;
      next.seen_groups += found.back().seen_groups;
      next.seen_keys += found.back().seen_keys;
      found.pop_back();
    }
    found.push_back(next);
  }
  for (TokenComponent& c : found) {
    const bool text = !c.video.size();
    const int64_t token = text ? c.text.begin : c.video.begin;
    const auto before = [&](const TokenGroup& g, int) {
      if (g.sample != c.sample) return g.sample < c.sample;
      return g.tokens.text != text ? text : g.tokens.end <= token;
    };
    c.first_queries =
        std::lower_bound(groups.queries.begin(), groups.queries.end(), 0, before) - groups.queries.begin();
  }
}

int64_t clamp(int64_t n, int64_t most) { return larger(0, smaller(n, most)); }

}  // namespace

int64_t TokenGroups::largest_component() const {
  int64_t most = 0;
  for (const TokenComponent& component : components) most = larger(most, component.queries());
  return most;
}

TokenTiles::TokenTiles(const std::vector<TokenGroup>& groups, int64_t heads, int64_t tile)
    : groups_(groups), tile_(tile), first_item_{0} {
  for (const TokenGroup& group : groups)
    first_item_.push_back(first_item_.back() + (group.tokens.size() + tile - 1) / tile * heads);
}

TokenTiles::Item TokenTiles::at(int64_t item) const {
  const auto after = std::upper_bound(first_item_.begin(), first_item_.end(), item);
  const size_t i = after - first_item_.begin() - 1;
  const TokenGroup& group = groups_[i];
  const int64_t tiles = (group.tokens.size() + tile_ - 1) / tile_, rest = item - first_item_[i];
  return {group, rest / tiles, piece(group.tokens, rest % tiles * tile_, tile_)};
}

TokenGroups frame_groups(const FrameMask& mask, int64_t batch, int64_t queries, int64_t keys, int64_t tokens,
                         int64_t start, const int64_t* lengths, const TextTokens& text) {
  TokenGroups groups{batch, queries * tokens, keys * tokens, text.count, {}, {}, {}};
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t valid = lengths ? clamp(lengths[b], keys) : keys;
    const int64_t alive = lengths ? clamp(lengths[b] - start, queries) : queries;
    const int64_t text_valid = text.lengths ? clamp(text.lengths[b], text.count) : text.count;
    const TokenRun prompt = {true, 0, text_valid};
    for (int64_t t = 0; t < queries; ++t) {
      TokenGroup group{b, video_run({t, t + 1}, tokens), {}, 0};
      if (t < alive) {
        Run low, window;
        mask.visible(start + t, valid, low, window);
        if (low.end == window.begin) window.begin = low.begin, low.end = low.begin;
        group.add(video_run(low, tokens));
        group.add(video_run(window, tokens));
        group.add(prompt);
      }
      append(groups.queries, group);
    }
    for (int64_t k = 0; k < keys; ++k) {
      TokenGroup group{b, video_run({k, k + 1}, tokens), {}, 0};
      if (k < valid) {
        Run seen = intersect(mask.seen_by(k, start, queries), {0, alive});
        const Run also = intersect(mask.also_seen_by(k, start, queries), {0, alive});
        const bool touch = seen.size() && also.begin == seen.end;
        if (touch) seen.end = larger(also.end, seen.end);
        group.add(video_run(seen, tokens));
        if (!touch) group.add(video_run(also, tokens));
        if (text.sees_video) group.add(prompt);
      }
      append(groups.keys, group);
    }
    TokenGroup query{b, prompt, {}, 0}, key{b, prompt, {}, 0};
    if (text.sees_video) query.add(video_run({0, valid}, tokens));
    query.add(prompt);
    key.add(video_run({0, alive}, tokens));
    key.add(prompt);
    append(groups.queries, query);
    append(groups.keys, key);
    const TokenRun rest = {true, text_valid, text.count};  // padding: sees nothing, is not seen
    append(groups.queries, {b, rest, {}, 0});
    append(groups.keys, {b, rest, {}, 0});
  }
  find_components(groups);
  return groups;
}

TokenGroups prompt_groups(int64_t batch, int64_t frames, int64_t tokens, int64_t prompt, bool per_frame,
                          const int64_t* lengths) {
  const int64_t prompts = per_frame ? frames : 1, rows = per_frame ? tokens : frames * tokens;
  TokenGroups groups{batch, frames * tokens, prompts * prompt, 0, {}, {}, {}};
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < prompts; ++i) {
      const TokenRun all = {false, i * prompt, (i + 1) * prompt};
      const TokenRun valid = {false, all.begin,
                              all.begin + (lengths ? clamp(lengths[b * prompts + i], prompt) : prompt)};
      const TokenRun query = {false, i * rows, (i + 1) * rows};
      TokenGroup sees{b, query, {}, 0}, seen{b, valid, {}, 0};
      sees.add(valid);
      seen.add(query);
      append(groups.queries, sees);
      append(groups.keys, seen);
      append(groups.keys, {b, {false, valid.end, all.end}, {}, 0});
    }
  find_components(groups);
  return groups;
}

}  // namespace vdcore
