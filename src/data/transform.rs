//! From a picture of any size to a square one for training: resize, crop, flip, as the loaders of Rombach et al. 2022 do.

use crate::error::{Error, Result};
use crate::io::Rgb8;
use crate::rng::Small;
use fast_image_resize as fir;
use fir::images::{Image, ImageRef};

/// A long thin picture grows beyond this when its shorter side is brought to size.
const MAX_PIXELS: usize = 1 << 26;

/// How pixels are mixed when a picture is resized. All but [`Filter::Area`] are Pillow's: their support grows as the picture
/// shrinks, so that nothing aliases.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filter {
    /// The mean over the area of the new pixel, as OpenCV's `INTER_AREA`; bilinear where the picture grows.
    Area,
    /// A tent of one pixel to each side.
    Bilinear,
    /// Cubic convolution with a = −0.5.
    Bicubic,
    /// A sinc windowed to three lobes.
    Lanczos,
}

/// Which part of a picture is kept.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Crop {
    /// The middle square, then resized.
    Square,
    /// A square somewhere, with a side of this share of the shorter side to all of it; then resized.
    Part(f64),
    /// Resized by the shorter side, then the middle.
    Center,
    /// Resized by the shorter side, then a square somewhere.
    Random,
}

/// What is done to every picture.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Transform {
    /// Side of the result, in pixels.
    pub size: usize,
    /// How it is resized.
    pub filter: Filter,
    /// Which part is kept.
    pub crop: Crop,
    /// Whether every second picture, by chance, is mirrored left to right.
    pub flip: bool,
}

impl Transform {
    /// Faces (CelebA-HQ, FFHQ) and ImageNet for validation: shorter side to `size`, bilinear; the middle. The paper's loaders
    /// take OpenCV's bilinear filter, which aliases where a picture shrinks; this one does not.
    pub fn center(size: usize) -> Transform {
        Transform { size, filter: Filter::Bilinear, crop: Crop::Center, flip: false }
    }

    /// ImageNet for training: shorter side to `size`, bilinear; a square anywhere.
    pub fn random(size: usize) -> Transform {
        Transform { crop: Crop::Random, ..Transform::center(size) }
    }

    /// LSUN: the middle square, bicubic; mirrored by chance.
    pub fn square(size: usize) -> Transform {
        Transform { size, filter: Filter::Bicubic, crop: Crop::Square, flip: true }
    }

    /// Super-resolution: a square of half to all of the shorter side, by area.
    pub fn part(size: usize) -> Transform {
        Transform { size, filter: Filter::Area, crop: Crop::Part(0.5), flip: false }
    }

    /// The square picture, shape (`size`, `size`, 3), 0 to 255. What is left to chance comes from `draw`.
    ///
    /// # Errors
    /// [`Error::Invalid`] as [`resize`].
    pub fn apply(&self, picture: &Rgb8, draw: &mut Small) -> Result<Vec<u8>> {
        let (size, short) = (self.size, picture.width.min(picture.height));
        let mut pixels = match self.crop {
            Crop::Square => {
                let at = middle(picture, short);
                resize(&crop(picture, at, short), [short, short], [size, size], self.filter)?
            }
            Crop::Part(least) => {
                let side = (short as f64 * draw.range(least.clamp(0.0, 1.0), 1.0)) as usize;
                let side = side.clamp(1, short.max(1));
                let at = anywhere(picture, side, draw);
                resize(&crop(picture, at, side), [side, side], [size, size], self.filter)?
            }
            Crop::Center | Crop::Random => {
                // Rounded as Python does.
                let scale = size as f64 / short.max(1) as f64;
                let [width, height] =
                    [picture.width, picture.height].map(|n| (n as f64 * scale).round_ties_even() as usize);
                let from = [picture.width, picture.height];
                let pixels = resize(&picture.pixels, from, [width, height], self.filter)?;
                let resized = Rgb8 { width, height, pixels, parameters: None };
                let at = match self.crop {
                    Crop::Center => middle(&resized, size),
                    _ => anywhere(&resized, size, draw),
                };
                crop(&resized, at, size)
            }
        };
        if self.flip && draw.below(2) == 1 {
            mirror(&mut pixels, size);
        }
        Ok(pixels)
    }
}

fn middle(picture: &Rgb8, side: usize) -> [usize; 2] {
    [picture.width, picture.height].map(|n| n.saturating_sub(side) / 2)
}

fn anywhere(picture: &Rgb8, side: usize, draw: &mut Small) -> [usize; 2] {
    [picture.width, picture.height].map(|n| draw.below(n.saturating_sub(side) + 1))
}

/// The square of `side` pixels with its upper left corner at (x, y).
fn crop(picture: &Rgb8, [x, y]: [usize; 2], side: usize) -> Vec<u8> {
    let rows = picture.pixels.chunks_exact(3 * picture.width.max(1)).skip(y).take(side);
    rows.flat_map(|row| &row[3 * x..3 * (x + side)]).copied().collect()
}

