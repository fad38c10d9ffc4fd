// Pretended NCCL: the calls that Horovod makes, between the ranks of one host, over shared memory. Preload it with
// gpu.cc's library. A collective runs in its stream's thread and, like a kernel, waits for its peers until they
// come or its communicator is aborted.
//
//   PRETENDED_NCCL_FAULT=KIND@RANK:CALL  plants a fault at the CALLth collective of that rank in its job:
//       init    ncclCommInitRank fails (no CALL; RANK may be `all`)
//       call    the collective's call fails
//       async   the collective never ends, and ncclCommGetAsyncError says why
//       kill    the process kills itself in the middle of the collective
//       stop    and stops itself there
//
// As in NCCL, two ranks on one GPU are refused, unless NCCL_MULTI_RANK_GPU_ENABLE=1 or their NCCL_HOSTID differ.

#include "streams.h"

#include <fcntl.h>
#include <nccl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int MAX_RANKS = 8;
constexpr size_t SLOT = size_t(8) << 20;  // bytes that a rank shows to the others at a time

struct Shared {
  struct Rank {
    std::atomic<uint64_t> steps;  // that it has come to
    char gpu[64];                 // host and PCI address
  } ranks[MAX_RANKS];
  char slots[MAX_RANKS][SLOT];
};

thread_local char last_error[256];

struct Fault {
  std::string kind;
  int rank = -2;  // -1: all
  int call = 0;

  bool is(const char* what, int of_rank) const { return kind == what && (rank == -1 || rank == of_rank); }
};

Fault read_fault() {
  Fault fault;
  char kind[16] = "", rank[16] = "";
  const char* text = getenv("PRETENDED_NCCL_FAULT");
  if (text && sscanf(text, "%15[a-z]@%15[a-z0-9]:%d", kind, rank, &fault.call) >= 2) {
    fault.kind = kind;
    fault.rank = std::string(rank) == "all" ? -1 : atoi(rank);
  }
  return fault;
}

const Fault& fault() {
  static const Fault planted = read_fault();
  return planted;
}

int job_rank() {  // of the process, as the launcher numbers it
  const char* rank = getenv("HOROVOD_RANK");
  return rank ? atoi(rank) : 0;
}

std::atomic<int> collectives{0};

}  // namespace

struct ncclComm {
  Shared* shared;
  int rank, size;
  uint64_t step = 0;  // of the collectives' thread
  std::atomic<int> unfinished{0};
  std::atomic<bool> aborted{false};
  std::atomic<int> async_error{ncclSuccess};
  std::atomic<bool> freed{false};

  char* slot(int of) { return shared->slots[of]; }

