//! What a frozen first stage says of pictures: asked at every step, or once for all of them and kept in a file.
//!
//! The file holds moments, not draws: a KL encoder predicts a distribution, and each step draws anew from it.

use super::concat::{Channels, Concatenated, Paired, signed};
use super::condition::Condition;
use super::frozen::{Encoder, FirstStage};
use super::run::Watch;
use super::source::{Stream, Subject, drawing, normal};
use crate::data::loader::{Loader, Options, shuffled};
use crate::data::source::Source;
use crate::error::{Error, Result};
use crate::exec::Device;
use crate::io::{Checkpoint, Order, weights};
use crate::rng::Small;
use crate::tensor::{DType, HostTensor};
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

/// A batch as a diffusion step takes it: what the encoder says (B,…), the ids of the condition, and what stands beside the latents.
pub(super) struct Said {
    pub(super) moments: Vec<f32>,
    pub(super) ids: Vec<Vec<i32>>,
    pub(super) channels: Channels,
}

/// Where batches come from.
pub(super) enum Latents {
    /// The encoder is asked at every step.
    Live { loader: Loader, encoder: Box<Encoder> },
    /// All has been said.
    Kept { file: Checkpoint, ids: Vec<Vec<i32>>, seed: u64, batch: usize },
}

/// One kept latent as it is called in the file.
const MOMENTS: &str = "moments";
/// Whose they are, by picture: (N).
const PLACES: &str = "places";
/// One picture at the latents' size, where such stand beside them.
const SMALL: &str = "low_res";

impl Latents {
    /// The encoder sees `batch` pictures at a time, a divisor of those of a step.
    pub(super) fn live(
        pictures: &Paired,
        options: Options,
        step: usize,
        (first, batch): (&FirstStage, usize),
        device: &Device,
    ) -> Result<Latents> {
        let encoder = Box::new(first.encoder(batch, pictures.side(), device)?);
        let loader = Loader::at(pictures.clone(), options, step as u64)?;
        Ok(Latents::Live { loader, encoder })
    }

    /// From `path`, which is made where it is not there or belongs to other pictures or another encoder.
    pub(super) fn kept(
        pictures: &Paired,
        options: Options,
        (first, batch, stage): (&FirstStage, usize, &str),
        (path, condition): (&Path, &Condition),
        device: &Device,
        watch: &mut dyn Watch,
    ) -> Result<Latents> {
        let subject = &pictures.subject;
        let low = pictures.kind == Some(Concatenated::LowResolution);
        let key = format!("{stage} {}{}", subject.fingerprint(), if low { " low_res" } else { "" });
        let old = path.is_file().then(|| Checkpoint::open(path)).transpose()?;
        let old = old.filter(|c| c.metadata().get("of") == Some(&key));
        let n = subject.len().unwrap_or(0) as usize;
        let side = subject.side();
        let file = match old {
            Some(file) => file,
            None => {
                watch.say(&format!("encodes {n} pictures, once"));
                let mut encoder = first.encoder(batch, side, device)?;
                let row = (side / first.factor()).pow(2) * first.moments();
                let mut all = Vec::with_capacity(n * row);
                let (mut places, mut small) = (Vec::with_capacity(n), vec![]);
                for start in (0..n).step_by(options.batch) {
                    let end = (start + options.batch).min(n);
                    let mut images = Vec::with_capacity(options.batch * side * side * 3);
                    for i in start..end {
                        let told = |what: String| watch.say(&format!("left out: {what}"));
                        let (place, mut sample) = subject.readable(i as u64, &mut Small::new(0), told)?;
                        pictures.extend(&mut sample, &mut Small::new(0))?;
                        places.push(place as f32);
                        images.extend(signed(&sample.pixels));
                        small.extend(sample.extras.low_resolution.iter().flat_map(|small| signed(small)));
                    }
                    images.resize(options.batch * side * side * 3, 0.0);
                    all.extend(&encoder.encode(&images)?[..(end - start) * row]);
                }
                let mut tensors = vec![
                    (MOMENTS.to_string(), HostTensor::f32([n, row], all)?),
                    (PLACES.to_string(), HostTensor::f32([n], places)?),
                ];
                if low {
                    tensors.push((SMALL.to_string(), HostTensor::f32([n, small.len() / n.max(1)], small)?));
                }
                weights::save(path, &tensors, Some(HashMap::from([("of".to_string(), key)])))?;
                Checkpoint::open(path)?
            }
        };
        let ids: Vec<Vec<i32>> = match subject {
            Subject::Folder { folder, .. } => {
                let items = folder.items().iter();
                items
                    .map(|i| condition.ids(i.caption.as_deref().unwrap_or_default(), i.class))
                    .collect::<Result<_>>()?
            }
            Subject::Shapes { world, .. } => {
                let scenes = (0..n).map(|i| world.scene(i as u64));
                scenes.map(|s| condition.ids(&s.caption(), Some(s.class()))).collect::<Result<_>>()?
            }
        };
        // A picture that could not be read has the moments, and so the caption, of the one that stands in for it.
        let places = file.read_f32(PLACES)?;
        let ids = places.iter().filter_map(|place| ids.get(*place as usize).cloned()).collect();
        Ok(Latents::Kept { file, ids, seed: options.seed, batch: options.batch })
    }

