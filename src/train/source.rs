//! The pictures of a run, and what is drawn for a step.

use super::settings::DataSettings;
use crate::data::folder::Folder;
use crate::data::shapes::{Colour, EXCLUDED, Shape, Split, World, class_of};
use crate::data::source::{Drawn, Pictures, Sample, Source};
use crate::error::{Error, Result};
use crate::rng::Small;
use std::collections::BTreeMap;

/// Captions of an endless source that a vocabulary is made from.
const CAPTIONS: u64 = 4096;

/// Pictures in a row that may be unreadable.
const TRIES: u64 = 64;

/// Pictures as a run wants them.
#[derive(Clone, Debug)]
pub(super) enum Subject {
    /// Scenes of the shapes world: all of them, or the first so many.
    Shapes { drawn: Drawn, world: World, count: u64 },
    /// A folder.
    Folder { folder: Folder, pictures: Pictures },
}

impl Subject {
    /// Lists the folder, or sets up the world.
    pub(super) fn open(s: &DataSettings) -> Result<Subject> {
        match &s.folder {
            Some(path) => {
                let folder = Folder::open(path)?;
                Ok(Subject::Folder { pictures: Pictures::new(folder.clone(), s.transform), folder })
            }
            None => {
                let world = World::new(s.seed, s.size, Split::Train)?;
                let world = s.objects.map_or(Ok(world), |n| world.objects(n))?;
                Ok(Subject::Shapes { drawn: Drawn::new(world), world, count: s.count })
            }
        }
    }

    /// Picture `index`, or the first after it that can be read, and which one that is; `left_out` is told of those that cannot.
    pub(super) fn readable(
        &self,
        index: u64,
        draw: &mut Small,
        mut left_out: impl FnMut(String),
    ) -> Result<(u64, Sample)> {
        let len = self.len().unwrap_or(u64::MAX);
        let mut first = None;
        for k in 0..len.min(TRIES) {
            let at = index.wrapping_add(k) % len;
            match self.sample(at, draw) {
                Err(e @ Error::File { .. }) => {
                    left_out(e.to_string());
                    first = first.or(Some(e));
                }
                other => return Ok((at, other?)),
            }
        }
        Err(first.unwrap_or_else(|| Error::invalid("data: there is no picture")))
    }

    /// Captions to make a vocabulary from.
    pub(super) fn captions(&self) -> Vec<String> {
        match self {
            Subject::Folder { folder, .. } => {
                folder.items().iter().filter_map(|i| i.caption.clone()).collect()
            }
            Subject::Shapes { world, count, .. } => {
                let n = if *count == 0 { CAPTIONS } else { CAPTIONS.min(*count) };
                (0..n).map(|i| world.scene(i).caption()).collect()
            }
        }
    }

    /// Numbers and names of the classes that training shows.
    ///
    /// # Errors
    /// When the pictures have none.
    pub(super) fn classes(&self) -> Result<BTreeMap<usize, String>> {
        match self {
            Subject::Shapes { .. } => {
                let all = Colour::ALL.into_iter().flat_map(|c| Shape::ALL.map(|s| (c, s)));
                let shown = all.filter(|pair| !EXCLUDED.contains(pair));
                Ok(shown.map(|(c, s)| (class_of(c, s), format!("{c} {s}"))).collect())
            }
            Subject::Folder { folder, .. } => {
                let name = |class: usize| folder.classes().get(class).cloned().unwrap_or(class.to_string());
                let there = folder.items().iter().filter_map(|i| i.class);
                let found: BTreeMap<_, _> = there.map(|class| (class, name(class))).collect();
                if found.is_empty() {
                    return Err(Error::file(
                        folder.path(),
                        "its pictures have no class: want a folder for each class, or `label` in metadata.jsonl",
                    ));
                }
                Ok(found)
            }
        }
    }

    /// What the pictures are, as text that changes when they do.
    pub(super) fn fingerprint(&self) -> String {
        match self {
            Subject::Shapes { world, count, .. } => format!("{world:?} {count}"),
            Subject::Folder { folder, pictures } => {
                let stamp = |path: &std::path::Path| {
                    let meta = std::fs::metadata(path).ok();
                    let when = meta.as_ref().and_then(|m| m.modified().ok());
                    (meta.map_or(0, |m| m.len()), when)
                };
                let files = folder.items().iter().map(|i| format!("{:?}{:?}", i.path, stamp(&i.path)));
                let mut hash = Small::new(0);
                for file in files {
                    let sum = file
                        .bytes()
                        .fold(hash.u64(), |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
                    hash = Small::new(sum);
                }
                format!("{} {} {:016x}", pictures.side(), folder.items().len(), hash.u64())
            }
        }
    }
}

impl Source for Subject {
    fn len(&self) -> Option<u64> {
        match self {
            Subject::Shapes { count: 0, .. } => None,
            Subject::Shapes { count, .. } => Some(*count),
            Subject::Folder { pictures, .. } => pictures.len(),
        }
    }

    fn side(&self) -> usize {
        match self {
            Subject::Shapes { drawn, .. } => drawn.side(),
            Subject::Folder { pictures, .. } => pictures.side(),
        }
    }

    fn sample(&self, index: u64, draw: &mut Small) -> Result<Sample> {
        match self {
            Subject::Shapes { drawn, .. } => drawn.sample(index, draw),
            Subject::Folder { pictures, .. } => pictures.sample(index, draw),
        }
    }
}

/// What a draw is for: streams do not depend on each other.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stream {
    /// Of the latents that a first stage predicts a distribution of.
    Latent = 1,
    /// That hides the latents.
    Noise,
    /// Which timestep.
    Time,
    /// Which captions are left out.
    Drop,
    /// Of noise that is the same all over a picture.
    Offset,
    /// Of the latents of masked pictures.
    Masked,
}

/// The generator of a stream at a step: a pure function, so that a run can be taken up anywhere.
pub(super) fn drawing(seed: u64, step: usize, stream: Stream) -> Small {
    let key = Small::new(Small::new(seed).u64() ^ (stream as u64) << 56).u64();
    Small::new(Small::new(key ^ step as u64).u64())
}

/// Unit normal numbers.
pub(super) fn normal(seed: u64, step: usize, stream: Stream, n: usize) -> Vec<f32> {
    let mut draw = drawing(seed, step, stream);
    (0..n).map(|_| draw.normal() as f32).collect()
}
