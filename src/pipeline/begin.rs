//! What a run begins with: noise, and what it is given of pictures, each image's from its own generator and drawn in the
//! order of diffusers.

use super::beside::{Beside, DRAWN, RGB};
use super::tiles::{self, Axis, Port};
use super::{Init, Mask, Observer, Pipeline, Request, Vae};
use crate::error::{Error, Result};
use crate::exec::Program;
use crate::rng::Generator;
use crate::samplers::{Ladder, Table};
use crate::tensor::HostTensor;

/// What a run begins with; K halves of guidance, N fresh noises.
pub(super) struct Begin {
    /// The sampler's first state (B,h,w,Z).
    pub(super) state: HostTensor,
    /// Fresh noises of the steps, (max(1, N),B,h,w,Z).
    pub(super) noises: HostTensor,
    /// Channels beside the latents (K·B,h,w,X).
    pub(super) beside: Option<HostTensor>,
    /// Mask (B,h,w,1), clean latents and their noise (B,h,w,Z), where known parts are put back after each step.
    pub(super) known: Option<[HostTensor; 3]>,
}

/// The encoder, in tiles where the request asks for them.
pub(super) struct Encoder {
    program: Program,
    /// Latents of a KL-regularised one are drawn, and the graph scales them.
    draws: bool,
    scale: f32,
    factor: usize,
    tiles: [Axis; 2],
}

impl Encoder {
    /// A picture (1,H,W,3) in −1…1 to latents (h·w·Z) in the sampler's scale. `draw` makes unit noise (1,h,w,Z).
    pub(super) fn run(
        &mut self,
        picture: &HostTensor,
        draw: &mut impl FnMut() -> Result<HostTensor>,
        observer: &mut dyn Observer,
    ) -> Result<Vec<f32>> {
        let noise = if self.draws { Some(draw()?) } else { None };
        let mut inputs = vec![(Port { name: "image", scale: self.factor }, picture)];
        inputs.extend(noise.iter().map(|noise| (Port { name: "noise", scale: 1 }, noise)));
        let output = Port { name: "latents", scale: 1 };
        let [rows, columns] = &self.tiles;
        let z = tiles::run(&mut self.program, "encoder", &inputs, output, [rows, columns], observer)?;
        let mut z = z.to_f32();
        if !self.draws {
            z.iter_mut().for_each(|v| *v *= self.scale);
        }
        Ok(z)
    }
}

impl Pipeline {
    /// Draws and encodes. For each image, in this order and as far as they are needed: the draw of the initial picture's
    /// latents, the noise that it starts from or is hidden by, the draw of the masked picture's latents, the steps' noises.
    pub(super) fn begin(
        &self,
        r: &Request,
        table: &Table,
        ladder: &Ladder,
        observer: &mut dyn Observer,
    ) -> Result<Begin> {
        let b = &self.blueprint;
        let ([h, w], z) = (b.latent_size(r)?, b.unet.out_channels);
        let (n, count, beside) = (h * w * z, table.noises, b.beside);
        let known = b.blends(r);
        let kept = r.init.as_ref().filter(|_| known || !b.starts_from_noise(r));
        let whole = kept.map(|init| pixels(init, None)).transpose()?;
        let masked = match (&r.init, &r.mask, beside) {
            (Some(init), Some(mask), Beside::Mask) => Some(pixels(init, Some(mask))?),
            _ => None,
        };
        let mut encoder = match whole.is_some() || masked.is_some() {
            true => Some(self.encoder(r, observer)?),
            false => None,
        };
        let mut state = Vec::with_capacity(r.batch * n);
        let mut noises = vec![0.0; count.max(1) * r.batch * n];
        let mut channels = Vec::with_capacity(r.batch * h * w * beside.channels(z));
        let (mut mask, mut all_clean, mut hidden) = (vec![], vec![], vec![]);
        for i in 0..r.batch {
            let mut generator = Generator::new(r.seed.wrapping_add(i as u64));
            let mut draw = || -> Result<HostTensor> {
                HostTensor::f32([1, z, h, w], generator.randn(n))?.permute(&[0, 2, 3, 1])
            };
            let mut encode = |picture: &Option<HostTensor>, draw: &mut _| match (&mut encoder, picture) {
                (Some(encoder), Some(picture)) => encoder.run(picture, draw, observer).map(Some),
                _ => Ok(None),
            };
            let clean = encode(&whole, &mut draw)?;
            let noise = draw()?.to_f32();
            match &clean {
                Some(clean) if !b.starts_from_noise(r) => {
                    let (alpha, sigma) = (ladder.steps[0].at.alpha as f32, ladder.steps[0].at.sigma as f32);
                    state.extend(clean.iter().zip(&noise).map(|(z, e)| alpha * z + sigma * e));
                }
                _ => state.extend(noise.iter().map(|e| e * table.noise_scale as f32)),
            }
            if let (true, Some(clean), Some(drawn)) = (known, clean, &r.mask) {
                mask.extend(drawn.latents([h, w], b.vae.codec().factor()));
                all_clean.extend(clean);
                hidden.extend(noise);
                // diffusers encodes the masked picture for these models too, and does not look at it.
                if matches!(b.vae, Vae::Kl(_)) {
                    draw()?;
                }
            }
            match (beside, encode(&masked, &mut draw)?, &r.mask, &r.init) {
                (Beside::Mask, Some(latents), Some(mask), _) => {
                    let drawn = mask.latents([h, w], b.vae.codec().factor());
                    let rows = drawn.zip(latents.chunks_exact(z));
                    rows.for_each(|(drawn, latents)| {
                        channels.push(drawn);
                        channels.extend(latents);
                    });
                }
                (Beside::Picture, _, _, Some(small)) => channels.extend(small.rgb.iter().map(|&v| unit(v))),
                _ => {}
            }
            for k in 0..count {
                noises[(k * r.batch + i) * n..][..n].copy_from_slice(&draw()?.to_f32());
            }
        }
        let beside = match beside.channels(z) {
            0 => None,
            x => {
                let copies = 1 + (b.guidance(r) > 1.0) as usize;
                Some(HostTensor::f32([copies * r.batch, h, w, x], channels.repeat(copies))?)
            }
        };
        let tensor = |c: usize, data| HostTensor::f32([r.batch, h, w, c], data);
        let known = match known {
            true => Some([tensor(1, mask)?, tensor(z, all_clean)?, tensor(z, hidden)?]),
            false => None,
        };
        Ok(Begin {
            known,
            state: HostTensor::f32([r.batch, h, w, z], state)?,
            noises: HostTensor::f32([count.max(1), r.batch, h, w, z], noises)?,
            beside,
        })
    }

