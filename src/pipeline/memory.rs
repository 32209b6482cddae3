//! What a request takes, stage by stage, before anything runs; and what would fit instead.

use super::blueprint::MAX_BATCH;
use super::{Beside, Blueprint, Init, Mask, Request, Residency, Vae};
use crate::error::{Error, Result};
use crate::exec::{Device, Graph, Program, Target, human_bytes};
use crate::models::{Conditioner, Inventory, Model};
use crate::tensor::DType;

/// The process itself: code, threads, configurations, graphs (measured).
const PROCESS: usize = 15 << 20;

/// The memory of one stage of a request.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Stage {
    /// `text`, `encoding`, `sampling` or `decoding`.
    pub name: &'static str,
    /// Bytes of the weights that are on the device.
    pub weights: usize,
    /// Bytes of arena and states.
    pub arena: usize,
    /// Bytes that the CPU's code takes beside them; none of it on a GPU.
    pub scratch: usize,
    /// Bytes of what goes into the stage and comes out of it, in the host's memory.
    pub host: usize,
}

impl Stage {
    /// Bytes on the device; on a CPU all there are.
    fn on(&self, target: Target) -> usize {
        let device_bytes = self.weights.saturating_add(self.arena);
        match target {
            Target::Cpu => device_bytes.saturating_add(self.scratch).saturating_add(self.host),
            Target::Cuda => device_bytes,
        }
    }
}

/// What a picture of some size costs.
#[derive(Clone, PartialEq, Debug)]
pub struct Estimate {
    /// Stages, in the order in which they run.
    pub stages: Vec<Stage>,
    /// Bytes of the process itself: code, tokenizer, graphs.
    pub process: usize,
    /// Bytes of the arena of one evaluation of the UNet, and of the sampler's states.
    pub unet_arena: usize,
    /// Bytes of the arena of the decoder, for one picture or one tile.
    pub decoder_arena: usize,
    /// Floating-point operations of one evaluation.
    pub unet_flops: f64,
    /// Floating-point operations of decoding one picture.
    pub decoder_flops: f64,
    /// Rows that one evaluation takes: the batch, twice with guidance.
    pub rows: usize,
    /// Evaluations of the UNet.
    pub evaluations: usize,
}

impl Estimate {
    /// The stage that takes most on a device.
    pub fn peak_stage(&self, device: &Device) -> Option<&Stage> {
        self.stages.iter().max_by_key(|s| s.on(device.into()))
    }

    /// Bytes that a run takes at its peak beside the process itself.
    pub fn beyond_process(&self, target: Target) -> usize {
        self.stages.iter().map(|s| s.on(target)).max().unwrap_or(0)
    }

    /// Bytes that a run takes at its peak: on a CPU by the whole process, on a GPU there.
    pub fn peak(&self, device: &Device) -> usize {
        let most = self.beyond_process(device.into());
        if matches!(device, Device::Cpu) { most.saturating_add(self.process) } else { most }
    }
}

/// The memory of a program with its weights.
fn stage(name: &'static str, graph: &Graph, target: Target, host: usize) -> Result<Stage> {
    let m = Program::measure(graph, target)?;
    Ok(Stage { name, weights: m.weights, arena: m.arena + m.states, scratch: m.scratch, host })
}

impl Blueprint {
    /// Bytes of all weights of all parts.
    ///
    /// # Errors
    /// When a configuration contradicts itself.
    pub fn weight_bytes(&self, dtype: DType) -> Result<usize> {
        let bytes = |graphs: Vec<Graph>| Inventory::of(&graphs).bytes();
        let vae = match &self.vae {
            Vae::Kl(v) => v.inventory(dtype)?,
            Vae::Vq(v) => v.inventory(dtype)?,
        };
        Ok(bytes(self.condition.inventory(dtype)?) + bytes(self.unet.inventory(dtype)?) + bytes(vae))
    }

    /// Memory and work for a request on a target, without running it.
    ///
    /// # Errors
    /// When the model cannot take the size.
    pub fn estimate(
        &self,
        r: &Request,
        dtype: DType,
        residency: Residency,
        target: Target,
    ) -> Result<Estimate> {
        let (unet, evaluations, s) = self.evaluation(r, dtype)?;
        let (width, height) = self.size(r)?;
        let [rows, columns] = self.tiles(r)?;
        let tiles = rows.starts.len() * columns.starts.len();
        let float = size_of::<f32>();
        let latents = r.batch * s.size[0] * s.size[1] * self.unet.out_channels * float;
        let context = s.copies() * r.batch * s.tokens * self.unet.context * float;
        let z = self.unet.out_channels;
        let channels = s.copies() * self.beside.channels(z) + if s.known { 1 + 2 * z } else { 0 };
        // The steps' noises are drawn before the first.
        let noises = unet.values().iter().find(|v| v.name == "noise").map_or(0, |v| v.spec.bytes());
        let beside = channels * r.batch * s.size[0] * s.size[1] * float + noises;
        let pixels = width * height * 3;
        // A picture as the decoder puts it out; in tiles, one tile beside the whole.
        let tile = rows.tile * columns.tile * self.vae.codec().factor().pow(2) * 3;
        let image = if tiles == 1 { pixels } else { pixels + tile } * float;

        let decoder = self.vae.decode_graph([1, rows.tile, columns.tile], dtype)?;
        let mut stages = vec![];
        if self.condition != Conditioner::Nothing {
            let text = self.condition.context_graph(s.copies(), s.tokens, dtype, r.clip_skip)?;
            stages.push(stage("text", &text, target, context)?);
        }
        // A model for inpainting takes the masked picture; another starts from the whole one.
        let masked = self.beside == Beside::Mask;
        let encoded = usize::from(masked) + usize::from(s.known || !self.starts_from_noise(r));
        if encoded > 0 {
            // Pictures as they come and as the encoder takes them, all of it, and of a tile what is cut out.
            let given = pixels + if masked || s.known { pixels / 3 } else { 0 };
            let host = context + encoded * image + given + 3 * latents + beside;
            stages.push(stage("encoding", &self.encode_graph(r, dtype)?, target, host)?);
        }
        stages.push(stage("sampling", &unet, target, context + 2 * latents + beside)?);
        stages.push(stage("decoding", &decoder, target, image + r.batch * pixels + 3 * latents)?);
        if residency == Residency::Always {
            let all = self.weight_bytes(dtype)?;
            stages.iter_mut().for_each(|s| s.weights = all);
        }
        let arena = |name: &str| stages.iter().find(|s| s.name == name).map_or(0, |s| s.arena);
        Ok(Estimate {
            unet_arena: arena("sampling"),
            decoder_arena: arena("decoding"),
            unet_flops: unet.total_cost().flops,
            decoder_flops: decoder.total_cost().flops * tiles as f64,
            rows: s.copies() * s.batch,
            evaluations,
            // A tokenizer holds each of its words a few times (measured).
            process: PROCESS + self.condition.vocabulary() * 500,
            stages,
        })
    }

