//! Products of small matrices on one thread, for code that shares out its own work.

use super::panels::Panels;
use super::{LDA, ROWS, multiply};
use crate::backend::cpu::scratch::scratch;
use crate::backend::cpu::simd::{Arith, Block, Isa, KC, transpose};

/// A matrix in memory: element (i, j) is data\[i·ld + j\], or data\[j·ld + i\] where it is turned.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    /// From the first element on.
    pub data: &'a [f32],
    /// Elements from one row in memory to the next.
    pub ld: usize,
    /// Rows in memory are columns.
    pub turned: bool,
}

impl<'a> Mat<'a> {
    /// Rows of `ld` elements.
    pub fn new(data: &'a [f32], ld: usize) -> Mat<'a> {
        Mat { data, ld, turned: false }
    }

    /// The transpose.
    pub fn t(self) -> Mat<'a> {
        Mat { turned: !self.turned, ..self }
    }
}

/// C (m,n), rows `ldc` apart, = A (m,k) · B (k,n), or += with `add`. k > 0.
pub fn product([m, n, k]: [usize; 3], a: Mat, b: Mat, c: &mut [f32], ldc: usize, add: bool) {
    if m == 0 || n == 0 {
        return;
    }
    let isa = Isa::best();
    let panels = Panels::new(isa, Arith::Fma, n, k, KC);
    let rows = m.div_ceil(m.div_ceil(ROWS));
    scratch(rows * LDA + panels.padded() * panels.kc, |buffer| {
        let (lines, packed) = buffer.split_at_mut(rows * LDA);
        for block in 0..panels.blocks() {
            let (k0, kc) = panels.block(block);
            let mut rest = &mut *packed;
            for panel in 0..panels.panels() {
                let (n0, width) = (panel * isa.nr(), panels.width(panel));
                let (out, tail) = rest.split_at_mut(kc * width);
                rest = tail;
                let cols = width.min(n - n0);
                if b.turned {
                    transpose(isa, &b.data[n0 * b.ld + k0..], b.ld, cols, kc, width, out);
                    continue;
                }
                for (i, line) in out.chunks_exact_mut(width).enumerate() {
                    line[..cols].copy_from_slice(&b.data[(k0 + i) * b.ld + n0..][..cols]);
                    line[cols..].fill(0.0);
                }
            }
            for m0 in (0..m).step_by(rows) {
                let count = rows.min(m - m0);
                if a.turned {
                    transpose(isa, &a.data[k0 * a.ld + m0..], a.ld, kc, count, LDA, lines);
                } else {
                    for (i, line) in lines.chunks_exact_mut(LDA).take(count).enumerate() {
                        line[..kc].copy_from_slice(&a.data[(m0 + i) * a.ld + k0..][..kc]);
                    }
                }
                let mut c = Block::new(&mut c[m0 * ldc..], ldc, count, n);
                let mut at = 0;
                for panel in 0..panels.panels() {
                    let width = panels.width(panel);
                    let b = panels.alone(&packed[at..at + kc * width], block, panel);
                    multiply(lines, &b, &mut c, panel * isa.nr(), add || block > 0);
                    at += kc * width;
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::simd::tests::{assert_close, random};

    #[test]
    fn products_of_all_four_forms() {
        for [m, n, k] in [[1, 1, 1], [3, 5, 7], [17, 40, 33], [200, 31, 9], [9, 70, 1100], [130, 64, 40]] {
            let (a, b, start) = (random(m * k, 1), random(k * n, 2), random(m * (n + 3), 3));
            for (turn_a, turn_b, add) in
                [(false, false, false), (true, false, true), (false, true, true), (true, true, false)]
            {
                let (a, b) = (
                    if turn_a { Mat::new(&a, m).t() } else { Mat::new(&a, k) },
                    if turn_b { Mat::new(&b, k).t() } else { Mat::new(&b, n) },
                );
                let at = |x: Mat, i: usize, j: usize| {
                    f64::from(if x.turned { x.data[j * x.ld + i] } else { x.data[i * x.ld + j] })
                };
                let mut c = start.clone();
                product([m, n, k], a, b, &mut c, n + 3, add);
                let (mut want, mut size) = (vec![], vec![]);
                for (i, old) in start.iter().enumerate() {
                    let (i, j, old) = (i / (n + 3), i % (n + 3), f64::from(*old));
                    let terms = || (0..k).map(|l| if j < n { at(a, i, l) * at(b, l, j) } else { 0.0 });
                    let kept = if add || j >= n { old } else { 0.0 };
                    want.push(kept + terms().sum::<f64>());
                    size.push(kept.abs() + terms().map(f64::abs).sum::<f64>());
                }
                assert_close(&c, &want, &size, &format!("{m} {n} {k} {turn_a} {turn_b} {add}"));
            }
        }
    }
}