    /// The encoder for pictures of a request's size.
    pub(super) fn encoder(&self, r: &Request, observer: &mut dyn Observer) -> Result<Encoder> {
        let (b, graph) = (&self.blueprint, self.blueprint.encode_graph(r, self.dtype)?);
        Ok(Encoder {
            draws: matches!(b.vae, Vae::Kl(_)),
            scale: b.scale() as f32,
            factor: b.vae.codec().factor(),
            tiles: b.tiles(r)?,
            program: self.program(&self.vae, graph, "encoding", observer)?,
        })
    }
}

/// A byte to −1…1.
fn unit(v: u8) -> f32 {
    f32::from(v) / 255.0 * 2.0 - 1.0
}

/// The initial picture (1,H,W,3) in −1…1, with a mask that of what is not drawn anew.
fn pixels(init: &Init, mask: Option<&Mask>) -> Result<HostTensor> {
    let mut data: Vec<f32> = init.rgb.iter().map(|&v| unit(v)).collect();
    mask.iter().for_each(|mask| mask.hide(&mut data));
    HostTensor::f32([1, init.height, init.width, RGB], data)
}

impl Mask {
    /// Makes pixels in −1…1 gray where they are drawn anew.
    pub(super) fn hide(&self, rgb: &mut [f32]) {
        let drawn = rgb.chunks_exact_mut(RGB).zip(&self.gray).filter(|(_, gray)| **gray >= DRAWN);
        drawn.for_each(|(pixel, _)| pixel.fill(0.0));
    }

    /// For each of the latents (h,w) whether it is drawn anew, 1 or 0, by the nearest pixel: the upper left one of the
    /// factor² that it stands for.
    pub(super) fn latents(&self, [h, w]: [usize; 2], factor: usize) -> impl Iterator<Item = f32> {
        let at = move |i: usize| i / w * factor * self.width + i % w * factor;
        (0..h * w).map(move |i| f32::from(self.gray[at(i)] >= DRAWN))
    }

    /// Whether it has no pixel that is drawn anew.
    pub(super) fn is_empty(&self) -> bool {
        self.gray.iter().all(|gray| *gray < DRAWN)
    }

    /// Puts the initial picture's bytes back where nothing was to be drawn.
    pub(super) fn composite(&self, init: &[u8], rgb: &mut [u8]) -> Result<()> {
        if rgb.len() != init.len() || rgb.len() != RGB * self.gray.len() {
            return Err(Error::invalid("mask: the picture has another size"));
        }
        let pixels = rgb.chunks_exact_mut(RGB).zip(init.chunks_exact(RGB));
        for ((pixel, old), gray) in pixels.zip(&self.gray) {
            if *gray < DRAWN {
                pixel.copy_from_slice(old);
            }
        }
        Ok(())
    }
}
