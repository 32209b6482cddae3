//! Channels beside the noisy latents that condition a UNet: Rombach et al. 2022, sections 4.4 (smaller pictures) and 4.5
//! (masks). Their order is that of diffusers' pipelines.

use super::frozen::Encoder;
use super::source::Subject;
use crate::data::mask;
use crate::data::source::{Sample, Source};
use crate::data::transform::{Filter, resize};
use crate::error::Result;
use crate::pipeline::{Beside, Init, Mask, Request};
use crate::rng::Small;

/// What stands beside the noisy latents in the UNet's input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Concatenated {
    /// A mask, 1 where the picture is to be painted, and the latents of the picture without what is there.
    Mask,
    /// The picture at the latents' size, from −1 to 1.
    LowResolution,
}

/// Side of the squares that stand for holes in pictures to look at, in pixels.
const CHECK: usize = 4;

impl Concatenated {
    /// What the pipeline of an export gives its UNet.
    pub(super) fn beside(self) -> Beside {
        match self {
            Concatenated::Mask => Beside::Mask,
            Concatenated::LowResolution => Beside::Picture,
        }
    }

    /// Channels beside the Z channels of the latents.
    pub fn channels(self, z: usize) -> usize {
        self.beside().channels(z)
    }

    /// A request with what such a picture (S,S,3), with so many pixels to a latent, is made from.
    pub(super) fn asked(self, request: Request, sample: &Sample, [side, factor]: [usize; 2]) -> Request {
        let init =
            |side, rgb: &[u8]| Some(Init { width: side, height: side, rgb: rgb.to_vec(), strength: 1.0 });
        let extras = &sample.extras;
        match self {
            Concatenated::Mask => {
                let gray = extras.mask.iter().flatten().map(|drawn| 255 * drawn).collect();
                let mask = Some(Mask { width: side, height: side, gray, composite: false });
                Request { init: init(side, &sample.pixels), mask, ..request }
            }
            Concatenated::LowResolution => Request {
                init: init(side / factor, extras.low_resolution.as_deref().unwrap_or_default()),
                ..request
            },
        }
    }

    /// The pipeline of diffusers that an export is one of, and the channels of latents that diffusers' own runs with; `None`
    /// where it has none: a UNet that is given a mask and no context.
    pub(super) fn pipeline(self, context: usize) -> Option<(&'static str, usize)> {
        match (self, context) {
            (Concatenated::Mask, 0) => None,
            (Concatenated::Mask, _) => Some(("StableDiffusionInpaintPipeline", 4)),
            (Concatenated::LowResolution, _) => Some(("LDMSuperResolutionPipeline", 3)),
        }
    }

    /// In a few words, for the log.
    pub(super) fn described(self) -> &'static str {
        match self {
            Concatenated::Mask => {
                ", and masks: pictures are encoded at each step, with and without what these cover"
            }
            Concatenated::LowResolution => " but the picture at the latents' size",
        }
    }

    /// Adds to a picture of S pixels a side, with so many to a latent, what the channels are made from. What is left to
    /// chance comes from `chance`.
    pub(super) fn extend(
        self,
        sample: &mut Sample,
        [side, factor]: [usize; 2],
        chance: &mut Small,
    ) -> Result<()> {
        match self {
            Concatenated::Mask => sample.extras.mask = Some(mask::draw(side, chance)),
            Concatenated::LowResolution => {
                let small = resize(&sample.pixels, [side; 2], [side / factor; 2], Filter::Bicubic)?;
                sample.extras.low_resolution = Some(small);
            }
        }
        Ok(())
    }

    /// The condition of a picture (S,S,3) to look at, of its size: with the holes checked, or with large pixels.
    pub(super) fn shown(self, sample: &Sample, [side, factor]: [usize; 2]) -> Vec<u8> {
        let mut pixels = sample.pixels.clone();
        for (i, pixel) in pixels.chunks_mut(3).enumerate() {
            let (x, y) = (i % side, i / side);
            match self {
                Concatenated::Mask => {
                    let odd = (x / CHECK + y / CHECK) % 2 == 1;
                    if sample.extras.mask.as_ref().is_some_and(|mask| mask[i] == 1) {
                        pixel.fill(if odd { 160 } else { 96 });
                    }
                }
                Concatenated::LowResolution => {
                    let at = 3 * (y / factor * (side / factor) + x / factor);
                    if let Some(small) = &sample.extras.low_resolution {
                        pixel.copy_from_slice(&small[at..at + 3]);
                    }
                }
            }
        }
        pixels
    }
}

/// Pictures with what the channels are made from.
#[derive(Clone)]
pub(super) struct Paired {
    pub(super) subject: Subject,
    pub(super) kind: Option<Concatenated>,
    /// Pixels per latent, on each axis.
    pub(super) factor: usize,
}

impl Paired {
    /// Adds to a picture what the channels are made from, where there are any.
    pub(super) fn extend(&self, sample: &mut Sample, chance: &mut Small) -> Result<()> {
        let size = [self.subject.side(), self.factor];
        self.kind.map_or(Ok(()), |kind| kind.extend(sample, size, chance))
    }
}

impl Source for Paired {
    fn len(&self) -> Option<u64> {
        self.subject.len()
    }

    fn side(&self) -> usize {
        self.subject.side()
    }

    fn sample(&self, index: u64, chance: &mut Small) -> Result<Sample> {
        let mut sample = self.subject.sample(index, chance)?;
        self.extend(&mut sample, chance)?;
        Ok(sample)
    }
}

