//! One step as a graph, and what owns its program.

use crate::error::{Error, Result};
use crate::exec::{Device, Program, Weights};
use crate::graph::{Graph, Layout, Var, gradients};
use crate::ops::{Adam, Clip, RATES, SquareSum};
use crate::tensor::{DType, HostTensor, Shape};
use std::ops::Range;

/// How weights follow their gradients.
#[derive(Clone, PartialEq, Debug)]
pub struct Optimiser {
    /// β₁ and β₂.
    pub betas: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Weight decay.
    pub decay: f32,
    /// Decay is added to the gradient, as Adam has it; otherwise taken from the weight (AdamW).
    pub coupled: bool,
    /// The largest norm of all gradients together; 0 for none.
    pub clip: f32,
    /// An average of the weights is kept.
    pub average: bool,
}

impl Default for Optimiser {
    /// AdamW as PyTorch has it, gradients clipped to a norm of 1.
    fn default() -> Optimiser {
        Optimiser { betas: [0.9, 0.999], eps: 1e-8, decay: 1e-2, coupled: false, clip: 1.0, average: false }
    }
}

/// Inputs of a step beside those of its loss: see [`RATES`], the factor of the loss, and its reciprocal.
const RATES_INPUT: &str = "train.rates";
const SCALE: &str = "train.scale";
const UNSCALE: &str = "train.unscale";

/// Appends to a graph, whose weights are parameters ([`Graph::train`]) and which computes `loss` (1) f32, the gradients of
/// all parameters and their update. Outputs `loss` and `norm`, that of the gradients. `again` as in [`gradients`].
///
/// # Errors
/// When a node has no gradient, or no parameter is trained.
pub fn update(g: &mut Graph, loss: Var, how: &Optimiser, again: &[Range<usize>]) -> Result<()> {
    let scale = g.input(SCALE, DType::F32, [1]);
    let unscale = g.input(UNSCALE, DType::F32, [1]);
    let rates = g.input(RATES_INPUT, DType::F32, [RATES]);
    let parameters = g.parameters().to_vec();
    let used: Vec<Var> = parameters.iter().map(|p| p.used).collect();
    let found = gradients(g, &[(loss, scale)], &used, again)?;
    let mut sum = None;
    for (p, d) in parameters.iter().zip(&found) {
        if let Some(d) = *d {
            let x: Vec<Var> = sum.into_iter().chain([d]).collect();
            sum = Some(g.push(&format!("norm.{}", p.name), SquareSum { more: sum.is_some() }, &x)?);
        }
    }
    let sum = sum.ok_or_else(|| Error::invalid("training: the loss depends on no parameter"))?;
    let clip = g.push_all("clip", Clip { most: how.clip }, &[sum, unscale])?;
    let &Optimiser { betas, eps, decay, coupled, average, .. } = how;
    for (p, d) in parameters.iter().zip(found) {
        let Some(d) = d else { continue };
        let shape = g.shape(p.state);
        let mut states = vec![p.state];
        let kinds: &[&str] = if average { &["m", "v", "ema"] } else { &["m", "v"] };
        states.extend(kinds.iter().map(|kind| g.state(&format!("{kind}.{}", p.name), DType::F32, shape)));
        let x = [&states[..], &[d, rates, clip[0]]].concat();
        let new =
            g.push_all(&format!("adam.{}", p.name), Adam { betas, eps, decay, coupled, average }, &x)?;
        states.into_iter().zip(new).for_each(|(state, new)| g.update(state, new));
    }
    g.output("loss", loss);
    g.output("norm", clip[1]);
    Ok(())
}

/// What a step found.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Report {
    /// The loss before the update.
    pub loss: f32,
    /// The norm of all gradients before clipping.
    pub norm: f32,
}

/// A parameter that is trained.
#[derive(Clone, PartialEq, Debug)]
struct Trained {
    name: String,
    layout: Layout,
    shape: Shape,
}

/// Owns a training step: parameters, moments and averages live on the device, by name.
pub struct Trainer {
    program: Program,
    trained: Vec<Trained>,
    how: Optimiser,
    step: usize,
}

impl Trainer {
    /// From a graph that [`update`] has completed. `frozen` holds the weights that are no parameters. All states are zero.
    ///
    /// # Errors
    /// When a frozen weight is missing, or memory runs out.
    pub fn new(graph: Graph, how: &Optimiser, frozen: &Weights, device: &Device) -> Result<Trainer> {
        let states = graph.updates().iter().map(|(state, _)| *state).collect::<Vec<_>>();
        let parameters = graph.parameters().iter().filter(|p| states.contains(&p.state));
        let trained = parameters
            .map(|p| Trained { name: p.name.clone(), layout: p.layout, shape: graph.shape(p.state) })
            .collect();
        let program = Program::new(graph, frozen, device)?;
        Ok(Trainer { program, trained, how: how.clone(), step: 0 })
    }

