use super::*;

/// Seeded numbers in -1..1.
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Asserts both bounds on f32 results: 1e-6 in norm, and per element 8 · 2^-23 · the sum of absolute terms.
pub fn assert_close(got: &[f32], want: &[f64], absolute: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let (mut error, mut norm) = (0.0, 0.0);
    for (i, ((&g, &w), &a)) in got.iter().zip(want).zip(absolute).enumerate() {
        let d = g as f64 - w;
        let bound = 8.0 * f64::from(f32::EPSILON) * a;
        assert!(
            d.abs() <= bound,
            "{what}: element {i}: got {g}, want {w}, |difference| {} over {bound}",
            d.abs()
        );
        error += d * d;
        norm += w * w;
    }
    let relative = (error / norm.max(1e-300)).sqrt();
    assert!(relative <= 1e-6, "{what}: error in norm {relative:e}");
}

/// Runs `f` with one rayon thread, then with two and with five, and asserts equal bits.
pub fn assert_threads_agree(what: &str, f: impl Fn() -> Vec<f32> + Send + Sync) {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&f).into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = run(1);
    for threads in [2, 5] {
        assert!(one == run(threads), "{what}: {threads} threads give other bits than one");
    }
}

#[test]
fn the_best_instruction_set_is_available_and_portable_always_is() {
    assert_eq!(Isa::available()[0], Isa::Portable);
    assert!(Isa::available().contains(&Isa::best()));
}

/// Every size of tile, with guard values around C: right sums, and nothing written outside.
#[test]
fn tiles_of_all_sizes_stay_inside_their_block() {
    const K: usize = 19;
    for &isa in Isa::available() {
        for rows in 1..=isa.mr() {
            for width in [isa.lanes(), isa.nr()] {
                let (a, b) = (random(rows * LDA, 1), random(K * width, 2));
                for accumulate in [false, true] {
                    let (ld, guard) = (width + 5, 7.5);
                    let mut c = vec![guard; (rows + 2) * ld];
                    let panel = Panel { isa, data: &b, width, kc: K, arith: Arith::Fma };
                    tile(rows, &a, &panel, &mut Block::new(&mut c, ld, rows + 2, ld), (1, 3), accumulate);
                    for (i, &got) in c.iter().enumerate() {
                        let (r, j) = ((i / ld).wrapping_sub(1), (i % ld).wrapping_sub(3));
                        if r >= rows || j >= width {
                            assert_eq!(got, guard, "{isa:?} {rows} × {width}: wrote outside at {i}");
                            continue;
                        }
                        let sum: f64 = (0..K).map(|k| a[r * LDA + k] as f64 * b[k * width + j] as f64).sum();
                        let want = sum + if accumulate { guard as f64 } else { 0.0 };
                        assert!(
                            (got as f64 - want).abs() < 1e-5,
                            "{isa:?} {rows} × {width}: {got}, want {want}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn transpose_packs_and_pads() {
    for &isa in Isa::available() {
        for (rows, kc) in [(0, 3), (1, 1), (7, 9), (8, 8), (13, 40), (isa.lanes(), 17), (isa.nr(), 33)] {
            let (rows, ld, width) = (rows.min(isa.nr()), kc + 3, isa.nr());
            let src = random(rows.max(1) * ld, 3);
            let mut out = vec![f32::NAN; kc * width];
            transpose(isa, &src, ld, rows, kc, width, &mut out);
            for k in 0..kc {
                for r in 0..width {
                    let want = if r < rows { src[r * ld + k] } else { 0.0 };
                    assert_eq!(out[k * width + r], want, "{isa:?} {rows} × {kc} at row {r}, k {k}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "lies outside")]
fn a_tile_outside_its_block_is_refused() {
    let (a, b, mut c) = (random(2 * LDA, 1), random(64, 2), vec![0.0; 64]);
    let isa = Isa::Portable;
    let b = Panel { isa, data: &b, width: isa.nr(), kc: 4, arith: Arith::Fma };
    tile(2, &a, &b, &mut Block::new(&mut c, 32, 2, 8), (1, 0), false);
}

#[test]
fn a_grid_covers_its_matrix_once() {
    let mut data = vec![0.0; 7 * 11];
    let grid = Grid::new(&mut data, 7, 11, 3, 4);
    for i in 0..grid.count() {
        let (m0, n0, mut block) = grid.take(i);
        for r in 0..block.rows() {
            for (j, y) in block.row(r).iter_mut().enumerate() {
                *y += ((m0 + r) * 11 + n0 + j) as f32;
            }
        }
    }
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as f32));
}

#[test]
#[should_panic(expected = "was taken before")]
fn a_grid_gives_a_block_once() {
    let mut data = vec![0.0; 4];
    let grid = Grid::new(&mut data, 2, 2, 1, 2);
    grid.take(1);
    grid.take(1);
}
