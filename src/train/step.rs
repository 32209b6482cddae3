//! One step as a graph, and what owns its program.

use crate::error::{Error, Result};
use crate::exec::{Device, Program, Weights};
use crate::graph::{Graph, Layout, Origin, Parameter, Var, gradients};
use crate::ops::{Accumulate, Adam, Clip, RATES, SquareSum};
use crate::tensor::{DType, HostTensor, Shape, Spec};
use std::collections::BTreeSet;
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
    /// The loss is multiplied by a factor that follows the gradients, for models in f16: it is halved, and the step left out,
    /// where they are not finite, and doubled after 2000 steps in which they were (PyTorch `GradScaler`).
    pub loss_scale: bool,
    /// Batches of a step, at least 1: their gradients are added up, and the last one updates by the mean.
    pub accumulate: usize,
}

impl Default for Optimiser {
    /// AdamW as PyTorch has it, gradients clipped to a norm of 1.
    fn default() -> Optimiser {
        Optimiser {
            betas: [0.9, 0.999],
            eps: 1e-8,
            decay: 1e-2,
            coupled: false,
            clip: 1.0,
            average: false,
            loss_scale: false,
            accumulate: 1,
        }
    }
}

/// Inputs of a step beside those of its loss: see [`RATES`], the factor of the loss, that of its gradients, and whether there
/// is a sum of gradients to go on with.
const RATES_INPUT: &str = "train.rates";
const SCALE: &str = "train.scale";
const UNSCALE: &str = "train.unscale";
const MORE: &str = "train.more";

/// Inputs that every update of a graph shares.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    /// The factor of the loss (1).
    pub scale: Var,
    unscale: Var,
    rates: Var,
    /// Where gradients of several batches are added up.
    more: Option<Var>,
}

impl Inputs {
    pub fn new(g: &mut Graph, how: &Optimiser) -> Inputs {
        Inputs {
            scale: g.input(SCALE, DType::F32, [1]),
            unscale: g.input(UNSCALE, DType::F32, [1]),
            rates: g.input(RATES_INPUT, DType::F32, [RATES]),
            more: (how.accumulate > 1).then(|| g.input(MORE, DType::F32, [1])),
        }
    }
}

/// Appends to a graph, whose weights are parameters ([`Graph::train`]) and which computes `loss` (1) f32, the gradients of
/// all parameters and their update. Outputs `loss` and `norm`, that of the gradients. `again` as in [`gradients`].
///
/// # Errors
/// When a node has no gradient, or no parameter is trained.
pub fn update(g: &mut Graph, loss: Var, how: &Optimiser, again: &[Range<usize>]) -> Result<()> {
    let inputs = Inputs::new(g, how);
    let parameters = g.parameters().to_vec();
    let used: Vec<Var> = parameters.iter().map(|p| p.used).collect();
    let mut found = gradients(g, &[(loss, inputs.scale)], &used, again)?;
    accumulate(g, &parameters, &mut found, inputs)?;
    g.output("loss", loss);
    let sum = squares(g, &parameters, &found)?;
    descend(g, "", &parameters, &found, how, inputs, (sum, &[loss]))
}

/// Where a step has several batches, takes for each gradient the state `sum.…` to which it is added.
///
/// # Errors
/// None that gradients of the right shapes can have.
pub(super) fn accumulate(
    g: &mut Graph,
    parameters: &[Parameter],
    found: &mut [Option<Var>],
    inputs: Inputs,
) -> Result<()> {
    let Some(more) = inputs.more else { return Ok(()) };
    for (p, d) in parameters.iter().zip(found) {
        let Some(d) = d else { continue };
        let state = g.state(&format!("sum.{}", p.name), DType::F32, g.shape(p.state));
        *d = g.push(&format!("sum.{}", p.name), Accumulate, &[state, *d, more])?;
        g.update(state, *d);
    }
    Ok(())
}

/// The sum of the squares of all gradients of some parameters (1).
///
/// # Errors
/// When no parameter has a gradient.
pub(super) fn squares(g: &mut Graph, parameters: &[Parameter], found: &[Option<Var>]) -> Result<Var> {
    let mut sum = None;
    for (p, d) in parameters.iter().zip(found) {
        if let Some(d) = *d {
            let x: Vec<Var> = sum.into_iter().chain([d]).collect();
            sum = Some(g.push(&format!("norm.{}", p.name), SquareSum { more: sum.is_some() }, &x)?);
        }
    }
    sum.ok_or_else(|| Error::invalid("training: the loss depends on no parameter"))
}

