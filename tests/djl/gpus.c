/* A CUDA runtime that reports four GPUs: DJL's MPI engines do not start where there is none. */

#include <stddef.h>

int cudaGetDeviceCount(int *count) { *count = 4; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 11070; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 8; return 0; }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = (size_t)16 << 30; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
const char *cudaGetErrorString(int code) { return "none"; }
