//! Outlines of the shapes and the exact part of a pixel that they cover.

use super::shapes::Shape;

/// A shape at its place. x runs to the right, y down, in pixels; pixel (x, y) is the square from (x, y) to (x+1, y+1).
#[derive(Clone, Debug)]
pub struct Outline {
    /// Corners of a closed polygon, with the inside to the right of each edge as seen on the screen.
    corners: Vec<[f64; 2]>,
    /// Discs, with the sign of their area.
    discs: Vec<(f64, f64)>,
    centre: [f64; 2],
}

impl Outline {
    /// The outline of a shape whose bounding box is `side` wide, with its centre at `centre`.
    pub fn new(shape: Shape, centre: [f64; 2], side: f64) -> Outline {
        let [cx, cy] = centre;
        let r = side / 2.0;
        let mut discs = vec![];
        let unit: &[[f64; 2]] = match shape {
            Shape::Circle => {
                discs.push((r, 1.0));
                &[]
            }
            Shape::Ring => {
                discs.extend([(r, 1.0), (r / 2.0, -1.0)]);
                &[]
            }
            Shape::Square => &[[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]],
            Shape::Diamond => &[[0.0, -1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]],
            Shape::Triangle => {
                const H: f64 = 0.866_025_403_784_438_6; // √3 / 2
                &[[0.0, -H], [1.0, H], [-1.0, H]]
            }
            Shape::Cross => {
                const A: f64 = 1.0 / 3.0;
                &[
                    [-A, -1.0],
                    [A, -1.0],
                    [A, -A],
                    [1.0, -A],
                    [1.0, A],
                    [A, A],
                    [A, 1.0],
                    [-A, 1.0],
                    [-A, A],
                    [-1.0, A],
                    [-1.0, -A],
                    [-A, -A],
                ]
            }
        };
        let corners = unit.iter().map(|[x, y]| [cx + r * x, cy + r * y]).collect();
        Outline { corners, discs, centre }
    }

    /// The part of pixel (x, y) inside the outline, 0 to 1: its exact area, not a count of samples.
    pub fn coverage(&self, x: usize, y: usize) -> f64 {
        let (x, y) = (x as f64, y as f64);
        let mut area = 0.0;
        for (i, a) in self.corners.iter().enumerate() {
            let b = self.corners[(i + 1) % self.corners.len()];
            area += left_of(*a, b, x, y);
        }
        for (radius, sign) in &self.discs {
            area += sign * disc([x - self.centre[0], y - self.centre[1]], *radius);
        }
        area.clamp(0.0, 1.0)
    }
}

/// The area of pixel (x, y) to the left of the edge from `a` to `b`, counted positive where the edge goes down. Over a
/// closed polygon these sum to the area inside (Green's theorem).
fn left_of(a: [f64; 2], b: [f64; 2], x: f64, y: f64) -> f64 {
    let height = b[1] - a[1];
    if height == 0.0 {
        return 0.0;
    }
    let at = |v: f64| ((v - a[1]) / height).clamp(0.0, 1.0);
    let (mut t0, mut t1) = (at(y), at(y + 1.0));
    if height < 0.0 {
        (t0, t1) = (t1, t0);
    }
    let [u0, u1] = [t0, t1].map(|t| a[0] + (b[0] - a[0]) * t - x);
    // The mean over the edge of its abscissa, kept within the pixel: `sum` is the integral of clamp(u, 0, 1).
    let sum = |u: f64| if u <= 1.0 { u.max(0.0).powi(2) / 2.0 } else { u - 0.5 };
    let mean = if (u1 - u0).abs() < 1e-6 {
        ((u0 + u1) / 2.0).clamp(0.0, 1.0)
    } else {
        (sum(u1) - sum(u0)) / (u1 - u0)
    };
    mean * (t1 - t0) * height
}

/// The area that the pixel with its corner at `corner` shares with a disc about the origin.
fn disc(corner: [f64; 2], r: f64) -> f64 {
    let [x, y] = corner;
    // A pixel reaches less than this far from its centre.
    const REACH: f64 = 0.7072;
    let distance = (x + 0.5).hypot(y + 0.5);
    if distance <= r - REACH {
        return 1.0;
    }
    if distance >= r + REACH {
        return 0.0;
    }
    let square = [[x, y], [x + 1.0, y], [x + 1.0, y + 1.0], [x, y + 1.0]];
    (0..4).map(|i| sector(square[i], square[(i + 1) % 4], r)).sum()
}

