// How threads copy the k-blocks of a tiled product themselves, by cp.async: the walk over the blocks of a sum, and the copies of one.
// Eight threads copy a row of x or of w, 16 bytes each, and a thread the same chunk of every LOAD_ROWS-th row. Zeros are written for
// pixels outside the image, channels beyond the segment, rows beyond M and N.
//
// It wants from the file that includes it, behind conv2d_tile.cuh: CHUNKS, LOAD_ROWS, A_LOADS, B_LOADS. Lines are counted from 1201 on,
// as there from 601.
#pragma once
#line 1209

constexpr int THIRDS = 3;  // the copies of a k-block are begun in three parts
static_assert(BM % LOAD_ROWS == 0, "whole rounds");

// Where chunk `chunk` of a row of a slot stands.
DEV int place(int row, int chunk) { return row * BK + ((chunk ^ (row & 7)) << 3); }

// What a thread copies next, and from where.
struct Walk {
    int segment, kh, kw, c;    // the k-block: its first channel, within the segment
    const T* x;                // of the segment
    const T* w;                // first row of this thread, at the tap
    int channels, w_row, w_tap, flat;
    int at[A_LOADS];           // element of x at this tap, or -1 outside
};

// The pixels of this tap.
DEV void tap(Walk& k, const Conv& p, const Row* rows, int m0) {
    const int first = thread_x() / CHUNKS;
    if (k.flat) {
        UNROLL
        for (int i = 0; i < A_LOADS; i++) {
            const int m = m0 + first + i * LOAD_ROWS;
            k.at[i] = m < p.m ? m * k.channels : -1;
        }
        return;
    }
    const int h = p.h << p.upsample, w = p.w_ << p.upsample;
    UNROLL
    for (int i = 0; i < A_LOADS; i++) {
        const Vec<int, 2> at = load_shared<2>(&rows[first + i * LOAD_ROWS].base);
        const int row = (at[1] >> 16) - 0x4000 + k.kh, column = (at[1] & 0xffff) - 0x4000 + k.kw;
        const bool in = at[1] >= 0 && unsigned(row) < unsigned(h) && unsigned(column) < unsigned(w);
        const int pixel = at[0] + (row >> p.upsample) * p.w_ + (column >> p.upsample);
        k.at[i] = in ? pixel * k.channels : -1;
    }
}

// `which` of the weights: those of the segment, or with parts those that this tile's columns belong to.
DEV void enter(Walk& k, const Conv& p, int segment, int which, int n) {
    k.segment = segment;
    k.kh = k.kw = k.c = 0;
    k.x = segment == 0 ? p.x : segment == 1 ? p.x1 : p.x2;
    k.channels = segment == 0 ? p.c : segment == 1 ? p.c1 : p.c2;
    k.w_row = segment == 0 ? p.w_row : segment == 1 ? p.w_row1 : p.w_row2;
    k.w_tap = segment == 0 ? p.w_tap : p.w_tap1;
    k.flat = segment == 0 ? p.flat : segment == 1 ? p.flat1 : 1;
    k.w = (which == 0 ? p.w : which == 1 ? p.w1 : p.w2) + n * k.w_row;
}

DEV void next(Walk& k, const Conv& p, const Row* rows, int m0, int n) {
    k.c += BK;
    if (k.c < k.channels) return;
    k.c = 0;
    k.w += k.w_tap;
    if (++k.kw == p.kw || k.flat) {
        k.kw = 0;
        if (++k.kh == p.kh || k.flat) enter(k, p, k.segment + 1, k.segment + 1, n);
    }
    if (k.segment < p.segments) tap(k, p, rows, m0);
}

// A third of the copies of one k-block into a slot, x first, then w; zeros where it is not `live`.
DEV void fetch(const Walk& k, T* slot, int step, int rows_left, bool live, int third) {
    const int row = thread_x() / CHUNKS, chunk = thread_x() % CHUNKS, c = k.c + chunk * 8;
    const bool channel = live && c < k.channels;
    UNROLL
    for (int i = third; i < A_LOADS; i += THIRDS) {
        const bool in = channel && k.at[i] >= 0;
        cp_async(slot + place(row + i * LOAD_ROWS, chunk), k.x + (in ? k.at[i] + c : 0), in);
    }
    UNROLL
    for (int i = third; i < B_LOADS; i += THIRDS) {
        if (BN % LOAD_ROWS != 0 && row + i * LOAD_ROWS >= BN) continue;
        const bool in = channel && i * step < rows_left;
        cp_async(slot + BM * BK + place(row + i * LOAD_ROWS, chunk), in ? k.w + i * step * k.w_row + c : k.x, in);
    }
}

// What a block takes of the weights: which of them, its thread's first row there, how far down the next one is, and how many
// rows there are from the first one on: of values, or of gates.
struct Columns {
    int part, row, step, left;
};

DEV Columns columns_of(const Conv& p, int n0) {
    const int n = n0 + thread_x() / CHUNKS;  // first row of w that this thread copies
    Columns c;
    c.part = p.part ? n0 / p.part : 0;
    c.row = weight_row(p, n - c.part * p.part);
    c.step = p.glu ? LOAD_ROWS / 2 : LOAD_ROWS;
    c.left = p.glu ? p.o - (n / 16 * 8 + n % 8) : (p.part ? p.part : p.o) - c.row;
    return c;
}