/// What the channels of a batch are made from.
pub(super) enum Channels {
    /// There are none.
    None,
    /// Masks of the latents' size (B,h,w), and what the encoder says of the pictures without what they cover.
    Mask { masks: Vec<f32>, moments: Vec<f32> },
    /// Pictures of the latents' size (B,h,w,3).
    LowResolution(Vec<f32>),
}

impl Channels {
    /// From pictures (B,S,S,3), and their masks (B,S,S) or small ones (B,h,w,3) if there are such; all but masks from −1 to 1.
    pub(super) fn of(
        images: &[f32],
        masks: Option<Vec<f32>>,
        small: Option<Vec<f32>>,
        encoder: &mut Encoder,
    ) -> Result<Channels> {
        Ok(match (masks, small) {
            (Some(masks), _) => Channels::Mask {
                moments: encoder.encode(&without(images, &masks))?,
                masks: nearest(&masks, encoder.side(), encoder.factor()),
            },
            (None, Some(small)) => Channels::LowResolution(small),
            (None, None) => Channels::None,
        })
    }

    /// The channels (B,h,w,X), where there are any; latents of Z channels are drawn by `draw` and multiplied by `scale`.
    pub(super) fn with(
        &self,
        z: usize,
        scale: f64,
        draw: impl FnOnce(&[f32]) -> Result<Vec<f32>>,
    ) -> Result<Option<Vec<f32>>> {
        Ok(match self {
            Channels::None => None,
            Channels::Mask { masks, moments } => {
                Some(joined((masks, 1), (&scaled(&draw(moments)?, scale), z)))
            }
            Channels::LowResolution(small) => Some(small.clone()),
        })
    }
}

/// 0 to 255 as −1 to 1.
pub(super) fn signed(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.iter().map(|v| f32::from(*v) / 127.5 - 1.0)
}

/// Latents in the scale of the UNet.
pub(super) fn scaled(z: &[f32], scale: f64) -> Vec<f32> {
    z.iter().map(|v| (f64::from(*v) * scale) as f32).collect()
}

/// Pictures (B,S,S,3) from −1 to 1 without what their masks (B,S,S) cover: 0 there.
pub(super) fn without(images: &[f32], masks: &[f32]) -> Vec<f32> {
    images
        .chunks(3)
        .zip(masks)
        .flat_map(|(p, m)| p.iter().map(move |v| if *m < 0.5 { *v } else { 0.0 }))
        .collect()
}

/// Masks (B,S,S) of S · `factor` pixels a side at the latents' size: the first of each square, as PyTorch's `interpolate` takes
/// the nearest.
pub(super) fn nearest(masks: &[f32], side: usize, factor: usize) -> Vec<f32> {
    let rows = masks.chunks(side).step_by(factor);
    rows.flat_map(|row| row.iter().step_by(factor).copied()).collect()
}

/// Two arrays with channels last, (…,A) and (…,B), as one (…,A + B).
pub(super) fn joined((x, a): (&[f32], usize), (y, b): (&[f32], usize)) -> Vec<f32> {
    x.chunks(a).zip(y.chunks(b)).flat_map(|(x, y)| [x, y].concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::frozen::FirstStage;
    use super::*;
    use crate::exec::Device;
    use crate::io::Checkpoint;
    use std::path::{Path, PathBuf};

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    /// Paired `StableDiffusionInpaintPipeline.prepare_mask_latents`, from the same picture, mask and noise: recorded by
    /// `tools/golden_train.py`.
    #[test]
    fn the_channels_of_a_mask_are_those_of_diffusers() {
        let record = Checkpoint::open(golden("train/inpainting.safetensors")).unwrap();
        let read = |name: &str| record.read_f32(name).unwrap();
        let first = FirstStage::open(&golden("inpaint-tiny/vae")).unwrap();
        let mut encoder = first.encoder(2, 32, &Device::Cpu).unwrap();
        let channels = Channels::of(&read("picture"), Some(read("mask")), None, &mut encoder).unwrap();
        let draw = |moments: &[f32]| Ok(first.draw(moments, &read("noise")));
        let ours = channels.with(4, 0.18215, draw).unwrap().unwrap();
        let theirs = read("channels");
        assert_eq!(ours.len(), theirs.len());
        let off = ours.iter().zip(&theirs).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        let size = theirs.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        assert!(off <= 1e-5 * size, "off by {off:e} of {size:e}");
        let mask = |x: &[f32]| x.iter().step_by(5).copied().collect::<Vec<f32>>();
        assert!(mask(&ours) == mask(&theirs), "masks differ");
        let covered: f32 = mask(&ours).iter().sum();
        assert!(covered > 50.0 && covered < 200.0, "{covered} of 512");
    }

    #[test]
    fn what_is_seen_of_a_condition() {
        let pixels = (0..8 * 8 * 3).map(|i| i as u8).collect();
        let mut sample = Sample { pixels, ..Sample::default() };
        Concatenated::LowResolution.extend(&mut sample, [8, 4], &mut Small::new(0)).unwrap();
        assert_eq!(sample.extras.low_resolution.as_ref().unwrap().len(), 2 * 2 * 3);
        let seen = Concatenated::LowResolution.shown(&sample, [8, 4]);
        let small = sample.extras.low_resolution.as_ref().unwrap();
        for (x, y, at) in [(0, 0, 0), (3, 3, 0), (4, 0, 3), (7, 7, 9), (3, 4, 6)] {
            assert_eq!(seen[3 * (8 * y + x)..][..3], small[at..at + 3], "({x}, {y})");
        }
        sample.extras.mask = Some((0..64).map(|i| u8::from(i < 8)).collect());
        let seen = Concatenated::Mask.shown(&sample, [8, 4]);
        assert_eq!((seen[0], seen[3 * 4], &seen[24..]), (96, 160, &sample.pixels[24..]));
    }
}
