#include "decode.hpp"

#include <algorithm>
#include <chrono>
#include <vector>

#include "choice.hpp"
#include "error.hpp"
#include "plan.hpp"

namespace dso {
namespace {

void check(const dso_plan& plan, const dso_batch& b, const dso_decode& d) {
  if (d.steps < 1) fail(DSO_EINVAL, "decode.steps is %d, must be at least 1", d.steps);
  if (d.n_stops < 0 || (d.n_stops > 0 && !d.stops))
    fail(DSO_EINVAL, "decode.n_stops is %d, or decode.stops is NULL", d.n_stops);
  if (d.keep_logits < 0 || d.keep_logits > 1) fail(DSO_EINVAL, "decode.keep_logits is %d, must be 0 or 1", d.keep_logits);
  if (!d.choices || !d.tokens) fail(DSO_EINVAL, "decode.choices or decode.tokens is NULL");
  if (b.S < 1 || b.T != b.S || b.R != b.S)
    fail(DSO_EINVAL, "decode: batch.T is %d, batch.R is %d, must be S, %d", b.T, b.R, b.S);
  if (b.axes || b.visible_to || b.features) fail(DSO_EINVAL, "decode: batch.axes, visible_to and features must be NULL");
  if (!b.token_ids || !b.positions || !b.context_len || !b.query_len || !b.phase || !b.logits)
    fail(DSO_EINVAL, "decode: batch.token_ids, positions, context_len, query_len, phase or logits is NULL");
  if (b.inputs_embeds || b.hidden) fail(DSO_EINVAL, "decode: batch.inputs_embeds and hidden must be NULL");
  if (b.states && d.steps > 1 && !plan.next_states(b))
    fail(DSO_EINVAL, "decode: batch.%s is NULL: the states of each step are those of the one before", plan.next_states_name());
  if (d.steps > 1 && plan.has_states())
    fail(DSO_EINVAL, "decode.steps is %d, must be 1: the plan has recurrent states", d.steps);
  for (int32_t s = 0; s < b.S; ++s) {
    if (b.query_len[s] != 1) fail(DSO_EINVAL, "decode: batch.query_len[%d] is %d, must be 1", s, b.query_len[s]);
    if (b.phase[s] != DSO_PHASE_DECODE) fail(DSO_EINVAL, "decode: batch.phase[%d] is %d, must be 0", s, b.phase[s]);
    check_choice(d.choices[s], plan.vocab_size(), s, d.generator);
    if (d.token_of && d.choices[s].n_tokens > 0)
      fail(DSO_EINVAL, "decode: choices[%d].n_tokens is %d, must be 0 with token_of", s, d.choices[s].n_tokens);
    if (d.generator && (d.choices[s].first_variate > d.variates - plan.vocab_size() ||
                        (s > 0 && d.choices[s].first_variate < d.choices[s - 1].first_variate + plan.vocab_size())))
      fail(DSO_EINVAL, "decode: choices[%d].first_variate is %lld: rows must follow each other within %lld variates", s,
           (long long)d.choices[s].first_variate, (long long)d.variates);
  }
}

}  // namespace

void decode(dso_plan& plan, const dso_batch& batch, dso_decode& d, const std::function<void(const dso_batch&)>& run) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  check(plan, batch, d);
  d.done = d.undecided = 0;
  const size_t rows = size_t(batch.S);
  std::vector<int32_t> ids(batch.token_ids, batch.token_ids + rows), positions(batch.positions, batch.positions + rows),
      lengths(batch.context_len, batch.context_len + rows);
  dso_batch b = batch;
  b.token_ids = ids.data();
  b.positions = positions.data();
  b.context_len = lengths.data();
  std::vector<Penalties> penalties;
  for (size_t s = 0; s < rows; ++s) penalties.emplace_back(d.choices[s], plan.vocab_size());
  Chooser chooser(plan.kernels(), plan.vocab_size());
  Mt19937 generator(d.generator ? *d.generator : dso_mt19937{1, 0, {}});
  const int64_t hidden_floats = int64_t(rows) * plan.hidden_width(), draft_floats = int64_t(rows) * plan.draft_width();
  for (;;) {
    run(b);
    generator.mark();
    for (size_t s = 0; s < rows; ++s) {
      ids[s] = chooser.choose(b.logits + int64_t(s) * plan.vocab_size(), d.choices[s], penalties[s], d.done,
                              d.generator ? &generator : nullptr);
      if (ids[s] == DSO_UNDECIDED) {
        d.undecided = 1;
        return;
      }
      if (d.token_of) ids[s] = d.token_of[ids[s]];
    }
    std::copy(ids.begin(), ids.end(), d.tokens + int64_t(d.done) * int64_t(rows));
    ++d.done;
    if (d.generator) {
      generator.skip_to(d.variates);
      *d.generator = generator.state();
    }
    const double passed = std::chrono::duration<double>(Clock::now() - start).count();
    const bool stops = std::any_of(ids.begin(), ids.end(), [&](int32_t token) {
      return std::find(d.stops, d.stops + d.n_stops, token) != d.stops + d.n_stops;
    });
    if (stops || d.done == d.steps || passed / d.done * (d.done + 1) > d.seconds) return;
    for (size_t s = 0; s < rows; ++s) {
      if (!d.token_of) penalties[s].add(ids[s]);
      ++positions[s];
      ++lengths[s];
    }
    if (b.states) b.states = plan.next_states(b);
    if (b.last_hidden) b.last_hidden += hidden_floats;
    if (b.draft_states) b.draft_states += draft_floats;
    if (d.keep_logits) b.logits += int64_t(rows) * plan.vocab_size();
  }
}

}  // namespace dso