    /// Batch number `step`; in order, or any from a file.
    pub(super) fn next(&mut self, step: usize, condition: &Condition) -> Result<Said> {
        match self {
            Latents::Live { loader, encoder } => {
                let batch = loader.next().unwrap_or(Err(Error::Cancelled))?;
                let class = |i: usize| batch.classes.as_ref().map(|classes| classes[i]);
                let captions = batch.captions.iter().enumerate();
                let ids = captions.map(|(i, caption)| condition.ids(caption, class(i)));
                let ids = ids.collect::<Result<_>>()?;
                let (masks, small) = (batch.masks, batch.low_resolution);
                let channels = Channels::of(&batch.images, masks, small, encoder)?;
                Ok(Said { ids, moments: encoder.encode(&batch.images)?, channels })
            }
            Latents::Kept { file, ids: all, seed, batch } => {
                let len = all.len() as u64;
                let (mut moments, mut ids, mut small) = (vec![], vec![], vec![]);
                for number in (step * *batch) as u64..((step + 1) * *batch) as u64 {
                    let i = shuffled(number % len, len, *seed, number / len) as usize;
                    moments.extend(row(file, MOMENTS, i)?);
                    if file.entry(SMALL).is_some() {
                        small.extend(row(file, SMALL, i)?);
                    }
                    ids.push(all[i].clone());
                }
                let channels = if small.is_empty() { Channels::None } else { Channels::LowResolution(small) };
                Ok(Said { moments, ids, channels })
            }
        }
    }

    pub(super) fn waited(&self) -> Duration {
        match self {
            Latents::Live { loader, .. } => loader.waited(),
            Latents::Kept { .. } => Duration::ZERO,
        }
    }

    pub(super) fn skipped(&self) -> Vec<String> {
        match self {
            Latents::Live { loader, .. } => loader.skipped(),
            Latents::Kept { .. } => vec![],
        }
    }
}

/// One row of a matrix of the file.
fn row(file: &Checkpoint, name: &str, i: usize) -> Result<Vec<f32>> {
    let width = file.entry(name).map_or(0, |e| e.shape.get(1).copied().unwrap_or(0));
    let mut one = vec![0.0f32; width];
    file.tensor(name)?.rows(i..i + 1, DType::F32, Order::Stored, bytemuck::cast_slice_mut(&mut one))?;
    Ok(one)
}

/// Draws from what the encoder says of a batch.
pub(super) fn drawn(
    first: &FirstStage,
    moments: &[f32],
    (seed, step, stream): (u64, usize, Stream),
) -> Vec<f32> {
    let n = moments.len() / first.moments() * first.channels();
    first.draw(moments, &normal(seed, step, stream, n))
}

/// By picture of a batch: whether its condition is left out.
pub(super) fn dropped(seed: u64, step: usize, share: f64, batch: usize) -> Vec<bool> {
    let mut draw = drawing(seed, step, Stream::Drop);
    (0..batch).map(|_| draw.uniform() < share).collect()
}
