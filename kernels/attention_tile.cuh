// What kernels of attention share: tiles in shared memory of rows of PITCH chunks of 16 bytes, PITCH = 2^A · odd, or 16 with A = 3; one row to
// a token of a head. Chunk c of row r lies at chunk r · PITCH + (c ^ x), where only the low A bits of c are changed, and x is the A bits of r
// from bit 3 - A on; why nothing meets in a bank, each kernel says of its own accesses. Wants from the file that includes it: PITCH, A,
// BLOCK.
#pragma once
// So that no line is one of the kernel's file too, where the emulator counts by lines.
#line 608

// Where chunk c of row r begins in a tile, in elements.
DEV int chunk(int r, int c) {
    constexpr int LOW = (1 << A) - 1;
    return (r * PITCH + (c & ~LOW) + ((c ^ (r >> (3 - A))) & LOW)) * 8;
}

// Starts the block's copy of chunk `at` of a tile of a head; rows from `rows` on and columns from d on become zeros.
DEV void copy_chunk(T* tile, const T* from, int at, int rows, int ld, int d) {
    const int r = at / PITCH, c = at % PITCH;
    cp_async(tile + chunk(r, c), from + r * ld + c * 8, r < rows && c * 8 < d);
}
// Of ROWS rows, every thread alike.
template <int ROWS>
DEV void copy_tile(T* tile, const T* from, int rows, int ld, int d) {
    static_assert(ROWS * PITCH % BLOCK == 0, "every chunk is some thread's");
    UNROLL
    for (int i = 0; i < ROWS * PITCH / BLOCK; i++) copy_chunk(tile, from, i * BLOCK + int(thread_x()), rows, ld, d);
}