  // Wait for all ranks to come to the same step; false if the communicator was aborted before.
  bool meet() {
    shared->ranks[rank].steps.store(++step);
    for (int other = 0; other < size; ++other) {
      for (int looks = 0; shared->ranks[other].steps.load() < step; ++looks) {
        if (aborted) return false;
        if (looks < 100) std::this_thread::yield();
        else std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    }
    return !aborted;
  }

  void wait_for_abort() {
    while (!aborted) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
};

namespace {

size_t width(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
    default:
      return 4;
  }
}

template <class T>
void reduce_as(ncclComm* comm, T* out, size_t first, size_t count, ncclRedOp_t op) {
  for (size_t i = 0; i < count; ++i) {
    double value = reinterpret_cast<T*>(comm->slot(0))[first + i];
    for (int rank = 1; rank < comm->size; ++rank) {
      double other = reinterpret_cast<T*>(comm->slot(rank))[first + i];
      value = op == ncclMax    ? std::max(value, other)
              : op == ncclMin  ? std::min(value, other)
              : op == ncclProd ? value * other
                               : value + other;
    }
    out[i] = T(op == ncclAvg ? value / comm->size : value);
  }
}

// `count` elements of the ranks' slots from `first` on, reduced into `out`.
void reduce_slots(ncclComm* comm, void* out, size_t first, size_t count, ncclDataType_t type, ncclRedOp_t op) {
  switch (type) {
    case ncclInt8: return reduce_as(comm, static_cast<int8_t*>(out), first, count, op);
    case ncclUint8: return reduce_as(comm, static_cast<uint8_t*>(out), first, count, op);
    case ncclInt32: return reduce_as(comm, static_cast<int32_t*>(out), first, count, op);
    case ncclInt64: return reduce_as(comm, static_cast<int64_t*>(out), first, count, op);
    case ncclFloat16: return reduce_as(comm, static_cast<_Float16*>(out), first, count, op);
    case ncclFloat32: return reduce_as(comm, static_cast<float*>(out), first, count, op);
    case ncclFloat64: return reduce_as(comm, static_cast<double*>(out), first, count, op);
    default: fprintf(stderr, "pretended NCCL: type %d is not pretended\n", type); abort();
  }
}

// Act on a fault of this collective in its thread; false if it is not to go on.
bool survives(ncclComm* comm, int call) {
  if (call != fault().call || fault().rank != job_rank()) return true;
  // raise, not kill: a signal to the process may reach another thread first, and this one goes on for a while
  if (fault().kind == "kill") raise(SIGKILL);
  if (fault().kind == "stop") raise(SIGSTOP);
  if (fault().kind == "async") {
    comm->async_error = ncclRemoteError;
    comm->wait_for_abort();
    return false;
  }
  return true;
}

// A group collects point-to-point transfers and runs them together; collectives keep their order.
struct Transfer {
  bool sends;
  int peer;
  void* data;
  size_t bytes;
};
struct Group {
  int depth = 0;
  ncclComm* comm = nullptr;
  cudaStream_t stream = nullptr;
  std::vector<Transfer> transfers;
};
thread_local Group group;

void check_alive(ncclComm* comm) {
  if (comm->freed) {
    fprintf(stderr, "pretended NCCL: a communicator is used after it was freed\n");
    abort();
  }
}

ncclResult_t start(ncclComm* comm, cudaStream_t stream, std::function<void()> kernel) {
  check_alive(comm);
  int call = ++collectives;
  if (fault().is("call", job_rank()) && call == fault().call) {
    snprintf(last_error, sizeof last_error, "planted at collective %d", call);
    return ncclInternalError;
  }
  ++comm->unfinished;
  queue_on_stream(stream, [=] {
    if (!comm->aborted && survives(comm, call)) kernel();
    --comm->unfinished;
  });
  return ncclSuccess;
}

void wait_until_finished(ncclComm* comm) {
  while (comm->unfinished) std::this_thread::sleep_for(std::chrono::microseconds(200));
  comm->freed = true;  // its memory stays, so that a later use is seen
}

bool share_a_gpu(ncclComm* comm, int* other) {
  const char* allowed = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  if (allowed && atoi(allowed)) return false;
  for (*other = 0; *other < comm->size; ++*other) {
    const char* gpu = comm->shared->ranks[*other].gpu;
    if (*other != comm->rank && strcmp(gpu, comm->shared->ranks[comm->rank].gpu) == 0) return true;
  }
  return false;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> number{0};
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "/pretended-nccl-%d-%d", getpid(), ++number);
  return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* result, int size, ncclUniqueId id, int rank) {
  *result = nullptr;
  if (size > MAX_RANKS) return ncclInvalidArgument;
  if (fault().is("init", job_rank())) {
    snprintf(last_error, sizeof last_error, "planted at init");
    return ncclInvalidUsage;
  }
  int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, sizeof(Shared)) != 0) return ncclSystemError;
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return ncclSystemError;
  auto* comm = new ncclComm{static_cast<Shared*>(memory), rank, size};
  int device;
  char pci[16];
  cudaGetDevice(&device);
  cudaDeviceGetPCIBusId(pci, sizeof pci, device);
  const char* host = getenv("NCCL_HOSTID");
  snprintf(comm->shared->ranks[rank].gpu, sizeof(Shared::Rank::gpu), "%s %s", host ? host : "", pci);
  comm->meet();
  shm_unlink(id.internal);
  int other;
  bool shared = share_a_gpu(comm, &other);
  comm->meet();
  if (shared) {
    snprintf(last_error, sizeof last_error, "Duplicate GPU detected : rank %d and rank %d both on CUDA device %s",
             rank, other, pci);
    return ncclInvalidUsage;
  }
  *result = comm;
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  check_alive(comm);
  wait_until_finished(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  check_alive(comm);
  comm->aborted = true;
  wait_until_finished(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  check_alive(comm);
  *error = ncclResult_t(comm->async_error.load());
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess: return "no error";
    case ncclSystemError: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case ncclInternalError: return "internal error - please report this issue to the NCCL developers";
    case ncclInvalidArgument: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case ncclInvalidUsage: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case ncclRemoteError: return "remote process exited or there was a network error";
    default: return "unknown result code";
  }
}
const char* ncclGetLastError(ncclComm_t) { return last_error; }

