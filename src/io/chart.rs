//! Lines over numbers, as a picture: axes with numbers and names, nothing else.

use super::png;
use crate::error::Result;
use std::path::Path;

/// Points from left to right, and their colour.
#[derive(Clone, PartialEq, Debug)]
pub struct Line {
    /// (x, y).
    pub points: Vec<(f64, f64)>,
    /// RGB.
    pub colour: [u8; 3],
}

/// What is drawn, the last line on top. Where all y are above 0 and span a factor of 20, their axis is logarithmic.
#[derive(Clone, PartialEq, Debug)]
pub struct Chart {
    /// What the axes show, x and y, in small letters, digits, `_`, `.` and `-`; other characters are left blank.
    pub names: [String; 2],
    /// The lines.
    pub lines: Vec<Line>,
}

const WIDTH: usize = 960;
const HEIGHT: usize = 540;
/// Left, top, right, bottom of the field.
const FIELD: [usize; 4] = [90, 20, WIDTH - 20, HEIGHT - 40];
const GREY: [u8; 3] = [225, 225, 225];
const INK: [u8; 3] = [60, 60, 60];
/// Pixels of a dot of a letter.
const DOT: usize = 2;

/// Letters of 3 by 5 dots, a row in three bits.
const LETTERS: [(char, [u8; 5]); 39] = [
    ('0', [7, 5, 5, 5, 7]),
    ('1', [2, 6, 2, 2, 7]),
    ('2', [7, 1, 7, 4, 7]),
    ('3', [7, 1, 7, 1, 7]),
    ('4', [5, 5, 7, 1, 1]),
    ('5', [7, 4, 7, 1, 7]),
    ('6', [7, 4, 7, 5, 7]),
    ('7', [7, 1, 1, 2, 2]),
    ('8', [7, 5, 7, 5, 7]),
    ('9', [7, 5, 7, 1, 7]),
    ('.', [0, 0, 0, 0, 2]),
    ('-', [0, 0, 7, 0, 0]),
    ('_', [0, 0, 0, 0, 7]),
    ('a', [2, 5, 7, 5, 5]),
    ('b', [6, 5, 6, 5, 6]),
    ('c', [3, 4, 4, 4, 3]),
    ('d', [6, 5, 5, 5, 6]),
    ('e', [7, 5, 7, 4, 7]),
    ('f', [7, 4, 6, 4, 4]),
    ('g', [3, 4, 5, 5, 3]),
    ('h', [5, 5, 7, 5, 5]),
    ('i', [7, 2, 2, 2, 7]),
    ('j', [1, 1, 1, 5, 2]),
    ('k', [5, 5, 6, 5, 5]),
    ('l', [4, 4, 4, 4, 7]),
    ('m', [5, 7, 7, 5, 5]),
    ('n', [6, 5, 5, 5, 5]),
    ('o', [2, 5, 5, 5, 2]),
    ('p', [6, 5, 6, 4, 4]),
    ('q', [2, 5, 5, 6, 3]),
    ('r', [6, 5, 6, 5, 5]),
    ('s', [3, 4, 2, 1, 6]),
    ('t', [7, 2, 2, 2, 2]),
    ('u', [5, 5, 5, 5, 7]),
    ('v', [5, 5, 5, 5, 2]),
    ('w', [5, 5, 7, 7, 5]),
    ('x', [5, 5, 2, 5, 5]),
    ('y', [5, 5, 2, 2, 2]),
    ('z', [7, 1, 2, 4, 7]),
];

struct Canvas(Vec<u8>);

impl Canvas {
    fn dot(&mut self, x: usize, y: usize, colour: [u8; 3]) {
        if x < WIDTH && y < HEIGHT {
            self.0[(y * WIDTH + x) * 3..][..3].copy_from_slice(&colour);
        }
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: [u8; 3], thick: usize) {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let n = dx.abs().max(dy.abs()).ceil().max(1.0) as usize;
        for i in 0..=n {
            let at = |a: f64, d: f64| (a + d * i as f64 / n as f64).round().max(0.0) as usize;
            for (x, y) in (0..thick).flat_map(|x| (0..thick).map(move |y| (x, y))) {
                self.dot(at(from.0, dx) + x, at(from.1, dy) + y, colour);
            }
        }
    }

    /// `x` is the right end.
    fn text(&mut self, text: &str, x: usize, y: usize) {
        let left = x.saturating_sub(width(text));
        for (i, c) in text.chars().enumerate() {
            let rows = LETTERS.iter().find(|(l, _)| *l == c).map_or([0; 5], |(_, rows)| *rows);
            for (r, row) in rows.iter().enumerate() {
                for b in (0..3).filter(|b| row >> (2 - b) & 1 == 1) {
                    for (u, v) in (0..DOT).flat_map(|u| (0..DOT).map(move |v| (u, v))) {
                        self.dot(left + (i * 4 + b) * DOT + u, y + r * DOT + v, INK);
                    }
                }
            }
        }
    }
}

