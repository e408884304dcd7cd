// A group over several machines: each process has a connection to each other one, through which both send their parts of an
// exchange whole. So every process adds the same numbers in the same order, as with shared memory, and a step waits for a
// network once per exchange. The stream of a connection is a head and a part per exchange.
//
// One thread exchanges, the one that opens the stage of the receiving step, in all connections at once and in both directions:
// no process waits for another one to receive before it receives itself.
#pragma once
#include <atomic>
#include <vector>

#include "arena.hpp"
#include "process_group.hpp"
#include "sockets.hpp"
#include "spinning.hpp"

namespace dso {

class SocketGroup final : public ProcessGroup {
 public:
  // data: by rank, connected sockets, which nobody else uses. alive: by rank, further connections to the same processes, whose
  // failure tells that a machine is gone, which a connection that is not read at the other side cannot tell; -1: none.
  // Those of the own rank are not read. All are duplicated.
  SocketGroup(const int32_t* data, const int32_t* alive, int32_t rank, int32_t ranks);
  ~SocketGroup() override;

  void send(const uint8_t* data, int64_t bytes) override;
  void receive(uint8_t* data, int64_t bytes) override;
  void lose(int32_t rank) override;
  int32_t look() override;
  int32_t lost() const override { return lost_.load(); }
  void reserve(int64_t bytes) override;
  void begin() override { ++exchanges_; }
  uint8_t* part(int32_t rank) const override { return regions_.data() + rank * region_bytes_; }
  void exchange(const int64_t* bytes) override;

 private:
  struct Head {
    uint64_t exchange;
    int64_t bytes;
    bool operator==(const Head&) const = default;
  };
  struct Peer {
    int32_t rank;
    int data, alive;
    Head sent_head, got_head, expected;
    int64_t to_send, sent, to_get, got;  // bytes of the current exchange, with the heads
    bool done() const { return sent == to_send && got == to_get; }
  };
  static Bytes bytes_of(Head& head) { return {reinterpret_cast<uint8_t*>(&head), sizeof head}; }
  bool advance();  // sends and receives what can be now; true: all is there, or a process is lost
  bool advance(Peer& peer);
  void sleep();  // until `advance`
  void close();

  std::vector<Peer> peers_;
  std::atomic<int32_t> lost_{-1};
  Arena regions_;
  int64_t region_bytes_ = 0;
  uint64_t exchanges_ = 0;
  ExchangeSpin spin_;
};

}  // namespace dso
