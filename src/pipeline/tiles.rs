//! Large pictures through the autoencoder in tiles that overlap, all of one size, so that one program serves them all.
//!
//! Neighbours are faded into each other over the narrowest overlap of their axis. The weights of all tiles at a pixel
//! are differences of one rising curve, so they add up to one by construction.

use super::{Observer, finite};
use crate::error::{Error, Result};
use crate::exec::Program;
use crate::tensor::HostTensor;

/// Share of a tile that at least overlaps with the next: 1 in this many, as in diffusers.
const OVERLAP: usize = 4;

/// How an axis is cut, in latents.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Axis {
    /// Length of every tile.
    pub(super) tile: usize,
    /// Where the tiles begin, first to last.
    pub(super) starts: Vec<usize>,
    /// Over how many latents neighbours are faded into each other.
    fade: usize,
}

impl Axis {
    /// Tiles of `side` that cover `length`, spread evenly; a single one where that is enough.
    pub(super) fn new(length: usize, side: usize) -> Axis {
        if length <= side {
            return Axis { tile: length, starts: vec![0], fade: 0 };
        }
        let overlap = (side / OVERLAP).max(1).min(side - 1);
        let last = (length - overlap).div_ceil(side - overlap) - 1;
        let starts: Vec<usize> = (0..=last).map(|i| i * (length - side) / last).collect();
        let fade = starts.windows(2).map(|s| s[0] + side - s[1]).min().unwrap_or(0);
        Axis { tile: side, starts, fade }
    }

    /// How far tile `i` has given way to tile `i` + 1 at a place, in latents: 0 to 1, without a bend at either end.
    fn given_way(&self, i: usize, at: f64) -> f64 {
        let middle = (self.starts[i + 1] + self.starts[i] + self.tile) as f64 / 2.0;
        let t = ((at - middle) / self.fade as f64 + 0.5).clamp(0.0, 1.0);
        t * t * (3.0 - 2.0 * t)
    }

    /// Weights of tile `i` along its own length, at `scale` values for each latent.
    fn weights(&self, i: usize, scale: usize) -> Vec<f32> {
        let at = |k: usize| self.starts[i] as f64 + (k as f64 + 0.5) / scale as f64;
        let before = |k: usize| if i == 0 { 1.0 } else { self.given_way(i - 1, at(k)) };
        let after = |k: usize| if i + 1 == self.starts.len() { 0.0 } else { self.given_way(i, at(k)) };
        (0..self.tile * scale).map(|k| (before(k) - after(k)) as f32).collect()
    }
}

/// An input or the output of a tile's program: its name, and how many values it has for each latent on an axis.
pub(super) struct Port<'a> {
    pub(super) name: &'a str,
    pub(super) scale: usize,
}

/// Runs a program of one tile over all tiles and joins what it puts out, (1,H,W,C). `inputs` are those of the whole.
///
/// # Errors
/// From the device, the observer, and for values that are not finite.
pub(super) fn run(
    program: &mut Program,
    part: &str,
    inputs: &[(Port, &HostTensor)],
    output: Port,
    [rows, columns]: [&Axis; 2],
    observer: &mut dyn Observer,
) -> Result<HostTensor> {
    let length = |axis: &Axis| axis.starts.last().map_or(0, |s| s + axis.tile) * output.scale;
    let (height, width) = (length(rows), length(columns));
    let (mut whole, mut channels, mut done) = (Vec::new(), 0, 0);
    let of = rows.starts.len() * columns.starts.len();
    if of == 1 {
        inputs.iter().try_for_each(|(port, x)| program.write(port.name, x))?;
        return finite(program, output.name, part);
    }
    for (i, &top) in rows.starts.iter().enumerate() {
        let down = rows.weights(i, output.scale);
        for (j, &left) in columns.starts.iter().enumerate() {
            let across = columns.weights(j, output.scale);
            for (port, x) in inputs {
                let at = [top * port.scale, left * port.scale];
                program
                    .write(port.name, &cut(x, at, [rows.tile * port.scale, columns.tile * port.scale])?)?;
            }
            let tile = finite(program, output.name, part)?;
            channels = tile.shape().last();
            whole.resize(height * width * channels, 0f32);
            let values = tile.as_f32().ok_or_else(|| Error::invalid("a tile that is not f32"))?;
            let (line, step) = (columns.tile * output.scale * channels, width * channels);
            let first = (top * output.scale * width + left * output.scale) * channels;
            for (y, from) in values.chunks_exact(line).enumerate() {
                let to = &mut whole[first + y * step..][..line];
                let weights = across.iter().map(|w| w * down[y]);
                for ((to, from), w) in
                    to.chunks_exact_mut(channels).zip(from.chunks_exact(channels)).zip(weights)
                {
                    to.iter_mut().zip(from).for_each(|(t, f)| *t += w * f);
                }
            }
            done += 1;
            observer.step(done, of)?;
        }
    }
    HostTensor::f32([1, height, width, channels], whole)
}