/// Pixels that a text takes across.
fn width(text: &str) -> usize {
    text.chars().count() * 4 * DOT
}

/// An axis: what lies at its ends, and whether it is logarithmic.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    fn of(values: &[f64], may_log: bool) -> Axis {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log = may_log && low > 0.0 && high / low >= 20.0;
        let pad = if high > low { 0.0 } else { 0.5 * high.abs().max(1e-9) };
        Axis { low: low - if log { 0.0 } else { pad }, high: high + pad, log }
    }

    /// 0 at the low end, 1 at the high.
    fn share(&self, v: f64) -> f64 {
        let of = |v: f64| if self.log { v.log10() } else { v };
        (of(v) - of(self.low)) / (of(self.high) - of(self.low)).max(1e-300)
    }

    /// Round numbers inside: 1, 2, 5 times a power of ten.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let powers = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let all = powers.flat_map(|p| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(p)));
            return all.filter(|v| (self.low..=self.high).contains(v)).collect();
        }
        let rough = (self.high - self.low) / 6.0;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

/// A number in a few letters.
fn short(v: f64) -> String {
    if v == 0.0 || (1e-3..1e6).contains(&v.abs()) {
        let text = format!("{v:.4}");
        text.trim_end_matches('0').trim_end_matches('.').into()
    } else {
        format!("{v:.1e}")
    }
}

impl Chart {
    /// Writes a PNG of 960 by 540 pixels. Values that are not finite are left out.
    ///
    /// # Errors
    /// [`crate::Error::File`] when it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let finite = |p: &&(f64, f64)| p.0.is_finite() && p.1.is_finite();
        let points = || self.lines.iter().flat_map(|l| l.points.iter().filter(finite));
        let x = Axis::of(&points().map(|p| p.0).collect::<Vec<_>>(), false);
        let y = Axis::of(&points().map(|p| p.1).collect::<Vec<_>>(), true);
        let [left, top, right, bottom] = FIELD.map(|v| v as f64);
        let place =
            |p: &(f64, f64)| (left + x.share(p.0) * (right - left), bottom - y.share(p.1) * (bottom - top));
        let mut canvas = Canvas(vec![255; WIDTH * HEIGHT * 3]);
        for v in x.ticks() {
            let at = place(&(v, y.low)).0;
            canvas.line((at, top), (at, bottom), GREY, 1);
            let text = short(v);
            canvas.text(&text, at as usize + width(&text) / 2, FIELD[3] + 8);
        }
        for v in y.ticks() {
            let at = place(&(x.low, v)).1;
            canvas.line((left, at), (right, at), GREY, 1);
            canvas.text(&short(v), FIELD[0] - 8, at as usize - 5);
        }
        let [x_name, y_name] = &self.names;
        canvas.text(x_name, FIELD[2], FIELD[3] + 24);
        canvas.text(y_name, FIELD[0] + width(y_name), 4);
        canvas.line((left, bottom), (right, bottom), INK, 1);
        canvas.line((left, top), (left, bottom), INK, 1);
        for line in &self.lines {
            let places: Vec<(f64, f64)> = line.points.iter().filter(finite).map(place).collect();
            places.windows(2).for_each(|w| canvas.line(w[0], w[1], line.colour, 2));
        }
        png::write_rgb8(path, WIDTH, HEIGHT, &canvas.0, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!(Axis::of(&[0.0, 60.0], true).ticks(), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]);
        assert_eq!(Axis::of(&[0.05, 2.0], true).ticks(), [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]);
        assert_eq!([short(0.0), short(0.05), short(1500.0), short(2e-5)], ["0", "0.05", "1500", "2.0e-5"]);
    }

    #[test]
    fn a_falling_line_falls() {
        let dir = Scratch::new("chart");
        let path = dir.path().join("a.png");
        let (colour, names) = ([200, 0, 0], ["step".to_string(), "loss".into()]);
        for points in
            [vec![(0.0, 1.0), (10.0, 0.01)], vec![(0.0, 3.0), (10.0, 3.0)], vec![(1.0, f64::NAN), (2.0, 0.0)]]
        {
            Chart { names: names.clone(), lines: vec![Line { points, colour }] }.write(&path).unwrap();
        }
        let line = Line { points: vec![(0.0, 1.0), (10.0, 0.01)], colour };
        Chart { names, lines: vec![line] }.write(&path).unwrap();
        let picture = png::read_rgb8(&path).unwrap();
        let at = |x: usize, y: usize| &picture.pixels[(y * WIDTH + x) * 3..][..3] == colour.as_slice();
        assert!(at(FIELD[0], FIELD[1]) && at(FIELD[2], FIELD[3]) && !at(FIELD[2], FIELD[1]));
        // The `l` of the name above the field.
        let ink = |x: usize, y: usize| &picture.pixels[(y * WIDTH + x) * 3..][..3] == INK.as_slice();
        assert!(ink(FIELD[0], 4) && !ink(FIELD[0] + 2 * DOT, 4) && ink(FIELD[0] + 2 * DOT, 4 + 4 * DOT));
    }
}
