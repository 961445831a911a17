// Which tokens attend to which, as groups of tokens that all see the same: what a kernel loops over instead of a mask.
#pragma once

#include <vector>

#include "common/frame_runs.h"

namespace vdcore {

// Tokens [begin, end) of the video, counted through all frames, or of the text.
struct TokenRun {
  bool text = false;
  int64_t begin = 0, end = 0;
  VDCORE_INLINE int64_t size() const { return end > begin ? end - begin : 0; }
};

// Query tokens and the key tokens that each of them sees; or key tokens and the query tokens that see each of them.
struct TokenGroup {
  int64_t sample = 0;
  TokenRun tokens;
  TokenRun runs[3];  // disjoint; the first `count` of them
  int count = 0;

  void add(const TokenRun& run) {
    if (run.size()) runs[count++] = run;
  }
};

// Queries and keys that have nothing to do with those outside: one frame in spatial attention, a whole sample in dense
// attention. A backward pass that holds one can add up the gradient of its queries by itself.
struct TokenComponent {
  int64_t sample = 0;
  Run video, text;                         // query tokens
  int64_t first_group = 0, end_group = 0;  // of the keys
  int64_t seen_groups = 0, seen_keys = 0;  // of those, what any query sees
  int64_t first_queries = 0;               // the first group of queries with tokens of `video`, or else of `text`
  VDCORE_INLINE int64_t queries() const { return video.size() + text.size(); }
};

struct TokenGroups {
  int64_t batch = 0, query_tokens = 0, key_tokens = 0, text = 0;  // what they are of; tokens of a sample
  std::vector<TokenGroup> queries, keys;  // each sample's groups in order, every token in exactly one
  std::vector<TokenComponent> components;

  int64_t largest_component() const;  // in query tokens

  // Calls body(group, tokens) for the queries of a component, group by group. No vector's own functions: the linker
  // might keep the copy of a newer instruction set.
  template <typename Body>
  VDCORE_INLINE void for_each_queries(const TokenComponent& c, const Body& body) const {
    const int64_t count = queries.end() - queries.begin();
    for (int64_t i = c.first_queries; i < count && queries.data()[i].sample == c.sample; ++i) {
      const TokenGroup& group = queries.data()[i];
      const Run of = group.tokens.text ? c.text : c.video, some = intersect(of, {group.tokens.begin, group.tokens.end});
      if (some.size()) body(group, TokenRun{group.tokens.text, some.begin, some.end});
      if (!group.tokens.text && group.tokens.end >= c.video.end && !c.text.size()) return;
    }
  }
};

struct TextTokens {
  int64_t count = 0;
  const int64_t* lengths = nullptr;  // valid ones of each sample, or null: all
  bool sees_video = true;
};

// The work on one side of an operator: tiles of at most `tile` tokens of one group, for every head. A group's heads
// come one after another, each with all its tiles, because these read the same rows of the other side.
class TokenTiles {
 public:
  struct Item {
    const TokenGroup& group;
    int64_t head;
    TokenRun tokens;
  };

  TokenTiles(const std::vector<TokenGroup>& groups, int64_t heads, int64_t tile);
  int64_t items() const { return first_item_.back(); }
  Item at(int64_t item) const;

 private:
  const std::vector<TokenGroup>& groups_;
  int64_t tile_;
  std::vector<int64_t> first_item_;  // of each group, and the end
};

// The piece of a run that starts `offset` tokens into it.
VDCORE_INLINE TokenRun piece(const TokenRun& run, int64_t offset, int64_t most) {
  return {run.text, run.begin + offset, smaller(run.end, run.begin + offset + most)};
}

// Video attention. `queries` and `keys` count frames of `tokens` tokens; `lengths`: valid frames of each sample, or
// null.
TokenGroups frame_groups(const FrameMask& mask, int64_t batch, int64_t queries, int64_t keys, int64_t tokens,
                         int64_t start, const int64_t* lengths, const TextTokens& text);

// Cross attention: one prompt of `prompt` tokens per sample, or one per frame; `lengths`: valid tokens of each prompt,
// or null.
TokenGroups prompt_groups(int64_t batch, int64_t frames, int64_t tokens, int64_t prompt, bool per_frame,
                          const int64_t* lengths);

}  // namespace vdcore
