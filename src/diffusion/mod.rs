//! A sampler joined to a model: one graph per evaluation, from the state through the UNet and guidance to the next
//! state; a table on the device says what each evaluation does.

use crate::error::{Error, Result};
use crate::exec::timing::Mark;
use crate::exec::{CheckFinite, Device, Hook, Program, Weights};
use crate::graph::Graph;
use crate::models::UNet2DCondition;
use crate::ops::{Advance, Blend, Concat, Prepare, TABLE, cast};
use crate::samplers::{Ladder, Method, Point, Row, Table};
use crate::tensor::{DType, HostTensor, Spec};

/// What a sampling run is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Images B.
    pub batch: usize,
    /// Height and width of the latents.
    pub size: [usize; 2],
    /// Context tokens S.
    pub tokens: usize,
    /// Guidance scale; above 1 the unconditional half runs too.
    pub guidance: f64,
    /// After each step, what is known of a picture takes its place again: [`Sampling::set_known`].
    pub known: bool,
    /// Type of weights and activations.
    pub dtype: DType,
}

impl Settings {
    /// Rows per image: 2 with guidance, else 1 (as diffusers decides it).
    pub fn copies(&self) -> usize {
        1 + (self.guidance > 1.0) as usize
    }
}

/// Evaluations between two looks at the device's word on whether all values were finite. Each look lets a GPU idle for a
/// moment.
const LOOK: usize = 8;

/// A sampling run: a program for its evaluations, and where it stands.
///
/// A GPU is always given the next evaluation before the last one is over. So what [`Sampling::step`] has asked for may be
/// unfinished, by one evaluation, and a value that is not finite is an error up to 8 evaluations later, but before anything
/// can be read.
pub struct Sampling {
    program: Program,
    table: Table,
    settings: Settings,
    channels: usize,
    done: usize,
    /// Evaluations known to be over.
    finished: usize,
    /// Evaluations known to have been finite.
    looked: usize,
    /// After the last evaluation.
    mark: Option<Mark>,
    /// An evaluation went wrong: the states are not to be used any more.
    broken: bool,
}

/// The graph of one evaluation, and the table that it follows.
///
/// # Errors
/// When the sizes do not fit the model.
pub fn evaluation_graph(unet: &UNet2DCondition, table: &Table, s: &Settings) -> Result<Graph> {
    let mut g = Graph::new();
    let (copies, [h, w]) = (s.copies(), s.size);
    let latents = [s.batch, h, w, unet.out_channels];
    let stack = |n: usize| [n, latents[0], h, w, latents[3]];
    let slots = g.state("slots", DType::F32, stack(table.slots));
    let counter = g.state("counter", DType::I32, [4]);
    let rows = g.input("table", DType::F32, [table.rows.len(), TABLE]);
    let noise = g.input("noise", DType::F32, stack(table.noises.max(1)));
    let context = match unet.context {
        0 => None,
        width => {
            let context = g.input("context", DType::F32, [copies * s.batch, s.tokens, width]);
            Some(cast(&mut g, "context", context, s.dtype, 1.0)?)
        }
    };

    let y = g.push_all("prepare", Prepare { copies, dtype: s.dtype }, &[slots, rows, counter])?;
    let (mut x, counter_now) = (y[0], y[1]);
    // The embeddings of all timesteps depend on nothing that changes: they are computed once, and the counter picks a row.
    let t = g.input("timesteps", DType::F32, [table.rows.len()]);
    let extra = unet.in_channels.checked_sub(unet.out_channels).ok_or_else(|| {
        Error::invalid(format!("unet: {} channels in, {} out", unet.in_channels, unet.out_channels))
    })?;
    if extra > 0 {
        let condition = g.input("condition", DType::F32, [copies * s.batch, h, w, extra]);
        let condition = cast(&mut g, "condition", condition, s.dtype, 1.0)?;
        x = g.push("condition.concat", Concat, &[x, condition])?;
    }
    let m = unet.body(&mut g, x, (t, Some(counter_now)), context)?;
    let y = g.push_all("advance", Advance { copies }, &[slots, m, rows, counter_now, noise])?;
    let (mut next, counter_now) = (y[0], y[1]);
    if s.known {
        let mask = g.input("mask", DType::F32, [s.batch, h, w, 1]);
        let [clean, hidden] = ["clean", "hidden"].map(|name| g.input(name, DType::F32, latents));
        next = g.push("blend", Blend, &[next, rows, counter_now, mask, clean, hidden])?;
    }
    g.update(slots, next);
    g.update(counter, counter_now);
    g.output("guided", y[2]);
    Ok(g)
}

