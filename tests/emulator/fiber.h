// Stacks and the switch between them: a few nanoseconds on x86-64, `swapcontext` elsewhere.
#pragma once

#include <cstddef>
#include <vector>

#if defined(__x86_64__) && !defined(LDM_UCONTEXT)
struct Context {
    void* sp = nullptr;
};
// Saves the callee's registers on this stack, its pointer in `from`, and goes on where `to` was saved.
extern "C" void ldm_switch(Context* from, Context* to);
#else
#include <ucontext.h>
struct Context {
    ucontext_t state;
};
static inline void ldm_switch(Context* from, Context* to) { swapcontext(&from->state, &to->state); }
#endif

struct Stack {
    char* low = nullptr;
    size_t bytes = 0;
    unsigned number = 0;
};

// The stacks of one OS thread; all of them are free again when a block is over, however it ended.
class Stacks {
  public:
    // A context that will run `entry` on a free stack. `entry` must never return.
    Stack* take(Context* context, void (*entry)());
    void give(Stack* stack) { free_.push_back(stack); }
    void give_all();

  private:
    std::vector<Stack*> all_, free_;
};
