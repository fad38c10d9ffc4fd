/* A CUDA runtime and driver without a GPU, preloaded: enough for torch's streams, events, pinned memory and
 * autograd's device thread to exist. It has no device memory: tensors on the GPU are torch's fake ones. Whatever
 * would compute on the GPU aborts, with its name.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int error;
typedef void *pointer;
typedef struct { unsigned x, y, z; } dim3;

static __thread int current_device;
static long last_handle = 4096;

#define SUCCEEDS(name, ...) error name(__VA_ARGS__) { return 0; }
#define CREATES(name, ...) error name(pointer *made, ##__VA_ARGS__) { *made = (pointer)(last_handle += 16); return 0; }
#define NEVER(name, ...) \
    error name(__VA_ARGS__) { write(2, "pretended GPU: " #name "\n", sizeof(#name) + 16); abort(); }

/* one device, of a current driver */
error cudaGetDeviceCount(int *count) { *count = 1; return 0; }
error cudaGetDevice(int *device) { *device = current_device; return 0; }
error cudaSetDevice(int device) { current_device = device; return 0; }
error cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
error cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
error cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}
error cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
error cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = 80ul << 30; return 0; }
const char *cudaGetErrorString(error code) { return "pretended"; }
const char *cudaGetErrorName(error code) { return "pretended"; }
SUCCEEDS(cudaGetLastError, void)
SUCCEEDS(cudaPeekAtLastError, void)
SUCCEEDS(cudaDeviceSynchronize, void)
SUCCEEDS(cudaGetDeviceProperties, pointer properties, int device)
SUCCEEDS(cudaGetDeviceProperties_v2, pointer properties, int device)

/* streams and events: all work is done at once */
CREATES(cudaStreamCreateWithPriority, unsigned flags, int priority)
CREATES(cudaStreamCreateWithFlags, unsigned flags)
CREATES(cudaEventCreate)
CREATES(cudaEventCreateWithFlags, unsigned flags)
error cudaStreamIsCapturing(pointer stream, int *capturing) { *capturing = 0; return 0; }
error cudaEventElapsedTime(float *ms, pointer start, pointer end) { *ms = 1; return 0; }
error cudaEventElapsedTime_v2(float *ms, pointer start, pointer end) { *ms = 1; return 0; }
SUCCEEDS(cudaStreamDestroy, pointer stream)
SUCCEEDS(cudaStreamQuery, pointer stream)
SUCCEEDS(cudaStreamSynchronize, pointer stream)
SUCCEEDS(cudaStreamWaitEvent, pointer stream, pointer event, unsigned flags)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode, int *mode)
SUCCEEDS(cudaEventDestroy, pointer event)
SUCCEEDS(cudaEventQuery, pointer event)
SUCCEEDS(cudaEventRecord, pointer event, pointer stream)
SUCCEEDS(cudaEventRecordWithFlags, pointer event, pointer stream, unsigned flags)
SUCCEEDS(cudaEventSynchronize, pointer event)

/* memory of the host */
error cudaHostAlloc(pointer *made, size_t bytes, unsigned flags) { *made = calloc(1, bytes + 64); return 0; }
error cudaPointerGetAttributes(pointer attributes, pointer memory) { memset(attributes, 0, 24); return 0; }
SUCCEEDS(cudaFreeHost, pointer memory)
SUCCEEDS(cudaHostRegister, pointer memory, size_t bytes, unsigned flags)
SUCCEEDS(cudaHostUnregister, pointer memory)

/* there is no device memory and nothing computes */
error cudaMalloc(pointer *made, size_t bytes) { return 2; /* out of memory */ }
NEVER(cudaLaunchKernel, pointer function, dim3 grid, dim3 block, pointer *arguments, size_t shared, pointer stream)

/* the driver */
SUCCEEDS(cuInit, unsigned flags)
error cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
error cuCtxGetCurrent(pointer *context) { *context = (pointer)1; return 0; }
SUCCEEDS(cuCtxSetCurrent, pointer context)
error cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
