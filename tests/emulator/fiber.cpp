// Stacks and the switch between them.

#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {
constexpr size_t STACK = 128 * 1024, PAGE = 4096;
}

#if defined(__x86_64__) && !defined(LDM_UCONTEXT)
// Only what the System V ABI lets a callee keep; the kernels do not change the floating-point modes.
asm(R"(
    .text
    .globl ldm_switch
    .hidden ldm_switch
    .type ldm_switch, @function
    .align 16
ldm_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size ldm_switch, .-ldm_switch
)");

static void prepare(Context* context, Stack* stack, void (*entry)()) {
    // Stacks start at different cache sets: a thousand equal offsets would all share one.
    const uintptr_t top = (uintptr_t(stack->low) + stack->bytes - (stack->number * 320u) % 4096u) & ~uintptr_t(63);
    void** sp = (void**)top;
    *--sp = nullptr;           // where `entry` would return to; also keeps its stack aligned as after a call
    *--sp = (void*)entry;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    context->sp = sp;
}
#else
static void prepare(Context* context, Stack* stack, void (*entry)()) {
    getcontext(&context->state);
    context->state.uc_stack.ss_sp = stack->low;
    context->state.uc_stack.ss_size = stack->bytes;
    context->state.uc_link = nullptr;
    makecontext(&context->state, entry, 0);
}
#endif

Stack* Stacks::take(Context* context, void (*entry)()) {
    if (free_.empty()) {
        char* low = (char*)mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (low == MAP_FAILED) {
            fprintf(stderr, "ldm emulator: no memory for the stack of a kernel thread\n");
            abort();
        }
        mprotect(low, PAGE, PROT_NONE);
        all_.push_back(new Stack{low + PAGE, STACK, unsigned(all_.size())});
        free_.push_back(all_.back());
    }
    Stack* stack = free_.back();
    free_.pop_back();
    prepare(context, stack, entry);
    return stack;
}

void Stacks::give_all() { free_.assign(all_.rbegin(), all_.rend()); }
