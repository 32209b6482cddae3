//! Masks for inpainting: rectangles, strokes of a free hand, or all of a picture.
//!
//! As the inpainting models of Stable Diffusion were trained: synthetic masks, of which a quarter covers everything. Strokes
//! are broken lines of one width with round ends (LaMa, Suvorov et al. 2021, draws such).

use crate::rng::Small;
use std::f64::consts::TAU;

/// One mask in so many covers everything.
const WHOLE: usize = 4;

/// A mask, shape (`side`, `side`): 1 in the holes to paint, 0 outside. It has at least one hole, and is a function of `draw`.
pub fn draw(side: usize, draw: &mut Small) -> Vec<u8> {
    let mut mask = vec![0; side * side];
    if draw.below(WHOLE) == 0 {
        mask.fill(1);
    } else if draw.below(2) == 0 {
        (0..=draw.below(3)).for_each(|_| rectangle(&mut mask, side, draw));
    } else {
        (0..=draw.below(4)).for_each(|_| stroke(&mut mask, side, draw));
    }
    mask
}

/// Sides of a tenth to nine tenths of the picture's, somewhere inside.
fn rectangle(mask: &mut [u8], side: usize, draw: &mut Small) {
    let mut span = || {
        let length = ((side as f64 * draw.range(0.1, 0.9)).round() as usize).clamp(1, side);
        let start = draw.below(side - length + 1);
        start..start + length
    };
    let (columns, rows) = (span(), span());
    for y in rows {
        mask[y * side..][columns.clone()].fill(1);
    }
}

/// One to six lines in a row, a sixteenth to a quarter of the picture's side wide, each up to half of it long.
fn stroke(mask: &mut [u8], side: usize, draw: &mut Small) {
    let s = side as f64;
    let half = (s * draw.range(1.0 / 16.0, 0.25) / 2.0).max(1.0);
    let mut from = [draw.range(0.0, s), draw.range(0.0, s)];
    let mut angle = draw.range(0.0, TAU);
    for _ in 0..=draw.below(6) {
        angle += draw.range(-0.3 * TAU, 0.3 * TAU);
        let length = s * draw.range(0.05, 0.5);
        let to = [from[0] + length * angle.cos(), from[1] + length * angle.sin()].map(|v| v.clamp(0.0, s));
        line(mask, side, (from, to), half);
        from = to;
    }
}

/// Fills the pixels whose centres are within `half` of the line between two places.
fn line(mask: &mut [u8], side: usize, (a, b): ([f64; 2], [f64; 2]), half: f64) {
    let range = |k: usize| {
        let (low, high) = (a[k].min(b[k]) - half, a[k].max(b[k]) + half);
        low.max(0.0) as usize..(high.ceil().max(0.0) as usize).min(side)
    };
    let d = [b[0] - a[0], b[1] - a[1]];
    let square = d[0] * d[0] + d[1] * d[1];
    for y in range(1) {
        for x in range(0) {
            let p = [x as f64 + 0.5 - a[0], y as f64 + 0.5 - a[1]];
            let along = if square > 0.0 { (p[0] * d[0] + p[1] * d[1]) / square } else { 0.0 }.clamp(0.0, 1.0);
            let off = [p[0] - along * d[0], p[1] - along * d[1]];
            if off[0] * off[0] + off[1] * off[1] <= half * half {
                mask[y * side + x] = 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cover(mask: &[u8]) -> f64 {
        mask.iter().map(|v| f64::from(*v)).sum::<f64>() / mask.len() as f64
    }

    #[test]
    fn masks_differ_in_kind_and_cover() {
        let n = 4000;
        for side in [8, 32, 64] {
            let covers: Vec<f64> = (0..n)
                .map(|i| {
                    let mask = draw(side, &mut Small::new(i));
                    assert!(mask.len() == side * side && mask.iter().all(|v| *v <= 1));
                    assert_eq!(mask, draw(side, &mut Small::new(i)), "a function of what is drawn");
                    cover(&mask)
                })
                .collect();
            let share = |inside: &dyn Fn(f64) -> bool| {
                covers.iter().filter(|v| inside(**v)).count() as f64 / n as f64
            };
            let whole = share(&|v| v == 1.0);
            assert!((0.22..0.32).contains(&whole), "{whole} of them cover everything, at {side}");
            assert_eq!(share(&|v| v == 0.0), 0.0, "without a hole, at {side}");
            for (low, high) in [(0.0, 0.15), (0.15, 0.3), (0.3, 0.5), (0.5, 0.9)] {
                let part = share(&|v| (low..high).contains(&v));
                assert!(part > 0.05, "{part} of them cover {low} to {high}, at {side}");
            }
        }
    }

    /// Every pixel is painted about as often as any other: the border neither more nor never.
    #[test]
    fn every_place_has_its_turn() {
        let (side, n) = (32, 4000);
        let mut hits = vec![0usize; side * side];
        for i in 0..n {
            let mask = draw(side, &mut Small::new(i));
            hits.iter_mut().zip(&mask).for_each(|(sum, v)| *sum += usize::from(*v));
        }
        let [low, high] = [hits.iter().min(), hits.iter().max()].map(|v| *v.unwrap() as f64 / n as f64);
        assert!(low > 0.3 && high < 0.7, "{low} to {high}");
    }

    #[test]
    fn a_line_is_round_and_as_wide_as_it_is_told() {
        let side = 16;
        let mut mask = vec![0; side * side];
        line(&mut mask, side, ([4.0, 8.0], [12.0, 8.0]), 2.0);
        let column = |x: usize| (0..side).filter(|y| mask[y * side + x] == 1).count();
        assert_eq!((column(1), column(2), column(8), column(13), column(14)), (0, 2, 4, 2, 0));
    }
}
