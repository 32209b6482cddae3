//! What a picture of the shapes world shows, read from its pixels alone.
//!
//! A pixel is background plus a share of the way to a colour. Where that share passes one half there is an object; connected
//! pixels are one. Its area and centroid, which neither blur nor noise moves, say how wide each shape would have to be and
//! where; the shape whose drawing comes nearest is the one.

use super::outline::Outline;
use super::shapes::{Background, Colour, Shape, Size};
use crate::error::{Error, Result};

/// An object that was seen. What is like nothing in the world is `None`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Found {
    /// What it is.
    pub shape: Option<Shape>,
    /// Its colour.
    pub colour: Option<Colour>,
    /// Its size.
    pub size: Option<Size>,
    /// Centre of the bounding box (x, y), in pixels.
    pub centre: [f64; 2],
    /// Width of the bounding box, in pixels.
    pub width: f64,
}

/// What a picture shows.
#[derive(Clone, PartialEq, Debug)]
pub struct Seen {
    /// The colour behind the objects; `None` for one that the world does not have.
    pub background: Option<Background>,
    /// From top to bottom.
    pub objects: Vec<Found>,
}

/// Farthest that a background, and a colour of an object, may be from the world's, as a distance in RGB of 0 to 255.
const FAR: f64 = 60.0;
/// Fewest pixels of an object, as a share of the picture: a quarter of the smallest that the world has.
const SPECK: f64 = 0.006;
/// Largest squared difference between an object and the drawing of its shape, as a share of its area. Objects of the world
/// stay below 0.09 with the blur and noise of the tests; an ellipse twice as wide as high has 0.29.
const UNLIKE: f64 = 0.2;

type Rgb = [f64; 3];

