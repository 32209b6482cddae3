//! Channels beside the noisy latents that condition a UNet: Rombach et al. 2022, sections 4.4 (smaller pictures) and 4.5
//! (masks). Their order is that of diffusers' pipelines.

use super::frozen::Encoder;
use super::source::Subject;
use crate::data::mask;
use crate::data::source::{Sample, Source};
use crate::error::Result;
use crate::rng::Small;

/// What stands beside the noisy latents in the UNet's input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Concatenated {
    /// A mask, 1 where the picture is to be painted, and the latents of the picture without what is there.
    Mask,
}

/// Side of the squares that stand for holes in pictures to look at, in pixels.
const CHECK: usize = 4;

impl Concatenated {
    /// Channels beside the Z channels of the latents.
    pub fn channels(self, z: usize) -> usize {
        match self {
            Concatenated::Mask => 1 + z,
        }
    }

    /// The pipeline of diffusers that an export is one of.
    pub(super) fn pipeline(self) -> &'static str {
        match self {
            Concatenated::Mask => "StableDiffusionInpaintPipeline",
        }
    }

    /// In a few words, for the log.
    pub(super) fn described(self) -> &'static str {
        match self {
            Concatenated::Mask => {
                ", and masks: pictures are encoded at each step, with and without what these cover"
            }
        }
    }

    /// Adds to a picture of S pixels a side what the channels are made from.
    pub(super) fn extend(self, sample: &mut Sample, side: usize, chance: &mut Small) {
        match self {
            Concatenated::Mask => sample.extras.mask = Some(mask::draw(side, chance)),
        }
    }

    /// The condition of a picture (S,S,3) to look at, of its size: the holes are checked.
    pub(super) fn shown(self, sample: &Sample, side: usize) -> Vec<u8> {
        let mut pixels = sample.pixels.clone();
        let holes = sample.extras.mask.iter().flatten().enumerate().filter(|(_, hole)| **hole == 1);
        for (i, _) in holes {
            let odd = (i % side / CHECK + i / side / CHECK) % 2 == 1;
            pixels[3 * i..3 * i + 3].fill(if odd { 160 } else { 96 });
        }
        pixels
    }
}

/// Pictures with what the channels are made from.
#[derive(Clone)]
pub(super) struct Beside {
    pub(super) subject: Subject,
    pub(super) kind: Option<Concatenated>,
}

impl Source for Beside {
    fn len(&self) -> Option<u64> {
        self.subject.len()
    }

    fn side(&self) -> usize {
        self.subject.side()
    }

    fn sample(&self, index: u64, chance: &mut Small) -> Result<Sample> {
        let mut sample = self.subject.sample(index, chance)?;
        if let Some(kind) = self.kind {
            kind.extend(&mut sample, self.side(), chance);
        }
        Ok(sample)
    }
}

/// What the channels of a batch are made from.
pub(super) enum Channels {
    /// There are none.
    None,
    /// Masks of the latents' size (B,h,w), and what the encoder says of the pictures without what they cover.
    Mask { masks: Vec<f32>, moments: Vec<f32> },
}

impl Channels {
    /// From pictures (B,S,S,3) and their masks (B,S,S).
    pub(super) fn masked(images: &[f32], masks: &[f32], encoder: &mut Encoder) -> Result<Channels> {
        let moments = encoder.encode(&without(images, masks))?;
        Ok(Channels::Mask { moments, masks: nearest(masks, encoder.side(), encoder.factor()) })
    }

    /// The channels (B,h,w,X), where there are any; latents are drawn by `draw` and multiplied by `scale`.
    pub(super) fn with(
        &self,
        z: usize,
        scale: f64,
        draw: impl FnOnce(&[f32]) -> Result<Vec<f32>>,
    ) -> Result<Option<Vec<f32>>> {
        match self {
            Channels::None => Ok(None),
            Channels::Mask { masks, moments } => {
                Ok(Some(joined((masks, 1), (&scaled(&draw(moments)?, scale), z))))
            }
        }
    }
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
