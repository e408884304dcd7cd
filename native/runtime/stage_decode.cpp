#include "stage_decode.hpp"

#include <vector>

#include "check_arguments.hpp"
#include "decode.hpp"
#include "plan.hpp"
#include "stage_link.hpp"

namespace dso {
namespace {

void check_rows(const dso_plan& plan, const dso_batch& b) {
  if (b.S < 1 || b.T != b.S || b.R != 0)
    fail(DSO_EINVAL, "stages: batch.T is %d, must be S, %d, and batch.R %d, 0", b.T, b.S, b.R);
  if (!b.positions || !b.context_len) fail(DSO_EINVAL, "stages: batch.positions or context_len is NULL");
  if (!b.last_hidden || plan.hidden_width() == 0) fail(DSO_EINVAL, "stages: batch.last_hidden is NULL, or the plan has none");
  if (b.states || b.inputs_embeds) fail(DSO_EINVAL, "stages: batch.states and inputs_embeds must be NULL");
}

// Says when it ends that there are no more steps, also if one has failed.
class Links {
 public:
  Links(const int32_t* sockets, int32_t count) {
    for (int32_t i = 0; i < count; ++i) links_.emplace_back(sockets[i]);
  }
  ~Links() {
    for (const StageLink& link : links_) link.send_end();
  }
  Links(const Links&) = delete;

  // Through the layers of all others; -1, or the index of the link that has ended.
  int32_t pass(float* rows, int64_t count) const {
    for (size_t i = 0; i < links_.size(); ++i)
      if (!links_[i].send_rows(rows, count) || links_[i].receive_rows(rows, count) != Received::kRows) return int32_t(i);
    return -1;
  }

 private:
  std::vector<StageLink> links_;
};

}  // namespace

void decode_stages(dso_plan& tail, const dso_batch& batch, dso_decode& d, dso_stages& stages) {
  stages.lost = -1;
  if (stages.n_links < 1 || !stages.links) fail(DSO_EINVAL, "stages.n_links is %d, or stages.links is NULL", stages.n_links);
  const Links links(stages.links, stages.n_links);
  dso_plan& first = given(stages.first, "stages.first");
  dso_batch own = given(stages.batch, "stages.batch");
  check_rows(first, own);
  if (own.T != batch.T || batch.states)
    fail(DSO_EINVAL, "stages.batch.T is %d, must be %d, and batch.states NULL", own.T, batch.T);
  decode(tail, batch, d, [&](const dso_batch& step) {
    own.token_ids = step.token_ids;
    own.positions = step.positions;
    own.context_len = step.context_len;
    first.run(own);
    stages.lost = links.pass(own.last_hidden, own.T * first.hidden_width());
    if (stages.lost >= 0) fail(DSO_ELOST, "link %d has ended", stages.lost);
    dso_batch last = step;
    last.states = own.last_hidden;
    tail.run(last);
  });
}

void follow(dso_plan& plan, const dso_batch& batch, int32_t link) {
  check_rows(plan, batch);
  const StageLink leader(link);
  const size_t rows = size_t(batch.S);
  std::vector<int32_t> positions(batch.positions, batch.positions + rows), lengths(batch.context_len, batch.context_len + rows);
  std::vector<float> states(rows * size_t(plan.hidden_width()));
  dso_batch b = batch;
  b.positions = positions.data();
  b.context_len = lengths.data();
  b.token_ids = nullptr;  // those of later steps are not known here
  b.states = states.data();
  for (;;) {
    const Received received = leader.receive_rows(states.data(), int64_t(states.size()));
    if (received == Received::kEnd) return;
    if (received == Received::kLost) fail(DSO_ELOST, "the first process");
    plan.run(b);
    if (!leader.send_rows(b.last_hidden, int64_t(states.size()))) fail(DSO_ELOST, "the first process");
    for (size_t s = 0; s < rows; ++s) {
      ++positions[s];
      ++lengths[s];
    }
  }
}

}  // namespace dso