/// Mirrors a square picture left to right.
fn mirror(pixels: &mut [u8], side: usize) {
    for row in pixels.chunks_exact_mut(3 * side) {
        row.as_chunks_mut::<3>().0.reverse();
    }
}

/// A picture in another size; sizes are (width, height), pixels (height, width, 3).
///
/// # Errors
/// [`Error::Invalid`] when `rgb` is not of its size, or a side is 0, or the result has more than 2^26 pixels.
pub fn resize(rgb: &[u8], from: [usize; 2], to: [usize; 2], filter: Filter) -> Result<Vec<u8>> {
    let said = |what: String| {
        let ([w, h], [v, g]) = (from, to);
        Error::invalid(format!("resize from {w}x{h} to {v}x{g}: {what}"))
    };
    let bytes = from[0].checked_mul(from[1]).and_then(|n| n.checked_mul(3));
    if bytes != Some(rgb.len()) || from.contains(&0) || to.contains(&0) {
        return Err(said(format!("want sides above 0 and 3 bytes per pixel; got {} bytes", rgb.len())));
    }
    if to[0].saturating_mul(to[1]) > MAX_PIXELS {
        return Err(said(format!("want at most {MAX_PIXELS} pixels")));
    }
    if from == to {
        return Ok(rgb.to_vec());
    }
    let filter = match filter {
        Filter::Area if to[0] <= from[0] && to[1] <= from[1] => {
            let wide: Vec<f32> = rgb.iter().map(|v| f32::from(*v)).collect();
            let both = area(&area(&wide, from[0], to[0], 3), from[1], to[1], 3 * to[0]);
            return Ok(both.iter().map(|v| v.round_ties_even() as u8).collect());
        }
        Filter::Area | Filter::Bilinear => fir::FilterType::Bilinear,
        Filter::Bicubic => fir::FilterType::CatmullRom,
        Filter::Lanczos => fir::FilterType::Lanczos3,
    };
    let options = fir::ResizeOptions::new().resize_alg(fir::ResizeAlg::Convolution(filter));
    let pass = |rgb: &[u8], from: [usize; 2], to: [usize; 2]| {
        let side = |n: usize| u32::try_from(n).map_err(|_| said(format!("a side of {n} is too long")));
        let failed = |e: &dyn std::fmt::Display| said(e.to_string());
        let kind = fir::PixelType::U8x3;
        let source = ImageRef::new(side(from[0])?, side(from[1])?, rgb, kind).map_err(|e| failed(&e))?;
        let mut target = Image::new(side(to[0])?, side(to[1])?, kind);
        fir::Resizer::new().resize(&source, &mut target, &options).map_err(|e| failed(&e))?;
        Ok(target.into_vec())
    };
    // Rows first and columns after, as Pillow: bytes are rounded in between.
    let narrow = pass(rgb, from, [to[0], from[1]])?;
    pass(&narrow, [to[0], from[1]], to)
}

