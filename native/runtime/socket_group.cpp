#include "socket_group.hpp"

#include <algorithm>

#include "error.hpp"
#include "files.hpp"
#include "layout.hpp"

namespace dso {
namespace {

constexpr int kLookAfter = 1000;  // milliseconds between two looks, in case that something was missed

}  // namespace

SocketGroup::SocketGroup(const int32_t* data, const int32_t* alive, int32_t rank, int32_t ranks) : ProcessGroup(rank, ranks) {
  for (int32_t r = 0; r < ranks; ++r) {
    if (r == rank) continue;
    Peer peer{};
    peer.rank = r;
    peer.data = is_stream(data[r]) ? duplicate_file(data[r]) : -1;
    peer.alive = is_stream(alive[r]) ? duplicate_file(alive[r]) : -1;
    peers_.push_back(peer);
    if (peer.data < 0 || (peer.alive < 0 && alive[r] >= 0)) {
      close();
      fail(DSO_EINVAL, "rank %d: %d and %d are not two sockets that are connected and can be duplicated", r, data[r], alive[r]);
    }
  }
}

SocketGroup::~SocketGroup() { close(); }

void SocketGroup::close() {
  for (const Peer& peer : peers_)
    for (const int fd : {peer.data, peer.alive})
      if (fd >= 0) close_file(fd);
}

void SocketGroup::send(const uint8_t*, int64_t) { fail(DSO_EINVAL, "the connections of a group are for rows only"); }
void SocketGroup::receive(uint8_t*, int64_t) { fail(DSO_EINVAL, "the connections of a group are for rows only"); }

// The other processes find their connections to this one ended, if they do not find the lost one's.
void SocketGroup::lose(int32_t rank) {
  check_rank(rank);
  int32_t none = -1;
  lost_.compare_exchange_strong(none, rank);
  for (const Peer& peer : peers_) shut_socket(peer.data);
}

int32_t SocketGroup::look() {
  if (lost() >= 0) return lost();
  std::vector<Watch> watches;
  for (const Peer& peer : peers_) {
    watches.push_back({peer.data, false, false, true, false});
    watches.push_back({peer.alive, false, false, false, false});
  }
  wait_for_sockets(watches, 0);
  for (size_t i = 0; i < watches.size(); ++i)
    if (watches[i].ended) lose(peers_[i / 2].rank);
  return lost();
}

void SocketGroup::reserve(int64_t bytes) {
  if (bytes <= region_bytes_) return;
  const int64_t size = round_up(bytes, int64_t(64));
  regions_.reserve(ranks() * size);
  region_bytes_ = size;
}

void SocketGroup::exchange(const int64_t* bytes) {
  constexpr int64_t head = sizeof(Head);
  for (Peer& peer : peers_) {
    peer.sent_head = {exchanges_, bytes[rank()]};
    peer.expected = {exchanges_, bytes[peer.rank]};
    peer.to_send = head + bytes[rank()];
    peer.to_get = head + bytes[peer.rank];
    peer.sent = peer.got = 0;
  }
  const auto all = [&] { return advance(); };
  if (!spin_(all)) sleep();
}

bool SocketGroup::advance() {
  bool done = true;
  for (Peer& peer : peers_) {
    if (lost() >= 0) return true;
    done = (peer.done() || advance(peer)) && done;
  }
  return done;
}

bool SocketGroup::advance(Peer& peer) {
  constexpr int64_t head = sizeof(Head);
  if (peer.sent < peer.to_send) {
    const auto [first, second] = rest(bytes_of(peer.sent_head), {part(rank()), peer.to_send - head}, peer.sent);
    const int64_t n = send_now(peer.data, first, second);
    if (n < 0) return lose(peer.rank), true;
    peer.sent += n;
  }
  if (peer.got < peer.to_get) {
    const auto [first, second] = rest(bytes_of(peer.got_head), {part(peer.rank), peer.to_get - head}, peer.got);
    const int64_t n = receive_now(peer.data, first, second);
    // A process that is not at this exchange runs other plans: nothing that it sends can be used.
    if (n < 0 || (peer.got += n, peer.got >= head && !(peer.got_head == peer.expected))) return lose(peer.rank), true;
  }
  return peer.done();
}

void SocketGroup::sleep() {
  std::vector<Watch> watches;
  for (;;) {
    watches.clear();
    for (const Peer& peer : peers_) {
      if (!peer.done()) watches.push_back({peer.data, peer.got < peer.to_get, peer.sent < peer.to_send, false, false});
      watches.push_back({peer.alive, false, false, false, false});
    }
    wait_for_sockets(watches, kLookAfter);
    if (advance()) return;
    // What has arrived comes first: the other process may have ended after it had sent its part.
    for (const Watch& watch : watches)
      for (const Peer& peer : peers_)
        if (watch.ended && watch.fd == peer.alive && !peer.done()) return lose(peer.rank);
  }
}

}  // namespace dso
