#include "expert_groups.hpp"

namespace dso {
namespace {

// The place of an expert in the stack; -1: another process has it.
int64_t place_of(float x, const OwnExperts& own) {
  const int64_t number = x >= 0 && x < float(own.all) ? int64_t(x) : 0, place = number - own.first;
  return place >= 0 && place < own.experts ? place : -1;
}

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
  auto expert_of = [&](int64_t token, int64_t j) { return place_of(routes.f32(token)[j], chosen); };
  int64_t own = 0;

  if (!grouped) {
    for (int64_t p = 0; p < pairs; ++p) {
      const int64_t token = p / top_k, j = p % top_k, expert = expert_of(token, j);
      if (expert < 0) continue;
      put(own, token, j);
      groups_.push_back({expert, own, token < decode ? own + 1 : own, own + 1});
      ++own;
    }
    tokens_.resize(own);
    weights_.resize(own);
    return;
  }

  places_.assign(chosen.experts, 0);
  for (int64_t t = 0; t < routes.count; ++t)
    for (int64_t j = 0; j < top_k; ++j)
      if (const int64_t expert = expert_of(t, j); expert >= 0) ++places_[expert], ++own;
  tokens_.resize(own);
  weights_.resize(own);
  int64_t begin = 0;
  for (int64_t e = 0; e < chosen.experts; ++e) {
    const int64_t end = begin + places_[e];
    if (begin < end) groups_.push_back({e, begin, begin, end});
    places_[e] = begin;
    begin = end;
  }
  auto place_rows = [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      for (int64_t j = 0; j < top_k; ++j)
        if (const int64_t expert = expert_of(t, j); expert >= 0) put(places_[expert]++, t, j);
  };
  place_rows(0, decode);
  for (ExpertGroup& g : groups_) g.prefill = places_[g.expert];
  place_rows(decode, routes.count);
}

}  // namespace dso
