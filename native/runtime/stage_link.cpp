#include "stage_link.hpp"

#include <cstring>
#include <tuple>
#include <vector>

#include "error.hpp"
#include "sockets.hpp"

namespace dso {
namespace {

constexpr uint32_t kRows = 0x52776f72, kEnd = 0x52646e65;  // no pickle begins with these
constexpr int kLookAfter = 1000;                           // milliseconds between two looks, in case that something was missed

struct Head {
  uint8_t bytes[8];
  explicit Head(uint32_t kind = 0, int64_t rest = 0) {
    const uint32_t length = uint32_t(sizeof kind + rest);
    for (int i = 0; i < 4; ++i) {
      bytes[i] = uint8_t(length >> (24 - 8 * i));
      bytes[4 + i] = uint8_t(kind >> (24 - 8 * i));
    }
  }
  bool operator==(const Head& other) const { return std::memcmp(bytes, other.bytes, sizeof bytes) == 0; }
};

// Waits until more can be sent or is there.
void wait_for(int socket, bool readable) {
  std::vector<Watch> watches{{socket, readable, !readable, false, false}};
  wait_for_sockets(watches, kLookAfter);
}

// Whether no more will come. Waits a moment for more: what is there already keeps the socket readable.
bool has_ended(int socket) {
  std::vector<Watch> watches{{socket, false, false, true, false}};
  wait_for_sockets(watches, 1);
  return watches[0].ended;
}

// Sends or receives all bytes of a head and the rows; false: the connection has ended.
template <class Transfer>
bool transfer(int socket, bool receives, Bytes head, Bytes rows, const Transfer& now) {
  while (head.bytes + rows.bytes > 0) {
    const int64_t done = now(socket, head, rows);
    if (done < 0) return false;
    if (done == 0) wait_for(socket, receives);
    std::tie(head, rows) = rest(head, rows, done);
  }
  return true;
}

}  // namespace

StageLink::StageLink(int socket) : socket_(socket) {
  if (!is_stream(socket)) fail(DSO_EINVAL, "link %d is not a connected socket", socket);
}

bool StageLink::send(uint32_t kind, float* rows, int64_t bytes) const {
  Head head(kind, bytes);
  return transfer(socket_, false, {head.bytes, sizeof head.bytes}, {reinterpret_cast<uint8_t*>(rows), bytes}, send_now);
}

bool StageLink::send_rows(float* rows, int64_t count) const { return send(kRows, rows, 4 * count); }

bool StageLink::send_end() const { return send(kEnd, nullptr, 0); }

Received StageLink::receive_rows(float* rows, int64_t count) const {
  Head head;
  const Bytes all{head.bytes, sizeof head.bytes};
  for (int64_t there = 0; there < all.bytes;) {
    there = peek_now(socket_, all);
    if (there < 0) return Received::kLost;
    if (there == 0) wait_for(socket_, true);
    if (there > 0 && there < all.bytes && has_ended(socket_)) return Received::kLost;
  }
  const bool ends = head == Head(kEnd);
  if (!ends && !(head == Head(kRows, 4 * count))) return Received::kLost;
  const Bytes rest{reinterpret_cast<uint8_t*>(rows), ends ? 0 : 4 * count};
  if (!transfer(socket_, true, all, rest, receive_now)) return Received::kLost;
  return ends ? Received::kEnd : Received::kRows;
}

}  // namespace dso
