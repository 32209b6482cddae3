//! What a frozen first stage says of pictures: asked at every step, or once for all of them and kept in a file.
//!
//! The file holds moments, not draws: a KL encoder predicts a distribution, and each step draws anew from it.

use super::frozen::{Encoder, FirstStage};
use super::run::Watch;
use super::source::{Stream, Subject, drawing, normal};
use crate::data::loader::{Loader, Options, shuffled};
use crate::data::source::Source;
use crate::error::{Error, Result};
use crate::exec::Device;
use crate::io::{Checkpoint, Order, Tokenizer, weights};
use crate::rng::Small;
use crate::tensor::{DType, HostTensor};
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

/// A batch as a diffusion step takes it: what the encoder says (B,…), and captions.
pub(super) struct Said {
    pub(super) moments: Vec<f32>,
    pub(super) ids: Vec<Vec<i32>>,
}

/// Where batches come from.
pub(super) enum Latents {
    /// The encoder is asked at every step.
    Live { loader: Loader, encoder: Box<Encoder> },
    /// All has been said.
    Kept { file: Checkpoint, captions: Vec<Vec<i32>>, seed: u64, batch: usize },
}

/// One kept latent as it is called in the file.
const MOMENTS: &str = "moments";
/// Whose they are, by picture: (N).
const PLACES: &str = "places";

impl Latents {
    /// The encoder sees `batch` pictures at a time, a divisor of those of a step.
    pub(super) fn live(
        subject: &Subject,
        options: Options,
        step: usize,
        (first, batch): (&FirstStage, usize),
        device: &Device,
    ) -> Result<Latents> {
        let encoder = Box::new(first.encoder(batch, subject.side(), device)?);
        Ok(Latents::Live { loader: Loader::at(subject.clone(), options, step as u64)?, encoder })
    }

    /// From `path`, which is made where it is not there or belongs to other pictures or another encoder.
    pub(super) fn kept(
        subject: &Subject,
        options: Options,
        (first, batch, stage): (&FirstStage, usize, &str),
        (path, tokenizer): (&Path, &Tokenizer),
        device: &Device,
        watch: &mut dyn Watch,
    ) -> Result<Latents> {
        let key = format!("{stage} {}", subject.fingerprint());
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
                let mut places = Vec::with_capacity(n);
                for start in (0..n).step_by(options.batch) {
                    let end = (start + options.batch).min(n);
                    let mut images = Vec::with_capacity(options.batch * side * side * 3);
                    for i in start..end {
                        let told = |what: String| watch.say(&format!("left out: {what}"));
                        let (place, sample) = subject.readable(i as u64, &mut Small::new(0), told)?;
                        places.push(place as f32);
                        images.extend(sample.pixels.iter().map(|v| f32::from(*v) / 127.5 - 1.0));
                    }
                    images.resize(options.batch * side * side * 3, 0.0);
                    all.extend(&encoder.encode(&images)?[..(end - start) * row]);
                }
                let tensors = [
                    (MOMENTS.to_string(), HostTensor::f32([n, row], all)?),
                    (PLACES.to_string(), HostTensor::f32([n], places)?),
                ];
                weights::save(path, &tensors, Some(HashMap::from([("of".to_string(), key)])))?;
                Checkpoint::open(path)?
            }
        };
        let ids = |caption: String| Ok(tokenizer.encode(&caption)?.ids);
        let captions = match subject {
            Subject::Folder { folder, .. } => {
                let text = folder.items().iter().map(|i| i.caption.clone().unwrap_or_default());
                text.map(ids).collect::<Result<Vec<_>>>()?
            }
            Subject::Shapes { world, .. } => {
                (0..n).map(|i| ids(world.scene(i as u64).caption())).collect::<Result<Vec<_>>>()?
            }
        };
        // A picture that could not be read has the moments, and so the caption, of the one that stands in for it.
        let places = file.read_f32(PLACES)?;
        let captions = places.iter().filter_map(|place| captions.get(*place as usize).cloned()).collect();
        Ok(Latents::Kept { file, captions, seed: options.seed, batch: options.batch })
    }

    /// Batch number `step`; in order, or any from a file.
    pub(super) fn next(&mut self, step: usize, tokenizer: &Tokenizer) -> Result<Said> {
        match self {
            Latents::Live { loader, encoder } => {
                let batch = loader.next().unwrap_or(Err(Error::Cancelled))?;
                let ids = batch.captions.iter().map(|c| Ok(tokenizer.encode(c)?.ids));
                Ok(Said { ids: ids.collect::<Result<_>>()?, moments: encoder.encode(&batch.images)? })
            }
            Latents::Kept { file, captions, seed, batch } => {
                let len = captions.len() as u64;
                let (mut moments, mut ids) = (vec![], vec![]);
                let tensor = file.tensor(MOMENTS)?;
                let row = file.entry(MOMENTS).map_or(0, |e| e.shape.get(1).copied().unwrap_or(0));
                for number in (step * *batch) as u64..((step + 1) * *batch) as u64 {
                    let i = shuffled(number % len, len, *seed, number / len) as usize;
                    let mut one = vec![0.0f32; row];
                    tensor.rows(i..i + 1, DType::F32, Order::Stored, bytemuck::cast_slice_mut(&mut one))?;
                    moments.extend(one);
                    ids.push(captions[i].clone());
                }
                Ok(Said { moments, ids })
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

/// Draws from what the encoder says of a batch.
pub(super) fn draw(first: &FirstStage, moments: &[f32], seed: u64, step: usize) -> Vec<f32> {
    let n = moments.len() / first.moments() * first.channels();
    first.draw(moments, &normal(seed, step, Stream::Latent, n))
}

/// By picture of a batch: whether its caption is left out.
pub(super) fn dropped(seed: u64, step: usize, share: f64, batch: usize) -> Vec<bool> {
    let mut draw = drawing(seed, step, Stream::Drop);
    (0..batch).map(|_| draw.uniform() < share).collect()
}