/// A part of x (1,H,W,C) f32.
fn cut(x: &HostTensor, [top, left]: [usize; 2], [height, width]: [usize; 2]) -> Result<HostTensor> {
    let (&[_, _, w, c], Some(values)) = (&x.shape()[..], x.as_f32()) else {
        return Err(Error::invalid(format!("want f32(1,H,W,C) to cut into tiles; got {}", x.spec())));
    };
    let line = |y: usize| &values[((top + y) * w + left) * c..][..width * c];
    HostTensor::f32([1, height, width, c], (0..height).flat_map(line).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::Device;
    use crate::io::ModelFolder;
    use crate::pipeline::{Init, Pipeline, Request};
    use crate::rng::Generator;

    #[test]
    fn tiles_cover_an_axis_and_their_weights_add_up_to_one() {
        for length in 1..200 {
            for side in [2, 3, 8, 16, 31, 64] {
                let axis = Axis::new(length, side);
                assert!(axis.starts.windows(2).all(|s| s[0] < s[1] && s[1] < s[0] + axis.tile), "{axis:?}");
                assert_eq!(axis.starts.last().unwrap() + axis.tile, length);
                assert!(
                    axis.starts.len() == 1 || axis.fade >= (side / OVERLAP).max(1),
                    "{axis:?} for {length}"
                );
                for scale in [1, 8] {
                    let mut sum = vec![0f32; length * scale];
                    for (i, start) in axis.starts.iter().enumerate() {
                        for (k, w) in axis.weights(i, scale).into_iter().enumerate() {
                            assert!((0.0..=1.0).contains(&w), "{axis:?}: {w}");
                            sum[start * scale + k] += w;
                        }
                    }
                    assert!(sum.iter().all(|s| (s - 1.0).abs() < 1e-6), "{axis:?}: {sum:?}");
                }
            }
        }
        assert_eq!(Axis::new(128, 64).starts, [0, 32, 64]);
        assert_eq!(Axis::new(112, 64).starts, [0, 48]);
        assert_eq!(Axis::new(64, 64), Axis { tile: 64, starts: vec![0], fade: 0 });
    }

    #[test]
    fn a_part_is_cut_out_of_the_whole() {
        let x = HostTensor::f32([1, 3, 4, 2], (0..24).map(|v| v as f32).collect()).unwrap();
        let part = cut(&x, [1, 2], [2, 1]).unwrap();
        assert_eq!((part.shape(), part.to_f32()), ([1, 2, 1, 2].into(), vec![12., 13., 20., 21.]));
    }

    /// Mean absolute difference of each line to the one before it, down the picture.
    fn steps(rgb: &[u8], width: usize) -> Vec<f64> {
        let lines: Vec<&[u8]> = rgb.chunks_exact(3 * width).collect();
        let step = |(a, b): (&[u8], &[u8])| {
            a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.len() as f64
        };
        lines.windows(2).map(|l| step((l[0], l[1]))).collect()
    }

    fn transposed(rgb: &[u8], width: usize) -> Vec<u8> {
        let height = rgb.len() / 3 / width;
        let pixel = |x: usize, y: usize| rgb[3 * (y * width + x)..][..3].to_vec();
        (0..width).flat_map(|x| (0..height).flat_map(move |y| pixel(x, y))).collect()
    }

    #[test]
    fn seams_do_not_show() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/sd15-tiny");
        let pipeline = Pipeline::open(&ModelFolder::open(model).unwrap(), &Device::Cpu, None).unwrap();
        let r = Request { width: Some(224), height: Some(160), ..Request::default() };
        let tiled = Request { vae_tiling: true, vae_tile_size: Some(32), ..r.clone() };
        let [rows, columns] = pipeline.blueprint().tiles(&tiled).unwrap();
        assert_eq!((rows.starts.len(), columns.starts.len(), rows.tile), (3, 5, 32));
        let z = HostTensor::f32([1, 80, 112, 4], Generator::new(3).randn(80 * 112 * 4)).unwrap();
        let whole = pipeline.pictures(&r, &z, &mut ()).unwrap().remove(0).rgb;
        let joined = pipeline.pictures(&tiled, &z, &mut ()).unwrap().remove(0).rgb;
        let apart = whole.iter().zip(&joined).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum::<f64>();
        let psnr = 10.0 * (255.0f64.powi(2) * whole.len() as f64 / apart).log10();
        assert!(psnr > 25.0, "{psnr} dB from the picture in one piece");
        for (axis, rgb, width) in [(&rows, joined.clone(), 224), (&columns, transposed(&joined, 224), 160)] {
            // Where a tile begins, ends, and is half faded.
            let middle = |i: usize| (axis.starts[i + 1] + axis.starts[i] + axis.tile) as f64 / 2.0 * 2.0;
            let mut seams: Vec<usize> =
                axis.starts.iter().flat_map(|s| [2 * s, 2 * (s + axis.tile)]).collect();
            seams.extend((0..axis.starts.len() - 1).map(|i| middle(i) as usize));
            let steps = steps(&rgb, width);
            let mean = |seam: bool| {
                let lines = (1..=steps.len()).filter(|line| seams.contains(line) == seam);
                let all: Vec<f64> = lines.map(|line| steps[line - 1]).collect();
                all.iter().sum::<f64>() / all.len() as f64
            };
            assert!(mean(true) <= 1.1 * mean(false), "{} at seams, {} elsewhere", mean(true), mean(false));
        }
    }

    #[test]
    fn an_initial_picture_is_encoded_in_tiles() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/sd15-tiny");
        let pipeline = Pipeline::open(&ModelFolder::open(model).unwrap(), &Device::Cpu, None).unwrap();
        let (w, h) = (128, 96);
        // A texture without end: each norm sees in a tile what it sees in the whole. A ramp would not do.
        let rgb = Generator::new(1).randn(w * h * 3).iter().map(|v| (128.0 + 40.0 * v) as u8).collect();
        let init = Some(Init { width: w, height: h, rgb, strength: 0.5 });
        let r = Request { init, ..Request::default() };
        let tiled = Request { vae_tiling: true, vae_tile_size: Some(24), ..r.clone() };
        let (method, schedule) = pipeline.blueprint().choose(&r).unwrap();
        let ladder = method.ladder(&schedule, 4, 2).unwrap();
        let table = method.table(&ladder).unwrap();
        let start = |r: &Request| pipeline.begin(r, &table, &ladder, &mut ()).unwrap().state.to_f64();
        let (a, b) = (start(&r), start(&tiled));
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
        let error = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut a.iter().copied());
        assert!(error > 0.0 && error < 0.1, "{error} from the encoding in one piece");
    }
}
