//! The losses of first stages: reconstruction, regularisation of the latents, and a discriminator of patches that trains
//! against the autoencoder. Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021, equations 5 to 7; the numbers are
//! those of the CompVis code (`LPIPSWithDiscriminator`, `VQLPIPSWithDiscriminator`).
//!
//! A step is one graph. All losses and gradients come from the weights before it, then both optimisers take their steps: the
//! autoencoder's on its parameters alone, the discriminator's on its own. In the CompVis code the optimisers take turns, and the
//! discriminator sees the batch reconstructed once more, by the updated autoencoder (and for KL drawn again). Here it sees the
//! same reconstruction as the generator's loss, whose logits serve both. So a step costs one pass through the autoencoder in
//! place of two, the discriminator is one update of the autoencoder behind, and its running statistics, which no loss reads,
//! follow two batches each step in place of three.
//!
//! The log-variance of the CompVis code, which stays 0 as no optimiser gets it, is left out.

use super::init::initial;
use super::perceptual::{PERCEPTUAL, PerceptualTerm};
use super::step::{Inputs, Optimiser, Trainer, accumulate, blocks, descend, squares};
use crate::error::{Error, Result};
use crate::exec::Program;
use crate::graph::{Graph, Layout, Parameter, Var, gradients};
use crate::models::{NLayerDiscriminator, PatchNorm};
use crate::nn::{add, cast, join};
use crate::ops::{
    AdaptiveWeight, CodeUsage, Criterion, Distance, Embedding, Gaussian, Kl, LogitLoss, Loss, Scale,
    SquareSum,
};
use crate::pipeline::Vae;
use crate::rng::Generator;
use crate::tensor::{DType, HostTensor, Shape};
use std::ops::Range;

/// What a first stage is trained for.
#[derive(Clone, PartialEq, Debug)]
pub struct FirstStageLoss {
    /// What the difference of one value of a picture costs: |d| in the CompVis code.
    pub distance: Distance,
    /// Weight of the divergence of a KL code, a sum over each latent, beside distances summed over each picture.
    pub kl_weight: f64,
    /// The likelihood and the divergence of a KL code are divided by the number H·W·C of a picture's values, so that the first
    /// is a mean, as it is for a codebook. The minimum stays the same, gradients are H·W·C times smaller, which Adam does not
    /// notice, and the adaptive weight follows them.
    pub means: bool,
    /// A perceptual distance beside the mean distance, of which it is a part: weighed and summed with it.
    pub perceptual: Option<PerceptualTerm>,
    /// The losses of a codebook, beside the mean distance.
    pub codebook: Codebook,
    /// The discriminator, if there is one.
    pub adversary: Option<Adversary>,
}

/// The losses of a codebook: van den Oord et al. 2017, equation 3.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Codebook {
    /// Weight of both terms.
    pub weight: f64,
    /// β, the weight of one of them: see `legacy`.
    pub beta: f64,
    /// β is on the term that moves the codebook, as the CompVis models were trained, and not on the one that commits the
    /// encoder.
    pub legacy: bool,
}

/// A discriminator and its part in the losses.
#[derive(Clone, PartialEq, Debug)]
pub struct Adversary {
    /// The discriminator.
    pub model: NLayerDiscriminator,
    /// Its loss.
    pub kind: Gan,
    /// Factor on the adaptive weight of the generator's loss (`disc_weight`).
    pub weight: f64,
    /// Factor on both losses from step `start` on (`disc_factor`); 0 before.
    pub factor: f64,
    /// The first step, counted from 0, in which it has a say (`disc_start`).
    pub start: usize,
}

/// The loss of a discriminator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gan {
    /// Half of mean max(0, 1 − real) + mean max(0, 1 + fake).
    Hinge,
    /// Half of mean log(1 + e^−real) + mean log(1 + e^fake).
    Vanilla,
}

impl Default for FirstStageLoss {
    /// Absolute differences, summed for KL; KL weight 1e-6, no perceptual term, whose weights come from a file, codebook weight
    /// 1, a hinge discriminator with weight 0.5 from step 50 001 on.
    fn default() -> FirstStageLoss {
        FirstStageLoss {
            distance: Distance::L1,
            kl_weight: 1e-6,
            means: false,
            perceptual: None,
            codebook: Codebook { weight: 1.0, beta: 0.25, legacy: true },
            adversary: Some(Adversary {
                model: NLayerDiscriminator::default(),
                kind: Gan::Hinge,
                weight: 0.5,
                factor: 1.0,
                start: 50_001,
            }),
        }
    }
}

