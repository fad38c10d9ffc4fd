// Pretended GPUs: the parts of CUDA's runtime, its driver and NVML that torch, Horovod and owt call, on a machine
// without a GPU. Preload it; it is also libcuda.so.1 and libnvidia-ml.so.1.
//
// Device memory is host memory, so that copies are copies. No kernel can run: a launch is an error, and
// kernels_on_cpu.py computes in its place. Streams are in order, and asynchronous only where NCCL's stand-in is:
// the events of its collectives come when the other ranks have come.
//
//   PRETENDED_GPUS  how many this host has (2); CUDA_VISIBLE_DEVICES hides some, by number or UUID

#include "streams.h"

#include <cuda.h>
#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using Clock = std::chrono::steady_clock;

namespace {

// devices

constexpr size_t MEMORY = size_t(16) << 30;
constexpr int MAJOR = 9, MINOR = 0;
constexpr const char* NAME = "Pretended GPU";

int installed_gpus() {
  const char* text = getenv("PRETENDED_GPUS");
  return text ? atoi(text) : 2;
}

std::string uuid_of(int number) {
  char text[64];
  snprintf(text, sizeof text, "GPU-00000000-0000-0000-0000-%012x", number + 1);
  return text;
}

// The installed numbers of the GPUs that CUDA_VISIBLE_DEVICES shows; the first bad word ends the list.
std::vector<int> visible_gpus() {
  std::vector<int> numbers;
  const char* text = getenv("CUDA_VISIBLE_DEVICES");
  if (!text) {
    for (int number = 0; number < installed_gpus(); ++number) numbers.push_back(number);
    return numbers;
  }
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    int found = -1;
    for (int number = 0; number < installed_gpus(); ++number) {
      if (word == std::to_string(number) || word == uuid_of(number)) found = number;
    }
    if (found < 0) break;
    numbers.push_back(found);
  }
  return numbers;
}

const std::vector<int>& gpus() {
  static const std::vector<int> numbers = visible_gpus();
  return numbers;
}

thread_local int current_device = 0;

// streams and events

class Event {
 public:
  uint64_t record() {
    std::lock_guard<std::mutex> guard(mutex_);
    return ++recorded_;
  }
  void come(uint64_t record) {
    std::lock_guard<std::mutex> guard(mutex_);
    came_ = record;
    at_ = Clock::now();
    changed_.notify_all();
  }
  bool has_come() {
    std::lock_guard<std::mutex> guard(mutex_);
    return came_ == recorded_;
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return came_ == recorded_; });
  }
  Clock::time_point at() {
    std::lock_guard<std::mutex> guard(mutex_);
    return at_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t recorded_ = 0, came_ = 0;
  Clock::time_point at_{};
};

class Stream {
 public:
  void queue(std::function<void()> work) {
    std::lock_guard<std::mutex> guard(mutex_);
    push(std::move(work));
  }
  // At once if the stream is idle, else in its turn.
  void queue_or_run(std::function<void()> work) {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      if (!work_.empty()) return push(std::move(work));
    }
    work();
  }
  bool is_idle() {
    std::lock_guard<std::mutex> guard(mutex_);
    return work_.empty();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return work_.empty(); });
  }

 private:
  void push(std::function<void()> work) {
    work_.push_back(std::move(work));
    changed_.notify_all();
    if (!running_) {
      running_ = true;
      std::thread([this] { run(); }).detach();
    }
  }
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return !work_.empty(); });
      std::function<void()> next = work_.front();
      lock.unlock();
      next();
      lock.lock();
      work_.pop_front();  // only now: while it runs the stream is not idle
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  bool running_ = false;
};

// Never freed: their threads may run until the process ends.
std::mutex streams_mutex;
std::set<Stream*>& streams() {
  static auto* all = new std::set<Stream*>;
  return *all;
}

Stream* make_stream() {
  std::lock_guard<std::mutex> guard(streams_mutex);
  return *streams().insert(new Stream).first;
}

Stream& stream_of(cudaStream_t handle) {
  static Stream* standard = make_stream();
  bool is_standard = handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
  return is_standard ? *standard : *reinterpret_cast<Stream*>(handle);
}

Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

// memory, so that is_pinned() and the like are answered

struct Block {
  size_t bytes;
  cudaMemoryType type;
  int device;
};
std::mutex memory_mutex;
std::map<const char*, Block>& memory() {
  static auto* blocks = new std::map<const char*, Block>;
  return *blocks;
}

void* allocate(size_t bytes, cudaMemoryType type) {
  void* block = nullptr;
  if (posix_memalign(&block, 4096, bytes ? bytes : 1) != 0) return nullptr;
  std::lock_guard<std::mutex> guard(memory_mutex);
  memory()[static_cast<char*>(block)] = {bytes, type, current_device};
  return block;
}

void release(void* block) {
  if (!block) return;
  {
    std::lock_guard<std::mutex> guard(memory_mutex);
    memory().erase(static_cast<char*>(block));
  }
  free(block);
}

thread_local cudaError_t last_error = cudaSuccess;

std::atomic<int> host_waits{0};

cudaError_t refuse_kernel() {
  fprintf(stderr, "pretended GPU: a kernel is launched that kernels_on_cpu did not take\n");
  return last_error = cudaErrorNotSupported;
}

}  // namespace