/// The signed area that the triangle of the origin, `a` and `b` shares with a disc about the origin: where the edge runs
/// inside the disc a triangle, where it runs outside a sector.
fn sector(a: [f64; 2], b: [f64; 2], r: f64) -> f64 {
    let d = [b[0] - a[0], b[1] - a[1]];
    let along = (a[0] * d[0] + a[1] * d[1]) / (d[0] * d[0] + d[1] * d[1]);
    let root = along * along - (a[0] * a[0] + a[1] * a[1] - r * r) / (d[0] * d[0] + d[1] * d[1]);
    let root = root.max(0.0).sqrt();
    let point = |t: f64| [a[0] + d[0] * t, a[1] + d[1] * t];
    let stops = [0.0, (-along - root).clamp(0.0, 1.0), (-along + root).clamp(0.0, 1.0), 1.0];
    let mut area = 0.0;
    for pair in stops.windows(2) {
        let (p, q, middle) = (point(pair[0]), point(pair[1]), point((pair[0] + pair[1]) / 2.0));
        let cross = p[0] * q[1] - p[1] * q[0];
        let dot = p[0] * q[0] + p[1] * q[1];
        let inside = middle[0] * middle[0] + middle[1] * middle[1] < r * r;
        area += if inside { cross / 2.0 } else { r * r * cross.atan2(dot) / 2.0 };
    }
    area
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Small;

    /// Whether a point is inside, straight from the definitions.
    fn inside(shape: Shape, [cx, cy]: [f64; 2], side: f64, x: f64, y: f64) -> bool {
        let (u, v) = (2.0 * (x - cx) / side, 2.0 * (y - cy) / side);
        match shape {
            Shape::Circle => u.hypot(v) < 1.0,
            Shape::Ring => u.hypot(v) < 1.0 && u.hypot(v) > 0.5,
            Shape::Square => u.abs() < 1.0 && v.abs() < 1.0,
            Shape::Diamond => u.abs() + v.abs() < 1.0,
            Shape::Cross => u.abs().min(v.abs()) < 1.0 / 3.0 && u.abs().max(v.abs()) < 1.0,
            Shape::Triangle => {
                let h = 3f64.sqrt() / 2.0;
                v < h && v > -h && u.abs() < (v + h) / (2.0 * h)
            }
        }
    }

    #[test]
    fn coverage_is_the_area_of_the_pixel_inside() {
        let mut draw = Small::new(1);
        for shape in Shape::ALL {
            let centre = [draw.range(7.0, 9.0), draw.range(7.0, 9.0)];
            let side = draw.range(6.0, 12.0);
            let outline = Outline::new(shape, centre, side);
            const N: usize = 200;
            for (x, y) in (0..16).flat_map(|x| (0..16).map(move |y| (x, y))) {
                let sample = |i: usize| (i as f64 + 0.5) / N as f64;
                let hits = (0..N * N)
                    .filter(|k| {
                        let (px, py) = (x as f64 + sample(k % N), y as f64 + sample(k / N));
                        inside(shape, centre, side, px, py)
                    })
                    .count();
                let (got, want) = (outline.coverage(x, y), hits as f64 / (N * N) as f64);
                assert!((got - want).abs() < 0.01, "{shape} at ({x}, {y}): want {want}; got {got}");
            }
        }
    }

    #[test]
    fn the_areas_sum_to_the_closed_form() {
        let mut draw = Small::new(2);
        for _ in 0..20 {
            for shape in Shape::ALL {
                let side = draw.range(3.0, 20.0);
                let outline = Outline::new(shape, [draw.range(12.0, 14.0), draw.range(12.0, 14.0)], side);
                let sum: f64 = (0..26 * 26).map(|i| outline.coverage(i % 26, i / 26)).sum();
                let want = shape.area() * side * side;
                assert!((sum - want).abs() < 1e-9 * want, "{shape} of {side}: want {want}; got {sum}");
            }
        }
    }
}
