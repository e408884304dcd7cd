#include "drafted_decode.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "choice.hpp"
#include "error.hpp"
#include "plan.hpp"

namespace dso {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void check_one_sequence(const dso_plan& plan, const dso_batch& b, const char* name) {
  if (b.S != 1) fail(DSO_EINVAL, "drafted: %s.S is %d, must be 1", name, b.S);
  if (b.T < 1 || b.R != 1) fail(DSO_EINVAL, "drafted: %s.T is %d, %s.R is %d, must be above 0 and 1", name, b.T, name, b.R);
  if (b.axes || b.visible_to || b.features || b.inputs_embeds || b.hidden)
    fail(DSO_EINVAL, "drafted: %s.axes, visible_to, features, inputs_embeds and hidden must be NULL", name);
  if (!b.token_ids || !b.positions || !b.context_len || !b.query_len || !b.phase || !b.logits)
    fail(DSO_EINVAL, "drafted: %s.token_ids, positions, context_len, query_len, phase or logits is NULL", name);
  if (!plan.next_states(b)) fail(DSO_EINVAL, "drafted: %s.%s is NULL", name, plan.next_states_name());
  if (b.phase[0] != DSO_PHASE_DECODE) fail(DSO_EINVAL, "drafted: %s.phase[0] is %d, must be 0", name, b.phase[0]);
}

void check_room(const dso_batch& b, const char* name, int32_t context, int32_t room) {
  if (int64_t(b.max_blocks) * DSO_BLOCK_TOKENS < int64_t(context) + room)
    fail(DSO_EINVAL, "drafted: %s.max_blocks is %d, too few for %d tokens after %d", name, b.max_blocks, room, context);
}

void check(const dso_plan& model, const dso_batch& b, const dso_plan& drafter, const dso_batch& p,
           const dso_drafted_decode& d) {
  if (d.rounds < 1 || d.drafts < 1 || d.room < 2)
    fail(DSO_EINVAL, "drafted.rounds is %d, drafts is %d, room is %d, must be at least 1, 1 and 2", d.rounds, d.drafts, d.room);
  if (d.n_stops < 0 || (d.n_stops > 0 && !d.stops))
    fail(DSO_EINVAL, "drafted.n_stops is %d, or drafted.stops is NULL", d.n_stops);
  if (!(d.least >= 0 && d.least <= 1)) fail(DSO_EINVAL, "drafted.least must be from 0 to 1");
  if (!d.choice || !d.tokens || !d.drafted || !d.chosen || !d.took)
    fail(DSO_EINVAL, "drafted.choice, tokens, drafted, chosen or took is NULL");
  check_one_sequence(model, b, "batch");
  check_one_sequence(drafter, p, "pending");
  if (b.T != 1) fail(DSO_EINVAL, "drafted: batch.T is %d, must be 1", b.T);
  if (b.states || !p.states) fail(DSO_EINVAL, "drafted: batch.states must be NULL, and pending.states not");
  const int32_t seen = p.context_len[0] + p.T;  // by the drafting plan
  if (seen > b.context_len[0])
    fail(DSO_EINVAL, "drafted: pending has rows up to %d, after batch.context_len[0], %d", seen, b.context_len[0]);
  check_room(b, "batch", b.context_len[0], d.room);
  check_room(p, "pending", seen, d.room);
  if (model.has_states() || drafter.has_states()) fail(DSO_EINVAL, "drafted: the plans must not have recurrent states");
  if (model.next_states_width() != drafter.next_states_width())
    fail(DSO_EINVAL, "drafted: the model's states have %lld elements, the drafter's %lld", (long long)model.next_states_width(),
         (long long)drafter.next_states_width());
  check_choice(*d.choice, model.vocab_size(), 0, false);
  if (d.choice->noise) fail(DSO_EINVAL, "drafted: choices[0].noise must be NULL");
}

// A step of one sequence, made from the batch of the first one.
class SequenceRows {
 public:
  explicit SequenceRows(const dso_batch& first) : b_(first), shift_(first.positions[0] - first.context_len[0]) {}

  // Rows `ids` after the first `context` tokens, with logits of the last `logits` rows.
  const dso_batch& of(const int32_t* ids, int32_t count, int32_t context, int32_t logits, const float* states) {
    positions_.resize(size_t(count));
    std::iota(positions_.begin(), positions_.end(), context + shift_);
    rows_.resize(size_t(logits));
    std::iota(rows_.begin(), rows_.end(), count - logits);
    count_ = count;
    context_ = context;
    b_.T = count;
    b_.R = logits;
    b_.token_ids = ids;
    b_.positions = positions_.data();
    b_.query_len = &count_;
    b_.context_len = &context_;
    b_.logit_rows = rows_.data();
    b_.states = states;
    return b_;
  }

