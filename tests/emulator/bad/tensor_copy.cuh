// What the kernels `tensor_…` share: y = x, of which a block takes 64 rows of 32, as one box of a tensor in the swizzle of 128 bytes.
#pragma once

constexpr int BLOCK = 256, ROWS = 64, WIDTH = 32, BOX = ROWS * WIDTH * 4;

struct alignas(1024) Shared {
    float rows[ROWS * WIDTH];
    Mbarrier full;
};

// By one thread.
DEV void copy_box(Shared& s, const TensorMap& x) {
    mbarrier_expect(s.full, BOX);
    tma_load(s.rows, x, 0, block_x() * ROWS, 0, 0, s.full);
}

// By all.
DEV void write(float* y, const Shared& s) {
    const int row = thread_x() / 4;
    for (int i = 0; i < 2; i++) {
        const int chunk = thread_x() % 4 * 2 + i;
        const Vec<float, 4> v = load_shared<4>(s.rows + row * WIDTH + (chunk ^ row % 8) * 4);
        store(y + (block_x() * ROWS + row) * WIDTH + chunk * 4, v);
    }
}