    /// Checks that the memory for a request is there, on a CPU with all that the process takes. `opened`: the weights
    /// that stay are on the device already.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the bytes that are needed and those that are there, and what would fit.
    pub fn check_memory(
        &self,
        r: &Request,
        dtype: DType,
        device: &Device,
        residency: Residency,
        opened: bool,
    ) -> Result<()> {
        let Some(have) = device.available() else { return Ok(()) };
        let need = |r: &Request| -> Result<usize> {
            let e = self.estimate(r, dtype, residency, device.into())?;
            let there = if opened && residency == Residency::Always { self.weight_bytes(dtype)? } else { 0 };
            Ok(e.peak(device).saturating_sub(there))
        };
        let bytes = need(r)?;
        if bytes <= have {
            return Ok(());
        }
        let (e, (width, height)) = (self.estimate(r, dtype, residency, device.into())?, self.size(r)?);
        let part = e.peak_stage(device).map_or("it", |s| s.name);
        let fits = self.fitting(r, |r| need(r).is_ok_and(|bytes| bytes <= have))?;
        let fits = if fits.is_empty() { "nothing smaller does either".into() } else { fits.join(", or ") };
        Err(Error::invalid(format!(
            "{part} {width}x{height}, batch size {}, in {dtype} needs {bytes} bytes ({}) with its weights; \
             {have} ({}) are free: try a smaller size or batch; what fits: {fits}",
            r.batch,
            human_bytes(bytes),
            human_bytes(have)
        )))
    }

    /// Changes of a request, one at a time, with which it `fits`: tiles, the largest batch, the largest size of about its
    /// shape.
    fn fitting(&self, r: &Request, fits: impl Fn(&Request) -> bool) -> Result<Vec<String>> {
        let (width, height) = self.size(r)?;
        let unit = self.vae.codec().factor() * self.unet.multiple();
        // Only its size counts; its pixels are not copied.
        let init = |w: usize, h: usize| {
            let [width, height] = [w, h].map(|n| n / self.growth());
            r.init.as_ref().map(|i| Init { width, height, rgb: vec![], strength: i.strength })
        };
        let mask = |width, height| {
            r.mask.as_ref().map(|m| Mask { width, height, gray: vec![], composite: m.composite })
        };
        let bare = Request {
            width: Some(width),
            height: Some(height),
            init: init(width, height),
            mask: mask(width, height),
            prompt: String::new(),
            prompts: vec![],
            negative: String::new(),
            ..Request { init: None, mask: None, ..r.clone() }
        };
        let sized = |k: usize| {
            let scale = k as f64 / (width.max(height) / unit) as f64;
            let side = |n: usize| ((n as f64 * scale / unit as f64).round() as usize).max(1) * unit;
            let (w, h) = (side(width), side(height));
            Request { width: Some(w), height: Some(h), init: init(w, h), mask: mask(w, h), ..bare.clone() }
        };
        let mut all = Vec::new();
        if !r.vae_tiling && fits(&Request { vae_tiling: true, ..bare.clone() }) {
            all.push("this with --vae-tiling".into());
        }
        let batch = largest(r.batch.min(MAX_BATCH), |batch| fits(&Request { batch, ..bare.clone() }));
        if let Some(n) = batch {
            all.push(format!("batch size {n} at this size"));
        }
        if let Some(k) = largest(width.max(height) / unit, |k| fits(&sized(k))) {
            let (w, h) = self.size(&sized(k))?;
            all.push(format!("{w}x{h} at this batch size"));
        }
        Ok(all)
    }
}

/// The largest number from 1 to below `than` that is good, where all below a good one are.
fn largest(than: usize, good: impl Fn(usize) -> bool) -> Option<usize> {
    let (mut low, mut high) = (0, than);
    while low + 1 < high {
        let middle = low + (high - low) / 2;
        if good(middle) { low = middle } else { high = middle }
    }
    (low > 0).then_some(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_good_number_is_found() {
        for limit in 0..20 {
            for than in 0..20 {
                let want = (1..than).filter(|&n| n <= limit).max();
                assert_eq!(largest(than, |n| n <= limit), want, "{limit} {than}");
            }
        }
    }
}