/// The parameters of one optimiser, and their gradients.
#[derive(Clone, PartialEq, Debug)]
pub struct Side {
    /// Before the names of its outputs: empty for the autoencoder, `discriminator.` for the discriminator.
    pub at: &'static str,
    /// What it updates.
    pub parameters: Vec<Parameter>,
    /// Of its loss with respect to each.
    pub gradients: Vec<Option<Var>>,
}

/// Before the names of the discriminator's weights.
pub(super) const DISCRIMINATOR: &str = "discriminator";
/// The input (1) f32 that is the factor on both losses of a discriminator in this step.
const FACTOR: &str = "discriminator.factor";
/// The input (B) f32 of weights of single pictures.
const WEIGHTS: &str = "weights";
/// The layer at which the pulls of likelihood and discriminator are compared.
const LAST: &str = "decoder.conv_out.weight";

/// A reconstruction and what it costs without a discriminator.
struct Forward {
    image: Var,
    reconstruction: Var,
    /// Distances (1): their mean, or for KL without `means` summed over each picture.
    likelihood: Var,
    /// The weighted rest (1).
    regulariser: Var,
}

impl FirstStageLoss {
    /// The optimiser of the CompVis configurations, of both sides: Adam with β 0.5 and 0.9.
    pub fn optimiser() -> Optimiser {
        Optimiser { betas: [0.5, 0.9], decay: 0.0, coupled: true, clip: 0.0, ..Optimiser::default() }
    }