    /// Names and shapes of the parameters, as the engine holds them.
    pub fn parameters(&self) -> Vec<(String, Shape)> {
        self.trained.iter().map(|p| (p.name.clone(), p.shape)).collect()
    }

    /// How many steps have been taken.
    pub fn steps(&self) -> usize {
        self.step
    }

    /// The program, for its memory.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Sets a parameter, and the average of it.
    ///
    /// # Errors
    /// When there is none of that name and shape.
    pub fn set(&mut self, name: &str, value: &HostTensor) -> Result<()> {
        self.program.write(name, value)?;
        if self.how.average { self.program.write(&format!("ema.{name}"), value) } else { Ok(()) }
    }

    /// Writes an input of the loss.
    ///
    /// # Errors
    /// When there is none of that name and shape.
    pub fn write(&mut self, name: &str, value: &HostTensor) -> Result<()> {
        self.program.write(name, value)
    }

    /// Reads an output, a parameter or a state.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        self.program.read(name)
    }

    /// Takes a step with a learning rate; the average keeps `keep` of itself.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where loss or gradients are not finite: then nothing was updated. Else from the device.
    pub fn step(&mut self, rate: f64, keep: f64) -> Result<Report> {
        let t = self.step as i32 + 1;
        let [b1, b2] = self.how.betas.map(|b| 1.0 - f64::from(b).powi(t));
        let one = |v: f64| HostTensor::f32([1], vec![v as f32]);
        self.program
            .write(RATES_INPUT, &HostTensor::f32([RATES], [rate, b1, b2, keep].map(|v| v as f32).into())?)?;
        self.program.write(SCALE, &one(1.0)?)?;
        self.program.write(UNSCALE, &one(1.0)?)?;
        self.program.run(&mut ())?;
        let [loss, norm] = ["loss", "norm"].map(|name| self.program.read(name));
        let report = Report { loss: loss?.to_f32()[0], norm: norm?.to_f32()[0] };
        if !report.loss.is_finite() || !report.norm.is_finite() {
            return Err(Error::NonFinite {
                op: "training".into(),
                node: format!("step {}", self.step),
                what: format!(
                    "a loss of {} and gradients of norm {}; the weights are those of the step before",
                    report.loss, report.norm
                ),
            });
        }
        self.step += 1;
        Ok(report)
    }

    /// All states as a checkpoint holds them: parameters, `m.…`, `v.…`, `ema.…`.
    ///
    /// # Errors
    /// From the device.
    pub fn states(&self) -> Result<Vec<(String, HostTensor)>> {
        let kinds: &[&str] = if self.how.average { &["", "m.", "v.", "ema."] } else { &["", "m.", "v."] };
        let names =
            self.trained.iter().flat_map(|p| kinds.iter().map(move |kind| format!("{kind}{}", p.name)));
        names.map(|name| Ok((name.clone(), self.program.read(&name)?))).collect()
    }

    /// Goes on from states, see [`Trainer::states`], after `step` steps.
    ///
    /// # Errors
    /// When one is missing, or has another shape.
    pub fn resume(&mut self, step: usize, mut find: impl FnMut(&str) -> Result<HostTensor>) -> Result<()> {
        let kinds: &[&str] = if self.how.average { &["", "m.", "v.", "ema."] } else { &["", "m.", "v."] };
        for p in self.trained.clone() {
            for kind in kinds {
                let name = format!("{kind}{}", p.name);
                let value = find(&name)?;
                self.program.write(&name, &value)?;
            }
        }
        self.step = step;
        Ok(())
    }

    /// The parameters of a part of the graph ([`Graph::part`]), or their averages, as weights of programs that do not train:
    /// without the name of the part, in the type that these compute in.
    ///
    /// # Errors
    /// From the device; or when averages are asked for, and none are kept.
    pub fn weights(&self, part: &str, average: bool, dtype: DType) -> Result<Weights> {
        let device = self.program.device();
        let mut weights = Weights::new(device);
        let prefix = if part.is_empty() { String::new() } else { format!("{part}.") };
        for p in &self.trained {
            let Some(name) = p.name.strip_prefix(&prefix) else { continue };
            let from = if average { format!("ema.{}", p.name) } else { p.name.clone() };
            weights.insert_as(name, &self.program.read(&from)?.to(dtype), p.layout)?;
        }
        Ok(weights)
    }

    /// The parameters (or their averages) under the names and axes of a checkpoint: convolutions (O,I,KH,KW).
    ///
    /// # Errors
    /// From the device; or when averages are asked for, and none are kept.
    pub fn export(&self, average: bool) -> Result<Vec<(String, HostTensor)>> {
        let read = |p: &Trained| {
            let name = if average { format!("ema.{}", p.name) } else { p.name.clone() };
            let value = self.program.read(&name)?;
            let value = if p.layout == Layout::Conv { value.permute(&[0, 3, 1, 2])? } else { value };
            Ok((p.name.clone(), value))
        };
        self.trained.iter().map(read).collect()
    }
}