void queue_on_stream(cudaStream_t stream, std::function<void()> work) { stream_of(stream).queue(std::move(work)); }

extern "C" {

// How often a thread of this process has waited for a stream, an event or the device; for tests to ask.
int pretended_host_waits() { return host_waits; }

// runtime: devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = int(gpus().size());
  return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= int(gpus().size())) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, NAME);
  int number = gpus()[device];
  properties->uuid.bytes[15] = char(number + 1);
  properties->pciBusID = number + 1;
  properties->major = MAJOR;
  properties->minor = MINOR;
  properties->totalGlobalMem = MEMORY;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  snprintf(id, length, "0000:%02x:00.0", gpus()[device] + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ++host_waits;
  std::set<Stream*> all;
  {
    std::lock_guard<std::mutex> guard(streams_mutex);
    all = streams();
  }
  for (Stream* stream : all) stream->wait();
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[32];
  snprintf(text, sizeof text, "CUDA error %d", int(error));
  return text;
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// runtime: streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = reinterpret_cast<cudaStream_t>(make_stream());
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return stream_of(stream).is_idle() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ++host_waits;
  stream_of(stream).wait();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (!event_of(event).has_come()) stream_of(stream).queue([event] { event_of(event).wait(); });
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long*,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // a stream may still record it
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  uint64_t record = event_of(event).record();
  stream_of(stream).queue_or_run([event, record] { event_of(event).come(record); });
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event_of(event).has_come() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ++host_waits;
  event_of(event).wait();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = std::chrono::duration<float, std::milli>(event_of(end).at() - event_of(start).at()).count();
  return cudaSuccess;
}

// runtime: memory

cudaError_t cudaMemGetInfo(size_t* unused, size_t* all) {
  *unused = *all = MEMORY;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** block, size_t bytes) {
  *block = allocate(bytes, cudaMemoryTypeDevice);
  return *block ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* block) {
  cudaDeviceSynchronize();
  release(block);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** block, size_t bytes, unsigned) {
  *block = allocate(bytes, cudaMemoryTypeHost);
  return *block ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* block) {
  release(block);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeUnregistered;
  attributes->device = -1;
  std::lock_guard<std::mutex> guard(memory_mutex);
  auto* place = static_cast<const char*>(pointer);
  auto found = memory().upper_bound(place);
  if (found != memory().begin() && place < (--found)->first + found->second.bytes) {
    attributes->type = found->second.type;
    attributes->device = found->second.device;
    attributes->hostPointer = attributes->devicePointer = const_cast<void*>(pointer);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  stream_of(stream).queue_or_run([=] { memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return cudaStreamSynchronize(nullptr);
}
cudaError_t cudaMemsetAsync(void* block, int value, size_t bytes, cudaStream_t stream) {
  stream_of(stream).queue_or_run([=] { memset(block, value, bytes); });
  return cudaSuccess;
}

// runtime: kernels

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return refuse_kernel(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return refuse_kernel(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return refuse_kernel(); }

// driver

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device;
  return CUDA_SUCCESS;
}
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

static CUresult not_pretended() { return CUDA_ERROR_NOT_SUPPORTED; }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  Dl_info here;
  dladdr(reinterpret_cast<void*>(&cuInit), &here);
  void* library = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, name) : nullptr;
  *function = found ? found : reinterpret_cast<void*>(&not_pretended);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// NVML, as far as owt and torch ask; pynvml takes the rest for a driver that does not report it

struct NvmlPci {
  char legacy_id[16];
  unsigned domain, bus, device, device_id, subsystem_id;
  char id[32];
};
struct NvmlMemory {
  unsigned long long total, unused, used;
};

int nvmlInit() { return 0; }
int nvmlInit_v2() { return 0; }
int nvmlInitWithFlags(unsigned) { return 0; }
int nvmlShutdown() { return 0; }
const char* nvmlErrorString(int) { return "pretended error"; }
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = installed_gpus();
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) {
  *handle = reinterpret_cast<void*>(size_t(index) + 1);
  return 0;
}
static int number_of(void* handle) { return int(reinterpret_cast<size_t>(handle)) - 1; }
int nvmlDeviceGetUUID(void* handle, char* uuid, unsigned length) {
  snprintf(uuid, length, "%s", uuid_of(number_of(handle)).c_str());
  return 0;
}
int nvmlDeviceGetName(void*, char* name, unsigned length) {
  snprintf(name, length, "%s", NAME);
  return 0;
}
int nvmlDeviceGetPciInfo_v3(void* handle, NvmlPci* pci) {
  memset(pci, 0, sizeof *pci);
  pci->bus = number_of(handle) + 1;
  snprintf(pci->id, sizeof pci->id, "00000000:%02x:00.0", pci->bus);
  return 0;
}
int nvmlDeviceGetMemoryInfo(void*, NvmlMemory* memory) {
  *memory = {MEMORY, MEMORY, 0};
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void*, int* major, int* minor) {
  *major = MAJOR;
  *minor = MINOR;
  return 0;
}
int nvmlSystemGetDriverVersion(char* version, unsigned length) {
  snprintf(version, length, "580.65.06");
  return 0;
}
int nvmlSystemGetCudaDriverVersion(int* version) {
  *version = 13000;
  return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int* version) { return nvmlSystemGetCudaDriverVersion(version); }

}  // extern "C"