/// A row as the device reads it. `next` is where the next evaluation is; after the last one, the latents are clean.
fn packed(row: &Row, next: Option<&Point>, guidance: f64) -> [f32; TABLE] {
    let mut y = [0.0; TABLE];
    y[..8].copy_from_slice(&[row.timestep, row.scale_in, row.dx, row.dm, row.clip, row.cm, row.cd, row.cz]);
    y[8..16].copy_from_slice(&row.c);
    let slots = [row.x_slot, row.next_slot, row.keep_m, row.keep_d, row.noise];
    y[16..21].iter_mut().zip(slots).for_each(|(y, slot)| *y = slot as f32);
    y[21] = guidance as f32;
    (y[22], y[23]) = next.map_or((1.0, 0.0), |at| (at.alpha as f32, at.sigma as f32));
    y
}

impl Sampling {
    /// Prepares a run of `method` along `ladder`.
    ///
    /// # Errors
    /// When the sizes do not fit the model, or memory runs out.
    pub fn new(
        unet: &UNet2DCondition,
        weights: &Weights,
        device: &Device,
        (method, ladder): (Method, &Ladder),
        settings: Settings,
    ) -> Result<Sampling> {
        let table = method.table(ladder)?;
        let graph = evaluation_graph(unet, &table, &settings)?;
        let mut program = Program::new(graph, weights, device)?;
        let next = ladder.steps.iter().skip(1).map(|step| Some(&step.at)).chain([None]);
        let rows = table.rows.iter().zip(next).flat_map(|(row, next)| packed(row, next, settings.guidance));
        let rows: Vec<f32> = rows.collect();
        program.write("table", &HostTensor::f32([table.rows.len(), TABLE], rows)?)?;
        let timesteps = table.rows.iter().map(|r| r.timestep).collect();
        program.write("timesteps", &HostTensor::f32([table.rows.len()], timesteps)?)?;
        program.write("noise", &HostTensor::zeros(program.spec("noise")?))?;
        let channels = unet.out_channels;
        let (done, finished, looked, mark, broken) = (0, 0, 0, None, false);
        Ok(Sampling { program, table, settings, channels, done, finished, looked, mark, broken })
    }

    /// Axes of the latents, (B,H,W,C).
    pub fn latents(&self) -> [usize; 4] {
        [self.settings.batch, self.settings.size[0], self.settings.size[1], self.channels]
    }

    /// Fresh noises that the run needs beside the initial one.
    pub fn noises(&self) -> usize {
        self.table.noises
    }

    /// What unit noise is multiplied with to become the first state.
    pub fn noise_scale(&self) -> f64 {
        self.table.noise_scale
    }

    /// Evaluations of the model.
    pub fn evaluations(&self) -> usize {
        self.table.rows.len()
    }

    /// Timestep of an evaluation.
    pub fn timestep(&self, k: usize) -> f32 {
        self.table.rows[k].timestep
    }

    /// The program, to inspect.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// The context (copies·B,S,E) f32, unconditional half first.
    ///
    /// # Errors
    /// When the axes differ; and as [`Sampling::step`].
    pub fn set_context(&mut self, context: &HostTensor) -> Result<()> {
        self.settle()?;
        self.program.write("context", context)
    }

    /// Channels beside the latents (copies·B,H,W,X) f32: mask and masked image of an inpainting model.
    ///
    /// # Errors
    /// When the model has none, or the axes differ; and as [`Sampling::step`].
    pub fn set_condition(&mut self, condition: &HostTensor) -> Result<()> {
        self.settle()?;
        self.program.write("condition", condition)
    }

    /// What is known of the pictures, for a run with [`Settings::known`]: `mask` (B,H,W,1), 1 where nothing is, the latents
    /// `clean` (B,H,W,C), and the unit noise `hidden` (B,H,W,C) that hides them until the last step, f32.
    ///
    /// # Errors
    /// When the run has no such inputs, or the axes differ; and as [`Sampling::step`].
    pub fn set_known(&mut self, mask: &HostTensor, clean: &HostTensor, hidden: &HostTensor) -> Result<()> {
        self.settle()?;
        [("mask", mask), ("clean", clean), ("hidden", hidden)]
            .into_iter()
            .try_for_each(|(name, x)| self.program.write(name, x))
    }

    /// The noises (Z,B,H,W,C) f32, Z = max(1, [`Sampling::noises`]).
    ///
    /// # Errors
    /// When the axes differ; and as [`Sampling::step`].
    pub fn set_noise(&mut self, noise: &HostTensor) -> Result<()> {
        self.settle()?;
        self.program.write("noise", noise)
    }