ncclResult_t ncclAllReduce(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  return start(comm, stream, [=] {
    size_t most = SLOT / width(type);
    for (size_t first = 0; first < count; first += most) {
      size_t now = std::min(most, count - first);
      memcpy(comm->slot(comm->rank), static_cast<const char*>(in) + first * width(type), now * width(type));
      if (!comm->meet()) return;
      reduce_slots(comm, static_cast<char*>(out) + first * width(type), 0, now, type, op);
      if (!comm->meet()) return;
    }
  });
}
ncclResult_t ncclReduce(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t stream) {
  return start(comm, stream, [=] {
    size_t most = SLOT / width(type);
    for (size_t first = 0; first < count; first += most) {
      size_t now = std::min(most, count - first);
      memcpy(comm->slot(comm->rank), static_cast<const char*>(in) + first * width(type), now * width(type));
      if (!comm->meet()) return;
      if (comm->rank == root)
        reduce_slots(comm, static_cast<char*>(out) + first * width(type), 0, now, type, op);
      if (!comm->meet()) return;
    }
  });
}
// Each rank gets its share of the sum; a share goes through the slots in pieces, one after another.
ncclResult_t ncclReduceScatter(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
  return start(comm, stream, [=] {
    size_t most = SLOT / width(type) / comm->size;
    for (size_t first = 0; first < count; first += most) {
      size_t now = std::min(most, count - first);
      for (int owner = 0; owner < comm->size; ++owner)
        memcpy(comm->slot(comm->rank) + owner * now * width(type),
               static_cast<const char*>(in) + (owner * count + first) * width(type), now * width(type));
      if (!comm->meet()) return;
      reduce_slots(comm, static_cast<char*>(out) + first * width(type), comm->rank * now, now, type, op);
      if (!comm->meet()) return;
    }
  });
}
ncclResult_t ncclAllGather(const void* in, void* out, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  size_t bytes = count * width(type);
  return start(comm, stream, [=] {
    for (size_t first = 0; first < bytes; first += SLOT) {
      size_t now = std::min(SLOT, bytes - first);
      memcpy(comm->slot(comm->rank), static_cast<const char*>(in) + first, now);
      if (!comm->meet()) return;
      for (int rank = 0; rank < comm->size; ++rank)
        memcpy(static_cast<char*>(out) + rank * bytes + first, comm->slot(rank), now);
      if (!comm->meet()) return;
    }
  });
}
ncclResult_t ncclBroadcast(const void* in, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  size_t bytes = count * width(type);
  return start(comm, stream, [=] {
    for (size_t first = 0; first < bytes; first += SLOT) {
      size_t now = std::min(SLOT, bytes - first);
      if (comm->rank == root) memcpy(comm->slot(root), static_cast<const char*>(in) + first, now);
      if (!comm->meet()) return;
      memcpy(static_cast<char*>(out) + first, comm->slot(root), now);
      if (!comm->meet()) return;
    }
  });
}
ncclResult_t ncclBcast(void* data, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(data, data, count, type, root, comm, stream);
}

ncclResult_t ncclGroupStart() {
  ++group.depth;
  return ncclSuccess;
}
static ncclResult_t add(Transfer transfer, ncclComm_t comm, cudaStream_t stream) {
  group.comm = comm;
  group.stream = stream;
  group.transfers.push_back(transfer);
  return ncclSuccess;
}
ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return add({true, peer, const_cast<void*>(data), count * width(type)}, comm, stream);
}
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return add({false, peer, data, count * width(type)}, comm, stream);
}
// Each rank's slot has a part for each peer, and the first byte of a part says whether its rank needs another round:
// all ranks go on until the longest transfer of any is done.
ncclResult_t ncclGroupEnd() {
  if (--group.depth > 0 || group.transfers.empty()) return ncclSuccess;
  ncclComm* comm = group.comm;
  auto transfers = std::move(group.transfers);
  group.transfers.clear();
  return start(comm, group.stream, [=] {
    const size_t part = SLOT / comm->size, most = part - 64;
    auto part_of = [=](int from, int to) { return comm->slot(from) + to * part; };
    size_t longest = 0;
    for (const Transfer& one : transfers) longest = std::max(longest, one.bytes);
    bool all_done = false;
    for (size_t first = 0; !all_done; first += most) {
      bool more = longest > first + most;
      for (int peer = 0; peer < comm->size; ++peer) *part_of(comm->rank, peer) = more;
      for (const Transfer& one : transfers)
        if (one.sends && one.bytes > first)
          memcpy(part_of(comm->rank, one.peer) + 64, static_cast<char*>(one.data) + first,
                 std::min(most, one.bytes - first));
      if (!comm->meet()) return;
      all_done = true;
      for (int peer = 0; peer < comm->size; ++peer) all_done &= !*part_of(peer, comm->rank);
      for (const Transfer& one : transfers)
        if (!one.sends && one.bytes > first)
          memcpy(static_cast<char*>(one.data) + first, part_of(one.peer, comm->rank) + 64,
                 std::min(most, one.bytes - first));
      if (!comm->meet()) return;
    }
  });
}

}  // extern "C"
