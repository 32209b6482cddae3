// One block of threads on one OS thread.
#pragma once

#include "emu.h"
#include "fiber.h"

// Runs block `index` (x fastest) of a launch; false if it broke a rule, which is then reported.
bool block_run(const Launch& launch, uint64_t index);

// Operations of a whole warp that are not in block.cpp, by number.
enum { OP_LDMATRIX = 110, OP_LDMATRIX_TRANS, OP_MMA };
// The running lane comes to an operation of its warp: true for the lane that comes last, which computes for all and goes
// on. The others wait, and find their results when they are back.
bool warp_arrives(int op, int line);
void warp_waits(int op, int line);

// Where `p` lies in the block's shared memory. An access that leaves it or is not aligned to its size is a violation.
unsigned shared_offset(const void* p, unsigned bytes, const char* what, int line);

// Asynchronous copies: a new block has none; a thread that exits may leave none behind; and the adversary's move when a
// thread comes to a barrier.
void copies_start(uint64_t block);
void copies_exit();
void copies_play();