fn minus(a: Rgb, b: Rgb) -> Rgb {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

fn dot(a: Rgb, b: Rgb) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

fn distance(a: Rgb, b: Rgb) -> f64 {
    dot(minus(a, b), minus(a, b)).sqrt()
}

fn median(of: impl Iterator<Item = Rgb>) -> Option<Rgb> {
    let all: Vec<Rgb> = of.collect();
    let channel = |c: usize| {
        let mut values: Vec<f64> = all.iter().map(|p| p[c]).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    Some([channel(0)?, channel(1)?, channel(2)?])
}

/// The nearest of several colours, if one is near.
fn nearest<T: Copy>(all: &[T], rgb: impl Fn(T) -> [u8; 3], to: Rgb) -> Option<T> {
    let off = |v: &T| distance(rgb(*v).map(f64::from), to);
    let best = all.iter().min_by(|a, b| off(a).total_cmp(&off(b)))?;
    (off(best) <= FAR).then_some(*best)
}

/// Looks at a square picture, shape (`side`, `side`, 3), 0 to 255.
///
/// # Errors
/// [`Error::Invalid`] when `rgb` is not of that size, or smaller than 16 pixels.
pub fn recognise(side: usize, rgb: &[u8]) -> Result<Seen> {
    if side < 16 || side.checked_mul(side).and_then(|n| n.checked_mul(3)) != Some(rgb.len()) {
        let got = rgb.len();
        return Err(Error::invalid(format!(
            "shapes: want a square picture, 16x16 or more; got {side}, {got} bytes"
        )));
    }
    let pixels: Vec<Rgb> = rgb.as_chunks::<3>().0.iter().map(|p| p.map(f64::from)).collect();
    let border = (0..side * side).filter(|i| {
        let (x, y) = (i % side, i / side);
        x.min(y) == 0 || x.max(y) == side - 1
    });
    let back = median(border.map(|i| pixels[i])).unwrap_or_default();
    let background = nearest(&Background::ALL, Background::rgb, back);
    let mut owner: Vec<usize> = pixels.iter().map(|p| usize::from(share(*p, back) >= 0.5)).collect();
    let count = label(&mut owner, side, (SPECK * (side * side) as f64).ceil() as usize);
    let picture = Picture { side, pixels, back, reach: (side / 32).max(1) };
    let owned = owner.clone();
    (0..picture.reach).for_each(|_| grow(&mut owner, side));
    let objects = (1..=count).map(|id| picture.object(id, &owned, &owner)).collect();
    Ok(Seen { background, objects })
}

/// How far a pixel is on the way from the background to that colour of the world whose way it lies nearest.
fn share(p: Rgb, back: Rgb) -> f64 {
    let p = minus(p, back);
    let mut best = (f64::INFINITY, 0.0);
    for colour in Colour::ALL {
        let way = minus(colour.rgb().map(f64::from), back);
        // Never backwards: red lies behind gray as seen from cyan.
        let share = (dot(p, way) / dot(way, way).max(1.0)).max(0.0);
        let off = minus(p, way.map(|v| v * share));
        let off = dot(off, off);
        if off < best.0 {
            best = (off, share);
        }
    }
    best.1
}

/// Numbers the connected regions (8 neighbours) of ones from 1, in order of their first pixel; those of fewer than `least`
/// pixels become 0. Returns how many there are.
fn label(owner: &mut [usize], side: usize, least: usize) -> usize {
    const WAITING: usize = usize::MAX;
    owner.iter_mut().for_each(|v| *v = if *v == 1 { WAITING } else { 0 });
    let mut count = 0;
    for start in 0..owner.len() {
        if owner[start] != WAITING {
            continue;
        }
        count += 1;
        owner[start] = count;
        let mut region = vec![start];
        let mut next = 0;
        while next < region.len() {
            for n in neighbours(region[next], side) {
                if owner[n] == WAITING {
                    owner[n] = count;
                    region.push(n);
                }
            }
            next += 1;
        }
        if region.len() < least {
            region.iter().for_each(|i| owner[*i] = 0);
            count -= 1;
        }
    }
    count
}

fn neighbours(i: usize, side: usize) -> impl Iterator<Item = usize> {
    let (x, y) = (i % side, i / side);
    let near = move |v: usize| v.saturating_sub(1)..(v + 2).min(side);
    near(y).flat_map(move |v| near(x).map(move |u| v * side + u))
}

/// Every region takes the free pixels that touch it.
fn grow(owner: &mut [usize], side: usize) {
    let before = owner.to_vec();
    for i in (0..before.len()).filter(|i| before[*i] == 0) {
        owner[i] = neighbours(i, side).map(|n| before[n]).find(|v| *v != 0).unwrap_or(0);
    }
}

struct Picture {
    side: usize,
    pixels: Vec<Rgb>,
    back: Rgb,
    /// How far beyond its region an object's edge may reach, in pixels.
    reach: usize,
}

impl Picture {
    /// The object of one region. `owned` holds the numbers of the regions, `grown` those of the regions with their edges.
    fn object(&self, id: usize, owned: &[usize], grown: &[usize]) -> Found {
        let side = self.side;
        let region: Vec<usize> = (0..owned.len()).filter(|i| owned[*i] == id).collect();
        // The colour of the middle: of those pixels that are farthest from the background.
        let far = |i: usize| distance(self.pixels[i], self.back);
        let mut depths: Vec<f64> = region.iter().map(|i| far(*i)).collect();
        depths.sort_by(f64::total_cmp);
        let deep = 0.85 * depths.get(depths.len() * 9 / 10).copied().unwrap_or_default();
        let middle = region.iter().filter(|i| far(**i) >= deep).map(|i| self.pixels[*i]);
        let colour = median(middle).unwrap_or(self.back);
        // The region with its edges, and around it what belongs to no other.
        let span = |v: &dyn Fn(usize) -> usize| {
            let (low, high) = region.iter().fold((side, 0), |(l, h), i| (l.min(v(*i)), h.max(v(*i))));
            low.saturating_sub(self.reach)..(high + self.reach + 1).min(side)
        };
        let (columns, rows) = (span(&|i| i % side), span(&|i| i / side));
        let way = minus(colour, self.back);
        let window: Vec<(usize, usize, f64)> = rows
            .flat_map(|y| columns.clone().map(move |x| (x, y)))
            .filter(|(x, y)| grown[y * side + x] == 0 || grown[y * side + x] == id)
            .map(|(x, y)| {
                let p = minus(self.pixels[y * side + x], self.back);
                (x, y, dot(p, way) / dot(way, way).max(1.0))
            })
            .collect();
        let area: f64 = window.iter().map(|w| w.2).sum::<f64>().max(1.0);
        let mean = |v: &dyn Fn(&(usize, usize, f64)) -> usize| {
            window.iter().map(|w| (v(w) as f64 + 0.5) * w.2).sum::<f64>() / area
        };
        let centroid = [mean(&|w| w.0), mean(&|w| w.1)];
        let fit = |shape: Shape| {
            let width = (area / shape.area()).sqrt();
            let mut centre = centroid;
            if shape == Shape::Triangle {
                // The centroid is a third of the height above the base, the middle of the box a half.
                centre[1] -= width * shape.height() / 6.0;
            }
            let outline = Outline::new(shape, centre, width);
            let off = window.iter().map(|(x, y, part)| (part - outline.coverage(*x, *y)).powi(2));
            (shape, centre, width, off.sum::<f64>() / area)
        };
        let fits = Shape::ALL.map(fit);
        let (shape, centre, width, off) =
            fits.into_iter().fold(fits[0], |a, b| if b.3 < a.3 { b } else { a });
        let share = width / side as f64;
        let size = match share {
            s if !(0.15..0.46).contains(&s) => None,
            s if s < (Size::Small.share() + Size::Large.share()) / 2.0 => Some(Size::Small),
            _ => Some(Size::Large),
        };
        Found {
            shape: (off <= UNLIKE).then_some(shape),
            colour: nearest(&Colour::ALL, Colour::rgb, colour),
            size,
            centre,
            width,
        }
    }
}

#[cfg(test)]
mod tests;
