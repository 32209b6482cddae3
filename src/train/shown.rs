//! Pictures of the data as a model that is conditioned by channels makes them anew, on the way.

use super::concat::Paired;
use super::condition::Condition;
use super::grid::Tiles;
use super::settings::Settings;
use crate::data::source::Source;
use crate::error::Result;
use crate::exec::Device;
use crate::io::ModelFolder;
use crate::pipeline::{Pipeline, Request};
use crate::rng::Small;
use crate::tensor::DType;
use std::path::Path;

/// Pictures of a grid where no prompts are given.
const PICTURES: u64 = 4;

/// What the pictures are made with.
pub(super) struct Shown<'a> {
    pub(super) settings: &'a Settings,
    pub(super) condition: &'a Condition,
    pub(super) pictures: &'a Paired,
}

impl Shown<'_> {
    /// Conditions above, what `ldm sample` makes of them with the export in `folder` below, each by itself, and the pictures of the
    /// data that they are from.
    pub(super) fn tiles(&self, folder: &Path, device: &Device) -> Result<Tiles> {
        let (side, how) = (self.settings.data.size, &self.settings.sample);
        let most = self.pictures.len().unwrap_or(u64::MAX);
        let n = if how.prompts.is_empty() { PICTURES.min(most) } else { how.prompts.len() as u64 };
        let pipeline = Pipeline::open(&ModelFolder::open(folder)?, device, Some(DType::F32))?;
        let [mut conditions, mut made, mut data] = [vec![], vec![], vec![]];
        for i in 0..n {
            let Some(kind) = self.pictures.kind else { break };
            // What is left out has been told of by the loader.
            let mut chance = Small::new(i);
            let (_, mut sample) = self.pictures.subject.readable(i % most, &mut chance, |_| ())?;
            self.pictures.extend(&mut sample, &mut chance)?;
            let words = match how.prompts.get(i as usize) {
                Some(words) => self.condition.request(words.clone()),
                None => self.condition.request_of(&sample),
            };
            let size = [side, self.pictures.factor];
            let request = Request {
                steps: how.steps,
                cfg_scale: how.guidance,
                seed: self.settings.seed + i,
                ..kind.asked(words, &sample, size)
            };
            conditions.push(kind.shown(&sample, size));
            made.extend(pipeline.generate(&request, &mut ())?.into_iter().map(|picture| picture.rgb));
            data.push(sample.pixels);
        }
        let pictures = [conditions, made, data].concat();
        Ok(Tiles { columns: n as usize, width: side, height: side, pictures })
    }
}