/// The update of parameters from their gradients, clipped together by the sum of their squares; those without one stay, and all
/// where the sum or one of the guards (at most 2) is not finite. Nothing may read them afterwards. Output `{at}norm`.
///
/// # Errors
/// None that gradients of the right shapes can have.
pub(super) fn descend(
    g: &mut Graph,
    at: &str,
    parameters: &[Parameter],
    found: &[Option<Var>],
    how: &Optimiser,
    Inputs { unscale, rates, .. }: Inputs,
    (sum, guards): (Var, &[Var]),
) -> Result<()> {
    let clip = Clip { most: how.clip, guards: guards.len() };
    let clip = g.push_all(&format!("{at}clip"), clip, &[&[sum, unscale], guards].concat())?;
    let &Optimiser { betas, eps, decay, coupled, average, .. } = how;
    for (p, d) in parameters.iter().zip(found) {
        let Some(d) = *d else { continue };
        let shape = g.shape(p.state);
        let mut states = vec![p.state];
        let kinds: &[&str] = if average { &["m", "v", "ema"] } else { &["m", "v"] };
        states.extend(kinds.iter().map(|kind| g.state(&format!("{kind}.{}", p.name), DType::F32, shape)));
        let x = [&states[..], &[d, rates, clip[0]]].concat();
        let new =
            g.push_all(&format!("adam.{}", p.name), Adam { betas, eps, decay, coupled, average }, &x)?;
        states.into_iter().zip(new).for_each(|(state, new)| g.update(state, new));
    }
    g.output(&format!("{at}norm"), clip[1]);
    Ok(())
}

/// The blocks of a model as ranges of nodes, to be made again in the backward pass in place of being kept: residual blocks,
/// transformers, and layers of a text encoder, by their names in the checkpoint.
pub fn blocks(g: &Graph) -> Vec<Range<usize>> {
    // `down_blocks.0.resnets.1.conv1` belongs to `down_blocks.0.resnets.1`.
    let block = |label: &str| {
        let words: Vec<&str> = label.split('.').collect();
        let kind = |w: &&str| ["resnets", "attentions", "layers"].contains(w);
        let at = words.iter().position(kind)?;
        words.get(at + 1)?.parse::<usize>().ok()?;
        Some(words[..at + 2].join("."))
    };
    // A weight that is computed with in another type is cast where it is first asked for, under its own name, in the midst of a block.
    let cast = |p: &Parameter| match g.values()[p.used.index()].origin {
        Origin::Node(node, _) => Some(node),
        _ => None,
    };
    let casts: BTreeSet<usize> = g.parameters().iter().filter_map(cast).collect();
    let mut found: Vec<(String, Range<usize>)> = vec![];
    for (i, node) in g.nodes().iter().enumerate().filter(|(i, _)| !casts.contains(i)) {
        match (block(&node.label), found.last_mut()) {
            (Some(name), Some((last, range)))
                if *last == name && (range.end..i).all(|n| casts.contains(&n)) =>
            {
                range.end = i + 1
            }
            (Some(name), _) => found.push((name, i..i + 1)),
            (None, _) => {}
        }
    }
    found.into_iter().map(|(_, range)| range).collect()
}

/// What a step found.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Report {
    /// The loss before the update.
    pub loss: f32,
    /// The norm of all gradients before clipping.
    pub norm: f32,
    /// Gradients were not finite under a loss scale: no weight was updated, and the scale is half of what it was.
    pub skipped: bool,
}

/// A parameter that is trained.
#[derive(Clone, PartialEq, Debug)]
struct Trained {
    name: String,
    layout: Layout,
    shape: Shape,
    /// There is an average of it.
    average: bool,
}

impl Trained {
    /// The names of its states.
    fn states(&self) -> impl Iterator<Item = String> {
        let kinds: &[&str] = if self.average { &["", "m.", "v.", "ema."] } else { &["", "m.", "v."] };
        kinds.iter().map(|kind| format!("{kind}{}", self.name))
    }
}

/// Owns a training step: parameters, moments and averages live on the device, by name.
pub struct Trainer {
    program: Program,
    trained: Vec<Trained>,
    /// Updated states that belong to no parameter, such as running statistics.
    others: Vec<String>,
    /// Outputs of one number beside the loss and its norm, and what the last step gave.
    parts: Vec<(String, f64)>,
    how: Optimiser,
    step: usize,
    /// The loss scale, and the steps since it changed.
    scale: (f64, usize),
}

/// The loss scale at the start, and steps after which it is doubled.
const FIRST_SCALE: f64 = 65536.0;
const PATIENCE: usize = 2000;

/// How the names of norms of gradients end: outputs that must be finite, and that only the last batch of a step has.
const NORM: &str = ".norm";

/// The name under which [`Trainer::states`] gives the loss scale and the steps since it changed.
const SCALE_STATE: &str = "loss_scale";

