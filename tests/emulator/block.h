// One block of threads on one OS thread.
#pragma once

#include "emu.h"
#include "fiber.h"

// Runs block `index` (x fastest) of a launch; false if it broke a rule, which is then reported.
bool block_run(const Launch& launch, uint64_t index);

// Operations of a whole warp that are not in block.cpp, by number.
enum { OP_LDMATRIX = 110, OP_LDMATRIX_TRANS, OP_MMA, OP_WGMMA_WAIT, OP_MBARRIER };
// The running lane comes to an operation of its warp: true for the lane that comes last, which computes for all and goes
// on. The others wait, and find their results when they are back.
bool warp_arrives(int op, int line);
void warp_waits();
// The same for the 128 threads of a warpgroup, which meet in `wgmma_wait`.
bool warpgroup_arrives(int line);

// Where `p` lies in the block's shared memory. An access that leaves it or is not aligned to its size is a violation.
unsigned shared_offset(const void* p, unsigned bytes, const char* what, int line);
// A thread that waits for no rendezvous (`warp_waits` alone) may go on.
void thread_ready(unsigned thread);
// What lies there, of the running block.
const unsigned char* shared_at(unsigned offset);
unsigned shared_bytes();

// An access by the running thread: a violation where its launch is programmatic and the thread has not waited.
void griddep_check(const char* what, int line);

// A site is reached: true where the setting `drop` says that it does nothing.
bool dropped(Site kind, int line);

// Bank conflicts, where the setting `banks` asks for them: one lane's access; the rows that a warp's ldmatrix reads, eight
// of 16 bytes per matrix; and the end of a block.
enum class Access { Load, Store, Copy, Matrix, COUNT };
void banks_access(Access what, unsigned offset, unsigned bytes, int line);
void banks_matrix(const unsigned* offsets, unsigned matrices, int line);
void banks_end(const Kernel& kernel);

// Asynchronous copies: a new block has none; a thread that exits may leave none behind; and the adversary's move when a
// thread comes to a barrier.
void copies_start(uint64_t block);
void copies_exit();
void copies_play();

// Products of warpgroups: a new block has none; a thread that exits may leave none behind; the adversary's move; and what the
// async proxy, which reads their operands, may rely on: a thread has begun a copy to 16 bytes or has seen it land, has stored,
// has fenced, or all threads of the block have met.
void wgmma_start(const Launch& launch, uint64_t block);
void wgmma_exit();
void wgmma_play();
bool wgmma_reads(unsigned offset, unsigned bytes);  // does one in flight?
void proxy_copying(unsigned offset);
void proxy_written(unsigned offset);
void proxy_barrier();
// And what a tensor copy, whose bytes count for a phase of a barrier, is about to write, or a thread to read.
void proxy_tensor(unsigned offset, unsigned bytes, unsigned barrier, uint32_t phase, int line);
void proxy_read(unsigned offset, const char* what, int line);

// Tensor copies and the barriers that they arrive at: a new block has none; where no thread can go on, one lands (false: none is on
// its way); a block that ends may leave none behind; threads meet in a barrier, and each knows of what any of them has waited for;
// lanes do something that a warp must do together; the first thread that has not waited for a phase, or -1; what a thread waits for.
void tensors_start(const Launch& launch, uint64_t block);
bool tensors_land();
void tensors_end();
void tensors_meet(unsigned first, unsigned count);
void tensors_together(const char* what, int line);
int tensors_unseen(unsigned barrier, uint32_t phase, unsigned first, unsigned count);
std::string tensors_waits(unsigned thread);

// Which stores other blocks may rely on: a block starts, its threads or those of a warp come to a barrier, it ends.
void visibility_start(const Launch& launch);
void visibility_barrier();
void visibility_warp(unsigned warp);
void visibility_end();
