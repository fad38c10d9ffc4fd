// Streams of the pretended GPUs: work in order, beside the threads that queue it.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

// Run `work` after all that was queued on the stream before, in the stream's own thread. For what may wait for
// other ranks; a copy on an idle stream is done at once, by the caller.
void queue_on_stream(cudaStream_t stream, std::function<void()> work);