/// Means over the new pixels along one axis: `x` is (…, `from`, `inner`), the result (…, `to`, `inner`).
fn area(x: &[f32], from: usize, to: usize, inner: usize) -> Vec<f32> {
    let scale = from as f64 / to as f64;
    // For each new pixel, the old ones that it covers and the share of each.
    let windows: Vec<(usize, Vec<f32>)> = (0..to)
        .map(|j| {
            let (start, end) = (j as f64 * scale, ((j + 1) as f64 * scale).min(from as f64));
            let first = start as usize;
            let share = |i: usize| ((i + 1) as f64).min(end) - (i as f64).max(start);
            (first, (first..end.ceil() as usize).map(|i| (share(i) / scale) as f32).collect())
        })
        .collect();
    let mut y = Vec::with_capacity(x.len() / from * to);
    for line in x.chunks_exact(from * inner) {
        for (first, shares) in &windows {
            let at = y.len();
            y.resize(at + inner, 0.0);
            for (i, share) in shares.iter().enumerate() {
                let old = &line[(first + i) * inner..][..inner];
                y[at..].iter_mut().zip(old).for_each(|(y, x)| *y += share * x);
            }
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::png::read_rgb8;
    use std::path::{Path, PathBuf};

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data").join(name)
    }

    /// Against Pillow and OpenCV: `tools/golden_data.py`.
    #[test]
    fn resizing_is_that_of_pillow_and_opencv() {
        let source = read_rgb8(golden("source.png")).unwrap();
        let filters = [
            ("area", Filter::Area),
            ("bilinear", Filter::Bilinear),
            ("bicubic", Filter::Bicubic),
            ("lanczos", Filter::Lanczos),
        ];
        for (name, filter) in filters {
            for to in [[24, 16], [31, 23], [48, 32], [17, 40], [120, 90]] {
                let file = golden(&format!("{name}-{}x{}.png", to[0], to[1]));
                let Ok(want) = read_rgb8(&file) else {
                    assert!(filter == Filter::Area, "{}", file.display());
                    continue;
                };
                let got = resize(&source.pixels, [source.width, source.height], to, filter).unwrap();
                let off: Vec<u8> = got.iter().zip(&want.pixels).map(|(a, b)| a.abs_diff(*b)).collect();
                let differ = off.iter().filter(|v| **v > 0).count();
                let worst = off.iter().max();
                // Exact by area; Pillow's weights have more bits, so that a value between two may fall either way.
                let most = if filter == Filter::Area { 0 } else { off.len() / 100 };
                assert!(
                    worst <= Some(&1) && differ <= most,
                    "{}: {differ} of {} differ, by up to {worst:?}",
                    file.display(),
                    off.len()
                );
            }
        }
    }

    /// A picture whose pixels say where they come from: red is x, green is y.
    fn map(width: usize, height: usize) -> Rgb8 {
        let pixels = (0..width * height).flat_map(|i| [(i % width) as u8, (i / width) as u8, 7]).collect();
        Rgb8 { width, height, pixels, parameters: None }
    }

    #[test]
    fn crops_lie_where_the_loaders_of_the_paper_put_them() {
        let mut draw = Small::new(0);
        // Nothing is resized: the pixels are those of the source.
        for (w, h, left, top) in [(21, 16, 2, 0), (16, 21, 0, 2), (16, 16, 0, 0), (20, 16, 2, 0)] {
            for crop in [Crop::Center, Crop::Square] {
                let t = Transform { crop, ..Transform::center(16) };
                let got = t.apply(&map(w, h), &mut draw).unwrap();
                let want: Vec<u8> =
                    (0..256).flat_map(|i| [left + i % 16, top + i / 16, 7].map(|v| v as u8)).collect();
                assert!(got == want, "{w}x{h}, {crop:?}: starts at {:?}", &got[..2]);
            }
        }
        // The shorter side becomes the size; the result is square whatever the shape.
        for (w, h) in [(100, 33), (33, 100), (5, 5), (1, 200), (250, 3)] {
            for crop in [Crop::Center, Crop::Random, Crop::Square, Crop::Part(0.5)] {
                for filter in [Filter::Area, Filter::Bilinear, Filter::Bicubic, Filter::Lanczos] {
                    let t = Transform { size: 16, filter, crop, flip: true };
                    assert_eq!(t.apply(&map(w, h), &mut draw).unwrap().len(), 16 * 16 * 3, "{w}x{h} {t:?}");
                }
            }
        }
    }

    #[test]
    fn chance_reaches_everything_and_nothing_else() {
        let mut draw = Small::new(1);
        let corners = |t: Transform, w, h, draw: &mut Small| {
            let pixels = t.apply(&map(w, h), draw).unwrap();
            let n = t.size * 3;
            ([pixels[0], pixels[1]], [pixels[n - 3], pixels[1 + n * (t.size - 1)]])
        };
        let starts: std::collections::BTreeSet<_> =
            (0..200).map(|_| corners(Transform::random(16), 20, 16, &mut draw).0).collect();
        assert_eq!(starts.into_iter().collect::<Vec<_>>(), [[0, 0], [1, 0], [2, 0], [3, 0], [4, 0]]);
        let mirrored = |draw: &mut Small| {
            let (a, b) = corners(Transform::square(16), 16, 16, draw);
            assert!((a[0], b[0]) == (0, 15) || (a[0], b[0]) == (15, 0));
            a[0] == 15
        };
        let n = (0..400).filter(|_| mirrored(&mut draw)).count();
        assert!((150..250).contains(&n), "{n} of 400 mirrored");
        // Parts of a half to all: the span of a row is the side of the part.
        let spans: Vec<u8> = (0..400)
            .map(|_| corners(Transform::part(8), 64, 80, &mut draw))
            .map(|(a, b)| b[0] - a[0])
            .collect();
        let (low, high) = (*spans.iter().min().unwrap(), *spans.iter().max().unwrap());
        assert!((26..31).contains(&low) && (52..57).contains(&high), "spans {low} to {high}");
    }

    #[test]
    fn sizes_are_checked() {
        for (len, from, to) in
            [(11, [2, 2], [1, 1]), (12, [2, 2], [0, 1]), (0, [0, 2], [1, 1]), (3, [usize::MAX, 2], [1, 1])]
        {
            let e = resize(&vec![0; len], from, to, Filter::Area).unwrap_err().to_string();
            assert!(e.starts_with("resize from ") && e.contains(&format!("got {len} bytes")), "{e}");
        }
        let e = Transform::center(0).apply(&map(4, 4), &mut Small::new(0)).unwrap_err().to_string();
        assert!(e.contains("to 0x0"), "{e}");
        let thread = Rgb8 { width: 1, height: 60_000, pixels: vec![0; 180_000], parameters: None };
        let e = Transform::center(256).apply(&thread, &mut Small::new(0)).unwrap_err().to_string();
        assert!(e.contains("from 1x60000 to 256x15360000: want at most 67108864 pixels"), "{e}");
    }
}
