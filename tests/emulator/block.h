// One block of threads on one OS thread.
#pragma once

#include "emu.h"
#include "fiber.h"

// Runs block `index` (x fastest) of a launch; false if it broke a rule, which is then reported.
bool block_run(const Launch& launch, uint64_t index);
