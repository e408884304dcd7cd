#include "expert_groups.hpp"

namespace dso {
namespace {

int64_t expert_number(float x, int64_t experts) { return x >= 0 && x < float(experts) ? int64_t(x) : 0; }

}  // namespace

void ExpertGroups::reserve(int64_t tokens) {
  const int64_t pairs = tokens * chosen.top_k;
  tokens_.reserve(pairs);
  weights_.reserve(pairs);
  groups_.reserve(grouped ? std::min(pairs, chosen.experts) : pairs);
  places_.reserve(chosen.experts);
}

void ExpertGroups::build(const Rows& routes, int64_t decode) {
  const int64_t top_k = chosen.top_k, pairs = routes.count * top_k;
  tokens_.resize(pairs);
  weights_.resize(pairs);
  groups_.clear();
  auto put = [&](int64_t place, int64_t token, int64_t j) {
    tokens_[place] = int32_t(token);
    weights_[place] = routes.f32(token)[top_k + j];
  };
  auto expert_of = [&](int64_t token, int64_t j) { return expert_number(routes.f32(token)[j], chosen.experts); };

  if (!grouped) {
    for (int64_t p = 0; p < pairs; ++p) {
      const int64_t token = p / top_k, j = p % top_k;
      put(p, token, j);
      groups_.push_back({expert_of(token, j), p, token < decode ? p + 1 : p, p + 1});
    }
    return;
  }

  places_.assign(chosen.experts, 0);
  for (int64_t t = 0; t < routes.count; ++t)
    for (int64_t j = 0; j < top_k; ++j) ++places_[expert_of(t, j)];
  int64_t begin = 0;
  for (int64_t e = 0; e < chosen.experts; ++e) {
    const int64_t end = begin + places_[e];
    if (begin < end) groups_.push_back({e, begin, begin, end});
    places_[e] = begin;
    begin = end;
  }
  auto place_rows = [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      for (int64_t j = 0; j < top_k; ++j) put(places_[expert_of(t, j)]++, t, j);
  };
  place_rows(0, decode);
  for (ExpertGroup& g : groups_) g.prefill = places_[g.expert];
  place_rows(decode, routes.count);
}

}  // namespace dso