    /// Appends to a graph whose weights are parameters ([`Graph::train`]) the step of an autoencoder, computed in `dtype`, on
    /// `image` (B,H,W,C) f32 in −1…1. For KL it makes the input `noise` (B,h,w,Z) f32. Further inputs are written by
    /// [`FirstStageLoss::begin`] and [`FirstStageLoss::at_step`]. With `again`, the autoencoder's [`blocks`] are made again in
    /// the backward pass in place of being kept.
    ///
    /// Both sides are updated as `how` says, the discriminator without weight decay and average.
    ///
    /// Outputs `loss` and `norm` of the autoencoder; `reconstruction`, the mean distance; `perceptual`, `kl`, `codebook`,
    /// without their weights, where they are; of a codebook `perplexity` and `used`; with a discriminator `generator`,
    /// `adaptive_weight`, `discriminator.loss` and `discriminator.norm`.
    ///
    /// # Errors
    /// When the picture does not fit the models.
    pub fn step(
        &self,
        g: &mut Graph,
        vae: &Vae,
        image: Var,
        (dtype, again): (DType, bool),
        how: &Optimiser,
    ) -> Result<()> {
        let inputs = Inputs::new(g, how);
        let mut sides = self.gradients(g, vae, image, (dtype, again), inputs.scale)?;
        for side in &mut sides {
            accumulate(g, &side.parameters, &mut side.gradients, inputs)?;
        }
        let loss = g.outputs().iter().find(|(name, _)| name == "loss").map(|(_, v)| *v);
        let sums = sides.iter().map(|s| squares(g, &s.parameters, &s.gradients));
        let sums = sums.collect::<Result<Vec<Var>>>()?;
        for (i, side) in sides.iter().enumerate() {
            // The average is there to sample from: the discriminator needs none. Nor does it decay, which would go on before its
            // start.
            let how = match side.at {
                "" => how.clone(),
                _ => Optimiser { average: false, decay: 0.0, ..how.clone() },
            };
            // Both sides are updated, or none.
            let others = sums.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, sum)| *sum);
            let guards: Vec<Var> = loss.into_iter().chain(others).collect();
            descend(g, side.at, &side.parameters, &side.gradients, &how, inputs, (sums[i], &guards))?;
        }
        Ok(())
    }

    /// The losses of [`FirstStageLoss::step`] and the gradients of each side, times `scale` (1) f32.
    ///
    /// # Errors
    /// As there.
    pub fn gradients(
        &self,
        g: &mut Graph,
        vae: &Vae,
        image: Var,
        (dtype, again): (DType, bool),
        scale: Var,
    ) -> Result<Vec<Side>> {
        let before = g.parameters().len();
        let forward = match vae {
            Vae::Kl(_) => self.forward_kl(g, vae, image, dtype)?,
            Vae::Vq(_) => self.forward_vq(g, vae, image, dtype)?,
        };
        let own = g.parameters()[before..].to_vec();
        let again = if again { blocks(g) } else { vec![] };
        let loss = add(g, "loss.autoencoder", forward.likelihood, forward.regulariser)?;
        let Some(adversary) = &self.adversary else {
            g.output("loss", loss);
            let found = gradients(g, &[(loss, scale)], &used(&own), &again)?;
            return Ok(vec![Side { at: "", parameters: own, gradients: found }]);
        };
        adversary.sides(g, &forward, (own, &again), loss, scale)
    }

    fn forward_kl(&self, g: &mut Graph, vae: &Vae, image: Var, dtype: DType) -> Result<Forward> {
        let Vae::Kl(model) = vae else { return Err(Error::invalid("want an AutoencoderKL")) };
        let x = cast(g, "image", image, dtype, 1.0)?;
        let moments = model.encode(g, x)?;
        let shape = g.shape(moments);
        let noise = g.input("noise", DType::F32, shape.with_last(shape.last() / 2));
        let z = g.push("draw", Gaussian { scale: 1.0 }, &[moments, noise])?;
        let z = cast(g, "z", z, dtype, 1.0)?;
        let reconstruction = model.decode(g, z)?;
        let weights = g.input(WEIGHTS, DType::F32, [shape[0]]);
        let mean = self.distance(g, reconstruction, (image, x), weights)?;
        let values = (g.shape(image).numel() / shape[0]) as f64;
        let (pixels, latents) = if self.means { (1.0, values) } else { (values, 1.0) };
        let likelihood = cast(g, "likelihood", mean, DType::F32, pixels)?;
        let kl = g.push("kl", Kl, &[moments])?;
        g.output("kl", kl);
        let regulariser = cast(g, "kl.weighted", kl, DType::F32, self.kl_weight / latents)?;
        Ok(Forward { image: x, reconstruction, likelihood, regulariser })
    }

    fn forward_vq(&self, g: &mut Graph, vae: &Vae, image: Var, dtype: DType) -> Result<Forward> {
        let Vae::Vq(model) = vae else { return Err(Error::invalid("want a VQModel")) };
        let x = cast(g, "image", image, dtype, 1.0)?;
        let z = model.encode(g, x)?;
        let encoded = model.quantize(g, z)?;
        let reconstruction = model.decode_quantized(g, encoded.quantized)?;
        let weights = g.input(WEIGHTS, DType::F32, [g.shape(image)[0]]);
        let likelihood = self.distance(g, reconstruction, (image, x), weights)?;

        let book =
            g.weight("quantize.embedding.weight", Layout::Same, dtype, [model.codes, model.code_width])?;
        let entries = g.push("codebook.entries", Embedding { positions: false }, &[encoded.codes, book])?;
        // A target is data: no gradient reaches it.
        let fixed = |g: &mut Graph, v| cast(g, "codebook.fixed", v, DType::F32, 1.0);
        let (z_fixed, e_fixed) = (fixed(g, z)?, fixed(g, encoded.quantized)?);
        let commits = g.push("codebook.commits", Loss(Distance::L2), &[z, e_fixed, weights])?;
        let moves = g.push("codebook.moves", Loss(Distance::L2), &[entries, z_fixed, weights])?;
        let Codebook { weight, beta, legacy } = self.codebook;
        let (whole, part) = if legacy { (commits, moves) } else { (moves, commits) };
        let part = cast(g, "codebook.beta", part, DType::F32, beta)?;
        let codebook = add(g, "codebook", whole, part)?;
        let usage = g.push_all("codebook.usage", CodeUsage { codes: model.codes }, &[encoded.codes])?;
        g.output("codebook", codebook);
        g.output("perplexity", usage[0]);
        g.output("used", usage[1]);
        let regulariser = cast(g, "codebook.weighted", codebook, DType::F32, weight)?;
        Ok(Forward { image: x, reconstruction, likelihood, regulariser })
    }

    /// The mean distance and the weighted perceptual distance (1) to the picture, in f32 and in the model's type.
    fn distance(
        &self,
        g: &mut Graph,
        reconstruction: Var,
        (image, typed): (Var, Var),
        weights: Var,
    ) -> Result<Var> {
        let mean = g.push("reconstruction", Loss(self.distance), &[reconstruction, image, weights])?;
        g.output("reconstruction", mean);
        let Some(PerceptualTerm { model, weight }) = &self.perceptual else { return Ok(mean) };
        g.train(false);
        let distance = model.distance(g, PERCEPTUAL, reconstruction, typed, weights);
        g.train(true);
        let distance = distance?;
        g.output("perceptual", distance);
        let weighted = cast(g, "perceptual.weighted", distance, DType::F32, *weight)?;
        add(g, "likelihood.mean", mean, weighted)
    }

    /// Readies a new trainer of [`FirstStageLoss::step`] for batches of `batch` pictures: all weigh the same, and running
    /// variances are 1.
    ///
    /// # Errors
    /// When the trainer is of another graph or batch.
    pub fn begin(&self, trainer: &mut Trainer, batch: usize) -> Result<()> {
        trainer.write(WEIGHTS, &HostTensor::f32([batch], vec![1.0; batch])?)?;
        for name in trainer.others().to_vec() {
            if name.ends_with("running_var") {
                let shape = trainer.read(&name)?.shape();
                trainer.write(&name, &HostTensor::f32(shape, vec![1.0; shape.numel()])?)?;
            }
        }
        Ok(())
    }

    /// Sets the shifts and scales of a discriminator's [`PatchNorm::Act`] from the first batch, which `inputs` are of (`image`,
    /// and `noise` for KL), in a trainer whose other parameters are set: −mean and 1 / (deviation + 1e-6) of what each norm sees
    /// of the reconstruction, which CompVis code shows the discriminator first. Does nothing with other norms.
    ///
    /// # Errors
    /// When the trainer is of another graph.
    pub fn begin_norms(
        &self,
        trainer: &mut Trainer,
        vae: &Vae,
        inputs: &[(&str, HostTensor)],
        dtype: DType,
    ) -> Result<()> {
        let Some(judge) = self.adversary.as_ref().map(|a| &a.model).filter(|m| m.norm == PatchNorm::Act)
        else {
            return Ok(());
        };
        let mut g = Graph::new();
        let [image, noise] = ["image", "noise"].map(|wanted| {
            let found = inputs.iter().find(|(name, _)| *name == wanted);
            found.map(|(name, value)| g.input(name, DType::F32, value.shape()))
        });
        let image = image.ok_or_else(|| Error::invalid("norms of a discriminator: want an input `image`"))?;
        let picture = reconstruct(&mut g, vae, (image, noise), dtype)?;
        let seen = judge.observe(&mut g, DISCRIMINATOR, picture)?;
        for norm in &seen {
            g.output(&join(&norm.name, "mean"), norm.mean);
            g.output(&join(&norm.name, "var"), norm.var);
        }
        let device = trainer.program().device().clone();
        // Each norm sees what those before it let through.
        for norm in &seen {
            let mut program = Program::new(g.clone(), &trainer.weights("", false, dtype)?, &device)?;
            for (name, value) in inputs {
                if program.has(name) {
                    program.write(name, value)?;
                }
            }
            program.run(&mut ())?;
            let [mean, var] = ["mean", "var"].map(|kind| program.read(&join(&norm.name, kind)));
            let n = norm.rows as f64;
            let loc = mean?.to_f64().into_iter().map(|mean| -mean as f32).collect();
            let scale = var?.to_f64().into_iter().map(|v| (1.0 / ((v * n / (n - 1.0)).sqrt() + 1e-6)) as f32);
            let c = [scale.len()];
            trainer.set(&join(&norm.name, "loc"), &HostTensor::f32(c, loc)?)?;
            trainer.set(&join(&norm.name, "scale"), &HostTensor::f32(c, scale.collect())?)?;
        }
        Ok(())
    }

    /// Before each step: whether the discriminator has a say in it.
    ///
    /// # Errors
    /// When the trainer is of another graph.
    pub fn at_step(&self, trainer: &mut Trainer) -> Result<()> {
        let Some(adversary) = &self.adversary else { return Ok(()) };
        let factor = if trainer.steps() >= adversary.start { adversary.factor } else { 0.0 };
        trainer.write(FACTOR, &HostTensor::f32([1], vec![factor as f32])?)
    }
}