 private:
  dso_batch b_;
  const int32_t shift_;  // from a token's place to its position
  int32_t count_ = 0, context_ = 0;
  std::vector<int32_t> positions_, rows_;
};

// The drafts of a round, most likely tokens one after the other.
class Drafter {
 public:
  Drafter(dso_plan& plan, const dso_batch& pending, const dso_drafted_decode& d)
      : plan_(plan),
        rows_(pending),
        logits_(pending.logits),
        made_(plan.next_states(pending)),
        d_(d),
        weights_(d.least > 0 ? size_t(plan.vocab_size()) : 0) {}

  // Appends up to `most` drafts to `tokens`, after processing the rows `ids` with the model's `states`.
  void draft(const int32_t* ids, int32_t count, int32_t context, const float* states, int32_t most,
             std::vector<int32_t>& tokens) {
    const int64_t width = plan_.next_states_width();
    for (int32_t n = 0; n < most; ++n) {
      const bool first = n == 0;
      if (first) {
        plan_.run(rows_.of(ids, count, context, 1, states));
        context += count;
        std::copy_n(made_ + (count - 1) * width, width, own_state(width));
      } else {
        plan_.run(rows_.of(&tokens.back(), 1, context++, 1, state_.data()));
        std::copy_n(made_, width, own_state(width));
      }
      const int64_t best = plan_.kernels().first_largest(logits_, plan_.vocab_size());
      if (best < 0) return;  // not finite: the model decides without a draft
      tokens.push_back(d_.token_of ? d_.token_of[best] : int32_t(best));
      if (d_.least > 0 && probability(logits_[best]) < d_.least) return;
    }
  }

 private:
  float* own_state(int64_t width) {
    state_.resize(size_t(width));
    return state_.data();
  }

  double probability(float largest) {  // of the most likely token
    plan_.kernels().exp_differences(logits_, largest, plan_.vocab_size(), weights_.data());
    return 1 / std::accumulate(weights_.begin(), weights_.end(), 0.0);
  }

  dso_plan& plan_;
  SequenceRows rows_;
  float *const logits_, *const made_;  // made_: the states of its rows
  const dso_drafted_decode& d_;
  std::vector<float> state_, weights_;
};

}  // namespace

void decode_drafted(dso_plan& model, const dso_batch& batch, dso_plan& drafter, const dso_batch& pending,
                    dso_drafted_decode& d) {
  const Clock::time_point start = Clock::now();
  check(model, batch, drafter, pending, d);
  d.done = d.undecided = 0;
  Penalties penalties(*d.choice, model.vocab_size());
  Chooser chooser(model.kernels(), model.vocab_size());
  Drafter drafts(drafter, pending, d);
  SequenceRows rows(batch);
  const int32_t hidden = batch.context_len[0] - pending.context_len[0] - pending.T;  // tokens that the drafter does not see
  int32_t context = batch.context_len[0], total = 0;
  std::vector<int32_t> ids = {batch.token_ids[0]}, waiting(pending.token_ids, pending.token_ids + pending.T);
  const float* states = pending.states;
  for (;;) {
    const Clock::time_point begun = Clock::now();
    drafts.draft(waiting.data(), int32_t(waiting.size()), context - hidden - int32_t(waiting.size()), states,
                 std::min(d.drafts, d.room - total - 1), ids);
    const int32_t count = int32_t(ids.size());
    const dso_batch& verified = rows.of(ids.data(), count, context, count, nullptr);
    model.run(verified);
    waiting.clear();
    bool stops = false;
    for (int32_t row = 0; row < count && !stops; ++row) {
      const int32_t token =
          chooser.choose(batch.logits + int64_t(row) * model.vocab_size(), *d.choice, penalties, total + row, nullptr);
      if (token == DSO_UNDECIDED) {
        d.undecided = 1;
        break;
      }
      waiting.push_back(token);
      penalties.add(token);
      stops = std::find(d.stops, d.stops + d.n_stops, token) != d.stops + d.n_stops;
      if (row + 1 < count && token != ids[size_t(row) + 1]) break;
    }
    const int32_t chosen = int32_t(waiting.size());
    std::copy(waiting.begin(), waiting.end(), d.tokens + total);
    d.drafted[d.done] = count - 1;
    d.chosen[d.done] = chosen;
    d.took[d.done] = since(begun);
    ++d.done;
    total += chosen;
    context += chosen;
    const double passed = since(start);
    if (d.undecided || stops || d.done == d.rounds || d.room - total < 2 || passed / d.done * (d.done + 1) > d.seconds) return;
    ids.assign(1, waiting.back());
    states = model.next_states(batch);  // of the last token and the drafts that hold
  }
}

}  // namespace dso
