//! Pictures of the data as a model that is conditioned by channels makes them anew, on the way.

use super::concat::{Channels, Paired, signed};
use super::condition::Condition;
use super::frozen::Encoder;
use super::grid::{Tiles, bytes};
use super::settings::{DiffusionSettings, Settings};
use crate::data::source::{Sample, Source};
use crate::diffusion::{Sampling, Settings as Evaluation};
use crate::error::Result;
use crate::exec::{Device, Program, Weights};
use crate::io::Checkpoint;
use crate::models::{Inventory, Model};
use crate::pipeline::load;
use crate::rng::{Generator, Small};
use crate::samplers::Method;
use crate::tensor::{DType, HostTensor};
use std::path::Path;

/// Pictures of a grid where no prompts are given.
const PICTURES: u64 = 4;

/// What the pictures are made with.
pub(super) struct Shown<'a> {
    pub(super) settings: &'a Settings,
    pub(super) own: &'a DiffusionSettings,
    pub(super) condition: &'a Condition,
    pub(super) pictures: &'a Paired,
    /// Factor of the latents.
    pub(super) scale: f64,
}

/// What each picture is made with.
struct Tools {
    encoder: Encoder,
    text: Option<Program>,
    unet: Weights,
    decoder: Program,
    method: Method,
}

impl Shown<'_> {
    /// Conditions above, what is made of them below, and the pictures of the data that they are from; each by itself, as
    /// diffusers draws its noise. UNet and text encoder are those of the export in `folder`.
    pub(super) fn tiles(&self, folder: &Path, device: &Device) -> Result<Tiles> {
        let side = self.settings.data.size;
        let told = &self.settings.sample.prompts;
        let most = self.pictures.len().unwrap_or(u64::MAX);
        let n = if told.is_empty() { PICTURES.min(most) } else { told.len() as u64 };
        let mut tools = self.tools(folder, device)?;
        let [mut conditions, mut made, mut data] = [vec![], vec![], vec![]];
        for i in 0..n {
            let Some(kind) = self.pictures.kind else { break };
            // What is left out has been told of by the loader.
            let mut chance = Small::new(i);
            let (_, mut sample) = self.pictures.subject.readable(i % most, &mut chance, |_| ())?;
            self.pictures.extend(&mut sample, &mut chance)?;
            let ids = match told.get(i as usize) {
                Some(words) => self.condition.told(words)?,
                None => self.condition.ids(&sample.caption, sample.class)?,
            };
            conditions.push(kind.shown(&sample, [side, self.pictures.factor]));
            made.push(self.made(&mut tools, &sample, ids, self.settings.seed + i, device)?);
            data.push(sample.pixels);
        }
        let pictures = [conditions, made, data].concat();
        Ok(Tiles { columns: n as usize, width: side, height: side, pictures })
    }

    /// Rows through the UNet: two with guidance, where there is something to guide by.
    fn copies(&self) -> usize {
        1 + usize::from(self.settings.sample.guidance > 1.0 && self.condition.length() > 0)
    }

    fn tools(&self, folder: &Path, device: &Device) -> Result<Tools> {
        let (own, side) = (self.own, self.settings.data.size);
        let unet = Inventory::of(&own.unet.inventory(DType::F32)?);
        let model = &self.condition.model;
        let text = match self.condition.length() {
            0 => None,
            tokens => {
                let inventory = Inventory::of(&model.inventory(DType::F32)?);
                let weights = load(Checkpoint::open(folder.join(model.part()))?, &inventory, device)?;
                let graph = model.context_graph(self.copies(), tokens, DType::F32, 0)?;
                Some(Program::new(graph, &weights, device)?)
            }
        };
        let latents = side / own.first.factor();
        let decoder = own.first.vae.decode_graph([1, latents, latents], DType::F32)?;
        let decoder = Program::new(decoder, &own.first.weights(device)?, device)?;
        let name = own.schedule_config["_class_name"].as_str().unwrap_or_default();
        Ok(Tools {
            encoder: own.first.encoder(1, side, device)?,
            text,
            unet: load(Checkpoint::open(folder.join("unet"))?, &unet, device)?,
            decoder,
            method: name.parse()?,
        })
    }

    /// The picture (S,S,3) that is made of a condition, from a seed.
    fn made(
        &self,
        tools: &mut Tools,
        sample: &Sample,
        ids: Vec<i32>,
        seed: u64,
        device: &Device,
    ) -> Result<Vec<u8>> {
        let (own, how, copies) = (self.own, &self.settings.sample, self.copies());
        let (side, c) = (self.settings.data.size / own.first.factor(), own.first.channels());
        let mut generator = Generator::new(seed);
        let mut noise =
            || HostTensor::f32([1, c, side, side], generator.randn(c * side * side))?.permute(&[0, 2, 3, 1]);
        let ladder = tools.method.ladder(&own.schedule, how.steps, 0)?;
        let evaluation = Evaluation {
            batch: 1,
            size: [side; 2],
            tokens: self.condition.length(),
            guidance: if copies == 2 { how.guidance } else { 1.0 },
            known: false,
            dtype: DType::F32,
        };
        let mut run = Sampling::new(&own.unet, &tools.unet, device, (tools.method, &ladder), evaluation)?;
        let scale = run.noise_scale();
        let start = noise()?.to_f32().iter().map(|v| v * scale as f32).collect();
        run.start(&HostTensor::f32([1, side, side, c], start)?)?;
        let images: Vec<f32> = signed(&sample.pixels).collect();
        let masks = sample.extras.mask.as_ref().map(|mask| mask.iter().map(|v| f32::from(*v)).collect());
        let small = sample.extras.low_resolution.as_ref().map(|small| signed(small).collect());
        let channels = Channels::of(&images, masks, small, &mut tools.encoder)?;
        let drawn = |moments: &[f32]| Ok(own.first.draw(moments, &noise()?.to_f32()));
        if let Some(more) = channels.with(c, self.scale, drawn)? {
            let x = own.unet.in_channels - c;
            run.set_condition(&HostTensor::f32([copies, side, side, x], more.repeat(copies))?)?;
        }
        if let Some(text) = &mut tools.text {
            let rows = if copies == 2 { [&self.condition.nothing[..], &ids].concat() } else { ids };
            text.write("ids", &HostTensor::i32(text.spec("ids")?.shape, rows)?)?;
            text.run(&mut ())?;
            run.set_context(&text.read("context")?)?;
        }
        while run.step()? {}
        let z = run.state()?.to_f32().iter().map(|v| (f64::from(*v) / self.scale) as f32).collect();
        tools.decoder.write("latents", &HostTensor::f32([1, side, side, c], z)?)?;
        tools.decoder.run(&mut ())?;
        Ok(bytes(&tools.decoder.read("image")?.to_f32()))
    }
}