    /// Starts from a state (B,H,W,C) f32, already scaled.
    ///
    /// # Errors
    /// When the axes differ.
    pub fn start(&mut self, x: &HostTensor) -> Result<()> {
        let want = Spec::new(DType::F32, self.latents());
        if x.spec() != want {
            return Err(Error::invalid(format!("initial latents: want {want}; got {}", x.spec())));
        }
        let n = want.shape.numel();
        let mut slots = vec![0.0; n * self.table.slots];
        slots[self.table.first_slot * n..][..n].copy_from_slice(&x.to_f32());
        let [b, h, w, c] = self.latents();
        self.program.write("slots", &HostTensor::f32([self.table.slots, b, h, w, c], slots)?)?;
        self.program.write("counter", &HostTensor::i32([4], vec![0; 4])?)?;
        (self.done, self.finished, self.looked, self.mark) = (0, 0, 0, None);
        self.broken = false;
        Ok(())
    }

    /// Runs the next evaluation, on a GPU until the one before is over; `false` when there is none left.
    ///
    /// # Errors
    /// From the device; [`Error::NonFinite`] naming the first node whose result was not finite, on a GPU perhaps some
    /// evaluations ago.
    pub fn step(&mut self) -> Result<bool> {
        self.step_with(&mut ())
    }

    /// [`Sampling::step`], watched by a hook.
    ///
    /// # Errors
    /// As there, and from the hook.
    pub fn step_with(&mut self, hook: &mut impl Hook) -> Result<bool> {
        if self.done == self.table.rows.len() {
            return Ok(false);
        }
        self.unbroken()?;
        self.broken = true;
        self.program.run(hook)?;
        self.done += 1;
        let mark = Mark::now(self.program.device())?;
        if let Some(last) = self.mark.replace(mark) {
            last.wait()?;
        }
        self.finished = self.done - 1;
        self.broken = false;
        let at_once = matches!(self.program.device(), Device::Cpu);
        if at_once || self.done == self.table.rows.len() || self.done - self.looked >= LOOK {
            self.wait()?;
        }
        Ok(self.done < self.table.rows.len())
    }

    fn unbroken(&self) -> Result<()> {
        if self.broken { Err(Error::invalid("sampling: an evaluation failed; start again")) } else { Ok(()) }
    }

    /// Before an input changes: an evaluation that went wrong is repeated with what it had.
    fn settle(&mut self) -> Result<()> {
        if self.broken { Ok(()) } else { self.wait() }
    }

    /// Waits for all evaluations that were asked for.
    ///
    /// # Errors
    /// As [`Sampling::step`].
    pub fn wait(&mut self) -> Result<()> {
        self.unbroken()?;
        if self.looked == self.done {
            return Ok(());
        }
        self.broken = true;
        let mut counter = [0; 3];
        self.program.read_i32("counter", &mut counter)?;
        if counter[2] != 0 {
            // Nothing has changed since that row, and a row never writes a slot that it reads: so its evaluation can be
            // repeated, with a check after each node.
            let k = counter[2] - 1;
            self.program.write("counter", &HostTensor::i32([4], vec![k, k, 0, 0])?)?;
            self.program.unsettle();
            let at = format!("evaluation {} of {}", k + 1, self.table.rows.len());
            self.program.run(&mut CheckFinite).map_err(|e| match e {
                Error::NonFinite { op, node, what } => {
                    Error::NonFinite { op, node, what: format!("{what} in {at}") }
                }
                other => other,
            })?;
            let what = format!("a value that was not finite in {at} and is when repeated");
            return Err(Error::NonFinite { op: "unet".into(), node: String::new(), what });
        }
        (self.finished, self.looked, self.broken) = (self.done, self.done, false);
        Ok(())
    }

    /// Evaluations that were asked for.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Evaluations that are known to be over: on a GPU one less than were asked for, but at the end.
    pub fn finished(&self) -> usize {
        self.finished
    }

    /// The model's prediction after guidance at the last evaluation, (B,H,W,C) f32.
    ///
    /// # Errors
    /// As [`Sampling::step`].
    pub fn guided(&mut self) -> Result<HostTensor> {
        self.wait()?;
        self.program.read("guided")
    }

    /// The state after the last evaluation, (B,H,W,C) f32, in the sampler's own scale.
    ///
    /// # Errors
    /// As [`Sampling::step`].
    pub fn state(&mut self) -> Result<HostTensor> {
        self.wait()?;
        // The state between two evaluations is what the next one reads.
        let slot = self.table.rows.get(self.done).map_or(self.table.last_slot, |next| next.x_slot as usize);
        let slots = self.program.read("slots")?.to_f32();
        let n = slots.len() / self.table.slots;
        HostTensor::f32(self.latents(), slots[slot * n..][..n].to_vec())
    }
}