/// What an autoencoder makes of an image (B,H,W,C), for KL with noise (B,h,w,Z).
fn reconstruct(g: &mut Graph, vae: &Vae, (image, noise): (Var, Option<Var>), dtype: DType) -> Result<Var> {
    let x = cast(g, "image", image, dtype, 1.0)?;
    match vae {
        Vae::Kl(model) => {
            let moments = model.encode(g, x)?;
            let noise = noise.ok_or_else(|| Error::invalid("a draw: want an input `noise`"))?;
            let z = g.push("draw", Gaussian { scale: 1.0 }, &[moments, noise])?;
            let z = cast(g, "z", z, dtype, 1.0)?;
            model.decode(g, z)
        }
        Vae::Vq(model) => {
            let z = model.encode(g, x)?;
            model.decode(g, z)
        }
    }
}

fn used(parameters: &[Parameter]) -> Vec<Var> {
    parameters.iter().map(|p| p.used).collect()
}

fn missing(what: &str) -> Error {
    Error::invalid(format!("training a first stage: the loss does not depend on {what}"))
}

impl Adversary {
    /// Both sides, from a forward pass whose parameters are `own` and whose loss without this discriminator is `loss`.
    fn sides(
        &self,
        g: &mut Graph,
        forward: &Forward,
        (own, again): (Vec<Parameter>, &[Range<usize>]),
        loss: Var,
        scale: Var,
    ) -> Result<Vec<Side>> {
        let (count, picture) = (g.parameters().len(), forward.reconstruction);
        let (fake, of_fake) = self.model.train(g, DISCRIMINATOR, picture)?;
        let (real, of_real) = self.model.train(g, DISCRIMINATOR, forward.image)?;
        let theirs = g.parameters()[count..].to_vec();
        NLayerDiscriminator::follow(g, &[of_fake, of_real])?;
        let factor = g.input(FACTOR, DType::F32, [1]);

        // What reaches the picture of likelihood and generator loss, and how hard each pulls at the last layer.
        let judged = g.push("generator", LogitLoss(Criterion::Generator), &[fake])?;
        let to = |g: &mut Graph, y: Var, dy: Var, x: Var| -> Result<Var> {
            gradients(g, &[(y, dy)], &[x], &[])?[0].ok_or_else(|| missing("the picture or the last layer"))
        };
        let pulls = [to(g, forward.likelihood, scale, picture)?, to(g, judged, scale, picture)?];
        let last = own.iter().find(|p| p.name.ends_with(LAST)).ok_or_else(|| missing(LAST))?.used;
        let mut squares = [scale; 2];
        for (square, pull) in squares.iter_mut().zip(pulls) {
            let at_last = to(g, picture, pull, last)?;
            *square = g.push("adaptive_weight.squares", SquareSum { more: false }, &[at_last])?;
        }
        let times = AdaptiveWeight { times: self.weight as f32 };
        let weight = g.push_all("adaptive_weight", times, &[squares[0], squares[1], scale, factor])?;
        let pull = g.push("generator.pull", Scale, &[pulls[1], weight[1]])?;
        let weighted = g.push("generator.weighted", Scale, &[judged, weight[1]])?;
        let total = add(g, "loss", loss, weighted)?;
        let seeds = [(picture, pulls[0]), (picture, pull), (forward.regulariser, scale)];
        let found = gradients(g, &seeds, &used(&own), again)?;

        let (on_real, on_fake) = match self.kind {
            Gan::Hinge => (Criterion::HingeReal, Criterion::HingeFake),
            Gan::Vanilla => (Criterion::VanillaReal, Criterion::VanillaFake),
        };
        let on_real = g.push("discriminator.real", LogitLoss(on_real), &[real])?;
        let on_fake = g.push("discriminator.fake", LogitLoss(on_fake), &[fake])?;
        let sum = add(g, "discriminator.sum", on_real, on_fake)?;
        let half = cast(g, "discriminator.half", sum, DType::F32, 0.5)?;
        let lost = g.push("discriminator.loss", Scale, &[half, factor])?;
        let seed = g.push("discriminator.scale", Scale, &[scale, factor])?;
        let found_theirs = gradients(g, &[(half, seed)], &used(&theirs), &[])?;

        g.output("loss", total);
        g.output("generator", judged);
        g.output("adaptive_weight", weight[0]);
        g.output("discriminator.loss", lost);
        Ok(vec![
            Side { at: "", parameters: own, gradients: found },
            Side { at: "discriminator.", parameters: theirs, gradients: found_theirs },
        ])
    }
}

/// A discriminator before the first step: convolutions normal with deviation 0.02, scales of norms normal about 1 with the same,
/// shifts 0, biases of convolutions as PyTorch starts them. Shapes are those that the engine holds.
///
/// # Errors
/// None that shapes of real weights can have.
pub fn initial_discriminator(parameters: &[(String, Shape)], seed: u64) -> Result<Vec<HostTensor>> {
    let mut all = initial(parameters, |_| false, seed)?;
    let mut random = Generator::new(seed.wrapping_add(1));
    for ((name, shape), value) in parameters.iter().zip(&mut all) {
        if name.ends_with(".weight") {
            let mean = if shape.len() == 1 { 1.0 } else { 0.0 };
            let data = random.randn(shape.numel()).into_iter().map(|v| mean + 0.02 * v).collect();
            *value = HostTensor::f32(*shape, data)?;
        }
    }
    Ok(all)
}
