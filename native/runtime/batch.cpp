#include "batch.hpp"

#include <algorithm>

#include "adapters.hpp"
#include "cache.hpp"
#include "error.hpp"
#include "layout.hpp"
#include "states.hpp"

namespace dso {
namespace {

constexpr int64_t kAdaptedRows = 32;                 // of one adapter that a task computes at most
constexpr int64_t kMostNumbered = int64_t(1) << 24;  // integers below it are exact in fp32

void check_cache(const dso_batch& b, const BatchNeeds& needs) {
  const dso_cache* k = b.cache;
  if (!k) fail(DSO_EINVAL, "batch.cache is NULL, but the plan has attention");
  const KvLayout& l = k->layout(0);
  if (needs.rows.empty() != (l.every == 0))
    fail(DSO_EINVAL, "batch.cache has %s; the plan needs %s", l.every ? "kinds of rows" : "layers",
         needs.rows.empty() ? "layers" : "kinds of rows");
  for (size_t i = 0; i < std::min(needs.rows.size(), size_t(k->layers)); ++i) {
    const RowsShape& need = needs.rows[i];
    const KvLayout& has = k->layout(int64_t(i));
    if (need.width && (has.rank != need.width || has.every != need.every))
      fail(DSO_EINVAL, "batch.cache has rows of %d elements for %d tokens as kind %d; the plan needs %lld for %lld", has.rank,
           has.every, int(i), (long long)need.width, (long long)need.every);
    if (need.plain && has.type != DSO_KV_F32 && has.type != DSO_KV_BF16)
      fail(DSO_EINVAL, "batch.cache has quantized rows as kind %d, which the plan reads as fp32 or bf16", int(i));
  }
  const bool latents = needs.rows.empty() && (needs.rank > 0 || needs.index == 0);  // index keys alone go with any cache
  if ((latents && (l.rank != needs.rank || l.rope != needs.rope)) || (needs.index > 0 && l.index != needs.index))
    fail(DSO_EINVAL, "batch.cache has rank %d, rope %d, index %d; the plan needs rank %lld, rope %lld, index %lld", l.rank,
         l.rope, l.index, (long long)needs.rank, (long long)needs.rope, (long long)needs.index);
  if (k->layers < needs.layers)
    fail(DSO_EINVAL, "batch.cache has %lld layers; the plan needs %lld", (long long)k->layers, (long long)needs.layers);
  if (needs.heads.empty() && l.kv_heads)
    fail(DSO_EINVAL, "batch.cache has kv_heads %d, head_dim %d; the plan needs latents", l.kv_heads, l.head_dim);
  for (size_t i = 0; i < needs.heads.size(); ++i) {
    const HeadsShape& need = needs.heads[i];
    const KvLayout& has = k->layout(int64_t(i));
    if (need.kv_heads && (has.kv_heads != need.kv_heads || has.head_dim != need.head_dim))
      fail(DSO_EINVAL, "batch.cache has kv_heads %d, head_dim %d in layer %d; the plan needs kv_heads %d, head_dim %d",
           has.kv_heads, has.head_dim, int(i), need.kv_heads, need.head_dim);
  }
  if (needs.summaries && l.summary_bytes == 0)
    fail(DSO_EINVAL, "batch.cache has no summaries, but the plan chooses blocks by them");
  if (!b.block_table) fail(DSO_EINVAL, "batch.block_table is NULL");
  std::vector<Visible> groups(size_t(k->groups()));
  for (int64_t layer = 0; layer < needs.layers; ++layer) {
    const Visible& visible = needs.visible[size_t(layer)];
    groups[size_t(k->group(layer))].add(visible);
    if (k->newest > 0) groups[size_t(k->group(k->copy_of(layer)))].add({visible.used, false, k->newest, 0});
  }
  for (int64_t s = 0; s < b.S; ++s) {
    const int64_t longest = needs.index > 0 || !needs.rows.empty() || (needs.rank > 0 && needs.summaries) ? kMostNumbered
                            : needs.summaries ? kMostNumbered * DSO_BLOCK_TOKENS
                                              : INT32_MAX;
    if (int64_t(b.context_len[s]) + b.query_len[s] > longest)
      fail(DSO_EINVAL, "batch: sequence %lld is longer than %lld tokens, the maximum with sparse attention (fp32 indices)",
           (long long)s, (long long)longest);
    const int64_t blocks = ceil_div(int64_t(b.context_len[s]) + b.query_len[s], DSO_BLOCK_TOKENS);
    if (blocks > b.max_blocks)
      fail(DSO_EINVAL, "batch: sequence %lld needs %lld blocks, but max_blocks is %d", (long long)s, (long long)blocks,
           b.max_blocks);
    for (size_t g = 0; g < groups.size(); ++g) {
      if (!groups[g].used) continue;
      const int32_t* table = b.block_table + (int64_t(g) * b.S + s) * b.max_blocks;
      for (int64_t i = 0; i < blocks; ++i)
        if ((table[i] < 0 || table[i] >= k->blocks) && !(table[i] == -1 && groups[g].hides(i, b.context_len[s])))
          fail(DSO_EINVAL, "batch.block_table[%lld][%lld] is %d, but the cache has %lld blocks", (long long)s, (long long)i,
               table[i], (long long)k->blocks);
    }
  }
}

void check_sequences(const dso_batch& b) {
  int64_t total = 0;
  for (int64_t s = 0; s < b.S; ++s) {
    if (b.query_len[s] < 1) fail(DSO_EINVAL, "batch.query_len[%lld] is %d, must be at least 1", (long long)s, b.query_len[s]);
    if (b.context_len[s] < 0 || int64_t(b.context_len[s]) + b.query_len[s] > INT32_MAX)
      fail(DSO_EINVAL, "batch.context_len[%lld] is %d, must be from 0 to INT32_MAX - query_len", (long long)s,
           b.context_len[s]);
    if (b.phase[s] != DSO_PHASE_DECODE && b.phase[s] != DSO_PHASE_PREFILL)
      fail(DSO_EINVAL, "batch.phase[%lld] is %d, must be 0 (decode) or 1 (prefill)", (long long)s, b.phase[s]);
    if (s > 0 && b.phase[s] < b.phase[s - 1])
      fail(DSO_EINVAL, "batch.phase[%lld]: sequences in decode phase must come first", (long long)s);
    total += b.query_len[s];
  }
  if (total != b.T) fail(DSO_EINVAL, "batch.query_len sums to %lld, but T is %d", (long long)total, b.T);
}

// Every slot that is read or written: once for a target; a source that is a target belongs to the sequence of its last row
// only.
void check_targets(const dso_batch& b, int64_t slots) {
  std::vector<int64_t> written, read;
  int64_t s = 0, end = b.query_len[0];  // the sequence of the entry, and one past its last row
  for (int64_t i = 0; i < b.n_state_to; ++i) {
    const int32_t row = b.state_to[2 * i], slot = b.state_to[2 * i + 1];
    if (row < 0 || row >= b.T || (i > 0 && row <= b.state_to[2 * i - 2]))
      fail(DSO_EINVAL, "batch.state_to[%lld]: row %d, must ascend and be below T, %d", (long long)i, row, b.T);
    if (slot < 0 || slot >= slots)
      fail(DSO_EINVAL, "batch.state_to[%lld]: slot %d, but there are %lld slots", (long long)i, slot, (long long)slots);
    if (row >= end)
      fail(DSO_EINVAL, "batch.state_to lacks row %lld, the last of sequence %lld", (long long)(end - 1), (long long)s);
    if (row != end - 1 || slot != b.state_from[s]) {
      for (int64_t other = 0; other < b.S; ++other)
        if (b.state_from[other] == slot)
          fail(DSO_EINVAL, "batch.state_to[%lld]: slot %d is read by sequence %lld", (long long)i, slot, (long long)other);
    }
    written.push_back(slot);
    if (row == end - 1 && ++s < b.S) end += b.query_len[s];
  }
  if (s < b.S) fail(DSO_EINVAL, "batch.state_to lacks row %lld, the last of sequence %lld", (long long)(end - 1), (long long)s);
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  if (twice != written.end()) fail(DSO_EINVAL, "batch.state_to has slot %lld twice", (long long)*twice);
  for (int64_t i = 0; i < b.S; ++i)
    if (b.state_from[i] >= 0) read.push_back(b.state_from[i]);
  std::sort(read.begin(), read.end());
  for (auto at = read.begin(); (at = std::adjacent_find(at, read.end())) != read.end(); ++at)
    if (std::binary_search(written.begin(), written.end(), *at))
      fail(DSO_EINVAL, "batch.state_to has slot %lld, which several sequences read", (long long)*at);
}

void check_visible_to(const dso_batch& b, const BatchNeeds& needs) {
  if (needs.rank > 0 || needs.choices || !needs.rows.empty())
    fail(DSO_EINVAL, "batch.visible_to is not NULL, but the plan attends to latents, entries or chosen blocks");
  for (int64_t s = 0, t = 0; s < b.S; ++s) {
    const int64_t context = b.context_len[s], total = context + b.query_len[s];
    for (int64_t token = context; token < total; ++token, ++t)
      if (b.visible_to[t] <= token || b.visible_to[t] > total || (token > context && b.visible_to[t] < b.visible_to[t - 1]))
        fail(DSO_EINVAL, "batch.visible_to[%lld] is %d: must be above the token's index, %lld, at most %lld, and not descend",
             (long long)t, b.visible_to[t], (long long)token, (long long)total);
  }
}

void check_states(const dso_batch& b, const BatchNeeds& needs) {
  if (!b.recurrent) fail(DSO_EINVAL, "batch.recurrent is NULL, but the plan has recurrent states");
  if (!b.state_from || !b.state_to || b.n_state_to < 0) fail(DSO_EINVAL, "batch.state_from or batch.state_to is NULL");
  const std::vector<dso_state_shape>& shapes = b.recurrent->shapes;
  for (size_t i = 0; i < needs.recurrent.size(); ++i) {
    const dso_state_shape& need = needs.recurrent[i];
    if (need.heads == 0) continue;
    if (i >= shapes.size() || shapes[i].heads != need.heads || shapes[i].rows != need.rows || shapes[i].cols != need.cols)
      fail(DSO_EINVAL, "batch.recurrent: state %d has another shape than the plan's, {%d, %d, %d}", int(i), need.heads,
           need.rows, need.cols);
  }
  for (int64_t s = 0; s < b.S; ++s)
    if (b.state_from[s] < -1 || b.state_from[s] >= b.recurrent->slots || (b.state_from[s] < 0) != (b.context_len[s] == 0))
      fail(DSO_EINVAL, "batch.state_from[%lld] is %d: it must be -1 for new sequences, and only for them, or one of %lld slots",
           (long long)s, b.state_from[s], (long long)b.recurrent->slots);
  check_targets(b, b.recurrent->slots);
}

void check_adapters(const dso_batch& b, const BatchNeeds& needs) {
  if (!b.adapters) fail(DSO_EINVAL, "batch.adapters is NULL, but adapter_of is not");
  const dso_adapters& a = *b.adapters;
  if (a.max_rank > needs.adapter_rank)
    fail(DSO_EINVAL, "batch.adapters has max_rank %d, but the plan has room for %d", a.max_rank, needs.adapter_rank);
  for (size_t i = 0; i < needs.adapter_sites.size(); ++i) {
    const dso_adapter_site& need = needs.adapter_sites[i];
    if (i >= a.sites.size() || (need.rows && need.rows != a.sites[i].rows) || (need.cols && need.cols != a.sites[i].cols) ||
        (need.heads && need.heads != std::max(1, a.sites[i].heads)))
      fail(DSO_EINVAL, "batch.adapters: site %d has another shape than the plan's, %d heads of [%d, %d]", int(i), need.heads,
           need.rows, need.cols);
  }
  for (int64_t s = 0; s < b.S; ++s)
    if (b.adapter_of[s] < -1 || b.adapter_of[s] >= a.slots)
      fail(DSO_EINVAL, "batch.adapter_of[%lld] is %d, must be -1 or one of %d slots", (long long)s, b.adapter_of[s], a.slots);
}

// The rows with adapters: those of neighboring sequences with the same one together, at most kAdaptedRows at a time.
void set_adapted(const dso_batch& b, const std::vector<int64_t>& first_row, std::vector<AdaptedRows>& adapted) {
  for (int64_t s = 0; s < b.S; ++s) {
    const int32_t slot = b.adapter_of[s];
    if (slot < 0) continue;
    const int64_t end = first_row[size_t(s)] + b.query_len[s];
    for (int64_t row = first_row[size_t(s)]; row < end;) {
      AdaptedRows* last = adapted.empty() ? nullptr : &adapted.back();
      if (!last || last->slot != slot || last->first + last->count != row || last->count == kAdaptedRows) {
        adapted.push_back({slot, row, 0});
        last = &adapted.back();
      }
      const int64_t n = std::min(end - row, kAdaptedRows - last->count);
      last->count += n;
      row += n;
    }
  }
}

}  // namespace

void Visible::add(const Visible& other) {
  used |= other.used;
  all |= other.all;
  window = std::max(window, other.window);
  sinks = std::max(sinks, other.sinks);
}

bool Visible::hides(int64_t block, int64_t context) const {
  const int64_t first = context + 1 - window;
  return !all && window > 0 && first > sinks && block * DSO_BLOCK_TOKENS >= sinks && (block + 1) * DSO_BLOCK_TOKENS <= first;
}

void check_batch(const dso_batch& b, const BatchNeeds& needs) {
  if (b.T < 1) fail(DSO_EINVAL, "batch.T is %d, must be at least 1", b.T);
  if (b.S < 1 || b.S > b.T) fail(DSO_EINVAL, "batch.S is %d, must be from 1 to T, %d", b.S, b.T);
  if (b.R < 0 || b.R > b.T) fail(DSO_EINVAL, "batch.R is %d, must be from 0 to T, %d", b.R, b.T);
  if (b.max_blocks < 0) fail(DSO_EINVAL, "batch.max_blocks is %d, must not be negative", b.max_blocks);
  if (!b.query_len) fail(DSO_EINVAL, "batch.query_len is NULL");
  if (!b.context_len) fail(DSO_EINVAL, "batch.context_len is NULL");
  if (!b.phase) fail(DSO_EINVAL, "batch.phase is NULL");
  check_sequences(b);
  if (needs.ids_always || (needs.token_ids && !b.inputs_embeds)) {
    if (!b.token_ids)
      fail(DSO_EINVAL, b.inputs_embeds ? "batch.token_ids is NULL, but the plan has an EMBEDDING with the IDS flag"
                                       : "batch.token_ids and batch.inputs_embeds are both NULL");
    for (int64_t t = 0; t < b.T; ++t)
      if (b.token_ids[t] < 0 || b.token_ids[t] >= needs.vocab)
        fail(DSO_EINVAL, "batch.token_ids[%lld] is %d, but the vocabulary has %lld tokens", (long long)t, b.token_ids[t],
             (long long)needs.vocab);
  }
  if (needs.positions && !b.positions) fail(DSO_EINVAL, "batch.positions is NULL");
  if (b.inv_freq && needs.rope_tables != 1)
    fail(DSO_EINVAL, "batch.inv_freq needs a plan with one ROPE_TABLE, not %lld", (long long)needs.rope_tables);
  if (needs.states && !b.states) fail(DSO_EINVAL, "batch.states is NULL");
  if (needs.axes && !b.axes) fail(DSO_EINVAL, "batch.axes is NULL");
  for (int64_t t = 0; t < b.T && needs.grid_rows > 0; ++t) {
    const int32_t *at = b.axes + 3 * t, i = at[1], j = at[2];
    if (i < 0 || i >= needs.grid_rows || j < 0 || j >= needs.grid_cols)
      fail(DSO_EINVAL, "batch.axes[%lld] is (%d, %d, %d), outside of a grid of %lld x %lld", (long long)t, at[0], i, j,
           (long long)needs.grid_rows, (long long)needs.grid_cols);
  }
  if (b.R > 0 && !b.logit_rows) fail(DSO_EINVAL, "batch.logit_rows is NULL");
  for (int64_t r = 0; r < b.R; ++r) {
    if (b.logit_rows[r] < 0 || b.logit_rows[r] >= b.T)
      fail(DSO_EINVAL, "batch.logit_rows[%lld] is %d, but T is %d", (long long)r, b.logit_rows[r], b.T);
    if (r > 0 && b.logit_rows[r] <= b.logit_rows[r - 1])
      fail(DSO_EINVAL, "batch.logit_rows[%lld] is %d: they must ascend", (long long)r, b.logit_rows[r]);
  }
  if (needs.logits && b.R > 0 && !b.logits) fail(DSO_EINVAL, "batch.logits is NULL");
  for (int64_t s = 0; s < b.S && needs.whole_sequences; ++s)
    if (b.context_len[s] != 0)
      fail(DSO_EINVAL, "batch.context_len[%lld] is %d, must be 0 for a plan with bidirectional attention", (long long)s,
           b.context_len[s]);
  if (needs.layers > 0) check_cache(b, needs);
  if (b.visible_to) check_visible_to(b, needs);
  if (!needs.recurrent.empty()) check_states(b, needs);
  if (b.adapter_of && !needs.adapter_sites.empty()) check_adapters(b, needs);
}

const int32_t* Batch::table(int64_t layer, int64_t sequence) const {
  return source->block_table + (source->cache->group(layer) * int64_t(source->S) + sequence) * source->max_blocks;
}

void Batch::set(const dso_batch& b, const BatchNeeds& needs) {
  check_batch(b, needs);
  source = &b;
  ++serial;
  T = b.T;
  R = b.R;
  decode_rows = 0;
  first_row.clear();
  pieces.clear();
  int64_t row = 0;
  for (int64_t s = 0; s < b.S; ++s) {
    first_row.push_back(row);
    const int64_t end = row + b.query_len[s];
    for (int64_t position = b.context_len[s]; row < end;) {
      const int64_t n = std::min(end - row, DSO_BLOCK_TOKENS - position % DSO_BLOCK_TOKENS);
      pieces.push_back({s, row, n, position});
      row += n;
      position += n;
    }
    if (b.phase[s] == DSO_PHASE_DECODE) decode_rows = end;
  }
  adapted.clear();
  adapts_heads.assign(size_t(b.S), false);
  if (b.adapter_of && !needs.adapter_sites.empty()) {
    set_adapted(b, first_row, adapted);
    for (int64_t s = 0; s < b.S; ++s)
      adapts_heads[size_t(s)] = b.adapter_of[s] >= 0 && b.adapters->adapts_heads(b.adapter_of[s]);
  }
  first_target.assign(b.S + 1, 0);
  if (!needs.recurrent.empty())
    for (int64_t s = 0, i = 0; s < b.S; ++s) {
      while (i < b.n_state_to && b.state_to[2 * i] < first_row[s] + b.query_len[s]) ++i;
      first_target[s + 1] = i;
    }
  decode_logits = std::lower_bound(b.logit_rows, b.logit_rows + R, decode_rows) - b.logit_rows;
}

}  // namespace dso