impl Trainer {
    /// From a graph that [`update`] has completed. `frozen` holds the weights that are no parameters. All states are zero.
    ///
    /// # Errors
    /// When a frozen weight is missing, or memory runs out.
    pub fn new(graph: Graph, how: &Optimiser, frozen: &Weights, device: &Device) -> Result<Trainer> {
        let states = graph.updates().iter().map(|(state, _)| *state).collect::<Vec<_>>();
        let parameters = graph.parameters().iter().filter(|p| states.contains(&p.state));
        let named = |state: &Var| graph.values()[state.index()].name.clone();
        let all: BTreeSet<String> = states.iter().map(named).collect();
        let trained: Vec<Trained> = parameters
            .map(|p| Trained {
                name: p.name.clone(),
                layout: p.layout,
                shape: graph.shape(p.state),
                average: all.contains(&format!("ema.{}", p.name)),
            })
            .collect();
        // Sums of gradients are made anew in each step: no checkpoint holds them.
        let sums = trained.iter().map(|p| format!("sum.{}", p.name));
        let owned: BTreeSet<String> = trained.iter().flat_map(Trained::states).chain(sums).collect();
        let others = all.difference(&owned).cloned().collect();
        let parts = graph.outputs().iter().filter(|(name, v)| {
            !["loss", "norm"].contains(&&**name) && graph.spec(*v) == Spec::new(DType::F32, [1])
        });
        let parts = parts.map(|(name, _)| (name.clone(), 0.0)).collect();
        let program = Program::new(graph, frozen, device)?;
        let scale = (if how.loss_scale { FIRST_SCALE } else { 1.0 }, 0);
        Ok(Trainer { program, trained, others, parts, how: how.clone(), step: 0, scale })
    }

    /// Names and shapes of the parameters, as the engine holds them.
    pub fn parameters(&self) -> Vec<(String, Shape)> {
        self.trained.iter().map(|p| (p.name.clone(), p.shape)).collect()
    }

    /// Names of the updated states that belong to no parameter, such as running statistics.
    pub fn others(&self) -> &[String] {
        &self.others
    }

    /// The outputs of one number beside `loss` and `norm`, such as `kl`, and what the last step gave.
    pub fn parts(&self) -> &[(String, f64)] {
        &self.parts
    }

    /// How many steps have been taken.
    pub fn steps(&self) -> usize {
        self.step
    }

    /// The program, for its memory.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Gives up the program, for its timing node by node.
    pub fn into_program(self) -> Program {
        self.program
    }

    /// Sets a parameter, and the average of it.
    ///
    /// # Errors
    /// When there is none of that name and shape.
    pub fn set(&mut self, name: &str, value: &HostTensor) -> Result<()> {
        self.program.write(name, value)?;
        let average = self.trained.iter().any(|p| p.name == name && p.average);
        if average { self.program.write(&format!("ema.{name}"), value) } else { Ok(()) }
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
    /// [`Error::NonFinite`] where the loss is not finite, or without a loss scale the gradients are not: then no weight was
    /// updated. Else from the device.
    pub fn step(&mut self, rate: f64, keep: f64) -> Result<Report> {
        self.step_over(rate, keep, |_, _| Ok(()))
    }

    /// The same where `feed` writes the inputs of each of the step's batches 0, 1, … ([`Optimiser::accumulate`]). The report, and
    /// [`Trainer::parts`], have the means over batches, and the norm of the mean gradient.
    ///
    /// # Errors
    /// As there, and those of `feed`.
    pub fn step_over(
        &mut self,
        rate: f64,
        keep: f64,
        mut feed: impl FnMut(&mut Trainer, usize) -> Result<()>,
    ) -> Result<Report> {
        let t = self.step as i32 + 1;
        let [b1, b2] = self.how.betas.map(|b| 1.0 - f64::from(b).powi(t));
        let one = |v: f64| HostTensor::f32([1], vec![v as f32]);
        self.program
            .write(RATES_INPUT, &HostTensor::f32([RATES], [rate, b1, b2, keep].map(|v| v as f32).into())?)?;
        self.program.write(SCALE, &one(self.scale.0)?)?;
        let n = self.how.accumulate.max(1);
        let (mut loss, mut parts) = (0.0, vec![0.0; self.parts.len()]);
        for batch in 0..n {
            feed(self, batch)?;
            // An infinite factor of the gradients leaves all weights as they are.
            let last = batch + 1 == n;
            self.program
                .write(UNSCALE, &one(if last { 1.0 / (self.scale.0 * n as f64) } else { f64::INFINITY })?)?;
            if n > 1 {
                self.program.write(MORE, &one(if batch > 0 { 1.0 } else { 0.0 })?)?;
            }
            self.program.run(&mut ())?;
            let number = |name: &str| Ok::<f64, Error>(self.program.read(name)?.to_f32()[0].into());
            loss += number("loss")? / n as f64;
            for (sum, (name, _)) in parts.iter_mut().zip(&self.parts) {
                let share = if name.ends_with(NORM) { f64::from(u8::from(last)) } else { 1.0 / n as f64 };
                *sum += if share > 0.0 { share * number(name)? } else { 0.0 };
            }
            if !loss.is_finite() {
                break;
            }
        }
        let norm = self.program.read("norm")?.to_f32()[0];
        let mut report = Report { loss: loss as f32, norm, skipped: false };
        let norms = self.parts.iter().zip(&parts).filter(|((name, _), _)| name.ends_with(NORM));
        let finite = norm.is_finite() && norms.map(|(_, v)| v).all(|v| v.is_finite());
        if self.how.loss_scale && report.loss.is_finite() && !finite && self.scale.0 > 1.0 {
            self.scale = (self.scale.0 / 2.0, 0);
            report.skipped = true;
            return Ok(report);
        }
        if !report.loss.is_finite() || !finite {
            return Err(Error::NonFinite {
                op: "training".into(),
                node: format!("step {}", self.step),
                what: format!(
                    "a loss of {} and gradients of norm {}; the weights are those of the step before",
                    report.loss, report.norm
                ),
            });
        }
        self.parts.iter_mut().zip(parts).for_each(|((_, part), mean)| *part = mean);
        self.step += 1;
        self.scale.1 += 1;
        if self.how.loss_scale && self.scale.1 == PATIENCE {
            self.scale = (2.0 * self.scale.0, 0);
        }
        Ok(report)
    }

    /// All states as a checkpoint holds them: parameters, `m.…`, `v.…`, `ema.…`, [`Trainer::others`], and `loss_scale` where
    /// there is one.
    ///
    /// # Errors
    /// From the device.
    pub fn states(&self) -> Result<Vec<(String, HostTensor)>> {
        let names = self.trained.iter().flat_map(Trained::states).chain(self.others.iter().cloned());
        let mut all: Vec<_> =
            names.map(|name| Ok((name.clone(), self.program.read(&name)?))).collect::<Result<_>>()?;
        if self.how.loss_scale {
            let (scale, steps) = self.scale;
            all.push((SCALE_STATE.into(), HostTensor::f32([2], vec![scale as f32, steps as f32])?));
        }
        Ok(all)
    }

    /// Goes on from states, see [`Trainer::states`], after `step` steps.
    ///
    /// # Errors
    /// When one is missing, or has another shape.
    pub fn resume(&mut self, step: usize, mut find: impl FnMut(&str) -> Result<HostTensor>) -> Result<()> {
        for name in self.trained.iter().flat_map(Trained::states).chain(self.others.iter().cloned()) {
            self.program.write(&name, &find(&name)?)?;
        }
        if self.how.loss_scale {
            let kept = find(SCALE_STATE)?.to_f32();
            let [scale, steps] = kept[..] else {
                return Err(Error::invalid(format!("{SCALE_STATE}: want two numbers; got {}", kept.len())));
            };
            self.scale = (f64::from(scale), steps as usize);
        }
        self.step = step;
        Ok(())
    }

    /// The parameters of a part of the graph ([`Graph::part`]), or their averages where such are kept, as weights of programs that do not train:
    /// without the name of the part, in the type that these compute in.
    ///
    /// # Errors
    /// From the device.
    pub fn weights(&self, part: &str, average: bool, dtype: DType) -> Result<Weights> {
        let device = self.program.device();
        let mut weights = Weights::new(device);
        let prefix = if part.is_empty() { String::new() } else { format!("{part}.") };
        for p in &self.trained {
            let Some(name) = p.name.strip_prefix(&prefix) else { continue };
            let from = if average && p.average { format!("ema.{}", p.name) } else { p.name.clone() };
            weights.insert_as(name, &self.program.read(&from)?.to(dtype), p.layout)?;
        }
        Ok(weights)
    }

    /// The parameters (or their averages, where such are kept) under the names and axes of a checkpoint: convolutions (O,I,KH,KW).
    ///
    /// # Errors
    /// From the device.
    pub fn export(&self, average: bool) -> Result<Vec<(String, HostTensor)>> {
        let read = |p: &Trained| {
            let name = if average && p.average { format!("ema.{}", p.name) } else { p.name.clone() };
            let value = self.program.read(&name)?;
            let value = if p.layout == Layout::Conv { value.permute(&[0, 3, 1, 2])? } else { value };
            Ok((p.name.clone(), value))
        };
        self.trained.iter().map(read).collect()
    }
}
